"""Assignments: one source each, from which a student's notebook and the tests are taken.

    python -m course.sheets [NN …]      notebooks to hand out, into _build/course/assignments

`course/assignments/NN_name/source.py` is Python in cells.  A cell begins with a line that says what
it is:

    # %% [markdown]                     text, in comments
    # %%                                code that is handed out as it is
    # %% question 1a                    a function to fill in; the answer stands between
                                        `# BEGIN SOLUTION` and `# END SOLUTION`
    # %% test 1a, 2 points              asserts that the student sees
    # %% hidden test 1a, 2 points       asserts that only the grader runs

Beside it `wrong_*.py` hold wrong answers: each says what is wrong, in a line `Loses:` which tests
have to see it, and defines the function that replaces the right one.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from course import chapters

FOLDER = Path(__file__).parent / "assignments"
CELL = re.compile(r"^# %% ?(.*)$", re.M)
TEST = re.compile(r"(hidden )?test (\w+), (\d+) points?")
SOLUTION = re.compile(r"\n*^([ \t]*)# BEGIN SOLUTION\n.*?^[ \t]*# END SOLUTION\n", re.M | re.S)


@dataclass(frozen=True)
class Cell:
    """One cell of a source: its kind is text, code, question or test."""

    kind: str
    source: str
    name: str = ""  # of a question or test; that of a hidden test ends in *
    points: int = 0

    @property
    def hidden(self) -> bool:
        """Whether only the grader has it."""
        return self.name.endswith("*")


@dataclass(frozen=True)
class Sheet:
    """An assignment."""

    folder: Path
    cells: tuple[Cell, ...]

    @property
    def tests(self) -> list[Cell]:
        """Visible and hidden ones, in order."""
        return [cell for cell in self.cells if cell.kind == "test"]

    @property
    def points(self) -> int:
        """All there are."""
        return sum(cell.points for cell in self.tests)

    def answer(self) -> list[str]:
        """The code of the model answer."""
        return [cell.source for cell in self.cells if cell.kind in ("code", "question")]

    def wrong(self) -> Iterator[tuple[Path, list[str], set[str]]]:
        """(file, code, names of the tests that it has to lose) of each wrong answer."""
        for file in sorted(self.folder.glob("wrong_*.py")):
            code = file.read_text(encoding="utf-8")
            loses = re.search(r"^Loses: (.*)$", code, re.M)
            assert loses, f"{file} does not say what it loses"
            yield file, [*self.answer(), code], set(loses[1].split())


def cell_of(head: str, body: str) -> Cell:
    """A cell from the line that begins it and from what follows."""
    test = TEST.fullmatch(head)
    if head == "[markdown]":
        return Cell("text", re.sub(r"^# ?", "", body, flags=re.M))
    if test:
        return Cell("test", body, test[2] + "*" * bool(test[1]), int(test[3]))
    if head.startswith("question "):
        return Cell("question", body, head.removeprefix("question "))
    if head:
        raise ValueError(f"a cell is {head!r}; see course/sheets.py for what it may be")
    return Cell("code", body)


def read(folder: Path) -> Sheet:
    """The assignment in a folder."""
    _, *parts = CELL.split((folder / "source.py").read_text(encoding="utf-8"))
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return Sheet(folder, tuple(cell_of(head, body.strip("\n")) for head, body in pairs))


def sheets() -> list[Sheet]:
    """All assignments."""
    return [read(file.parent) for file in sorted(FOLDER.glob("*/source.py"))]


def to_fill(source: str) -> str:
    """A question without its answer."""
    return SOLUTION.sub(r'\n\1raise NotImplementedError("your code")\n', source + "\n").rstrip("\n")


def handed_out(sheet: Sheet) -> NotebookNode:
    """The student's notebook: no answers, no hidden tests."""
    cells = []
    for i, cell in enumerate(c for c in sheet.cells if not c.hidden):
        id_ = f"{cell.kind}-{i}"
        if cell.kind == "text":
            cells.append(new_markdown_cell(cell.source, id=id_))
            continue
        marks = {"tags": [cell.kind, cell.name]} if cell.name else {}
        source = to_fill(cell.source)
        if cell.kind == "test":
            source = (
                f"# Test of {cell.name}, {cell.points} points; silent when it passes.\n{source}"
            )
        cells.append(new_code_cell(source, id=id_, metadata=marks))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel})


def main(numbers: list[str]) -> list[Path]:
    """Writes the notebooks of the assignments whose numbers are given, or of all."""
    folder = chapters.BUILD / "assignments"
    written = [
        chapters.write(handed_out(sheet), folder / f"{sheet.folder.name}.ipynb")
        for sheet in sheets()
        if not numbers or sheet.folder.name[:2] in numbers
    ]
    print(f"{len(written)} assignments in {folder}")
    return written


if __name__ == "__main__":
    main(sys.argv[1:])
