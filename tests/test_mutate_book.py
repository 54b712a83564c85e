"""The faults planted while chapters run: they still can be, and every one was noticed."""

import ast
import json
from collections import Counter
from pathlib import Path

import nbformat
import pytest

from benchmarks import mutate_book
from benchmarks._faults import FAULTS, Fault

SLR = Path(__file__).parent.parent / "slr"
EVERY = list(mutate_book.pairs(sorted(mutate_book.chapters())))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_can_be_planted_and_leaves_a_module(fault):
    source = (SLR / fault.file).read_text(encoding="utf-8")
    made = fault.planted(source)
    assert ast.dump(ast.parse(made)) != ast.dump(ast.parse(source))


def test_a_text_that_is_not_there_once_is_no_place_for_a_fault():
    for source, count in (("a = 1", 0), ("x = x", 2)):
        with pytest.raises(ValueError, match=f"'x' is {count} times in m.py"):
            Fault("wrong", (1,), "m.py", (("x", "y"),)).planted(source)


def test_every_chapter_has_faults_of_its_own():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    planted = Counter(chapter for fault in FAULTS for chapter in fault.chapters)
    assert planted.keys() == mutate_book.chapters().keys()
    assert min(planted.values()) >= 4


def test_the_record_has_all_of_them_and_each_was_noticed_by_a_cell_that_is_there():
    rows = json.loads(mutate_book.OUT.read_text(encoding="utf-8"))["rows"]
    assert [(row["chapter"], row["fault"]) for row in rows] == [(c, f.name) for c, f in EVERY]
    assert not mutate_book.wrong(rows)
    cells = {
        chapter: dict(mutate_book.code_of(json.loads(file.read_text(encoding="utf-8"))))
        for chapter, file in mutate_book.chapters().items()
    }
    for row in rows:
        if row["error"]:
            assert row["line"] in cells[row["chapter"]][row["id"]], row


def test_a_missed_fault_and_a_chapter_that_fails_alone_are_wrong():
    rows = [
        {"fault": "nothing", "error": None}, {"fault": "a", "error": "AssertionError"},
        {"fault": "b", "error": None}, {"fault": "nothing", "error": "NameError: x"},
    ]  # fmt: skip
    assert mutate_book.wrong(rows) == rows[2:]


def test_a_run_tells_the_first_cell_that_fails(tmp_path):
    cells = [
        nbformat.v4.new_markdown_cell("Two and two."),
        nbformat.v4.new_code_cell("import slr"),
        nbformat.v4.new_code_cell("\nfound = slr.__version__\nassert found != 'planted', found"),
    ]
    chapter = tmp_path / "chapter.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), chapter)
    line = next(x for x in (SLR / "__init__.py").read_text().splitlines() if "__version__ =" in x)
    fault = Fault("another version", (), "__init__.py", ((line, '__version__ = "planted"'),))
    with mutate_book.copied() as folder:
        assert mutate_book.run(chapter, folder)["error"] is None
        with mutate_book.planted(folder, fault):
            found = mutate_book.run(chapter, folder)
        assert (folder / "slr" / "__init__.py").read_bytes() == (SLR / "__init__.py").read_bytes()
    assert (found["cell"], found["line"]) == (2, "found = slr.__version__")
    assert found["error"] == "AssertionError: planted"
    assert found["id"] == cells[2]["id"]
