"""The book as one PDF and as an EPUB, from its built pages: ``make pdf``, ``make epub``.

    python -m book.publish pdf epub          from the repository's root, after the book was built

Chromium reads the pages of ``_build/html`` once more, draws their formulas as SVG and takes out
what only a screen can use (``collect.js``).  Sphinx's own builders would need LaTeX for that.
What is printed is then a page without scripts; what goes into the EPUB is XML.
"""

import json
import re
import sys
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import yaml
from pygments.formatters import HtmlFormatter

from book import browser, epub, pdf

HERE = Path(__file__).parent
BUILT = Path("_build") / "html"


@dataclass
class Page:
    """A page of the book, as `collect.js` hands it over."""

    page: str
    name: str
    title: str
    body: str
    images: list[str]
    small: list[str]
    head: bool = False  # opens a part; the pages of the part come one level below it
    below: bool = False


@dataclass
class Book:
    """What is published, in order: a caption and its pages; the first caption is empty."""

    title: str
    author: str
    rights: str
    address: str
    version: str
    style: str
    parts: list[tuple[str, list[Page]]] = field(default_factory=list)

    @property
    def pages(self) -> list[Page]:
        return [page for _, pages in self.parts for page in pages]


def entries(listed: list[dict]) -> list[str]:
    """The files of a part of _toc.yml, with what is nested in them."""
    found = []
    for entry in listed:
        if "file" in entry:
            found.append(entry["file"])
        found += entries(entry.get("sections", []))
    return found


def contents(toc: dict) -> list[tuple[str, list[str]]]:
    """Caption and built pages of every part, the root first."""
    parts = [("", [toc["root"]])]
    parts += [(part.get("caption", ""), entries(part["chapters"])) for part in toc["parts"]]
    return [(caption, [f"{file}.html" for file in files]) for caption, files in parts]


def styles() -> str:
    """The style sheet of both editions."""
    colours = HtmlFormatter(style="a11y-high-contrast-light").get_style_defs(".highlight")
    return f"{colours}\n{(HERE / 'paper.css').read_text(encoding='utf-8')}"


def mathjax(pages: list[str]) -> dict:
    """The settings of MathJax that the built pages have, where they have formulas."""
    texts = ((BUILT / page).read_text(encoding="utf-8") for page in pages)
    found = (re.search(r"window\.MathJax = (\{.*?\})</script>", text) for text in texts)
    return next(json.loads(options[1]) for options in found if options)


def collect(pages: list[str], *, one: bool, style: str) -> list[dict]:
    """The pages with drawn formulas; `one`: to stand in one document together."""
    for page in pages:
        if not (BUILT / page).is_file():
            raise SystemExit(f"no {BUILT / page} yet: run 'make book' first")
    settings = mathjax(pages) | {"startup": {"typeset": False}, "svg": {"fontCache": "none"}}
    script = (HERE / "collect.js").read_text(encoding="utf-8")
    told = browser.ask(
        BUILT,
        f'<!doctype html><meta charset="utf-8"><style>{style}</style><body class="paper"><script>'
        f"const ONE = {json.dumps(one)}, PAGES = {json.dumps(pages)};"
        f"window.MathJax = {json.dumps(settings)};{script}</script>"
        '<script src="/_static/mathjax/tex-svg-full.js"></script></body>',
    )
    if told.get("failed") or told["wrong"]:
        raise SystemExit(f"pages are not fit to be published: {told.get('failed', told['wrong'])}")
    print(f"{len(pages)} pages, {told['formulas']} formulas")
    return told["pages"]


def read(*, one: bool) -> Book:
    """The book, its pages collected."""
    config = yaml.safe_load(Path("_config.yml").read_text(encoding="utf-8"))
    listed = contents(yaml.safe_load(Path("_toc.yml").read_text(encoding="utf-8")))
    book = Book(
        title=config["title"],
        author=config["author"],
        rights=config["copyright"],
        address=config["repository"]["url"],
        version=metadata.version("slr"),
        style=styles(),
    )
    files = [file for _, files in listed for file in files]
    made = {page["page"]: Page(**page) for page in collect(files, one=one, style=book.style)}
    book.parts = [(caption, [made[file] for file in files]) for caption, files in listed]
    for _, pages in book.parts:
        pages[0].head = bool(re.match(r"part\d", Path(pages[0].page).name))
        for page in pages[1:]:
            page.below = pages[0].head
    for page in book.pages:
        for what in page.small:
            print(f"{page.page}: printed at less than half its size: {what!r}", file=sys.stderr)
    return book


def main(kinds: list[str]) -> int:
    """The exit code."""
    makers = {"pdf": pdf.write, "epub": epub.write}
    if not kinds or set(kinds) - set(makers):
        print("usage: python -m book.publish pdf epub", file=sys.stderr)
        return 2
    for kind in kinds:
        out = Path("_build") / kind / f"slr.{kind}"
        out.parent.mkdir(parents=True, exist_ok=True)
        said = makers[kind](read(one=kind == "pdf"), out)
        print(f"{out}: {said}, {out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
