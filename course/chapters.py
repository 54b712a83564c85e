"""Chapters as the course reads them: their files, their exercises, their titles.

A chapter marks its exercises itself: a heading ``### Exercise 5.2 · derive · level 2 · 15 min``, a
cell tagged `exercise` with functions to fill in and the asserts to mark oneself by, and after it
cells tagged `solution`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from course.plain import plain

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "_build" / "course"
CHAPTERS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))

HEADING = re.compile(
    r"### Exercise (\d+\.\d+) · (\w+) · level (\d) · (\d+) min\n\n\*\*(.*?)[.?]?\*\*", re.S
)


@dataclass(frozen=True)
class Exercise:
    """What the heading of an exercise says."""

    number: str  # chapter.place, as "5.2"
    kind: str  # check, derive, extend or open
    level: int  # 1 to 3
    minutes: int
    title: str


def read(file: Path) -> NotebookNode:
    """A notebook in the format of today."""
    return nbformat.read(file, as_version=4)


def chapter(file: Path) -> NotebookNode:
    """A chapter as it reads outside of the book: statements, citations and links in plain words."""
    notebook = read(file)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = plain(cell.source)
    return notebook


def write(notebook: NotebookNode, file: Path) -> Path:
    """Writes a valid notebook and its folder; returns the file."""
    nbformat.validate(notebook)
    file.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, file)
    return file


def tags(cell: NotebookNode) -> list[str]:
    """The tags of a cell."""
    return cell.metadata.get("tags", [])


def exercises(notebook: NotebookNode) -> Iterator[Exercise]:
    """The exercises of a chapter, in order."""
    for cell in notebook.cells:
        said = HEADING.match(cell.source) if cell.cell_type == "markdown" else None
        if said:
            number, kind, level, minutes, title = said.groups()
            yield Exercise(number, kind, int(level), int(minutes), title)


def title(notebook: NotebookNode) -> str:
    """The chapter's title, with its number."""
    return notebook.cells[0].source.splitlines()[0].removeprefix("# ")


def question(notebook: NotebookNode) -> str:
    """The one question that the chapter answers."""
    return re.search(r"^\*\*(.*\?)\*\*$", notebook.cells[0].source, re.M)[1]


def takeaways(notebook: NotebookNode) -> list[str]:
    """The paragraphs that say what an experiment has shown."""
    text = "\n\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    found = re.findall(r"^\*\*Takeaway\.\*\* (.*)$", text, re.M)
    return [paragraph.strip() for paragraph in found]


def overview() -> str:
    """A table of the exercises of all chapters, as Markdown; the book shows it."""
    lines = [
        "| chapter | check | derive | extend | open | min |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for file in CHAPTERS:
        notebook = read(file)
        found = list(exercises(notebook))
        page = f"../notebooks/{file.name}"
        of_kind = [
            " ".join(
                f"[{e.number}]({page}#ex-{e.number.replace('.', '-')})"
                for e in found
                if e.kind == kind
            )
            for kind in ("check", "derive", "extend", "open")
        ]
        link = f"[{title(notebook)}](../notebooks/{file.stem})"
        cells = [link, *of_kind, str(sum(e.minutes for e in found))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
