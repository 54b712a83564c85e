"""CAP, LoSparse and sparsity induction through ``slr compress``: the same folders as any other."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_pipeline import family, hashes
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import slr
from slr.checkpoint.journal import Journal
from slr.cli import app
from slr.options import SYSTEMS

QUICK = {"steps": 3, "samples": 4, "seqlen": 32}


def stop_at(name, monkeypatch):
    """Let the journal be interrupted when it is given a file that begins so."""
    real = Journal.add

    def add(self, file, tensors, notes=None):
        if file.startswith(name):
            raise KeyboardInterrupt
        real(self, file, tensors, notes)

    monkeypatch.setattr(Journal, "add", add)


@pytest.mark.parametrize("method", ["cap", "losparse"])
def test_a_whole_model_method_makes_a_folder_like_any_other(small, tmp_path, method):
    reports = slr.compress(small, SYSTEMS[method](budget=0.4, **QUICK), out=tmp_path / "out")
    dense = sum(math.prod(r.shape) for r in reports)
    kept = sum(r.kept + r.rank * sum(r.shape) for r in reports)
    assert len(reports) == 14
    assert 0.35 * dense < kept <= 0.4 * dense
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    names = {n for n, m in model.named_modules() if isinstance(m, slr.SLRLinear)}
    assert names == {r.name for r in reports}
    ids = torch.arange(24).view(1, 24)
    logits = model(ids).logits
    assert logits.isfinite().all()
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto").eval()
    assert torch.equal(again(ids).logits, logits)
    assert not list((tmp_path / "out").glob("candidates*"))
    streamed = slr.perplexity(tmp_path / "out", ids, stream=True)
    assert streamed == pytest.approx(slr.perplexity(tmp_path / "out", ids), rel=1e-4)


@pytest.mark.parametrize(
    ("method", "where"),
    [("cap", "candidates-00002"), ("cap", "model-00002"), ("losparse", "model-00002")],
)
def test_stopped_and_resumed_it_ends_with_the_same_files(
    small, tmp_path, method, where, monkeypatch
):
    slr.compress(small, SYSTEMS[method](**QUICK), out=tmp_path / "calm")
    with monkeypatch.context() as patch:
        stop_at(where, patch)
        with pytest.raises(KeyboardInterrupt):
            slr.compress(small, SYSTEMS[method](**QUICK), out=tmp_path / "out")
    assert (tmp_path / "out.partial").is_dir()
    with pytest.raises(ValueError, match=r"recipe.budget was 0.5, now 0.3"):
        slr.compress(small, SYSTEMS[method](budget=0.3, **QUICK), out=tmp_path / "out")
    slr.compress(small, SYSTEMS[method](**QUICK), out=tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "calm")


def test_losparse_stores_what_training_changed_elsewhere(small, tmp_path):
    slr.compress(small, slr.LoSparse(**QUICK), out=tmp_path / "out")
    before = load_file(small / "model.safetensors")
    now = load_file(tmp_path / "out" / "model.safetensors")
    words = "model.embed_tokens.weight"
    assert not torch.equal(before[words], now[words])
    assert now[words].dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["cap", "losparse"])
def test_nothing_is_left_of_what_cannot_be_done(small, tmp_path, method, monkeypatch):
    for options, says in (
        ({"budget": 1.5}, "budget is 1.5"),
        ({"steps": 0}, "steps is 0"),
        ({"samples": 10**6, "seqlen": 32}, "fewer than"),
    ):
        with pytest.raises(ValueError, match=says):
            slr.compress(small, SYSTEMS[method](**options), out=tmp_path / "out")
    monkeypatch.setattr("slr.model.distributed.world", lambda: 2)
    with pytest.raises(ValueError, match="one process, not in 2"):
        slr.compress(small, SYSTEMS[method](**QUICK), out=tmp_path / "out")
    assert not list(tmp_path.iterdir())
    with pytest.raises(TypeError, match="recipe is 'best'; it must be"):
        slr.compress(small, "best", out=tmp_path / "out")


def test_induction_is_stored_and_resumed_with_its_block(small, tmp_path, monkeypatch):
    recipe = slr.Recipe(prepare="induction", prune="magnitude", iterations=2, samples=3, seqlen=32)
    assert recipe.statistic is None
    assert recipe.needs_data
    slr.compress(small, recipe, out=tmp_path / "calm")
    norm = "model.layers.0.input_layernorm.weight"
    stored = load_file(tmp_path / "calm" / "model.safetensors")[norm]
    assert not torch.equal(stored, load_file(small / "model.safetensors")[norm])
    with monkeypatch.context() as patch:
        stop_at("model-00002", patch)
        with pytest.raises(KeyboardInterrupt):
            slr.compress(small, recipe, out=tmp_path / "out")
    slr.compress(small, recipe, out=tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "calm")
    with pytest.raises(ValueError, match="needs calibration windows"):
        slr.compress_model(slr.load(small), recipe)


def test_induction_scales_no_rows_before_a_pruner_that_compares_them(small, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "slr.methods.blockwise.induce_block",
        lambda block, index, inputs, options: seen.append(options),
    )
    data = {"prepare": "induction", "refine": "none", "samples": 3, "seqlen": 32}
    mixed = {"*.down_proj": {"prune": "magnitude", "group": "matrix"}}
    for number, (recipe, scaled) in enumerate(
        (
            ({"prune": "magnitude", "pattern": "0.5"}, True),
            ({"prune": "sparsegpt", "pattern": "2:4"}, True),
            ({"prune": "sparsegpt", "pattern": "0.5"}, False),
            ({"prune": "magnitude", "pattern": "0.5", "overrides": mixed}, False),
        )
    ):
        seen.clear()
        slr.compress(small, slr.Recipe(**data, **recipe), out=tmp_path / str(number))
        assert len(seen) == 2
        assert all(("value" not in options.fixed) == scaled for options in seen)
        assert {str(options.pattern) for options in seen} == {recipe["pattern"]}


def test_induction_is_refused_before_anything_is_written(small, tmp_path, monkeypatch):
    recipe = slr.Recipe(prepare="induction", prune="magnitude", samples=3, seqlen=32)
    with monkeypatch.context() as patch:
        patch.setattr("slr.model.distributed.world", lambda: 2)
        with pytest.raises(ValueError, match="works in one process, not in 2"):
            slr.compress(small, recipe, out=tmp_path / "out")
    family("phi3", tmp_path / "phi3", True)
    shutil.copy(small / "tokenizer.json", tmp_path / "phi3")
    with pytest.raises(ValueError, match="of model type 'phi3'; scales can be moved exactly in"):
        slr.compress(tmp_path / "phi3", recipe, out=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"phi3"}


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_from_the_command_line(small, tmp_path):
    out, data = tmp_path / "cap", ["--samples", 4, "--seqlen", 32]
    done = run("compress", small, "--out", out, "--method", "cap", "--steps", 2, *data)
    assert done.exit_code == 0, done.output
    done = run("info", out)
    assert done.exit_code == 0, done.output
    assert "method cap" in done.stdout
    told = json.loads(run("info", out, "--json").stdout)
    assert told["parameters"] <= 0.5 * told["parameters_before"]
    done = run("eval", out, "--limit", 2, "--seqlen", 32)
    rows = [line.rpartition("  ")[0].strip() for line in done.stdout.splitlines()]
    assert rows == ["dense", "plain int8", "plain int4 by 32", "CAP"]
    done = run("export", out, "--to", "peft", "--out", tmp_path / "peft")
    assert done.exit_code == 0, done.output
    done = run(
        "compress", small, "--out", tmp_path / "induced", "--method", "induction+magnitude",
        "--iterations", 2, *data,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    recipe = json.loads(run("info", tmp_path / "induced", "--json").stdout)["recipe"]
    assert (recipe["prepare"], recipe["prune"]) == ("induction", "magnitude")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--method", "cap", "--rank", "4"], "--rank has no effect with --method cap"),
        (["--method", "cap", "--admm"], "--admm has no effect with --method cap"),
        (["--method", "cap", "--update-mask"], "--update-mask has no effect with --method cap"),
        (["--method", "cap", "--override", "*:rank=2"], "--override has no effect with"),
        (["--budget", "0.3"], "--budget has no effect but with --method cap or losparse"),
        (["--method", "best"], "method 'best' is unknown; it must be cap, losparse or induction"),
        (["--method", "induction+wanda", "--prune", "magnitude"], "both name a pruner"),
        (["--method", "induction+best"], "prune 'best' is unknown"),
    ],
)
def test_a_method_with_the_wrong_options_is_one_line(tmp_path, options, says):
    done = run("compress", "tiny", "--out", tmp_path / "x", *options)
    assert done.exit_code == 2, done.output
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_a_loaded_two_four_model_holds_its_linears_packed(tmp_path):
    """The embedded model, bfloat16, rank 1/32 of its width: at most 0.65 of the dense bytes."""
    recipe = slr.Recipe(prune="magnitude", pattern="2:4", iterations=1)
    slr.compress("tiny", recipe, out=tmp_path / "out")
    model = slr.load(tmp_path / "out")
    layers = [m for m in model.modules() if isinstance(m, slr.SLRLinear)]
    model(torch.arange(24).view(1, 24))  # nothing dense is kept from a forward pass either
    held = sum(t.nbytes for m in layers for t in (*m.parameters(), *m.buffers()))
    dense = sum(2 * m.in_features * m.out_features for m in layers)
    assert model.dtype == torch.bfloat16
    assert 0.6 * dense < held <= 0.65 * dense
    for layer in layers:
        layer.cache_()
    assert sum(t.nbytes for m in layers for t in (*m.parameters(), *m.buffers())) > 1.5 * dense
