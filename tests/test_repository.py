"""The files around the package agree with one another."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def pins():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {name.lower().replace("_", "-"): Version(version) for name, version in pairs}


def requirements(project):
    extras = project["optional-dependencies"]
    named = [d for extra, deps in extras.items() if extra != "all" for d in deps]
    return [Requirement(text) for text in project["dependencies"] + named]


def test_every_requirement_is_pinned_within_its_range(project, pins):
    for requirement in requirements(project):
        name = requirement.name.lower().replace("_", "-")
        assert name in pins, f"constraints.txt lacks {name}"
        assert requirement.specifier.contains(pins[name]), f"{requirement} against {pins[name]}"


def test_torch_is_pinned_as_the_makefile_installs_it(pins):
    assert str(pins["torch"]) == "2.13.0"


def test_all_names_every_extra(project):
    extras = project["optional-dependencies"]
    listed = re.fullmatch(r"slr\[(.*)\]", extras["all"][0])[1].split(",")
    assert sorted(listed) == sorted(set(extras) - {"all"})


def test_environment_installs_the_same(project):
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    conda = [d for d in environment["dependencies"] if isinstance(d, str)]
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert pip[1:] == ["-c constraints.txt", "-e .[all]"]
    assert pip[0].startswith("--extra-index-url https://download.pytorch.org/")
    python = next(d for d in conda if d.startswith("python=")).split("=")[1]
    assert Requirement(f"x{project['requires-python']}").specifier.contains(python)


def test_one_repository_address(project):
    address = project["urls"]["Repository"]
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    assert config["repository"]["url"] == address
    name = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+)", address)[1]
    places = (
        r"(?:git\+https://github\.com|mybinder\.org/v2/gh|google\.com/github)/([\w.-]+/[\w.-]+)"
    )
    pages = [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("guide/*.ipynb"), *ROOT.glob("book/*.md")]
    for path in [*pages, ROOT / "README.md"]:
        found = re.findall(places, path.read_text(encoding="utf-8"))
        assert set(found) <= {name}, path.name
        assert found or path.suffix == ".md", path.name  # a chapter installs the package on Colab


def test_make_repo_sets_the_address_everywhere(tmp_path, project):
    def git(*arguments):
        command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)

    old = project["urls"]["Repository"].removeprefix("https://github.com/")
    names = ["pyproject.toml", "_config.yml", "README.md", "Makefile", "book/how-to-use.md"]
    names += ["CITATION.cff", "CHANGELOG.md"]
    names += [str(p.relative_to(ROOT)) for p in ROOT.glob("[gn]*/*.ipynb")]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    git("init", "-q")
    git("add", "-A")
    make = ["make", "-s", "repo", "URL=https://github.com/some-one/their.slr/"]
    subprocess.run(make, cwd=tmp_path, check=True)
    for name in names:
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert old not in text, name
        assert name == "Makefile" or "some-one/their.slr" in text, name
    bad = subprocess.run(
        ["make", "-s", "repo", "URL=nonsense"], cwd=tmp_path, capture_output=True, text=True
    )
    assert bad.returncode
    assert "must look like" in bad.stdout


PAGES = sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("slr/**/*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_to_files_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    files = [link.partition("#")[0] for link in links if not re.match(r"https?:|#", link)]
    assert [file for file in files if not (page.parent / file).exists()] == []


def test_how_to_cite(project):
    import slr

    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["cff-version"] == "1.2.0"
    assert cited["message"]
    assert cited["title"]
    assert cited["version"] == slr.__version__
    assert cited["repository-code"] == project["urls"]["Repository"]
    assert " AND ".join(cited["license"]) == project["license"]
    assert [author["name"] for author in cited["authors"]] == [
        a["name"] for a in project["authors"]
    ]
    [paper] = cited["references"]
    bib = (ROOT / "book/references.bib").read_text(encoding="utf-8").partition("\n}")[0]
    for words in (paper["title"], paper["url"], str(paper["year"]), f"{paper['start']}--"):
        assert words in bib
    families = [author["family-names"] for author in paper["authors"]]
    assert families == re.findall(r"(?:= \{|and )(\w+), ", bib)


def test_the_changelog_is_of_this_version():
    import slr

    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    first = re.search(r"^## \[(.*?)\](.*)", text, re.M)
    assert slr.__version__ in text
    assert first[1] == "Unreleased" or re.fullmatch(r" - \d{4}-\d\d-\d\d", first[2])
    kinds = set(re.findall(r"^### (.*)", text, re.M))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_forms_for_issues():
    forms = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
    assert [form.stem for form in forms] == ["bug", "config", "erratum"]
    for form in forms[::2]:
        made = yaml.safe_load(form.read_text(encoding="utf-8"))
        assert made["name"]
        assert made["description"]
        ids = [field["id"] for field in made["body"]]
        assert len(ids) == len(set(ids))
        assert all(field["attributes"]["label"] for field in made["body"])


def test_every_python_is_resolved_and_tested(project):
    start = "Programming Language :: Python :: "
    told = [c.removeprefix(start) for c in project["classifiers"] if c.startswith(start)]
    assert min(Version(v) for v in told) == Version(project["requires-python"].removeprefix(">="))
    resolved = re.search(r"for version in (.*?);", (ROOT / "Makefile").read_text())[1].split()
    workflow = yaml.safe_load((ROOT / ".github/workflows/nightly.yml").read_text())
    tested = workflow["jobs"]["pythons"]["strategy"]["matrix"]["python"]
    assert told == resolved == tested


def test_workflows_call_what_there_is():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {
        name for names in re.findall(r"^([a-z -]+):(?!=)", makefile, re.M) for name in names.split()
    }
    for file in ROOT.glob(".github/workflows/*.yml"):
        for line in re.findall(r"make ((?:[a-z-]+ ?)+)", file.read_text(encoding="utf-8")):
            assert set(line.split()) <= targets, file.name


def test_every_page_of_the_contents_exists_and_every_chapter_is_in_it():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    pages = [toc["root"]] + [c["file"] for part in toc["parts"] for c in part["chapters"]]
    for page in pages:
        assert (ROOT / f"{page}.md").is_file() or (ROOT / f"{page}.ipynb").is_file(), page
    chapters = sorted(f"notebooks/{p.stem}" for p in ROOT.glob("notebooks/*.ipynb"))
    assert [page for page in pages if page.startswith("notebooks/")] == chapters


def test_public_names_are_documented():
    import importlib
    import inspect
    import pkgutil

    import slr

    for info in pkgutil.walk_packages(slr.__path__, "slr."):
        module = importlib.import_module(info.name)
        assert module.__doc__, info.name
        for name in getattr(module, "__all__", []):
            thing = getattr(module, name)
            if callable(thing) and not isinstance(thing, type(int | str)):
                assert inspect.getdoc(thing), f"{info.name}.{name}"


def test_the_readmes_python_runs(capsys):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    exec(code, {})
    errors, shape = capsys.readouterr().out.splitlines()
    one_shot, refined = map(float, errors.split())
    assert refined < one_shot
    assert shape == "torch.Size([3, 704])"


def test_the_readmes_table_is_the_measured_one():
    """What the README's claims rest on: refined < SVD < pruned, in perplexity and in error."""
    import json

    found = ROOT / "results/measured/tiny"
    dense = json.loads((found / "dense/dense.json").read_text())["perplexity"]
    for mask in ("magnitude", "wanda"):  # SparseGPT's weights have moved; see chapter 11
        for column in ("0.5", "0.6", "0.7", "2-4", "4-8"):
            pruned, svd, refined = (
                json.loads((found / f"{mask}-{repair}" / f"{column}.json").read_text())
                for repair in ("pruned", "svd", "refined")
            )
            for value in ("perplexity", "error"):
                assert refined[value] < svd[value] < pruned[value], (mask, column)
            assert refined["perplexity"] > dense
            for name in ("commit", "date", "processor", "versions"):
                assert refined["about"][name], name


