"""The rendered book in a real browser: run by ``make browser-test`` after ``make book``.

A page of our own loads every page of the book in a frame, 1280 and 390 pixels wide, from a server
on localhost, and looks at what the reader would see.  Needs Chromium or Chrome on the PATH.
"""

import json
from pathlib import Path

import pytest

from book import browser

ROOT = Path(__file__).parent.parent.parent
BOOK = ROOT / "_build" / "html"
WIDTHS = (1280, 390)
# The theme tells the console what it does.
THEIRS = ("[PST]", "[togglebutton]", "Got invalid theme mode")

LOOK = """<!doctype html><meta charset="utf-8"><body><script>
const pages = PAGES, widths = WIDTHS, found = {};
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
async function load(page, width) {
  const frame = document.createElement("iframe");
  frame.style = `width:${width}px;height:900px;border:0`;
  frame.src = "/" + page;
  document.body.append(frame);
  await new Promise((done) => (frame.onload = done));
  const view = frame.contentWindow;
  for (let i = 0; i < 100 && !view.MathJax?.startup?.promise; i++) await wait(20);
  if (view.MathJax?.startup?.promise) await view.MathJax.startup.promise;
  await wait(100);
  return frame;
}
function clipped(doc, width) {
  // Wider than the page, and not inside something that scrolls: what is hidden is lost.
  return [...doc.querySelectorAll("article *")].filter((node) => {
    const box = node.getBoundingClientRect();
    if (!box.width || box.right <= width + 1) return false;
    if (node.closest("mjx-assistive-mml")) return false;  // for screen readers, never shown
    for (let up = node; up && up !== doc.body; up = up.parentElement) {
      const style = doc.defaultView.getComputedStyle(up);
      if (["auto", "scroll"].includes(style.overflowX)) return false;
      if (style.position === "fixed" || style.visibility === "hidden") return false;
    }
    return true;
  }).map((node) => node.outerHTML.slice(0, 120));
}
function scrollers(doc) {
  // Of what goes on to the right: that which does not show it, or no longer does at its end.
  const wide = [...doc.querySelectorAll("article *")].filter((node) => {
    const style = doc.defaultView.getComputedStyle(node);
    return ["auto", "scroll"].includes(style.overflowX) && node.clientWidth > 80
      && node.scrollWidth > node.clientWidth + 2;
  });
  return { count: wide.length, silent: wide.filter((node) => {
    const style = doc.defaultView.getComputedStyle(node);
    return style.maskImage === "none" && style.webkitMaskImage === "none";
  }).map((node) => node.outerHTML.slice(0, 120)) };
}
async function slide(doc) {
  // Moves every slider to its ends; tells those that a keyboard does not reach or that change
  // nothing, and pictures whose table is not folded away.
  const bad = [];
  for (const box of doc.querySelectorAll(".try")) {
    const says = () => box.querySelector(".says")?.textContent;
    const inputs = [...box.querySelectorAll("input[type=range]")];
    if (inputs.length < 2 || box.querySelector("details").open) bad.push(box.id);
    if (!box.querySelector(".chart .here")) bad.push(`${box.id}: no dot`);
    for (const input of inputs) {
      const was = says(), dot = box.querySelector(".here")?.outerHTML;
      input.focus();
      if (doc.activeElement !== input || input.tabIndex < 0) bad.push(`${box.id}: no focus`);
      for (const value of [input.min, input.max]) {
        input.value = value;
        input.dispatchEvent(new Event("input"));
        const told = [says(), box.querySelector(".here")?.outerHTML].join();
        if (/undefined|NaN/.test(box.textContent + box.querySelector("svg").outerHTML))
          bad.push(`${box.id}: not a number`);
        if (told === [was, dot].join() && value !== input.defaultValue)
          bad.push(`${box.id}: ${input.ariaLabel} ${value} changes nothing`);
        if (input.parentNode.querySelector("output").textContent !== input.ariaValueText)
          bad.push(`${box.id}: ${input.ariaLabel} says another value than it shows`);
      }
      input.value = input.defaultValue;
      input.dispatchEvent(new Event("input"));
      if (says() !== was) bad.push(`${box.id}: ${input.ariaLabel} does not come back`);
    }
  }
  return bad;
}
function look(frame, width) {
  const view = frame.contentWindow, doc = frame.contentDocument;
  const article = doc.querySelector("article");
  const figures = [...article.querySelectorAll("img")];
  const links = [...article.querySelectorAll("a[href]")].map((a) => a.getAttribute("href"));
  const controls = [...article.querySelectorAll("a[href], button, summary")]
    .filter((node) => node.checkVisibility({ checkVisibilityCSS: true }));
  return {
    red: [...doc.querySelectorAll(`mjx-merror, [data-mjx-error], mjx-container [style*="red"],
      mjx-container [fill="red"], mjx-container [mathcolor="red"]`)].map((e) => e.outerHTML),
    raw: (article.innerText.match(/\\\\(frac|lVert|circ|begin)\\b|\\$\\$/g) || []),
    maths: doc.querySelectorAll("mjx-container").length,
    broken: figures.filter((i) => !i.complete || !i.naturalWidth).map((i) => i.src),
    mute: figures.filter((i) => (i.alt || "").length < 40).map((i) => i.src),
    outside: view.performance.getEntriesByType("resource").map((e) => e.name)
      .filter((name) => !name.startsWith(location.origin) && !name.startsWith("data:")),
    wide: doc.documentElement.scrollWidth,
    clipped: clipped(doc, width),
    anchors: links.filter((h) => h.startsWith("#") && h.length > 1
      && !doc.getElementById(decodeURIComponent(h.slice(1)))),
    local: links.filter((h) => !/^(#|[a-z]+:)/.test(h)),
    unreachable: controls.filter((node) => { node.focus(); return doc.activeElement !== node; })
      .map((node) => node.outerHTML.slice(0, 120)),
    scrollers: scrollers(doc),
    // Of a formula in a line of a statement: wider than its place without being drawn so.
    nudged: [...doc.querySelectorAll("div.proof mjx-container:not([display='true'])")]
      .filter((node) => node.clientWidth && node.scrollWidth > node.clientWidth + 2
        && node.firstElementChild.getBoundingClientRect().width <= node.clientWidth + 2)
      .map((node) => node.parentNode.textContent.slice(0, 80)),
    faded: [...article.querySelectorAll(".goes-on")].filter((node) => node.clientWidth <= 80)
      .map((node) => node.parentNode.textContent.slice(0, 80)),
    wrapped: [...article.querySelectorAll("div.highlight pre")].filter(
      (node) => node.clientWidth && view.getComputedStyle(node).whiteSpace !== "pre")
      .map((node) => node.textContent.slice(0, 80)),
    sliders: doc.querySelectorAll(".try").length,
    drawings: article.querySelectorAll("[id^=draw-] img").length,
    skip: !!doc.querySelector("#pst-skip-link, a.skip-link, a[href='#main-content']"),
    language: doc.documentElement.lang,
  };
}
(async () => {
  for (const page of pages) {
    found[page] = {};
    for (const width of widths) {
      const frame = await load(page, width);
      const stuck = await slide(frame.contentDocument);
      frame.contentDocument.querySelectorAll("article details").forEach((d) => (d.open = true));
      await wait(100);
      found[page][width] = { stuck, ...look(frame, width) };
      frame.remove();
    }
  }
  await fetch("/-/told", { method: "POST", body: JSON.stringify(found) });
})();
</script>"""


