"""The maps: of each part, and of which chapter needs which: ``python book/maps.py``.

What chapters need is read from their line *Prerequisites*; only the places on the map and the few
words in a box are given here.
"""

import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "book" / "_static"
BLACK, BLUE, ORANGE, GREEN, GREY = "#000000", "#0072B2", "#D55E00", "#009E73", "#555"
FONT = "DejaVu Sans, Helvetica, Arial, sans-serif"
LINE, FIRST = 17, 25.5  # between lines of text, and from the top of a box to the first

# x, y, width, height, colour, lines
Box = tuple[float, float, float, float, str, list[str]]
# x and y of where it begins and ends
Arrow = tuple[float, float, float, float]


def svg(title: str, size: tuple[int, int], boxes: list[Box], arrows: list[Arrow]) -> str:
    """A drawing of boxes and arrows."""
    width, height = size
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'font-family="{FONT}">\n<title>{title}</title>\n'
        '<defs><marker id="a" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0L10 5L0 10z" fill="#555"/></marker></defs>\n'
        f'<rect width="{width}" height="{height}" fill="#fff"/>\n'
    )
    return head + "".join(map(arrow, arrows)) + "".join(map(box, boxes)) + "</svg>\n"


def arrow(points: Arrow) -> str:
    """A line that ends in a head."""
    x, y, to_x, to_y = points
    return (
        f'<path d="M{x:g} {y:g}L{to_x:g} {to_y:g}" stroke="{GREY}" stroke-width="1.5" '
        'fill="none" marker-end="url(#a)"/>\n'
    )


def box(found: Box) -> str:
    """A box with a bold line and others."""
    x, y, width, height, color, lines = found
    parts = [
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="#fff" '
        f'stroke="{color}" stroke-width="2"/>\n'
    ]
    for i, words in enumerate(lines):
        weight = "" if i else 'font-weight="bold"'
        place = f'x="{x + width / 2:.1f}" y="{y + FIRST + i * LINE}"'
        parts.append(f'<text {place} text-anchor="middle" font-size="13" {weight}>{words}</text>\n')
    return "".join(parts)


DOWN = (210, 68, 210, 102)
SPLIT = [(165, 162, 115, 196), (255, 162, 305, 196)]
JOIN = [(115, 256, 165, 290), (305, 256, 255, 290)]
PARTS: dict[str, tuple[str, tuple[int, int], list[Box], list[Arrow]]] = {
    "map-part1": (
        "Map of Part I",
        (420, 360),
        [
            (90, 10, 240, 58, BLACK, ["1  Why compress", "a dense W costs bytes read"]),
            (10, 104, 190, 58, BLUE, ["2  Pattern", "how many, in which group"]),
            (220, 104, 190, 58, BLUE, ["3  Score", "|W|, Wanda, SparseGPT"]),
            (110, 198, 200, 58, BLUE, ["mask P, sparse S", "what is kept"]),
            (110, 292, 200, 58, ORANGE, ["residual W − S", "to Part II"]),
        ],
        [
            (160, 68, 115, 102),
            (260, 68, 305, 102),
            (105, 162, 165, 196),
            (315, 162, 255, 196),
            (210, 256, 210, 290),
        ],
    ),
    "map-part2": (
        "Map of Part II",
        (420, 454),
        [
            (100, 10, 220, 58, ORANGE, ["4  Residual W − S", "its spectrum; one-shot SVD"]),
            (100, 104, 220, 58, GREEN, ["5  Refinement", "S may move: complete W"]),
            (10, 198, 190, 58, GREEN, ["6  Converges?", "to what, how fast"]),
            (220, 198, 190, 58, GREEN, ["7  Fast", "one step, not an SVD"]),
            (100, 292, 220, 58, GREEN, ["8  Activations", "weigh errors by the inputs"]),
            (100, 386, 220, 58, BLACK, ["9  To the model", "drift, and what undoes it"]),
        ],
        [DOWN, *SPLIT, *JOIN, (210, 350, 210, 384)],
    ),
    "map-part3": (
        "Map of Part III",
        (420, 454),
        [
            (90, 10, 240, 58, BLACK, ["Parts I and II", "pruners, repairs, one matrix"]),
            (90, 104, 240, 58, BLUE, ["10  A whole model", "stream, stop, resume"]),
            (90, 198, 240, 58, GREEN, ["11  The table", "which orders hold, and where"]),
            (10, 292, 190, 58, GREEN, ["12  LLaMA-7B", "published and derived"]),
            (220, 292, 190, 58, ORANGE, ["13  Beyond perplexity", "what else is lost"]),
            (90, 386, 240, 58, BLACK, ["a number and its protocol", "what others can repeat"]),
        ],
        [
            DOWN,
            (210, 162, 210, 196),
            (165, 256, 115, 290),
            (255, 256, 305, 290),
            (115, 350, 165, 384),
            (305, 350, 255, 384),
        ],
    ),
    "map-part4": (
        "Map of Part IV",
        (420, 330),
        [
            (90, 10, 240, 58, BLACK, ["Parts I to III", "one matrix, one pass, one rank"]),
            (8, 123, 126, 76, ORANGE, ["14  LoSparse", "rows go while", "it is trained"]),
            (147, 123, 126, 76, BLUE, ["15  CAP", "ranks and entries", "share a budget"]),
            (286, 123, 126, 76, GREEN, ["16  Induction", "rescaled before", "it is pruned"]),
            (90, 260, 240, 58, BLACK, ["S + B A", "the same form, found otherwise"]),
        ],
        [
            (126.6, 68, 71, 121),
            (71, 199, 126.6, 258),
            (210, 68, 210, 121),
            (210, 199, 210, 258),
            (293.4, 68, 349, 121),
            (349, 199, 293.4, 258),
        ],
    ),
    "map-part5": (
        "Map of Part V",
        (420, 360),
        [
            (90, 10, 240, 58, BLACK, ["S + B A, in a file", "values, bits, factors"]),
            (90, 104, 240, 58, GREEN, ["17  Running it", "a bound from bytes and operations"]),
            (10, 198, 190, 58, BLUE, ["a CPU", "any mask, row by row"]),
            (220, 198, 190, 58, BLUE, ["a GPU", "2:4, as its units want it"]),
            (90, 292, 240, 58, BLACK, ["tokens a second", "at most, and as measured"]),
        ],
        [DOWN, *SPLIT, *JOIN],
    ),
    "map-part6": (
        "Map of Part VI",
        (420, 360),
        [
            (10, 10, 190, 58, BLUE, ["a mask", "half of the weights, wide"]),
            (220, 10, 190, 58, ORANGE, ["a grid", "all weights, few bits"]),
            (90, 104, 240, 58, GREEN, ["18  One alternation", "S in a set, B A beside it"]),
            (90, 198, 240, 58, GREEN, ["19  The league", "every method, by bits a weight"]),
            (90, 292, 240, 58, BLACK, ["which command", "for a machine and a purpose"]),
        ],
        [
            (115, 68, 165, 102),
            (305, 68, 255, 102),
            (210, 162, 210, 196),
            (210, 256, 210, 290),
        ],
    ),
}

