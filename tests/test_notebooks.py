"""What every chapter must have, read from the files: no chapter is run here (nbval does that)."""

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
import yaml

import slr

ROOT = Path(__file__).parent.parent
CHAPTERS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PARTS = [
    "## The problem in symbols",
    "## By hand",
    "**Takeaway.**",
    "## What breaks",
    "## Summary",
    "## Exercises",
    "## Further reading",
]
FIGURE = re.compile(r"\b(curves|grouped_bars|plt\.\w+|imshow|heat_map)\(")


@pytest.fixture(params=CHAPTERS, ids=lambda path: path.stem)
def chapter(request):
    return json.loads(request.param.read_text(encoding="utf-8"))


def sources(chapter, kind):
    return ["".join(c["source"]) for c in chapter["cells"] if c["cell_type"] == kind]


HEADING = re.compile(
    r"### Exercise (\d+)\.(\d+) · (check|derive|extend|open) · level ([123]) · (\d+) min\n\n\*\*"
)


def exercises(chapter):
    """(heading cell, exercise cell, solution cell) of each exercise, in order."""
    cells = chapter["cells"]
    for i, cell in enumerate(cells):
        if "exercise" in cell["metadata"].get("tags", []):
            after = next(c for c in cells[i + 1 :] if c["cell_type"] == "code")
            assert "solution" in after["metadata"]["tags"], "".join(cell["source"])[:60]
            yield cells[i - 1], cell, after


def test_chapters_are_numbered_and_in_the_table_of_contents():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    listed = [c["file"] for part in toc["parts"] for c in part["chapters"]]
    listed = [file for file in listed if file.startswith("notebooks/")]
    assert listed == [f"notebooks/{path.stem}" for path in CHAPTERS]
    for number, path in enumerate(CHAPTERS, 1):
        assert path.stem.startswith(f"{number:02}_")
        title = sources(json.loads(path.read_text(encoding="utf-8")), "markdown")[0]
        assert title.startswith(f"# {number}. ")


def test_has_all_parts_in_order(chapter):
    text = "\n".join(sources(chapter, "markdown"))
    at = [text.find(part) for part in PARTS]
    assert -1 not in at, PARTS[at.index(-1)]
    assert [at[0], at[1], *at[3:]] == sorted([at[0], at[1], *at[3:]])
    first = sources(chapter, "markdown")[0]
    assert re.match(r"# \d+\. ", first)
    for words in ("**", "?**", "you will be able to", "*Prerequisites:*", "*Time:*"):
        assert words in first, words
    bullets = text.split("## Summary")[1].split("##")[0].count("\n- ")
    assert 1 <= bullets <= 5


def test_was_executed_without_errors(chapter):
    for cell in chapter["cells"]:
        if cell["cell_type"] == "code" and "".join(cell["source"]).strip():
            start = "".join(cell["source"])[:60]
            assert cell["execution_count"] is not None, f"never executed: {start!r}"
            kinds = {output["output_type"] for output in cell["outputs"]}
            assert "error" not in kinds, f"error in {start!r}"
            streams = {output.get("name") for output in cell["outputs"]}
            assert "stderr" not in streams, f"writes to standard error: {start!r}"


