"""The grader of the assignments.  ``make grade`` tries it on answers of known worth.

    python -m course.grade                      a model answer of each, and three wrong ones
    python -m course.grade 03 FILE …            submissions to assignment 3: notebooks or Python

A submission is run cell by cell; a cell that fails costs what depends on it, no more.  Then every
test, seen or hidden, is taken from the assignment's source and run on a copy of what the submission
defined.  Each submission has a process and two minutes to itself.  That keeps accidents apart; it
is no sandbox: what strangers hand in belongs in a container.

Why not nbgrader or Otter?  Both are well kept.  nbgrader needs Python 3.11 and brings JupyterLab
with its server; Otter brings the drivers of a browser and of Docker.  To run asserts twice, neither
is needed.  `course/otter.py` writes the assignments in Otter's format for those who use it.
"""

import contextlib
import io
import json
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from course import chapters, sheets

SECONDS = 120


@dataclass(frozen=True)
class Mark:
    """What one test gave."""

    test: str
    points: int
    got: int
    said: str = ""


def code_of(file: Path) -> list[str]:
    """The code cells of a submission, without the tests that it was handed out with."""
    if file.suffix != ".ipynb":
        return [file.read_text(encoding="utf-8")]
    cells = chapters.read(file).cells
    return [c.source for c in cells if c.cell_type == "code" and "test" not in chapters.tags(c)]


def defined(cells: list[str]) -> dict:
    """The names that a submission defines."""
    space: dict = {"__name__": "submission"}
    for source in cells:
        with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
            exec(compile(source, "submission", "exec"), space)
    return space


def why(error: Exception, source: str) -> str:
    """An error in a line: of an assert, what it says or what it asserts."""
    if not isinstance(error, AssertionError):
        return f"{type(error).__name__}: {error}"
    if error.args:
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    line = next((f.lineno for f in reversed(frames) if f.filename == "test"), None)
    return source.splitlines()[line - 1].strip() if line else "an assert failed"


def marks(sheet: sheets.Sheet, cells: list[str]) -> Iterator[Mark]:
    """Runs all tests of an assignment on a submission's cells."""
    import torch

    space = defined(cells)
    for test in sheet.tests:
        torch.manual_seed(0)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(test.source, "test", "exec"), dict(space))
        except Exception as error:
            yield Mark(test.name, test.points, 0, why(error, test.source))
        else:
            yield Mark(test.name, test.points, test.points)


def apart(sheet: sheets.Sheet, file: Path, seconds: float = SECONDS) -> list[Mark]:
    """The marks of a submission, from a process of its own."""
    command = [sys.executable, "-m", "course.grade", "--one", sheet.folder.name[:2], str(file)]
    try:
        run = subprocess.run(
            command, cwd=chapters.ROOT, capture_output=True, text=True, timeout=seconds
        )
        return [Mark(**mark) for mark in json.loads(run.stdout.splitlines()[-1])]
    except subprocess.TimeoutExpired:
        said = f"took longer than {seconds:g} seconds"
    except (json.JSONDecodeError, IndexError):
        said = f"ended with code {run.returncode}"
    return [Mark(test.name, test.points, 0, said) for test in sheet.tests]


def line(name: str, found: list[Mark]) -> str:
    """Points, and the tests that were lost."""
    got, of = sum(m.got for m in found), sum(m.points for m in found)
    lost = " ".join(m.test for m in found if not m.got)
    return f"{name:40} {got:3} of {of}{'   lost: ' + lost if lost else ''}"


def rehearse(sheet: sheets.Sheet) -> list[str]:
    """Grades the model answer and the wrong ones; what is not as it should be."""
    tried = [("model answer", sheet.answer(), set())]
    tried += [(file.stem, code, loses) for file, code, loses in sheet.wrong()]
    faults = []
    for name, code, loses in tried:
        found = list(marks(sheet, code))
        print(line(f"{sheet.folder.name} {name}", found), flush=True)
        lost = {m.test for m in found if not m.got}
        for test in sorted(lost ^ loses):
            word = "loses" if test in lost else "keeps"
            said = next((m.said for m in found if m.test == test), "There is no such test.")
            faults.append(f"{sheet.folder.name}: {name} {word} {test}. {said}")
    return faults


def submissions(sheet: sheets.Sheet, files: list[Path]) -> None:
    """Grades files; prints why points were lost and keeps all of it as JSON."""
    folder = chapters.BUILD / "grades" / sheet.folder.name
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        found = apart(sheet, file.resolve())
        print(line(file.name, found), flush=True)
        for mark in found:
            if mark.said:
                print(f"    {mark.test:4} {mark.said}")
        told = json.dumps([asdict(mark) for mark in found], indent=1)
        (folder / f"{file.stem}.json").write_text(told + "\n", encoding="utf-8")


def main(arguments: list[str]) -> int:
    """The exit code."""
    if not arguments:
        faults = [fault for sheet in sheets.sheets() for fault in rehearse(sheet)]
        print("\n".join(faults) or "Every answer has the marks that it should have.")
        return 1 if faults else 0
    one = arguments[0] == "--one"
    number, *files = arguments[one:]
    sheet = next(s for s in sheets.sheets() if s.folder.name.startswith(number))
    if one:
        print(json.dumps([asdict(m) for m in marks(sheet, code_of(Path(files[0])))]))
    else:
        submissions(sheet, [Path(file) for file in files])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
