"""Which parts of a chapter are slides, by rule, so that no chapter needs marks.

The title with its question; of each section the beginning, as much as there is room for; every
definition, algorithm and proposition, without proof; every figure with its caption, and every short
table; every takeaway, under what it was taken from; the summary; the exercises by title.  A
beginning of a few lines goes on the slide of what comes next.  What else a section says goes into
the notes of its slide.
"""

import re
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass, field

from nbformat import NotebookNode

from course import chapters
from course.plain import END

LEAD = 480  # characters of text on a slide, about
LINES = 260  # and of a beginning that shares its slide
ROWS = 14  # of a table that can be read from the back of the room
STATED = re.compile(r"\*\*(Definition|Algorithm) \d")
LEFT_OUT = ("## Further reading", "## Exercises")


@dataclass
class Slide:
    """What is on it in order, what is said with it, and the cells it was made from."""

    title: str
    body: list[tuple[str, str]] = field(default_factory=list)  # (md, html or caption; text)
    notes: list[str] = field(default_factory=list)
    cells: set[str] = field(default_factory=set)
    kind: str = "section"
    full: bool = False  # nothing more goes on it

    def room(self) -> int:
        """Characters of text that still fit."""
        return LEAD - sum(len(text) for kind, text in self.body if kind == "md")


def blocks(source: str) -> list[str]:
    """The paragraphs, lists, tables and formulas of a Markdown cell."""
    parts, open_, stated = [], False, False
    for paragraph in re.split(r"\n\s*\n", source):
        if paragraph == END:
            stated = False
            continue
        if open_ or stated:
            parts[-1] += "\n\n" + paragraph
        else:
            parts.append(paragraph.strip("\n"))
        open_ ^= paragraph.count("$$") % 2 == 1 or paragraph.count("```") % 2 == 1
        stated |= bool(STATED.match(paragraph)) and END in source
    return [part for part in parts if part.strip()]


def figure(cell: NotebookNode) -> list[tuple[str, str]]:
    """The picture that a cell drew, as HTML with its description, and its caption."""
    notes = cell.metadata.get("mystnb", {})
    caption = notes.get("figure", {}).get("caption", "")
    alt = notes.get("image", {}).get("alt", "").replace('"', "&quot;")
    for output in cell.outputs:
        data = output.get("data", {})
        if "image/svg+xml" in data:
            # Apart, as an image: figures share the names of their parts.
            source = "svg+xml;base64," + b64encode(data["image/svg+xml"].encode()).decode()
        elif "image/png" in data:
            source = "png;base64," + data["image/png"].replace("\n", "")
        else:
            continue
        picture = f'<figure><img alt="{alt}" src="data:image/{source}"></figure>'
        return [("html", picture), ("caption", caption)]
    return []


def table(cell: NotebookNode) -> list[tuple[str, str]]:
    """The table that a cell printed, if it is short."""
    for output in cell.outputs:
        html = output.get("data", {}).get("text/html", "")
        if "<table" in html and html.count("<tr") <= ROWS:
            html = re.sub(r"<style.*?</style>", "", html, flags=re.S)
            return [("html", f'<div class="table">{html}</div>')]
    return []


class Deck:
    """Slides in the making: what comes next goes on the last one, or on a new one."""

    def __init__(self) -> None:
        self.slides: list[Slide] = []
        self.section = ""

    def new(self, cell: NotebookNode, *body: tuple[str, str], kind: str = "section") -> Slide:
        slide = Slide(self.section, list(body), cells={cell.id}, kind=kind)
        last = self.slides[-1]
        same = last.kind == "section" and last.title == self.section
        if same and last.room() >= LEAD - LINES and "$$" not in str(last.body):
            slide.body = last.body + slide.body
            slide.notes, slide.cells = last.notes, last.cells | slide.cells
            self.slides.pop()
        self.slides.append(slide)
        return slide

    def text(self, cell: NotebookNode, block: str) -> None:
        """One block of prose: on the slide, on one of its own, or in the notes."""
        last = self.slides[-1]
        if block.startswith("## "):
            self.section = block.splitlines()[0].removeprefix("## ")
            self.new(cell)
        elif block.startswith("**Proposition"):
            self.new(cell, ("md", block), kind="proposition")
        elif STATED.match(block):
            self.new(cell, ("md", block), kind="statement")
        elif block.startswith("**Takeaway"):
            if last.kind == "result" and last.title == self.section:
                last.body.append(("md", block))
                last.cells.add(cell.id)
            else:
                self.new(cell, ("md", block), kind="takeaway")
        elif self.fits(last, block):
            last.body.append(("md", block))
            last.cells.add(cell.id)
        else:
            last.notes.append(block)

    def fits(self, slide: Slide, block: str) -> bool:
        """Whether a block is shown: while there is room, and none was left out before it."""
        if slide.kind == "proposition":
            slide.full |= block.startswith("*Proof")
        elif slide.kind == "section" and block.startswith(("|", "<", "```")):
            return False
        elif slide.kind == "section":
            slide.full |= bool(slide.body) and len(block) > slide.room()
        else:
            slide.full = True
        return not slide.full

    def outputs(self, cell: NotebookNode) -> None:
        """What a cell drew or printed."""
        if shown := figure(cell) or table(cell):
            self.new(cell, *shown, kind="result")


def opening(notebook: NotebookNode) -> Slide:
    """The first slide."""
    cell = notebook.cells[0]
    body = [("md", f"**{chapters.question(notebook)}**")]
    body += [("md", b) for b in blocks(cell.source) if b.startswith("- ")]
    return Slide(chapters.title(notebook), body, cells={cell.id}, kind="title")


def asked(notebook: NotebookNode) -> Slide:
    """The last one: exercises by title."""
    lines = [
        f"- {e.number} {e.title} (*{e.kind}*, level {e.level}, {e.minutes} min)"
        for e in chapters.exercises(notebook)
    ]
    cells = {c.id for c in notebook.cells if chapters.HEADING.match(c.source)}
    return Slide("Exercises", [("md", "\n".join(lines))], cells=cells, kind="exercises")


def prose(cell: NotebookNode) -> Iterator[str]:
    """The blocks of a cell, up to what no slide is made of."""
    for block in blocks(cell.source):
        if block.startswith(LEFT_OUT):
            return
        head, _, rest = block.partition("\n")
        yield head if block.startswith("## ") else block
        if block.startswith("## ") and rest.strip():
            yield rest.strip()


def slides(notebook: NotebookNode) -> list[Slide]:
    """The deck of a chapter."""
    deck = Deck()
    deck.slides.append(opening(notebook))
    for cell in notebook.cells[1:]:
        if {"exercise", "solution", "remove-cell"} & set(chapters.tags(cell)):
            continue
        if cell.cell_type == "code":
            deck.outputs(cell)
            continue
        for block in prose(cell):
            deck.text(cell, block)
        if "## Exercises" in cell.source:
            break
    found = [s for s in deck.slides if s.body]
    return [*found, asked(notebook)]


def shown(notebook: NotebookNode) -> set[str]:
    """The ids of the cells from which slides are made."""
    return set().union(*(slide.cells for slide in slides(notebook)))
