"""A chapter needs the package and nothing else: it runs in an empty folder, as it does on Colab.

What every chapter imports of the package and reads of recorded results is tried here, and one
chapter is run; with ``SLR_CHAPTERS=all`` every one is, which the nightly workflow does.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
CHAPTERS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NIGHTLY = os.environ.get("SLR_CHAPTERS") == "all"
MINE = [path for path in CHAPTERS if NIGHTLY or path.stem.startswith("15")]
# A checkout that is installed to be edited would lend what the wheel lacks.
ALONE = """import sys
sys.meta_path[:] = [f for f in sys.meta_path if not f.__module__.startswith("__editable__")]
"""
SAY = "import pathlib, slr; print(slr.__file__, *pathlib.Path().iterdir())"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
DAY = 24 * 60 * 60


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of the package, and what was said while it was built."""
    home = tmp_path_factory.mktemp("wheel")
    unused = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("slr", "benchmarks", "results"):
        shutil.copytree(ROOT / name, home / "source" / name, ignore=unused)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, home / "source")
    alone = ["--no-deps", "--no-build-isolation", "--no-index", "--verbose"]
    done = subprocess.run(
        [*PIP, "wheel", *alone, "-w", home, home / "source"],
        check=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return next(home.glob("*.whl")), done.stdout


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Folder that holds what the wheel installs, found before any other."""
    site = tmp_path_factory.mktemp("installed") / "site"
    install = [*PIP, "install", "--quiet", "--no-deps", "--target", site, wheel[0]]
    subprocess.run(install, check=True)
    (site / "sitecustomize.py").write_text(ALONE, encoding="utf-8")
    return site


def environment(installed):
    return {**os.environ, "PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1"}


def sources(chapter):
    cells = json.loads(chapter.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]


def uses(chapter):
    """Its imports of the package, and calls that read the record that they name, as code."""
    for node in (n for source in sources(chapter) for n in ast.walk(ast.parse(source))):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "slr":
            yield ast.unparse(node)
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        if [type(a) for a in node.args] != [ast.Constant]:
            continue
        if node.func.id in ("record", "recorded"):  # the first prints more, and is the chapter's
            yield f"recorded({node.args[0].value!r})"
        if node.func.id == "runs":
            yield f"assert list({ast.unparse(node)})"
        if node.func.id == "folder" and (ROOT / "results" / node.args[0].value).is_dir():
            yield f"assert list({ast.unparse(node)}.rglob('*.json'))"


def names(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*.json")}


def test_the_wheel_lists_its_packages(wheel):
    file, said = wheel
    assert "running build_py" in said
    assert "is absent from the `packages` configuration" not in said
    assert file.stat().st_size < 12e6


def test_links_of_the_long_description_are_absolute(wheel):
    with zipfile.ZipFile(wheel[0]) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        headers, _, text = archive.read(name).decode().partition("\n\n")
    address = re.search(r"^Project-URL: Repository, (.*)$", headers, re.M)[1]
    assert "Description-Content-Type: text/markdown" in headers
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)]*)\)", text)
    assert len(links) > 10
    assert all(re.match("https?://", link) for _, link in links)
    own = [link.removeprefix(f"{address}/blob/main/") for _, link in links if address in link]
    raw = address.replace("github.com", "raw.githubusercontent.com")
    own += [link.removeprefix(f"{raw}/main/") for image, link in links if image and raw in link]
    assert len(own) > 10
    assert all((ROOT / path).exists() for path in own)


def test_every_table_and_record_comes_with_the_package(installed):
    files, there = names(ROOT / "results"), names(installed / "slr" / "results")
    elsewhere = {
        f"{name}/{file}"
        for name in ("specs", "published")
        for file in names(installed / "slr" / name)
    }
    assert len(there) > 150
    assert not there & elsewhere
    assert there | elsewhere == files


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_reads_no_file_of_the_repository(chapter):
    assert not [source for source in sources(chapter) if "../" in source]
    cells = json.loads(chapter.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    assert not re.findall(r"!\[[^\]]*\]\(\.\.|<img[^>]*\.\./|\{(?:figure|image)\} \.\.", text)


READ = ("recorded(", "runs(", "folder(")


def test_what_chapters_import_and_read_is_in_the_package(installed, tmp_path):
    found = {chapter.stem[:2]: list(dict.fromkeys(uses(chapter))) for chapter in CHAPTERS}
    reading = {n for n, lines in found.items() if any("records import" in x for x in lines)}
    assert reading == {f"{n:02}" for n in (*range(7, 13), *range(14, 20))}
    for number in reading:
        assert any(name in x for x in found[number] for name in READ), number
    lines = [line for chapter in found.values() for line in chapter]
    imports = [line for line in lines if line.startswith("from ")]
    code = "\n".join([*imports, *(line for line in lines if line not in imports)])
    done = subprocess.run(
        [sys.executable, "-c", f"{SAY}\n{code}"],
        cwd=tmp_path,
        env=environment(installed),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(installed / "slr" / "__init__.py")]


@pytest.mark.parametrize("chapter", MINE, ids=lambda path: path.stem)
def test_a_chapter_runs_in_an_empty_folder(chapter, installed, tmp_path):
    notebook = nbformat.read(chapter, as_version=4)
    say = nbformat.v4.new_code_cell(SAY)
    notebook.cells.insert(0, say)
    NotebookClient(
        notebook,
        resources={"metadata": {"path": str(tmp_path)}},
        timeout=None,
        startup_timeout=DAY,
        iopub_timeout=DAY,
    ).execute(env=environment(installed))
    assert say.outputs[0]["text"].split() == [str(installed / "slr" / "__init__.py")]
