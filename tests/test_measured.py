"""What a compression says of itself, before and after."""

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import slr
from slr.checkpoint.cards import far
from slr.checkpoint.estimates import estimate
from slr.checkpoint.folder import about, load_tokenizer
from slr.checkpoint.sizes import checkpoint_account
from slr.checkpoint.work import HELD_OUT, look
from slr.cli import app
from slr.measurements import benchmarks
from slr.methods.blockwise import compress_model
from slr.model import data
from slr.model.plain import PLAIN, round_linears
from slr.model.recipe import Recipe
from slr.model.stream import Stream
from slr.options import recipe_of

FEW = {"samples": 2, "seqlen": 32, "iterations": 2}
run = CliRunner().invoke


def held(folder, seqlen=32):
    return data.unseen("general", load_tokenizer(folder), seqlen, HELD_OUT)


def test_the_three_perplexities_are_those_of_the_models(small, tmp_path):
    out = tmp_path / "out"
    slr.compress(small, Recipe("magnitude", refine="svd", rank=2), out=out)
    found = about(out)["measured"]
    seqlen = found["seqlen"]
    windows = held(small, seqlen)
    assert (found["text"], found["windows"]) == ("general", len(windows))
    pruned = slr.load(small, dtype=torch.float32)
    compress_model(pruned, Recipe("magnitude", refine="none"))
    want = {
        "dense": slr.perplexity(small, windows),
        "pruned": slr.perplexity(pruned, windows),
        "result": slr.perplexity(out, windows),
    }
    for name, grid in PLAIN.items():
        plain = slr.load(small, dtype=torch.float32)
        round_linears(plain.model.layers, grid)
        want[name] = slr.perplexity(plain, windows)
    assert list(found["perplexity"]) == list(want)
    for kind, value in want.items():
        assert found["perplexity"][kind] == pytest.approx(value, rel=1e-3), kind


