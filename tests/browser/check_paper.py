"""What collect.js makes of a page for paper and for readers: run by ``make browser-test``."""

import shutil
from xml.etree import ElementTree

import pikepdf
import pytest

from book import browser, publish
from course.slides import mathjax

PAGE = r"""<html><head><script>window.MathJax = {"options": {"processHtmlClass": "math"}}</script>
</head><body><nav>around it</nav><article>
<section class="mathjax_ignore" id="one">
<h1>One<a class="headerlink" href="#one">#</a></h1>
<p>A <span class="math">\(W\)</span>, <code>\(not\)</code> and<br>
<a href="two.html#two">two</a>, <a href="_sources/one.md">its source</a>, <a href="https://e.org">e</a></p>
<div class="math" id="eq">\[S + BA\]</div>
<div class="admonition dropdown" id="d"><p class="admonition-title">Answer</p><p>42</p></div>
<details class="hide above-input"><summary><p class="expanded">Hide</p><p>Show</p></summary>
<pre>code</pre></details>
<dl><dt>f(<dl><dd>x,</dd><dd>y</dd></dl>)</dt><dd>does</dd></dl>
<table><tr><td style="white-space: nowrap">WIDE</td></tr></table>
<script>boast()</script><noscript><p>without scripts</p></noscript>
<button>copy</button>
<img src="_images/p.svg" alt="picture"></section></article>
</body></html>"""
WIDE = "a cell that is wider than the page " * 6


@pytest.fixture
def pages(tmp_path, monkeypatch):
    (tmp_path / "_images").mkdir()
    (tmp_path / "_static/mathjax").mkdir(parents=True)
    shutil.copy(mathjax(), tmp_path / "_static/mathjax")
    (tmp_path / "_images/p.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    )
    (tmp_path / "one.html").write_text(PAGE.replace("WIDE", WIDE), encoding="utf-8")
    (tmp_path / "two.html").write_text("<article><h1 id='two'>Two</h1></article>", encoding="utf-8")
    monkeypatch.setattr(publish, "BUILT", tmp_path)
    return tmp_path


def collected(one):
    found = publish.collect(["one.html", "two.html"], one=one, style=publish.styles())
    assert [page["title"] for page in found] == ["One", "Two"]
    body = found[0]["body"]
    ElementTree.fromstring(f"<x>{body}</x>")
    for gone in (
        "around it",
        "boast",
        "copy",
        "headerlink",
        "_sources",
        "Hide",
        "mjx-",
        "noscript",
    ):
        assert gone not in body
    for kept in (
        "its source",
        "<code>\\(not\\)</code>",
        "https://e.org",
        "<summary>Code</summary>",
    ):
        assert kept in body
    assert '<div class="lines"><div>x,</div><div>y</div></div>' in body
    assert body.count("<svg ") == 2
    assert 'aria-label="S + BA"' in body
    return found[0]


def test_a_page_for_paper(pages):
    page = collected(one=True)
    assert 'href="#two--two"' in page["body"]
    assert 'id="one--eq"' in page["body"]
    assert page["body"].count("<details") == page["body"].count('open=""') == 2
    assert "zoom" in page["body"]
    assert page["small"] == []


def test_a_page_for_readers(pages):
    page = collected(one=False)
    assert 'href="two.xhtml#two"' in page["body"]
    assert 'src="images/p.svg"' in page["body"]
    assert page["images"] == ["_images/p.svg"]
    assert 'id="d"' in page["body"]
    assert 'open=""' not in page["body"]
    assert "zoom" not in page["body"]


@pytest.mark.parametrize(("right", "wrong"), [(r"\(W\)", r"\(\wrong\)"), ("p.svg", "gone.svg")])
def test_a_page_with_a_fault_is_refused(pages, right, wrong):
    text = (pages / "one.html").read_text(encoding="utf-8")
    (pages / "one.html").write_text(text.replace(right, wrong), encoding="utf-8")
    with pytest.raises(SystemExit, match="not fit to be published"):
        collected(one=True)


def test_what_would_be_too_small_to_read_is_told(pages):
    text = (pages / "one.html").read_text(encoding="utf-8")
    (pages / "one.html").write_text(text.replace(WIDE, WIDE * 3), encoding="utf-8")
    assert collected(one=True)["small"] == [WIDE[:60]]


def test_the_print_has_an_outline_and_named_places(tmp_path):
    browser.print_pdf(
        tmp_path,
        '<html xmlns="http://www.w3.org/1999/xhtml"><body><h1 id="a">A</h1>'
        '<h2 id="b" style="break-before: page">B</h2><a href="#b">to it</a></body></html>',
        tmp_path / "x.pdf",
    )
    from book import pdf

    with pikepdf.open(tmp_path / "x.pdf") as made, made.open_outline() as outline:
        assert pdf.starts(made) == {"b": 2}
        assert pdf.entries(outline.root) == 2
