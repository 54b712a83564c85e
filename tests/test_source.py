"""The source that a compressed folder is compared with: the one it was made from, or none."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import slr
from slr.checkpoint import source as sources
from slr.cli import app
from slr.evaluate.comparison import compare

RECIPE = slr.Recipe(prune="magnitude", refine="weights", rank=2, iterations=1)
WINDOWS = torch.randint(4096, (2, 16), generator=torch.Generator().manual_seed(1))


def louder(folder):
    file = folder / "model.safetensors"
    save_file({k: v * 3 for k, v in load_file(file).items()}, file, {"format": "pt"})


@pytest.fixture
def made(small, tmp_path, monkeypatch):
    """A folder made from the relative path ``model``, and the working directory of that."""
    shutil.copytree(small, tmp_path / "one" / "model")
    monkeypatch.chdir(tmp_path / "one")
    slr.compress("model", RECIPE, out=tmp_path / "x")
    return tmp_path / "x"


def rewrite(folder, change):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config["slr"])
    file.write_text(json.dumps(config))


def evaluate(folder, *more):
    done = CliRunner().invoke(app, ["eval", str(folder), "--limit", "1", "--json", *map(str, more)])
    lines = [line for line in done.stderr.splitlines() if line.startswith("slr: ")]
    assert len(lines) == (done.exit_code != 0)
    return done.exit_code, done.stderr, done.stdout


def test_from_any_directory_it_is_the_same_source(made, tmp_path, monkeypatch):
    expected = compare(made, WINDOWS)
    assert list(expected) == ["dense", "plain int8", "plain int4 by 32", "pruned", "refined"]
    shutil.copytree(tmp_path / "one" / "model", tmp_path / "two" / "model")
    louder(tmp_path / "two" / "model")
    monkeypatch.chdir(tmp_path / "two")
    assert compare(made, WINDOWS) == expected
    assert compare(made, WINDOWS, stream=True)["dense"] == pytest.approx(expected["dense"])


@pytest.mark.parametrize("stream", [False, True])
def test_a_source_that_has_changed_is_refused(made, tmp_path, stream):
    more = ["--stream"] * stream
    louder(tmp_path / "one" / "model")
    code, told, _ = evaluate(made, *more)
    assert code == 2
    assert "is not what" in told and "model.safetensors differs" in told  # noqa: PT018
    assert "--no-compare" in told
    code, _, out = evaluate(made, "--no-compare", *more)
    assert code == 0
    assert set(json.loads(out)["perplexity"]) == {"refined"}


def test_a_source_that_has_moved_is_found_when_named(made, tmp_path):
    expected = compare(made, WINDOWS)
    (tmp_path / "one" / "model").rename(tmp_path / "moved")
    assert list(compare(made, WINDOWS)) == ["refined"]
    assert compare(made, WINDOWS, source=tmp_path / "moved") == expected
    code, told, out = evaluate(made)
    assert (code, set(json.loads(out)["perplexity"])) == (0, {"refined"})
    assert "(without its source: its source 'model' is not here; give it by --source)" in told
    code, told, out = evaluate(made, "--source", tmp_path / "moved")
    assert list(json.loads(out)["perplexity"]) == [
        "dense",
        "plain int8",
        "plain int4 by 32",
        "pruned",
        "refined",
    ]
    louder(tmp_path / "moved")
    assert evaluate(made, "--source", tmp_path / "moved")[0] == 2
    for wrong, says in (
        ("nowhere", "neither 'tiny', 'smollm2', nor a folder"),
        (made, "is not what"),
    ):
        code, told, _ = evaluate(made, "--source", wrong)
        assert code == 2
        assert says in told
    code, told, _ = evaluate(tmp_path / "moved", "--source", made)
    assert code == 2
    assert "is not compressed" in told


def test_a_folder_that_does_not_say_what_its_source_was(made, tmp_path):
    rewrite(made, lambda about: about.pop("origin"))
    code, told, out = evaluate(made)
    assert (code, set(json.loads(out)["perplexity"])) == (0, {"refined"})
    assert "what its source 'model' was is not recorded; give it by --source" in told
    code, _, out = evaluate(made, "--source", tmp_path / "one" / "model")
    assert list(json.loads(out)["perplexity"]) == [
        "dense",
        "plain int8",
        "plain int4 by 32",
        "pruned",
        "refined",
    ]
    code, told, _ = evaluate(made, "--source", "tiny")
    assert code == 2
    assert "does not fit" in told


@pytest.mark.parametrize("mark", ["snapshots", ".cache/huggingface", ".git"])
def test_a_downloaded_folder_opens_no_path_unasked(made, tmp_path, monkeypatch, mark):
    folder = tmp_path / ("snapshots/abc" if mark == "snapshots" else "down")
    shutil.copytree(made, folder)
    if mark != "snapshots":
        (folder / mark).mkdir(parents=True)
    opened = []
    real = sources.fingerprint
    monkeypatch.setattr(sources, "fingerprint", lambda path: opened.append(path) or real(path))
    code, told, out = evaluate(folder)
    assert (code, set(json.loads(out)["perplexity"]), opened) == (0, {"refined"}, [])
    assert "it was downloaded; give its source by --source, or --compare" in told
    code, _, out = evaluate(folder, "--compare")
    assert list(json.loads(out)["perplexity"]) == [
        "dense",
        "plain int8",
        "plain int4 by 32",
        "pruned",
        "refined",
    ]
    assert opened == [tmp_path / "one" / "model"]


def test_the_name_alone_opens_nothing(made, tmp_path):
    """A path in ``source``, which anybody can write, is never followed."""
    rewrite(made, lambda about: about.update(source=str(tmp_path / "one" / "model")))
    rewrite(made, lambda about: about["origin"].update(folder="model"))
    assert list(compare(made, WINDOWS)) == ["refined"]


def test_what_eval_refuses_beside_source(made):
    for more, says in ((["--no-compare"], "--source has no effect with --no-compare"),
                       (["--tasks", "w"], "--source has no effect with --tasks")):  # fmt: skip
        code, told, _ = evaluate(made, "--source", "model", *more)
        assert code == 2
        assert says in told
