"""One deck a chapter, in one HTML file that asks nothing of the network: ``make slides``.

    python -m course.slides [NN …]

nbconvert's slides load reveal.js, require.js and MathJax from other hosts, unless all three are
installed by npm; these need nothing that the book does not use already: markdown-it for the text,
MathJax from its pip package.  Keys: arrows, Home, End, n for notes, p or the printer for a page
a slide.  The instructor's edition has the same choice of cells marked for RISE and nbconvert.
"""

import html
import re
import shutil
import sys
from importlib import util
from pathlib import Path
from string import Template

from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin

from course import chapters, outline

HERE = Path(__file__).parent
MATHJAX = "tex-svg-full.js"  # in one file, fonts included


def formula(content: str, options: dict) -> str:
    """A formula as MathJax wants it."""
    escaped = html.escape(content.strip())
    return rf"\[{escaped}\]" if options.get("display_mode") else rf"\({escaped}\)"


def renderer() -> MarkdownIt:
    """Markdown with formulas, to HTML."""
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    return markdown.use(dollarmath_plugin, renderer=formula, allow_digits=True)


def without_dead_links(text: str) -> str:
    """Links to pages of the book as plain text: a deck stands alone."""
    return re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]*\)", r"\1", text)


def page(slide: outline.Slide, markdown: MarkdownIt) -> str:
    """One slide as HTML."""
    parts = []
    for kind, text in slide.body:
        if re.match(r"\*\*(Proposition|Definition|Algorithm) \d", text):
            parts.append('<div class="claim">')
        if kind == "md":
            text = markdown.render(without_dead_links(text))
        elif kind == "caption":
            text = f'<div class="caption">{markdown.renderInline(without_dead_links(text))}</div>'
        parts.append(text)
    parts.append("</div>" * parts.count('<div class="claim">'))
    notes = "".join(markdown.render(without_dead_links(text)) for text in slide.notes)
    level = "h1" if slide.kind == "title" else "h2"
    heading = markdown.renderInline(slide.title)
    return (
        f'<section class="{slide.kind}"><div class="fit"><{level}>{heading}</{level}>'
        f"{''.join(parts)}</div><aside>{notes}</aside></section>"
    )


def deck(notebook) -> str:
    """The deck of a chapter."""
    markdown = renderer()
    pages = [page(slide, markdown) for slide in outline.slides(notebook)]
    frame = Template((HERE / "deck.html").read_text(encoding="utf-8"))
    return frame.substitute(
        title=html.escape(chapters.title(notebook)), pages="\n".join(pages), mathjax=MATHJAX
    )


def mathjax() -> Path:
    """Where its pip package has it; the folder's name is not that of a module."""
    spec = util.find_spec("sphinx-mathjax-offline")
    if spec is None or spec.origin is None:
        raise SystemExit("MathJax is missing: pip install sphinx-mathjax-offline")
    return Path(spec.origin).parent / "static" / "mathjax" / MATHJAX


def main(numbers: list[str]) -> list[Path]:
    """Writes the decks of the chapters whose numbers are given, or of all."""
    folder = chapters.BUILD / "slides"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(mathjax(), folder / MATHJAX)
    written = []
    for file in chapters.CHAPTERS:
        if numbers and file.stem[:2] not in numbers:
            continue
        written.append(folder / f"{file.stem}.html")
        written[-1].write_text(deck(chapters.chapter(file)), encoding="utf-8")
    print(f"{len(written)} decks in {folder}")
    return written


if __name__ == "__main__":
    main(sys.argv[1:])
