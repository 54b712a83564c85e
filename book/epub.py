"""The book as an EPUB 3: a page of the book a file, with a table of contents of both kinds."""

import html
import mimetypes
import re
import uuid
import zipfile
from datetime import datetime, timezone
from pathlib import Path
from xml.etree import ElementTree

from book import links

BUILT = Path("_build") / "html"
HEAD = '<?xml version="1.0" encoding="utf-8"?>\n'
CONTAINER = (
    HEAD + '<container version="1.0" xmlns="urn:oasis:names:tc:opendocument:xmlns:container">'
    '<rootfiles><rootfile full-path="book/book.opf" media-type="application/oebps-package+xml"/>'
    "</rootfiles></container>\n"
)


def xhtml(title: str, body: str) -> str:
    """A file of the book."""
    return (
        f'{HEAD}<!DOCTYPE html>\n<html xmlns="http://www.w3.org/1999/xhtml"'
        ' xmlns:epub="http://www.idpf.org/2007/ops" lang="en" xml:lang="en">'
        f"<head><title>{html.escape(title)}</title>"
        f'<link rel="stylesheet" href="paper.css"/></head><body>{body}</body></html>\n'
    )


def tree(book) -> list[tuple[str, str, list]]:
    """(title, file, what is below) of every entry; a caption leads to its first page."""
    found = []
    for caption, pages in book.parts:
        listed = [(page.title, f"{page.name}.xhtml", []) for page in pages]
        if not caption:
            found += listed
        elif pages[0].head:
            found.append((*listed[0][:2], listed[1:]))
        else:
            found.append((caption, listed[0][1], listed))
    return found


def nav(entries: list[tuple[str, str, list]]) -> str:
    """The list of EPUB 3."""
    items = "".join(
        f'<li><a href="{file}">{html.escape(title)}</a>{nav(below) if below else ""}</li>'
        for title, file, below in entries
    )
    return f"<ol>{items}</ol>"


def points(entries: list[tuple[str, str, list]], count) -> str:
    """The same for readers of EPUB 2."""
    return "".join(
        f'<navPoint id="p{next(count)}"><navLabel><text>{html.escape(title)}</text></navLabel>'
        f'<content src="{file}"/>{points(below, count)}</navPoint>'
        for title, file, below in entries
    )


def ncx(book, identifier: str) -> str:
    """toc.ncx."""
    return (
        f'{HEAD}<ncx xmlns="http://www.daisy.org/z3986/2005/ncx/" version="2005-1"><head>'
        f'<meta name="dtb:uid" content="{identifier}"/></head>'
        f"<docTitle><text>{html.escape(book.title)}</text></docTitle>"
        f"<navMap>{points(tree(book), iter(range(1_000_000)))}</navMap></ncx>\n"
    )


def package(book, identifier: str, images: dict[str, str]) -> str:
    """The list of all files, and their order."""
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    files = [
        ("nav", "nav.xhtml", "application/xhtml+xml", ' properties="nav"'),
        ("ncx", "toc.ncx", "application/x-dtbncx+xml", ""),
        ("css", "paper.css", "text/css", ""),
    ]
    for page in book.pages:
        drawn = ' properties="svg"' if "<svg" in page.body else ""
        files.append((f"page-{page.name}", f"{page.name}.xhtml", "application/xhtml+xml", drawn))
    for i, file in enumerate(images):
        kind = mimetypes.guess_type(file)[0]
        files.append((f"image-{i}", f"images/{file}", kind, ""))
    manifest = "".join(
        f'<item id="{name}" href="{file}" media-type="{kind}"{more}/>'
        for name, file, kind, more in files
    )
    spine = "".join(f'<itemref idref="page-{page.name}"/>' for page in book.pages)
    return (
        f'{HEAD}<package xmlns="http://www.idpf.org/2007/opf" version="3.0"'
        ' unique-identifier="id" xml:lang="en">'
        '<metadata xmlns:dc="http://purl.org/dc/elements/1.1/">'
        f'<dc:identifier id="id">{identifier}</dc:identifier>'
        f"<dc:title>{html.escape(book.title)}</dc:title><dc:language>en</dc:language>"
        f"<dc:creator>{html.escape(book.author)}</dc:creator>"
        f"<dc:rights>© {html.escape(book.rights)}</dc:rights>"
        f'<meta property="dcterms:modified">{now}</meta></metadata>'
        f'<manifest>{manifest}</manifest><spine toc="ncx">{spine}</spine></package>\n'
    )


def plain(picture: bytes) -> bytes:
    """An SVG of matplotlib's as EPUB wants it: no type from elsewhere, a space has a path too."""
    picture = re.sub(rb"<!DOCTYPE[^>]*>", b"", picture, count=1)
    return re.sub(rb"<path(?![^>]*\sd=)", b'<path d=""', picture)


def write(book, out: Path) -> str:
    """Write the EPUB; says what is in it."""
    identifier = f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'{book.address}#{book.version}')}"
    images = {Path(file).name: file for page in book.pages for file in page.images}
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        # The type comes first and unpacked: readers look for it at byte 38.
        archive.writestr("mimetype", "application/epub+zip", zipfile.ZIP_STORED)
        archive.writestr("META-INF/container.xml", CONTAINER)
        archive.writestr("book/book.opf", package(book, identifier, images))
        table = f'<nav epub:type="toc"><h1>Contents</h1>{nav(tree(book))}</nav>'
        archive.writestr("book/nav.xhtml", xhtml("Contents", table))
        archive.writestr("book/toc.ncx", ncx(book, identifier))
        archive.writestr("book/paper.css", book.style)
        for page in book.pages:
            body = page.body.replace(' xmlns="http://www.w3.org/1999/xhtml"', "")
            archive.writestr(f"book/{page.name}.xhtml", xhtml(page.title, body))
        for name, file in images.items():
            content = (BUILT / file).read_bytes()
            archive.writestr(
                f"book/images/{name}", plain(content) if name[-4:] == ".svg" else content
            )
    wrong = faults(out)
    if wrong:
        raise SystemExit("\n".join([f"{out} is not fit to be read:", *wrong[:20]]))
    return f"{len(book.pages)} pages, {len(images)} pictures"


def faults(file: Path) -> list[str]:
    """What is wrong with an EPUB: its type, its XML, its list of files, its links."""
    wrong = []
    with zipfile.ZipFile(file) as archive:
        first, names = archive.infolist()[0], set(archive.namelist())
        if first.filename != "mimetype" or first.compress_type != zipfile.ZIP_STORED:
            wrong.append("mimetype is not the first file, or packed")
        texts = {n: archive.read(n) for n in names if not n.endswith((".png", ".gif", ".css"))}
    for name, text in texts.items():
        try:
            name == "mimetype" or ElementTree.fromstring(text)
        except ElementTree.ParseError as error:
            wrong.append(f"{name}: {error}")
    listed = set(re.findall(r'<item [^>]*href="([^"]+)"', texts["book/book.opf"].decode()))
    there = {name.removeprefix("book/") for name in names if name.startswith("book/")}
    wrong += [f"{name}: not listed, or not there" for name in listed ^ (there - {"book.opf"})]
    pages = {n: links.Page(t.decode()) for n, t in texts.items() if n.endswith(".xhtml")}
    return wrong + links.internal(pages, names.__contains__)
