"""The PDF and the EPUB before a browser prints them: contents, links, files, XML."""

import os
import re
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import pikepdf
import pytest
import yaml

from book import build, epub, pdf, publish

ROOT = Path(__file__).parent.parent

SVG = '<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="W"><path d="M0 0"/></svg>'
PICTURE = b'<!DOCTYPE svg PUBLIC "x" "http://y.dtd"><svg><path id="a"/><path id="b" d="M1"/></svg>'


def page(name, body, **more):
    body = f'<section xmlns="http://www.w3.org/1999/xhtml"><h1>{name} &amp; co</h1>{body}</section>'
    return publish.Page(f"{name}.html", name, f"{name} & co", body, [], [], **more)


@pytest.fixture
def book(tmp_path, monkeypatch):
    (tmp_path / "_images").mkdir()
    (tmp_path / "_images/p.svg").write_bytes(PICTURE)
    for module in (epub, pdf):
        monkeypatch.setattr(module, "BUILT", tmp_path)
    made = publish.Book("A & B", "Me", "2026", "https://e.org", "1.0", "p { margin: 0; }")
    first = page("part1", f"<p>{SVG}</p>", head=True)
    second = page("one", '<h2 id="s">.</h2><img src="images/p.svg" alt="a picture"/>', below=True)
    second.images = ["_images/p.svg"]
    made.parts = [
        ("", [page("intro", '<a href="one.xhtml#s">.</a>')]),
        ("Part", [first, second]),
        ("Back", [page("end", "")]),
    ]
    return made


def test_contents_are_those_of_the_book():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    files = [file for _, files in publish.contents(toc) for file in files]
    assert files[0] == "book/intro.html"
    written = re.findall(r"(?:file|root): (\S+)", (ROOT / "_toc.yml").read_text(encoding="utf-8"))
    assert files == [f"{file}.html" for file in written]


def test_contents_that_are_nested():
    toc = {"root": "a", "parts": [{"chapters": [{"file": "b", "sections": [{"file": "c"}]}]}]}
    assert publish.contents(toc) == [("", ["a.html"]), ("", ["b.html", "c.html"])]


def test_an_epub_is_whole(book, tmp_path):
    out = tmp_path / "x.epub"
    assert epub.write(book, out) == "4 pages, 1 pictures"
    with zipfile.ZipFile(out) as archive:
        assert out.read_bytes()[30:58] == b"mimetypeapplication/epub+zip"
        assert archive.testzip() is None
        package = ElementTree.fromstring(archive.read("book/book.opf"))
        listed = {item.get("href"): item for item in package.iter() if item.tag.endswith("}item")}
        assert listed["part1.xhtml"].get("properties") == "svg"
        assert listed["one.xhtml"].get("properties") is None
        assert listed["images/p.svg"].get("media-type") == "image/svg+xml"
        table = archive.read("book/nav.xhtml").decode()
        assert '<a href="part1.xhtml">part1 &amp; co</a><ol><li><a href="one.xhtml">' in table
        assert '<li><a href="end.xhtml">Back</a><ol>' in table
        assert archive.read("book/images/p.svg").count(b" d=") == 2
        assert b"DOCTYPE" not in archive.read("book/images/p.svg")


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("<p>", "mismatched tag"),
        ('<a href="gone.xhtml">.</a>', "gone.xhtml is not there"),
        ('<a href="one.xhtml#gone">.</a>', "has no such anchor"),
        ('<img src="images/gone.svg"/>', "images/gone.svg is not there"),
    ],
)
def test_an_epub_with_a_fault_is_refused(book, tmp_path, body, fault):
    book.parts[0][1][0].body += body
    with pytest.raises(SystemExit, match=fault):
        epub.write(book, tmp_path / "x.epub")


def test_what_an_epub_must_list(book, tmp_path):
    out = tmp_path / "x.epub"
    epub.write(book, out)
    with zipfile.ZipFile(out, "a") as archive:
        archive.writestr("book/more.css", "")
    assert epub.faults(out) == ["more.css: not listed, or not there"]


def test_the_printed_document(book):
    book.parts[0][1][0].body = "<h1>intro</h1>"
    text = pdf.document(book, {"one": 7})
    html = "{http://www.w3.org/1999/xhtml}"
    root = ElementTree.fromstring(text)
    assert [e.text for e in root.iter(f"{html}h2")] == ["one & co"]  # a chapter, below its part
    assert [e.get("href") for e in root.iter(f"{html}a")][2:4] == ["#one", "#end"]
    assert "<span>7</span>" in text
    assert {e.get("id") for e in root.iter(f"{html}section")} >= {"intro", "part1", "one", "end"}


def test_a_document_with_a_fault_is_not_printed(book, tmp_path):
    with pytest.raises(SystemExit, match=r"one\.xhtml#s is not there"):
        pdf.write(book, tmp_path / "x.pdf")


def test_where_chapters_start():
    with pikepdf.new() as made:
        for _ in range(3):
            made.add_blank_page()
        place = pikepdf.Array([made.pages[1].obj, pikepdf.Name("/XYZ"), 0, 0, 0])
        made.Root.Dests = pikepdf.Dictionary({"/one": place})
        assert pdf.starts(made) == {"one": 2}
        with made.open_outline() as outline:
            outline.root.append(pikepdf.OutlineItem("Part", 0))
            outline.root[0].children.append(pikepdf.OutlineItem("Chapter", 1))
        with made.open_outline() as outline:
            assert pdf.entries(outline.root) == 2


def test_a_page_that_was_not_built(tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "BUILT", tmp_path)
    with pytest.raises(SystemExit, match="run 'make book' first"):
        publish.collect(["book/intro.html"], one=True, style="")


def test_a_page_that_is_no_longer_rendered_is_deleted(tmp_path):
    names = ("9_old.html", "9_new.html", "_static/x.html", "index.html")
    old, new, static, index = (tmp_path / name for name in names)
    for file, at in ((old, 100), (new, 200), (static, 100), (index, 100)):
        file.parent.mkdir(exist_ok=True)
        file.write_text("page")
        os.utime(file, (at, at))
    build.remove_old(tmp_path, 150)
    assert [file.exists() for file in (old, new, static, index)] == [False, True, True, True]
