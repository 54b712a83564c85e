"""What the guide must have, read from its file; nbval runs it."""

import ast
import json
import re
from pathlib import Path

import pytest
import typer

from slr.cli import app

ROOT = Path(__file__).parent.parent
GUIDES = sorted((ROOT / "guide").glob("*.ipynb"))
STEPS = ("Choose", "A text", "How long", "Compress", "Evaluate", "Export", "Serve")


@pytest.fixture(params=GUIDES, ids=lambda path: path.stem)
def cells(request):
    return json.loads(request.param.read_text(encoding="utf-8"))["cells"]


def sources(cells, kind):
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


def test_every_step_says_how_to_tell_that_it_went_wrong():
    text = "\n".join(
        sources(json.loads(GUIDES[0].read_text(encoding="utf-8"))["cells"], "markdown")
    )
    parts = re.split(r"^## ", text, flags=re.M)[1:]
    steps = [part for part in parts if re.match(r"\d", part)]
    assert [part.split("\n")[0][:2] for part in steps] == [f"{i}." for i in range(1, 8)]
    for name, part in zip(STEPS, steps, strict=True):
        assert part[3:].startswith(name)
        assert "> **It went wrong if**" in part, name


def test_was_executed_without_errors_and_is_quiet(cells):
    for cell in cells:
        if cell["cell_type"] == "code":
            start = "".join(cell["source"])[:60]
            assert cell["execution_count"] is not None, f"never executed: {start!r}"
            assert "\r" not in json.dumps(cell["outputs"]), start
            kinds = {output["output_type"] for output in cell["outputs"]}
            assert "error" not in kinds, f"error in {start!r}"
            streams = {output.get("name") for output in cell["outputs"]}
            assert "stderr" not in streams, f"writes to standard error: {start!r}"


def test_cells_are_short(cells):
    for source in sources(cells, "code"):
        assert source.count("\n") < 30, source[:60]
        assert max(map(len, source.splitlines())) < 80, source[:60]


def test_same_setup_cell_as_the_chapters(cells):
    chapter = json.loads(next((ROOT / "notebooks").glob("01_*.ipynb")).read_text(encoding="utf-8"))
    mine, theirs = (
        next(c for c in x if c["cell_type"] == "code") for x in (cells, chapter["cells"])
    )
    assert mine["source"] == theirs["source"]
    assert mine["metadata"]["tags"] == theirs["metadata"]["tags"]


def test_commands_in_the_text_take_the_options_that_they_are_given(cells):
    """Those that are run are known to work; these are only shown."""
    commands = typer.main.get_command(app).commands
    shown = [c for text in sources(cells, "markdown") for c in re.findall(r"`(slr [^`]+)`", text)]
    assert len(shown) > 4
    for text in shown:
        name, known = text.split()[1], set()
        for param in commands[name].params:
            known |= set(getattr(param, "opts", ()))
        assert set(re.findall(r"--[a-z-]+", text)) <= known, text


def test_numbers_of_the_real_model_come_from_records(cells):
    """What is said of it is read by cells: the text holds no decimal number of its own."""
    for text in sources(cells, "markdown"):
        prose = re.sub(r"`[^`]*`|```.*?```", " ", text, flags=re.S)
        assert not re.findall(r"\d\.\d", prose.replace("Python 3.10", "")), text[:60]
    used = [
        n for code in sources(cells, "code") if "%%" not in code for n in ast.walk(ast.parse(code))
    ]
    names = {
        arg.value
        for call in used
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") in ("recorded", "runs")
        for arg in call.args
    }  # fmt: skip
    assert {"pipeline/smollm2", "smollm2/rounded", "smollm2/llama_cpp", "decode"} <= names
