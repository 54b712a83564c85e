"""The chapters as notebooks for students and for the instructor.

    make student, make instructor, or for some chapters:

    python -m course.editions student [NN …]       without solutions and outputs, cells to fill
    python -m course.editions instructor [NN …]    with both, a plan and marks for slides

They are written to `_build/course/student` and `_build/course/instructor`.  A student's edition
runs up to its first exercise, where it stops with NotImplementedError, until that is solved.
"""

import re
import sys
from pathlib import Path

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell

from course import chapters, outline

# A function without a body, on one line or on several.
ONE_LINE = re.compile(r"^(def .*\):) \.\.\.  # your code(.*)$", re.M)
BODY = re.compile(r"^(\s+)\.\.\.  # your code(.*)$", re.M)
CHECK = re.compile(r"^# (check_\w+\(.*?\))(.*)$", re.M)
TO_FILL = r'raise NotImplementedError("your code\2")'
QUIZ = "the quiz on this chapter"  # a page of the book, which a student may have or not
FINDINGS = "*What you tried, what came out, and what you conclude from it:*\n\n…"


def to_fill(source: str) -> tuple[str, str]:
    """An exercise as (functions to fill in and their check, the call that marks them)."""
    call = CHECK.search(source)
    assert call, f"no call of a check in {source[:60]!r}"
    source = CHECK.sub("", source).rstrip()
    source = ONE_LINE.sub(r"\1\n    " + TO_FILL, source)
    source = BODY.sub(r"\1" + TO_FILL, source)
    return source, f"{call[1]}  # silent when it is right"


def bare(cell: NotebookNode) -> NotebookNode:
    """A cell that has never been run, without what only the book needs to know."""
    if cell.cell_type == "code":
        kept = {"tags": chapters.tags(cell)} if chapters.tags(cell) else {}
        return new_code_cell(cell.source, id=cell.id, metadata=kept)
    return new_markdown_cell(cell.source, id=cell.id)


def student(notebook: NotebookNode) -> NotebookNode:
    """Without solutions and outputs; each exercise has a cell to fill in and one to mark it."""
    cells = []
    for cell in notebook.cells:
        if "solution" in chapters.tags(cell):
            continue
        cells.append(bare(cell))
        cells[-1].source = cells[-1].source.replace(QUIZ, f"{QUIZ}, on the book's page *Quiz*")
        if "exercise" in chapters.tags(cell):
            cells[-1].source, call = to_fill(cell.source)
            cells.append(new_code_cell(call, id=f"{cell.id}-check", metadata={"tags": ["mark"]}))
            if "open" in chapters.tags(cell):
                cells.append(new_markdown_cell(FINDINGS, id=f"{cell.id}-notes"))
    return NotebookNode({**notebook, "cells": cells})


def plan(notebook: NotebookNode) -> str:
    """What an instructor wants to see first: the question, what to take away, the exercises."""
    lines = ["## For the instructor", "", f"*Question:* {chapters.question(notebook)}", ""]
    for words in chapters.takeaways(notebook):
        lines += [f"- {words}"]
    lines += ["", "| exercise | kind | level | minutes | |", "| --- | --- | --- | --- | --- |"]
    found = list(chapters.exercises(notebook))
    for e in found:
        lines.append(f"| {e.number} | {e.kind} | {e.level} | {e.minutes} | {e.title} |")
    lines += ["", f"All of them: {sum(e.minutes for e in found)} minutes."]
    return "\n".join(lines)


def instructor(notebook: NotebookNode) -> NotebookNode:
    """All of it, a plan at the head, and marks that RISE and nbconvert's slides go by."""
    shown = outline.shown(notebook)
    cells = []
    for cell in notebook.cells:
        kind = "slide" if cell.id in shown else "skip"
        metadata = {**cell.metadata, "slideshow": {"slide_type": kind}}
        cells.append(NotebookNode({**cell, "metadata": NotebookNode(metadata)}))
    skip = {"slideshow": {"slide_type": "skip"}, "tags": ["instructor"]}
    cells.insert(1, new_markdown_cell(plan(notebook), id="instructor", metadata=skip))
    return NotebookNode({**notebook, "cells": cells})


EDITIONS = {"student": student, "instructor": instructor}


def main(arguments: list[str]) -> list[Path]:
    """Writes one edition of the chapters whose numbers are given, or of all."""
    name, *numbers = arguments
    written = [
        chapters.write(EDITIONS[name](chapters.chapter(file)), chapters.BUILD / name / file.name)
        for file in chapters.CHAPTERS
        if not numbers or file.stem[:2] in numbers
    ]
    print(f"{len(written)} notebooks in {chapters.BUILD / name}")
    return written


if __name__ == "__main__":
    main(sys.argv[1:])
