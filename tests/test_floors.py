"""The shape of the package: floors as folders, imports that go down, names and sizes."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import slr

ROOT = Path(__file__).parent.parent
FLOORS = ["matrix", "layer", "model", "methods", "checkpoint", "evaluate", "chapters"]
FILES = sorted((ROOT / "slr").rglob("*.py"))
LINT = "import sys; from importlinter.cli import lint_imports_command; lint_imports_command()"


def lint(folder):
    done = subprocess.run(
        [sys.executable, "-c", LINT, "--no-cache"], cwd=folder, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def copy(tmp_path):
    """The package and its contracts, to plant faults in."""
    shutil.copytree(ROOT / "slr", tmp_path / "slr", ignore=shutil.ignore_patterns("model/*.s*"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_imports_go_down_and_a_planted_one_is_seen(copy):
    code, told = lint(copy)
    assert code == 0, told
    assert "2 kept, 0 broken" in told
    file = copy / "slr" / "matrix" / "lowrank.py"
    text = file.read_text()
    file.write_text(text + "\n\ndef up():\n    from slr.layer.bits import pack_mask\n")
    code, told = lint(copy)
    assert code == 1
    assert "slr.matrix.lowrank -> slr.layer.bits" in told
    file.write_text(text + "\n\ndef round():\n    from slr.matrix.pcp import pursue\n")
    code, told = lint(copy)
    assert code == 1
    assert "no circles, at any depth BROKEN" in told


def test_each_folder_says_what_lives_there_and_what_it_may_import():
    for floor in FLOORS:
        text = ast.get_docstring(ast.parse((ROOT / "slr" / floor / "__init__.py").read_text()))
        assert len(text.splitlines()) == 3, floor
        assert "Imports" in text, floor


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_modules_are_small_and_no_function_has_their_name(file):
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= 350
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef):
            continue
        doc = ast.get_docstring(node, clean=False)
        code = node.end_lineno - node.lineno + 1 - (doc.count("\n") + 1 if doc else 0)
        assert code <= 60, node.name
    defined = {n.name for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)}
    assert file.stem not in defined


def test_importing_slr_is_light_and_every_public_name_is_there():
    code = (
        "import sys, slr; late = [m for m in sys.modules if m.startswith('slr.') and "
        "m.split('.')[1] in ('methods', 'checkpoint', 'evaluate', 'chapters')]; "
        "print(late, 'transformers' in sys.modules); "
        "print(all(getattr(slr, name) is not None for name in slr.__all__))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[] False", "True"]
    with pytest.raises(AttributeError, match="has no attribute 'compres'"):
        slr.compres  # noqa: B018
