"""No traceback reaches a user: malformed files of all sorts, and the command's own last net."""

import ast
import builtins
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import slr
from slr.cli import app
from slr.evaluate import reproduction

PRUNE = slr.Recipe(prune="magnitude", refine="none")


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def one_line(done, *says, code=2):
    assert done.exit_code == code, done.output
    assert isinstance(done.exception, SystemExit)
    lines = [line for line in done.stderr.splitlines() if line.startswith("slr: ")]
    assert len(lines) == 1, done.stderr
    for text in says:
        assert text in lines[0], lines[0]
    assert "Traceback" not in done.output
    assert len(done.stderr.splitlines()) <= 2  # and perhaps what is about to be done


@pytest.fixture(scope="module")
def compressed(small, tmp_path_factory):
    out = tmp_path_factory.mktemp("edges") / "x"
    slr.compress(small, PRUNE, out=out)
    return out


def copy_of(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def without(key):
    return lambda about: about.pop(key)


def with_(**values):
    return lambda about: about.update(values)


def layer(**values):
    return lambda about: next(iter(about["layers"].values())).update(values)


Q = "'layers'.'model.layers.0.self_attn.q_proj'"
ABOUT = {
    "'slr' lacks 'layers'": without("layers"),
    "'slr' lacks 'recipe'": without("recipe"),
    "'slr' lacks 'dense'": without("dense"),
    "'slr' lacks 'source'": without("source"),
    "'slr' lacks 'calibration'": without("calibration"),
    "'layers' is [1]; it must be a mapping": with_(layers=[1]),
    "'recipe' is 'wanda'; it must be a mapping": with_(recipe="wanda"),
    "'recipe' lacks 'refine'": with_(recipe={}),
    "'dense' lacks 'num_hidden_layers'": lambda about: about["dense"].pop("num_hidden_layers"),
    "'source' is 5; it must be a name or null": with_(source=5),
    "'origin' lacks 'fingerprint'": with_(origin={"folder": "/x"}),
    "has format None, but slr reads format": without("format"),
    f"{Q} is 7; it must be a mapping": lambda about: about["layers"].update(
        {"model.layers.0.self_attn.q_proj": 7}
    ),
    f"{Q} lacks 'rank'": lambda about: next(iter(about["layers"].values())).pop("rank"),
    f"{Q}: 'rank' is 'two'; it must be a whole number": layer(rank="two"),
    f"{Q}: 'shape' is [64]; it must be two sizes": layer(shape=[64]),
    f"{Q}: 'kept' is -1; it must be a whole number": layer(kept=-1),
    f"{Q}: 'bias' is 1; it must be true or false": layer(bias=1),
    f"{Q}: 'error' is 'x'; it must be a number or null": layer(error="x"),
    f"{Q}: 'pattern': pattern '2-4' is neither": layer(pattern="2-4"),
    f"{Q}: 'grid': rounding 'int99' is unknown": layer(grid="int99"),
    f"{Q} has 'factors' but no 'grid'": layer(factors="int8"),
    "'layers' is {}; it must be a mapping of at least one layer": with_(layers={}),
    "'calibration' lacks 'text'": with_(calibration={}),
    "'measured' is 'x'; it must be a mapping": with_(measured="x"),
    "'measured' lacks 'text'": with_(measured={}),
    "'perplexity' is {'dense': 'x'}; it must be numbers": with_(
        measured={"text": "t", "windows": 1, "seqlen": 2, "perplexity": {"dense": "x"}}
    ),
    "'tuned' lacks 'passes'": with_(tuned={}),
}


@pytest.mark.parametrize("says", ABOUT)
def test_what_a_compressed_folder_says_of_itself(compressed, tmp_path, says):
    folder = copy_of(compressed, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    ABOUT[says](config["slr"])
    (folder / "config.json").write_text(json.dumps(config))
    for arguments in (
        ["info", folder],
        ["eval", folder, "--no-compare"],
        ["eval", folder, "--stream"],
        ["eval", folder, "--tasks", "w"],
        ["export", folder, "--to", "dense", "--out", tmp_path / "y"],
        ["compress", folder, "--out", tmp_path / "y", "--prune", "magnitude"],
    ):
        one_line(run(*arguments), "config.json", says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1, 2]", "must be a JSON object"),
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"slr": [1], "model_type": "slr"}', "'slr' is [1]; it must be a mapping"),
        ('{"model_type": "slr"}', "lacks 'slr'"),
        ('{"model_type": ["llama"]}', "'model_type' is ['llama']; it must be a name"),
    ],
)
def test_a_configuration_that_is_none(small, tmp_path, text, says):
    folder = copy_of(small, tmp_path)
    (folder / "config.json").write_text(text)
    for arguments in (["eval", folder], ["eval", folder, "--stream"], ["info", folder],
                      ["compress", folder, "--out", tmp_path / "y"]):  # fmt: skip
        one_line(run(*arguments), "config.json", says)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "wide"}, {"num_attention_heads": 0}, {"num_hidden_layers": None},
        {"vocab_size": -4}, {"rope_parameters": 7}, {"hidden_act": "none such"},
        {"max_position_embeddings": "many"}, {"quantization_config": [1]},
        {"quantization_config": {"quant_method": "fp8"}},
    ],
    ids=str,
)  # fmt: skip
def test_a_configuration_of_which_no_model_can_be_made(small, tmp_path, change):
    folder = copy_of(small, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    options = ["--seqlen", 16, "--limit", 1]
    for arguments in (
        ["eval", folder, *options],
        ["eval", folder, "--stream", *options],
        ["compress", folder, "--out", tmp_path / "y", "--samples", 2, "--iterations", 2],
    ):
        if "max_position_embeddings" in change and arguments[0] == "eval":
            arguments = [a for a in arguments if a not in ("--seqlen", 16)]
        one_line(run(*arguments), str(folder))
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_weights_of_8_bits_are_refused(small, tmp_path, kind):
    folder = copy_of(small, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(kind)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    what = {torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}[kind]
    with pytest.raises(ValueError, match=f"tensor {name} has dtype {what}"):
        slr.load(folder)
    for more in (
        ["eval"],
        ["eval", "--stream"],
        ["eval", "--tasks", "w"],
        ["compress", "--out", "y"],
    ):
        arguments = [more[0], folder, *more[1:]]
        one_line(run(*arguments), f"tensor {name} has dtype {what}")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model": {"type": "None such"}}'])
def test_a_broken_tokenizer(small, tmp_path, text):
    folder = copy_of(small, tmp_path)
    (folder / "tokenizer.json").write_text(text)
    for arguments in (["eval", folder], ["compress", folder, "--out", tmp_path / "y"]):
        one_line(run(*arguments), f"the tokenizer of {folder}")


@pytest.mark.parametrize("known", [True, False])
def test_no_code_of_a_checkpoint_runs_and_nobody_is_asked(small, tmp_path, monkeypatch, known):
    def asked(*args):
        raise AssertionError("a prompt")

    monkeypatch.setattr(builtins, "input", asked)
    folder = copy_of(small, tmp_path)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    if not known:
        config["model_type"] = "none such"
    (folder / "config.json").write_text(json.dumps(config))
    told = json.loads((folder / "tokenizer_config.json").read_text())
    told["auto_map"] = {"AutoTokenizer": ["evil.T", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    for arguments in (
        ["eval", folder, "--limit", 1],
        ["eval", folder, "--limit", 1, "--stream"],
        ["compress", folder, "--out", tmp_path / "y", "--samples", 2, "--iterations", 2],
        ["eval", tmp_path / "y", "--limit", 1],
    ):
        if known:
            done = run(*arguments)
            assert done.exit_code == 0, done.output
        else:
            one_line(run(*arguments))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing"], "No such command 'nothing'"),
        (["eval"], "Missing argument"),
        (["eval", "tiny", "--limit", "x"], "Invalid value for '--limit'"),
        (["eval", "tiny", "--colour"], "No such option"),
        (["eval", "tiny", "more"], "unexpected extra argument"),
        (["compress", "tiny"], "Missing option '--out'"),
        (["compress", "tiny", "--out"], "requires an argument"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(arguments, says):
    one_line(run(*arguments), says)


def test_help_is_no_error():
    for arguments in ([], ["--help"], ["eval", "--help"]):
        done = run(*arguments)
        assert done.exit_code == 0
        assert "Usage" in done.stdout
    assert "run Python code" in " ".join(done.stdout.replace("│", " ").split())


@pytest.mark.parametrize(
    ("error", "says", "code"),
    [
        (KeyError("rank"), "unexpected KeyError 'rank'; set SLR_TRACEBACK=1", 1),
        (IndexError("out of range"), "unexpected IndexError out of range", 1),
        (AssertionError(), "unexpected AssertionError", 1),
        (RecursionError("too deep"), "too deep", 1),
        (MemoryError(), "out of memory", 1),
        (OSError("disk"), "disk", 1),
        (ValueError("two\nlines"), "two lines", 2),
        (KeyboardInterrupt(), "stopped", 130),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_is_raised_is_one_line(monkeypatch, error, says, code):
    def fails(*args):
        raise error

    monkeypatch.setattr("slr.cli.about", fails)
    one_line(run("info", "tiny"), says, code=code)
    monkeypatch.setenv("SLR_TRACEBACK", "1")
    if code != 130:
        assert "Traceback" in run("info", "tiny").stderr


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"repairs": ["magic"]}, "repair 'magic' is unknown; it must be one of none, svd"),
        ({"masks": ["magic"]}, "magic"),
        ({"columns": ["5:4"]}, "5:4"),
        ({"seqlen": "long"}, "'seqlen' is 'long'; it must be 2 tokens or more"),
        ({"recipe": [1]}, "'recipe' is [1]; it must be a mapping"),
        ({"dtype": "int8"}, "'dtype' is 'int8'; it must be float32"),
        ({"model": None}, "'model' is None; it must be text"),
        ({"limit": 0}, "'limit' is 0"),
        ("[]", "the spec is []; it must be a mapping"),
    ],
    ids=str,
)
def test_a_specification_of_a_table(tmp_path, change, says):
    spec = {
        "title": "t", "model": "tiny", "dtype": "float32", "text": "embedded", "seqlen": 16,
        "limit": 1, "calibration": "embedded", "recipe": {}, "masks": ["magnitude"],
        "repairs": ["none"], "columns": ["2:4"],
    }  # fmt: skip
    file = tmp_path / "table.json"
    file.write_text(change if isinstance(change, str) else json.dumps({**spec, **change}))
    one_line(run("reproduce", file, "--out", tmp_path / "x"), "table 'table'", says)


def test_every_loader_is_told_to_trust_nothing():
    root, seen = Path(slr.__file__).parent, []
    for file in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            name = ast.unparse(node.func).rpartition(".")[2] if isinstance(node, ast.Call) else ""
            if name in ("from_pretrained", "from_config", "load_dataset", "HFLM"):
                told = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert told.get("trust_remote_code") == "False", f"{file}:{node.lineno}"
                seen.append(name)
    assert set(seen) == {"from_pretrained", "from_config", "load_dataset", "HFLM"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_cell_that_is_no_number_is_null(tmp_path, monkeypatch, value):
    losses = torch.tensor([value] * 24)
    monkeypatch.setattr(reproduction, "measure", lambda *args, **options: (losses, []))
    spec = reproduction.Spec.read("tiny")
    found = reproduction.reproduce(spec, tmp_path, rows=["dense"])
    assert str(found["dense"]["dense"]) == "nan"
    assert '"perplexity": null' in (tmp_path / "dense" / "dense.json").read_text()
    (tmp_path / "dense" / "dense.json").write_text("{}")
    with pytest.raises(ValueError, match=r"dense.json lacks 'perplexity', a number or null"):
        reproduction.reproduce(spec, tmp_path, rows=["dense"])