def pages():
    skip = {"genindex.html", "search.html", "index.html"}
    found = [p.relative_to(BOOK).as_posix() for p in BOOK.rglob("*.html")]
    return sorted(p for p in found if p not in skip and not p.startswith("_"))


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    if not (BOOK / "index.html").is_file():
        pytest.fail("no book yet: run 'make book' first")
    script = LOOK.replace("PAGES", json.dumps(pages())).replace("WIDTHS", json.dumps(WIDTHS))
    with browser.served(BOOK, {"look.html": script}) as (address, told):
        said = browser.browse(
            "--virtual-time-budget=600000", "--window-size=1400,1000", "--dump-dom",
            "--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost",
            f"{address}/-/look.html",
        )  # fmt: skip
    assert told, f"the browser told nothing: {said[-500:]}"
    # "[…:INFO:CONSOLE(1)] "Uncaught …", source: http://localhost:1/book/intro.html (1)"
    Path(tmp_path_factory.getbasetemp() / "console").write_text(
        "\n".join(
            line
            for line in said.splitlines()
            if "CONSOLE" in line and not any(f'"{theirs}: ' in line for theirs in THEIRS)
        )
    )
    return told[0]


def everywhere(seen, what):
    return {f"{page} at {w}": at[what] for page, by in seen.items() for w, at in by.items()}


def test_every_chapter_is_there(seen):
    chapters = {f"notebooks/{p.stem}.html" for p in (ROOT / "notebooks").glob("*.ipynb")}
    assert chapters <= set(seen)
    for chapter in chapters:
        assert seen[chapter]["1280"]["maths"] > 5


@pytest.mark.parametrize(
    "what", ["red", "raw", "broken", "mute", "outside", "anchors", "wrapped", "stuck"]
)
def test_nothing_is_broken(seen, what):
    bad = {where: found for where, found in everywhere(seen, what).items() if found}
    assert not bad


def test_links_within_the_book_lead_somewhere(seen):
    for page, by in seen.items():
        for link in by["1280"]["local"]:
            target = (BOOK / page).parent / link.partition("#")[0].partition("?")[0]
            assert target.exists(), f"{page}: {link}"


def test_nothing_is_cut_off_on_a_phone(seen):
    bad = {page: by["390"]["clipped"][:3] for page, by in seen.items() if by["390"]["clipped"]}
    assert not bad
    assert all(by["390"]["wide"] <= 391 for by in seen.values())


def test_what_scrolls_shows_it(seen):
    found = everywhere(seen, "scrollers")
    assert not {where: at["silent"] for where, at in found.items() if at["silent"]}
    assert any(at["count"] for where, at in found.items() if where.endswith("390"))


def test_what_fits_does_not_fade(seen):
    """A letter in a sentence, narrower than the fade itself, would be lost in it."""
    bad = {where: found[:3] for where, found in everywhere(seen, "faded").items() if found}
    assert not bad


def test_a_formula_that_fits_does_not_scroll(seen):
    """Its text for screen readers, which nobody sees, is wider than the formula."""
    bad = {where: found[:3] for where, found in everywhere(seen, "nudged").items() if found}
    assert not bad


def test_the_sliders_are_there(seen):
    assert everywhere(seen, "sliders")["book/try-it.html at 390"] == 3


def test_every_chapter_has_a_drawing(seen):
    drawings = everywhere(seen, "drawings")
    assert all(n for page, n in drawings.items() if page.startswith("notebooks/"))
    assert drawings["book/intro.html at 1280"] == 1


def test_nothing_is_said_on_the_console(seen, tmp_path_factory):
    assert not (tmp_path_factory.getbasetemp() / "console").read_text()


def test_the_keyboard_reaches_everything(seen):
    bad = {where: found for where, found in everywhere(seen, "unreachable").items() if found}
    assert not bad
    assert all(everywhere(seen, "skip").values())
    assert set(everywhere(seen, "language").values()) == {"en"}
