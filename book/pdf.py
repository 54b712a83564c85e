"""The book as one PDF: every page in one document, printed by Chromium with an outline.

It is printed twice: what page a chapter starts on is known after the first time.
"""

import html
import re
import tempfile
from pathlib import Path

import pikepdf

from book import browser, links

HERE = Path(__file__).parent
BUILT = Path("_build") / "html"


def lower(body: str) -> str:
    """The headings one level down, so that a chapter comes below its part in the outline."""
    return re.sub(r"(</?h)([1-5])\b", lambda m: f"{m[1]}{int(m[2]) + 1}", body)


def front(book) -> str:
    """The title page."""
    lines = [book.author, f"Version {book.version}", f"© {book.rights}", book.address]
    text = "".join(f"<p>{html.escape(line)}</p>" for line in lines)
    return f'<section class="front"><p class="name">{html.escape(book.title)}</p>{text}</section>'


def contents(book, numbers: dict[str, int]) -> str:
    """The table of contents; a page's number is left out where it is not known yet."""
    lines = []
    for caption, pages in book.parts:
        if caption and not pages[0].head:
            lines.append(f'<p class="caption">{html.escape(caption)}</p>')
        for page in pages:
            kind = "caption" if page.head else "below" if caption else ""
            lines.append(
                f'<p class="{kind}"><a class="title" href="#{page.name}">{html.escape(page.title)}'
                f'</a><span class="dots"></span><span>{numbers.get(page.name, "")}</span></p>'
            )
    return f'<section class="contents"><h1>Contents</h1>{"".join(lines)}</section>'


def document(book, numbers: dict[str, int]) -> str:
    """The whole book as XHTML."""
    print_style = (HERE / "print.css").read_text(encoding="utf-8")
    pages = [
        f'<section class="page{" below" * page.below}" id="{page.name}">'
        f"{lower(page.body) if page.below else page.body}</section>"
        for page in book.pages
    ]
    return (
        '<!DOCTYPE html><html xmlns="http://www.w3.org/1999/xhtml" lang="en"><head>'
        f"<title>{html.escape(book.title)}</title>"
        f"<style><![CDATA[{book.style}{print_style}]]></style></head>"
        f"<body>{front(book)}{contents(book, numbers)}{''.join(pages)}</body></html>"
    )


def starts(pdf: pikepdf.Pdf) -> dict[str, int]:
    """The number of the page on which each named place is."""
    order = {page.objgen: number for number, page in enumerate(pdf.pages, 1)}
    return {name[1:]: order[place[0].objgen] for name, place in pdf.Root.Dests.items()}


def entries(items) -> int:
    """How many entries an outline has, at every depth."""
    return sum(1 + entries(item.children) for item in items)


def write(book, out: Path) -> str:
    """Print the book; says how large it is."""
    there = {"book": links.Page(document(book, {}))}
    wrong = links.internal(there, lambda path: (BUILT / path.lstrip("/")).is_file())
    if wrong:
        raise SystemExit("\n".join(["the book is not fit to be printed:", *wrong[:20]]))
    with tempfile.TemporaryDirectory() as folder:
        printed = Path(folder) / "printed.pdf"
        browser.print_pdf(BUILT, document(book, {}), printed)
        with pikepdf.open(printed) as draft:
            numbers = starts(draft)
        missing = [page.page for page in book.pages if page.name not in numbers]
        if missing:
            raise SystemExit(f"not in the printed book: {', '.join(missing)}")
        browser.print_pdf(BUILT, document(book, numbers), printed)
        with pikepdf.open(printed) as pdf, pdf.open_outline() as outline:
            if starts(pdf) != numbers:
                raise SystemExit("the page numbers of the contents have moved the chapters")
            said = f"{len(pdf.pages)} sheets, {entries(outline.root)} entries in its outline"
            pdf.docinfo["/Author"] = book.author
            packed = pikepdf.ObjectStreamMode.generate  # half the size: Chromium packs only streams
            pdf.save(out, object_stream_mode=packed)
    return said