# Column and row of each chapter, its colour and its name on the map.
CHAPTERS: dict[int, tuple[float, int, str, str]] = {
    1: (2, 0, BLACK, "Why compress"),
    2: (2, 1, BLUE, "Masks"),
    3: (0.5, 2, BLUE, "Pruners"),
    4: (2.5, 2, ORANGE, "Residual"),
    5: (2.5, 3, GREEN, "Refinement"),
    14: (4, 3, ORANGE, "LoSparse"),
    8: (0, 4, GREEN, "Activations"),
    10: (1, 4, BLUE, "Streaming"),
    6: (2, 4, GREEN, "Converges?"),
    7: (3, 4, GREEN, "Fast"),
    17: (4, 4, BLACK, "Running it"),
    13: (0, 5, ORANGE, "Measures"),
    9: (1, 5, GREEN, "To the model"),
    18: (2, 5, GREEN, "Few bits"),
    16: (3, 5, GREEN, "Induction"),
    15: (4, 5, ORANGE, "CAP"),
    11: (0.5, 6, BLUE, "The table"),
    19: (1.75, 6, BLACK, "The league"),
    12: (0.5, 7, BLUE, "LLaMA-7B"),
}
WIDE, HIGH, ACROSS, BELOW, EDGE = 138, 40, 150, 84, 12


def needs() -> dict[int, list[int]]:
    """The chapters that each chapter names in its line *Prerequisites*."""
    found = {}
    for file in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        first = nbformat.read(file, as_version=4).cells[0].source
        line = re.search(r"\*Prerequisites:\*(.*?)\*Time:\*", first, re.S)
        assert line, f"{file.name} does not say what it needs"
        wanted = line[1].split(";")[0]  # what only helps comes after
        found[int(file.stem[:2])] = sorted(int(n) for n in re.findall(r"\]\((\d\d)_", wanted))
    return found


def direct(wanted: dict[int, list[int]]) -> dict[int, list[int]]:
    """Without the chapters that another needed chapter needs already."""

    def all_of(chapter: int) -> set[int]:
        return {chapter}.union(*(all_of(other) for other in wanted[chapter]))

    return {
        chapter: [n for n in found if not any(n in all_of(m) for m in found if m != n)]
        for chapter, found in wanted.items()
    }


def chapters() -> str:
    """The map of the whole book."""
    boxes: list[Box] = []
    arrows: list[Arrow] = []
    wanted = direct(needs())
    for number, (column, row, color, name) in CHAPTERS.items():
        x, y = EDGE + column * ACROSS, EDGE + row * BELOW
        boxes.append((x, y, WIDE, HIGH, color, [f"{number}  {name}"]))
        for other in wanted[number]:
            above, over, *_ = CHAPTERS[other]
            lean = max(-1, min(1, column - above)) * WIDE / 4  # leave and arrive on that side
            start = EDGE + above * ACROSS + WIDE / 2 + lean, EDGE + over * BELOW + HIGH
            arrows.append((*start, x + WIDE / 2 - lean, y - 2))
    size = (2 * EDGE + 4 * ACROSS + WIDE, 2 * EDGE + 7 * BELOW + HIGH)
    return svg("Which chapter needs which", size, boxes, arrows)


def drawn() -> dict[str, str]:
    """Every map by the name of its file."""
    return {name: svg(*map_) for name, map_ in PARTS.items()} | {"map-chapters": chapters()}


if __name__ == "__main__":
    for name, text in drawn().items():
        (FOLDER / f"{name}.svg").write_text(text, encoding="utf-8")
