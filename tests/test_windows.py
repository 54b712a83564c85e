"""Windows that a model cannot read, and perplexities that are no number: one line, everywhere."""

import json
import math
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import slr
from slr.cli import app
from slr.evaluate.agree import agreement

PRUNE = slr.Recipe(prune="wanda", refine="none")
SYSTEMS = [PRUNE, slr.Recipe(prune="magnitude", refine="none", prepare="induction"),
           slr.CAP(steps=2), slr.LoSparse(steps=2)]  # fmt: skip


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(done, says, code=2):
    assert done.exit_code == code, done.output
    lines = [line for line in done.stderr.splitlines() if line.startswith("slr: ")]
    assert len(lines) == 1, done.stderr
    assert says in lines[0]
    assert "Traceback" not in done.output


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    """Folder of an OPT, which has an embedding of 64 positions."""
    from transformers import OPTConfig, OPTForCausalLM

    folder = tmp_path_factory.mktemp("opt")
    config = OPTConfig(
        vocab_size=4096, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32, max_position_embeddings=64, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    OPTForCausalLM(config).save_pretrained(folder)
    for file in slr.tiny.path().glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def test_no_more_tokens_than_learned_positions(opt, tmp_path):
    says = "seqlen is 65, but the model has 64 positions; it must be at most 64"
    model, windows = slr.load(opt), torch.randint(4096, (2, 65))
    assert slr.perplexity(model, windows[:, :64]) > 1  # all of them can be used
    for call in (
        lambda: slr.perplexity(model, windows),
        lambda: slr.perplexity(opt, windows, stream=True),
        lambda: agreement(model, model, windows),
        lambda: slr.compress_model(model, PRUNE, windows),
        lambda: slr.compress(opt, PRUNE, out=tmp_path / "x", calibration=windows),
    ):
        with pytest.raises(ValueError, match=says):
            call()
    for more in ([], ["--stream"], ["--tasks", "w", "--task-folder", tmp_path]):
        refused(run("eval", opt, "--seqlen", 65, *more), says)
    refused(run("compress", opt, "--out", tmp_path / "x", "--seqlen", 65, "--samples", 2), says)
    assert not list(tmp_path.iterdir())
    assert run("eval", opt, "--limit", 1).exit_code == 0  # a window that fits by default
    done = run("compress", opt, "--out", tmp_path / "x", "--samples", 2, "--iterations", 2)
    assert done.exit_code == 0, done.output


def test_more_tokens_than_a_rotary_model_was_made_for_bring_a_warning(small):
    windows = torch.randint(4096, (2, 65))
    with pytest.warns(UserWarning, match="seqlen is 65, but the model was made for 64 tokens"):
        assert slr.perplexity(small, windows) > 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slr.perplexity(small, windows[:, :64])
    done = run("eval", small, "--seqlen", 65, "--limit", 1)
    assert done.exit_code == 0
    assert "slr: warning: seqlen is 65" in done.stderr
    assert "UserWarning" not in done.stderr


@pytest.mark.parametrize("token", [-1, 4096])
def test_tokens_that_are_not_in_the_vocabulary(small, tmp_path, token):
    windows = torch.zeros(2, 8, dtype=torch.int64)
    windows[1, 3] = token
    says = rf"hold token {token}, but the model has 4096"
    model = slr.load(small)
    for call in (
        lambda: slr.perplexity(model, windows),
        lambda: slr.perplexity(small, windows, stream=True),
        lambda: agreement(model, model, windows),
        lambda: slr.compress_model(model, PRUNE, windows),
        *(lambda recipe=recipe: slr.compress(model, recipe, calibration=windows)
          for recipe in SYSTEMS),
        *(lambda recipe=recipe: slr.compress(small, recipe, out=tmp_path / "x", calibration=windows)
          for recipe in SYSTEMS),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            call()
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_is_larger_than_the_embedding(small, tmp_path):
    shutil.copytree(small, tmp_path / "a")
    tokenizer = slr.load_tokenizer(small)
    tokenizer.add_tokens(["<|extra|>"])
    tokenizer.save_pretrained(tmp_path / "a")
    text = tmp_path / "text.txt"
    text.write_text("def f(x): <|extra|> return x\n" * 200)
    options = ["--calibration", text, "--samples", 2, "--seqlen", 32]
    for arguments in (
        ["compress", tmp_path / "a", "--out", tmp_path / "x", *options],
        ["compress", tmp_path / "a", "--out", tmp_path / "x", *options, "--method", "cap"],
        ["eval", tmp_path / "a", "--text", text],
        ["eval", tmp_path / "a", "--text", text, "--stream"],
    ):
        refused(run(*arguments), "hold token 4096, but the model has 4096")


@pytest.mark.parametrize("windows", [[1, 2], [[1], [2]], [[0.5, 1.0]], [[True, False]]])
def test_what_is_no_windows(small, windows):
    windows, model = torch.tensor(windows), slr.load(small)
    for call in (lambda: slr.perplexity(model, windows),
                 lambda: slr.compress_model(model, PRUNE, windows)):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=r"windows have (shape|dtype)"):
            call()


@pytest.mark.parametrize(
    ("tensor", "factor", "value"),
    [("model.embed_tokens.weight", 1e6, math.inf), ("model.norm.weight", 3e38, math.nan)],
)
def test_a_perplexity_that_is_no_number(small, tmp_path, tensor, factor, value):
    shutil.copytree(small, tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    tensors = load_file(file)
    tensors[tensor] = (tensors[tensor].float() * factor).to(torch.bfloat16)
    if math.isnan(value):
        tensors["model.embed_tokens.weight"] *= 1e4
    save_file(tensors, file, {"format": "pt"})
    windows = torch.randint(4096, (2, 16))
    for stream in (False, True):
        with pytest.warns(UserWarning, match=f"the perplexity is {value}: the mean loss is"):
            found = slr.perplexity(tmp_path / "a", windows, stream=stream)
        assert str(found) == str(value)
        options = ["--seqlen", 16, "--limit", 2, "--json", *["--stream"] * stream]
        done = run("eval", tmp_path / "a", *options)
        assert done.exit_code == 1
        assert done.stderr.splitlines()[-1].endswith("has no finite perplexity on embedded")

        def refuse(constant):
            raise AssertionError(f"{constant} is not JSON")

        assert json.loads(done.stdout, parse_constant=refuse)["perplexity"] == {"dense": None}
