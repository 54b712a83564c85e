"""Drawings: the same bytes in the chapters as in the code, letters that fit and can be read."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath

from slr.chapters.drawings import DRAWINGS, drawn, pen, show

ROOT = Path(__file__).parent.parent
CHAPTERS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = {"s-plus-ba"}  # files of the book, beside those that cells draw
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(params=DRAWINGS)
def drawing(request):
    return request.param


def in_chapters():
    """(chapter, name, cell) of each cell that shows a drawing."""
    for path in CHAPTERS:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            said = re.search(r'\bshow\("([\w-]+)"\)', "".join(cell["source"]))
            if cell["cell_type"] == "code" and said and "chapters.drawings" in str(cell["source"]):
                yield path.stem, said[1], cell


def test_every_chapter_has_one_and_each_is_somewhere_once():
    found = [(stem, name) for stem, name, _ in in_chapters()]
    assert {stem for stem, _ in found} == {path.stem for path in CHAPTERS}
    assert sorted(name for _, name in found) == sorted(set(DRAWINGS) - PAGES)


def test_chapters_hold_what_the_code_draws():
    for stem, name, cell in in_chapters():
        (output,) = cell["outputs"]
        assert "".join(output["data"]["image/svg+xml"]) == show(name).data, (stem, name)
        assert cell["metadata"]["tags"] == ["remove-input"]


def test_pages_have_what_the_code_draws():
    for name in PAGES:
        file = ROOT / "book" / "_static" / f"{name}.svg"
        assert file.read_text(encoding="utf-8") == drawn(name), f"{file}: see the end of this test"
    # python -c 'from slr.chapters.drawings import drawn; print(drawn("NAME"), end="")' > FILE


def test_letters_fit_and_can_be_read(drawing):
    root = ElementTree.fromstring(drawn(drawing))
    _, _, width, height = map(float, root.get("viewBox").split())
    assert width == 640
    texts = root.findall(f"{SVG}text")
    assert texts
    for text in texts:
        words, size = "".join(text.itertext()), float(text.get("font-size"))
        assert size * 720 / width >= 14
        # DejaVu Sans is wider than the fonts that may stand in for it.
        font = FontProperties(family="DejaVu Sans", size=size, weight=text.get("font-weight"))
        long, _, _ = TextToPath().get_text_width_height_descent(words, font, ismath=False)
        x, y = float(text.get("x")), float(text.get("y"))
        if not text.get("transform"):
            left = x - {"middle": long / 2, "end": long}.get(text.get("text-anchor"), 0)
            assert left >= 0, words
            assert left + long <= width, words
            assert size <= y <= height - 3, words


def test_is_small_alone_and_told(drawing):
    svg = drawn(drawing)
    assert svg == drawn(drawing)
    assert len(svg) < 30_000
    assert not re.search(r"href|url\(|@import|<script|<image", svg)
    assert len(ElementTree.fromstring(svg).find(f"{SVG}title").text) > 30


def test_what_moves_stands_still_when_asked(drawing):
    svg = drawn(drawing)
    moving = set(re.findall(r"\.(\w+)\{animation:", svg))
    still = re.search(r"@media \(prefers-reduced-motion:reduce\)\{(.*?)\{animation:none\}\}", svg)
    assert bool(moving) == (drawing == "alternating-projections")
    assert {name.strip(".") for name in still[1].split(",")} == moving if moving else not still
    # It shows all of the way to those who see it stand still.
    assert not moving or svg.count("stroke-dasharray") >= len(moving)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="drawing 'monalisa' is unknown; it must be one of"):
        drawn("monalisa")


def test_the_pen_draws_what_it_is_told():
    sheet = pen.Sheet("A title that is read", 10)
    sheet.text(1, 2, "*W* & more")
    sheet.arrow((0, 0), (3, 4))
    svg = sheet.svg()
    assert '<tspan font-style="italic">W</tspan> &amp; more</text>' in svg
    assert "M3 4L" in svg  # the head's tip