def test_cells_are_short_and_figures_described(chapter):
    for cell in chapter["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            continue
        assert source.count("\n") < 30, f"long cell: {source[:60]!r}"
        shown = any("image/" in kind for o in cell["outputs"] for kind in o.get("data", {}))
        if shown or FIGURE.search(source):
            notes = cell["metadata"].get("mystnb", {})
            assert len(notes.get("image", {}).get("alt", "")) > 60, f"no alt text: {source[:60]!r}"
            assert notes.get("figure", {}).get("caption"), f"no caption: {source[:60]!r}"


def test_plots_and_plumbing_are_folded_and_naive_code_is_open(chapter):
    for cell in chapter["cells"]:
        source, tags = "".join(cell["source"]), cell["metadata"].get("tags", [])
        if cell["cell_type"] != "code" or {"exercise", "solution", "remove-cell"} & set(tags):
            continue
        figure = cell["metadata"].get("mystnb", {}).get("figure")
        if figure:
            assert {"hide-input", "remove-input"} & set(tags), f"a plot is open: {source[:60]!r}"
        elif re.search(r"def naive_|torch\.equal|allclose", source):
            assert "hide-input" not in tags, f"what is taught is folded: {source[:60]!r}"


def test_tables_are_for_readers(chapter):
    """Neither NaN nor the numbers of rows."""
    for cell in chapter["cells"]:
        for output in cell.get("outputs", []):
            page = "".join(output.get("data", {}).get("text/html", ""))
            start = "".join(cell["source"])[:60]
            assert "<td>NaN</td>" not in page, f"NaN in the table of {start!r}"
            names = re.findall(r"<tr>\s*<th>([^<]*)</th>\s*<td>", page.partition("<tbody>")[2])
            assert names[:3] != ["0", "1", "2"], f"row numbers in the table of {start!r}"


def test_light_and_offline():
    for path in CHAPTERS:
        assert path.stat().st_size <= 500_000, path.name
        raw = path.read_text(encoding="utf-8")
        assert "tqdm.auto" not in raw
        assert "application/javascript" not in raw


def test_figures_have_names_of_their_own():
    names = [
        figure.get("name")
        for path in CHAPTERS
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if (figure := cell["metadata"].get("mystnb", {}).get("figure"))
    ]
    assert len(names) == len(set(names))


def test_same_setup_cell_everywhere():
    first = {sources(json.loads(p.read_text(encoding="utf-8")), "code")[0] for p in CHAPTERS}
    assert len(first) == 1
    for path in CHAPTERS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        setup = next(cell for cell in cells if cell["cell_type"] == "code")
        assert setup["metadata"]["tags"] == ["remove-cell"]
        assert "google.colab" in "".join(setup["source"])


def test_solutions_pass_and_stubs_fail(chapter):
    import math

    for _, stub, solution in exercises(chapter):
        stub, solution = "".join(stub["source"]), "".join(solution["source"])
        space = {"torch": torch, "slr": slr, "math": math}
        exec(stub, space)
        call = re.search(r"^# (check_\w+\(.*?\))", stub, re.M)[1]
        with pytest.raises(Exception):  # noqa: B017, PT011 - the empty answer fails in any way
            exec(call, space)
        assert solution.endswith(f"\ntorch.manual_seed(0)\n{call}")
        exec(solution, space)


def test_exercises_say_what_they_ask_for(chapter):
    number = int(sources(chapter, "markdown")[0].split(".")[0][2:])
    found = list(exercises(chapter))
    assert 3 <= len(found) <= 5
    for place, (heading, stub, solution) in enumerate(found, 1):
        said = HEADING.match("".join(heading["source"]))
        assert said, "".join(heading["source"])[:80]
        assert (int(said[1]), int(said[2])) == (number, place)
        tags = ["exercise", said[3], f"level-{said[4]}", f"minutes-{said[5]}"]
        assert stub["metadata"]["tags"] == tags
        assert solution["metadata"]["tags"] == ["hide-input", "solution"]
        assert solution["outputs"] == []
    assert "open" in found[-1][1]["metadata"]["tags"]


def test_no_exercise_is_told_twice():
    """Nor are two checks alike: neither their names nor what they ask."""
    told = [
        (re.search(r"check_\w+", "".join(stub["source"]))[0], "".join(heading["source"]))
        for path in CHAPTERS
        for heading, stub, _ in exercises(json.loads(path.read_text(encoding="utf-8")))
    ]
    assert len({name for name, _ in told}) == len(told)
    titles = [re.search(r"\*\*(.*?)\*\*", text)[1] for _, text in told]
    assert len(set(titles)) == len(titles)


def test_every_proposition_is_proved_and_checked(chapter):
    cells = chapter["cells"]
    for i, cell in enumerate(cells):
        text = "".join(cell["source"])
        if cell["cell_type"] != "markdown" or "{prf:proposition}" not in text:
            continue
        after = text[text.index(":::{prf:proposition}") :]
        start = after[:60]
        assert text.count("{prf:proposition}") == 1, f"two at once: {start!r}"
        assert ":::{prf:proof}\n" in after, f"no proof: {start!r}"
        assert "\\square" in after, f"no end of the proof: {start!r}"
        code = itertools.takewhile(lambda c: c["cell_type"] == "code", cells[i + 1 :])
        assert any("assert " in "".join(c["source"]) for c in code), f"not checked: {start!r}"


STATEMENT = re.compile(r"^:::\{prf:(proposition|definition|algorithm)\} (.+)\n:label: (\S+)$", re.M)
LABEL = {"proposition": "prop", "definition": "def", "algorithm": "alg"}
LINK = re.compile(r"\[([^\]\n]+)\]\(([^)\s]*?)(?:#([\w-]+))?\)")
NAMED = {"Proposition": "prop", "Definition": "def", "Exercise": "ex", "equation": "eq"}


def targets(path):
    """The names in a chapter that a link may lead to."""
    text = "\n".join(sources(json.loads(path.read_text(encoding="utf-8")), "markdown"))
    names = {label for _, _, label in STATEMENT.findall(text)}
    names |= {f"ex-{a}-{b}" for a, b, *_ in HEADING.findall(text)}
    return names | set(re.findall(r"\$\$ \(([\w-]+)\)$", text, re.M))


def test_statements_and_equations_are_numbered_as_their_labels_say(chapter):
    """The book counts them by chapter; the label carries the number where there is no book."""
    text = "\n".join(sources(chapter, "markdown"))
    number = int(text.split(".")[0][2:])
    counted = dict.fromkeys(LABEL, 0)
    for kind, _, label in STATEMENT.findall(text):
        counted[kind] += 1
        assert label == f"{LABEL[kind]}-{number}-{counted[kind]}"
    assert sum(counted.values()) == len(re.findall(r"^:::\{prf:(?!proof)", text, re.M))
    assert counted["proposition"] >= 1
    found = re.findall(r"\$\$ \(([\w-]+)\)$", text, re.M)
    assert found == [f"eq-{number}-{i}" for i in range(1, len(found) + 1)]


def test_links_say_where_they_lead(chapter):
    """ "Proposition 5.2" leads to prop-5-2 of chapter 5, "chapter 5" to its file."""
    text = "\n".join(sources(chapter, "markdown"))
    own = CHAPTERS[int(text.split(".")[0][2:]) - 1]
    for words, file, name in LINK.findall(text):
        if file.startswith("http"):
            continue
        path = (ROOT / "notebooks" / file).resolve() if file else own
        assert path.is_file(), f"[{words}]({file}): a link has to work in Jupyter, too"
        if path.suffix == ".ipynb":
            assert not name or name in targets(path), f"{words}: no {name} in {path.name}"
        if said := re.match(r"(\w+?)s? \(?(\d+)\.(\d+)\)?$", words):
            assert name == f"{NAMED[said[1]]}-{said[2]}-{said[3]}", words
        elif said := re.fullmatch(r"(?:[Cc]hapter )?(\d+)", words):
            assert path == CHAPTERS[int(said[1]) - 1], words


def test_every_mention_of_a_chapter_is_a_link(chapter):
    text = "\n".join(sources(chapter, "markdown"))
    number = text.split(".")[0][2:]
    prose = re.sub(r"^#.*$|`[^`\n]*`|\[[^\]\n]*\]\([^)\s]*\)", "", text, flags=re.M)
    prose = prose.replace("its chapter 8 {cite}", "")  # of another book
    for found in re.findall(r"\b[Cc]hapters? (\d+)|\b(Parts? [IV]+)\b", prose):
        assert found[0] == number, found
    for word in ("Proposition", "Definition", "Exercise"):
        assert not re.search(rf"\b{word}s? \d", prose), word


# Not of ours: the headings of exercises, mathematics, code, links and what is in a solution.
NOT_PROSE = re.compile(
    r"### Exercise [^\n]*|<details>.*?</details>|```.*?```|\$\$.*?\$\$|\$.*?\$|`.*?`|:label: .*?\n"
    r"|\[.*?\]\(.*?\)",
    re.S,
)
MEASURED = re.compile(r"(?<![\w.:/])\d+(?:\.\d+ ?%?| ?%| per cent)(?![\w:])")


def test_no_typed_results(chapter):
    """A decimal or a percentage in prose is computed by a cell, or its paragraph cites it."""
    code = "\n".join(sources(chapter, "code"))
    outputs = [o for c in chapter["cells"] for o in c.get("outputs", [])]
    texts = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in outputs]
    shown = json.dumps(texts)  # and not the figures: their paths hold every number
    for text in sources(chapter, "markdown"):
        for paragraph in NOT_PROSE.sub(" ", text).split("\n\n"):
            if "published" in paragraph:
                continue
            for number in MEASURED.findall(paragraph):
                bare = re.match(r"[\d.]+", number)[0]
                known = {bare, f"{float(bare) / 100:g}"}
                assert any(n in code or n in shown for n in known), (number, paragraph)
