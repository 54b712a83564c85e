"""The assignments as masters of Otter Assign, for courses that grade with it.

    python -m course.otter [NN …]              into _build/course/otter
    otter assign 01_masks.ipynb 01_masks       there, with `pip install otter-grader`
    otter run -a 01_masks/autograder/*.zip SUBMISSION

Otter is not among the packages of this repository; `course/grade.py` says why.
"""

import sys
from itertools import groupby
from pathlib import Path

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_raw_cell

from course import chapters, sheets

HEAD = """# ASSIGNMENT CONFIG
name: {name}
init_cell: false
export_cell: false
check_all_cell: false
"""
TEST = '''""" # BEGIN TEST CONFIG
name: {name}
points: {points}
hidden: {hidden}
""" # END TEST CONFIG
'''


def part(cells: list[sheets.Cell]) -> list[NotebookNode]:
    """The cells of one question: what to fill in, then its tests."""
    name = cells[0].name.rstrip("*")
    found = [new_raw_cell(f"# BEGIN QUESTION\nname: q{name}")]
    found.append(new_raw_cell("# BEGIN SOLUTION"))
    found += [new_code_cell(c.source) for c in cells if c.kind == "question"]
    found += [new_raw_cell("# END SOLUTION"), new_raw_cell("# BEGIN TESTS")]
    for cell in (c for c in cells if c.kind == "test"):
        told = {
            "name": cell.name.replace("*", " hidden"),
            "points": cell.points,
            "hidden": str(cell.hidden).lower(),
        }
        found.append(new_code_cell(TEST.format(**told) + cell.source))
    return [*found, new_raw_cell("# END TESTS"), new_raw_cell("# END QUESTION")]


def master(sheet: sheets.Sheet) -> NotebookNode:
    """An assignment in Otter's format."""
    cells = [new_raw_cell(HEAD.format(name=sheet.folder.name))]
    for name, group in groupby(sheet.cells, key=lambda cell: cell.name.rstrip("*")):
        if name:
            cells += part(list(group))
            continue
        for cell in group:
            new = new_markdown_cell if cell.kind == "text" else new_code_cell
            cells.append(new(cell.source))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel})


def main(numbers: list[str]) -> list[Path]:
    """Writes the masters of the assignments whose numbers are given, or of all."""
    folder = chapters.BUILD / "otter"
    written = [
        chapters.write(master(sheet), folder / f"{sheet.folder.name}.ipynb")
        for sheet in sheets.sheets()
        if not numbers or sheet.folder.name[:2] in numbers
    ]
    print(f"{len(written)} masters in {folder}")
    return written


if __name__ == "__main__":
    main(sys.argv[1:])