def test_every_public_function_of_one_matrix_has_an_example_and_a_cost():
    import importlib
    import inspect
    import pkgutil

    import slr.matrix

    names = [m.name for m in pkgutil.walk_packages(slr.matrix.__path__, "slr.matrix.")]
    for name in [*names, "slr.layer.bits", "slr.layer.packing"]:
        if name.endswith(".checks"):  # errors, not results
            continue
        module = importlib.import_module(name)
        for public in module.__all__:
            thing = getattr(module, public)
            if inspect.isfunction(thing):
                assert ">>>" in thing.__doc__, f"{name}.{public}"
                assert "Cost" in thing.__doc__, f"{name}.{public}"


def test_reading_times_are_true():
    """What a chapter states is within a fifth, or five minutes, of what its length says."""
    import nbformat

    sys.path.insert(0, str(ROOT / "book"))
    import counts

    for file in sorted(ROOT.glob("notebooks/*.ipynb")):
        cells = nbformat.read(file, as_version=4).cells
        stated = int(re.search(r"\*Time:\* (\d+) minutes to read; ", cells[0].source)[1])
        found = counts.minutes(cells)
        assert abs(stated - found) <= max(5, 0.2 * found), f"{file.name}: about {found:.0f}"


def test_maps_are_drawn_from_what_chapters_say():
    sys.path.insert(0, str(ROOT / "book"))
    import maps

    for name, text in maps.drawn().items():
        assert (maps.FOLDER / f"{name}.svg").read_text(encoding="utf-8") == text, name
    page = (ROOT / "book" / "how-to-use.md").read_text(encoding="utf-8")
    told = re.search(r"map-chapters\.svg\n.*?:alt: (.*?)\n", page, re.S)[1]
    assert set(map(int, re.findall(r"\d+", told))) == set(maps.CHAPTERS)


def letters(text):
    """What stands in dollars in the first column of tables, each letter by itself."""
    found = set()
    for cell in re.findall(r"^\| ([^|]*\$[^|]*) \|", text, re.M):
        for formula in re.findall(r"\$([^$]+)\$", cell):
            found |= {part.strip() for part in re.split(r", |\\ge", formula.split("=")[0])}
    return {letter for letter in found if not letter.startswith("\\dots")}


def test_notation_has_every_letter_of_every_chapter():
    import json

    page = (ROOT / "book" / "notation.md").read_text(encoding="utf-8")
    common = letters(page.split("## Letters of one chapter")[0])
    rows = re.findall(r"^\| \[(\d+)\]\(\.\./notebooks/(\S+)\) \| (.*) \|$", page, re.M)
    files = sorted(ROOT.glob("notebooks/*.ipynb"))
    assert [stem for _, stem, _ in rows] == [file.stem for file in files]
    for (number, _, row), file in zip(rows, files, strict=True):
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
        table = text[text.index("| symbol | ") :].split("\n\n")[0]
        own = {
            part.strip()
            for formula in re.findall(r"\$([^$]+)\$", row)
            for part in re.split(r", |\\ge", formula.split("=")[0])
        }
        missing = letters(table) - common - own
        assert not missing, f"chapter {number}: {missing}"