def test_held_out_windows_are_calibrated_on_by_none(small, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SAMPLES", 10**6)  # all that may be taken
    tokenizer, file = load_tokenizer(small), tmp_path / "text.txt"
    file.write_text(" ".join(f"word{i} is number {i}." for i in range(400)), encoding="utf-8")
    for source in ("general", "embedded", str(file)):
        seen = {tuple(row) for row in data.calibration(source, tokenizer, 32, None).tolist()}
        unseen = data.unseen(source, tokenizer, 32, 8)
        assert not seen & {tuple(row) for row in unseen.tolist()}, source
    monkeypatch.undo()
    short = tmp_path / "short.txt"
    short.write_text("a few words " * 20, encoding="utf-8")
    assert data.unseen(str(short), tokenizer, 32, 8) is None
    slr.compress(small, Recipe(**FEW), calibration=str(short), out=tmp_path / "out")
    assert about(tmp_path / "out")["measured"] is None


def test_the_card_and_info_tell_it(small, tmp_path):
    out = tmp_path / "out"
    slr.compress(small, Recipe(**FEW), out=out)
    measured, card = about(out)["measured"], (out / "README.md").read_text(encoding="utf-8")
    for value in measured["perplexity"].values():
        assert f"{value:.2f}" in card
    assert set(measured["sample"]) == {"prompt", "dense", "result"}
    told = run(app, ["info", str(out)]).stdout
    assert f"result {measured['perplexity']['result']:.2f}" in told
    assert "sample, prompt" in told
    assert json.loads(run(app, ["info", str(out), "--json"]).stdout)["measured"] == measured


def test_a_result_far_from_dense_is_warned_of():
    assert far({"perplexity": {"dense": 10.0, "result": 14.9}}) is None
    assert "1.6 times" in far({"perplexity": {"dense": 10.0, "result": 16.0}})


def test_a_perplexity_that_is_not_finite_loses_no_work(small, tmp_path, monkeypatch):
    monkeypatch.setattr("slr.model.heldout.exponential", lambda losses: float("inf"))
    slr.compress(small, Recipe("magnitude", refine="none"), out=tmp_path / "out")
    assert about(tmp_path / "out")["measured"]["perplexity"] == {
        "dense": None, "result": None, "plain int8": None, "plain int4 by 32": None,
    }  # fmt: skip
    assert "not finite" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "not finite" in run(app, ["info", str(tmp_path / "out")]).stdout
    assert "not finite" in far({"perplexity": {"dense": 10.0, "result": None}})


def test_a_small_model_is_one_file(small, tmp_path, monkeypatch):
    recipe = Recipe("magnitude", refine="none")
    slr.compress(small, recipe, out=tmp_path / "one")
    monkeypatch.setattr("slr.checkpoint.finish.SMALL", 0)
    slr.compress(small, recipe, out=tmp_path / "many")
    names = {f.name for f in (tmp_path / "one").glob("*.safetensors*")}
    assert names == {"model.safetensors"}
    assert len(list((tmp_path / "many").glob("*.safetensors"))) == len(Stream(small).blocks) + 1
    one, many = (slr.load(tmp_path / name).state_dict() for name in ("one", "many"))
    assert all(torch.equal(one[name], many[name]) for name in many)


@pytest.mark.parametrize("recipe", [Recipe(**FEW), Recipe("magnitude", "0.5", refine="none")])
def test_the_disk_that_is_foretold_is_what_is_taken(recipe, tmp_path):
    found = estimate(look("tiny", tmp_path / "x", recipe))
    assert not list(tmp_path.iterdir())
    slr.compress("tiny", recipe, out=tmp_path / "out")
    assert found.disk == pytest.approx(checkpoint_account(tmp_path / "out")["bytes"], rel=0.01)
    assert found.seconds > 0
    assert found.memory > found.disk


def test_the_memory_that_is_foretold_counts_the_model_that_is_loaded_for_the_sample(monkeypatch):
    monkeypatch.setattr("slr.checkpoint.estimates.whole_for_sample", lambda stream: 10**12)
    found = estimate(look("tiny", "not-there", Recipe("magnitude", refine="none")))
    assert found.memory > 10**12


def test_a_dry_run_writes_nothing(small, tmp_path):
    done = run(app, ["compress", str(small), "--out", str(tmp_path / "out"), "--dry-run", "--json"])
    assert done.exit_code == 0, done.output
    assert set(json.loads(done.stdout)) == {"seconds", "memory", "disk"}
    assert not list(tmp_path.iterdir())


def test_the_default_is_the_best_for_what_is_read():
    best = Recipe()
    assert (str(best.prune), str(best.refine), best.refine.update_mask) == (
        "wanda", "activations", "admm",
    )  # fmt: skip
    free = Recipe("magnitude")
    assert (str(free.refine), free.refine.schedule, free.needs_data) == (
        "weights", "accelerated", False,
    )  # fmt: skip
    assert Recipe("wanda", refine="weights").refine.schedule == "paper"


def test_windows_are_spread_over_the_text(small):
    tokenizer = load_tokenizer(small)
    text = "".join(chr(97 + i % 26) * 3 + " " for i in range(3000))
    every, few = data.windows(text, tokenizer, 16), data.windows(text, tokenizer, 16, 4)
    n = len(every)
    assert torch.equal(few, every[[0, n // 4, n // 2, 3 * n // 4]])


@pytest.mark.parametrize("name", benchmarks())
def test_every_benchmark_tells_its_options(name, monkeypatch):
    """By ``slr bench``, where the folder of its siblings is no place to import from."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", [p for p in sys.path if Path(p).name != "benchmarks"])
    done = run(app, ["bench", name, "--help"])
    assert done.exit_code == 0, done.output
    assert "usage:" in done.stdout


def test_presets_benchmarks_and_version():
    assert run(app, ["--version"]).stdout == f"slr {slr.__version__}\n"
    listed = run(app, ["bench"]).stdout
    assert "pipeline" in listed
    assert "A whole model" in listed
    wrong = run(app, ["compress", "tiny", "--out", "x", "--preset", "fast"])
    assert isinstance(wrong.exception, SystemExit)
    assert wrong.exception.code == 2
    int4 = slr.Recipe(pattern="dense", values="int4 by 64")
    assert recipe_of(None, {}, {}, None, "int4") == int4
    both = recipe_of(None, {}, {"pattern": "2:4"}, None, "int4")
    assert both == slr.Recipe(values="int4 by 64")
