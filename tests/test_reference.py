"""The reference pages are whole, and inline code leads to them: a small book with those pages."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import typer

import slr
from slr.cli import app as commands

pytest.importorskip("sphinx")
from sphinx.application import Sphinx

ROOT = Path(__file__).parent.parent
BOOK = ROOT / "book"
sys.path.insert(0, str(BOOK))
slr_reference = importlib.import_module("slr_reference")

PYTHON, CLI = "reference-python.html", "reference-cli.html"
# Inline code, and where it leads; nowhere: None.
CODE = {
    "slr.prune": f"{PYTHON}#slr.prune",
    "slr.Gram(H)": f"{PYTHON}#slr.Gram",
    "SLRLinear.from_refined": f"{PYTHON}#slr.SLRLinear.from_refined",
    "slr.patterns.NM": f"{PYTHON}#slr.NM",  # by another of its names
    "slr.matrix.pruning.prune": f"{PYTHON}#slr.prune",
    "slr.data.windows": f"{PYTHON}#slr.model.data.windows",
    "slr.data": f"{PYTHON}#module-slr.model.data",
    'slr.compress("tiny", slr.Recipe(), out="small")': f"{PYTHON}#slr.compress",
    "slr compress MODEL --out DIR": f"{CLI}#command-slr-compress",
    "slr bench": f"{CLI}#command-slr-bench",
    "--pattern dense": f"{CLI}#cmdoption-slr-compress-pattern",
    "--seqlen 512": f"{CLI}#cmdoption-slr-compress-seqlen",  # also of slr eval
    "--to gguf": f"{CLI}#cmdoption-slr-export-to",
    "--enable-lora": None,
    "--rows": None,  # of two commands
    "prune": None,
    "Gram matrix": None,
    "slr.nothing": None,
    "slr nothing": None,
    "Recipe.nothing": None,
}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The Sphinx application, built, and the folder of its pages."""
    source = tmp_path_factory.mktemp("source")
    for name in ("reference-python.md", "reference-cli.md"):
        (source / name).write_bytes((BOOK / name).read_bytes())
    lines = [f"{i}: `{code}`\n" for i, code in enumerate(CODE)]
    pages = ["reference-python", "reference-cli", "troubleshooting", "already"]
    (source / "index.md").write_text(
        "\n".join(["# Index\n", "```{toctree}", *pages, "```\n", *lines]), encoding="utf-8"
    )
    (source / "troubleshooting.md").write_text("# T\n", encoding="utf-8")
    (source / "already.md").write_text("# A\n\n[`slr.prune`](https://x.org)\n", encoding="utf-8")
    (source / "conf.py").write_text("", encoding="utf-8")
    config = {
        "extensions": ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "slr_reference"],
        "myst_enable_extensions": ["colon_fence", "dollarmath"],
        "default_role": "literal",
        "html_theme": "basic",
    }
    said = open(source / "said.txt", "w+", encoding="utf-8")  # noqa: SIM115
    out = source / "_build"
    app = Sphinx(
        source, source, out, source / "_trees", "html", config, said, said, freshenv=True
    )  # fmt: skip
    app.build()
    said.close()
    assert not app.statuscode
    text = (source / "said.txt").read_text(encoding="utf-8")
    assert "WARNING" not in text, text
    assert "ERROR" not in text, text
    return app, out


def test_inline_code_leads_to_its_entry(site):
    page = (site[1] / "index.html").read_text(encoding="utf-8")
    for i, (code, where) in enumerate(CODE.items()):
        line = re.search(rf"<p>{i}: (.*?)</p>", page, re.S)[1]
        shown = re.sub(r"<[^>]*>", "", line).replace("&quot;", '"')
        assert shown == code
        found = re.findall(r'href="(.*?)"', line)
        assert found == ([] if where is None else [where]), code


def test_anchors_are_there(site):
    for where in filter(None, CODE.values()):
        page, _, anchor = where.partition("#")
        assert f'id="{anchor}"' in (site[1] / page).read_text(encoding="utf-8"), where


def test_code_in_a_link_stays_there(site):
    page = (site[1] / "already.html").read_text(encoding="utf-8")
    assert 'href="https://x.org"' in page
    assert "#slr.prune" not in page


def test_every_public_name_has_an_entry(site):
    known = slr_reference.entries(site[0].env)
    for name in slr.__all__:
        assert slr_reference.thing(f"slr.{name}") in known, name


def test_every_command_and_option_has_an_entry(site):
    options = site[0].env.get_domain("std").progoptions
    for name, command in typer.main.get_command(commands).commands.items():
        assert slr_reference.place(site[0].env, {}, f"slr {name}"), name
        for param in command.params:
            if param.param_type_name == "option":
                assert (f"slr-{name}", param.opts[0]) in options, (name, param.name)


def inline_code():
    """Pieces of inline code in the book, with the file that each is from."""
    for file in [*sorted(BOOK.glob("*.md")), *sorted(ROOT.glob("[gn]*/*.ipynb"))]:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".ipynb":
            cells = json.loads(text)["cells"]
            text = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
        text = re.sub(r"^(`{3,}).*?^\1", "", text, flags=re.S | re.M)
        for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text):
            yield file.name, code


def test_names_in_the_text_exist_and_have_entries(site):
    """No page tells of a name or command that is not there, or is nowhere explained."""
    known = slr_reference.entries(site[0].env)
    found = set()
    for file, code in inline_code():
        name = slr_reference.full(code) or ""
        if name.startswith("slr.") or re.match(r"slr [a-z]", code):
            assert slr_reference.place(site[0].env, known, code), (file, code)
            found.add(code)
    assert len(found) > 40


def test_a_note_in_a_docstring_is_a_paragraph_of_its_own():
    lines = ["Sum.", "", "Cost: one", "    pass.", "Source: here.", "", "    code"]
    slr_reference.with_notes(None, "", "", None, None, lines)
    assert lines == [
        "Sum.", "", "", "**Cost.** one", "pass.", "", "**Source.** here.", "", "    code",
    ]  # fmt: skip
