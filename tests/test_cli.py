import json
import subprocess
import sys
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import slr
from slr.checkpoint.estimates import Estimate
from slr.checkpoint.journal import Journal
from slr.cli import app
from slr.reports import foretell


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_compress_then_eval_prints_perplexities(small, tmp_path):
    out = tmp_path / "x"
    done = run("compress", small, "--out", out, "--prune", "magnitude", "--iterations", 4)
    assert done.exit_code == 0, done.output
    assert "mean relative error, result" in done.stdout
    assert "layer/s" in done.stderr  # the progress bar
    done = run("eval", out, "--limit", 3, "--seqlen", 32)
    assert done.exit_code == 0, done.output
    rows = [line.rpartition("  ")[0].strip() for line in done.stdout.splitlines()]
    assert rows == ["dense", "plain int8", "plain int4 by 32", "pruned", "refined"]


def test_wanda_and_json(small, tmp_path):
    out = tmp_path / "x"
    options = ["--refine", "weights", "--samples", 4, "--seqlen", 32, "--iterations", 2, "--json"]
    done = run("compress", small, "--out", out, *options)
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    assert figures["error"] < figures["pruned_error"] < 1
    assert figures["compressed_MB"] < figures["dense_MB"]
    done = run("eval", out, "--limit", 2, "--seqlen", 32, "--json", "--no-compare")
    assert set(json.loads(done.stdout)["perplexity"]) == {"refined"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["compress", "tiny", "--out", "X", "--prune", "best"], "prune 'best' is unknown"),
        (["compress", "tiny", "--out", "X", "--pattern", "3:2"], "pattern 3:2"),
        (["compress", "tiny", "--out", "X", "--rank", "0"], "rank is 0"),
        (["compress", "tiny", "--out", "X", "--rank", "300", "--prune", "magnitude"], "rank 300"),
        (["compress", "tiny", "--out", "X", "--group", "tree"], "group is 'tree'"),
        (["compress", "tiny", "--out", "X", "--device", "tpu"], "device 'tpu'"),
        (["compress", "tiny", "--out", "X", "--calibration", "nowhere"], "'nowhere'"),
        (["compress", "no-such-folder", "--out", "X"], "neither 'tiny', 'smollm2', nor a folder"),
        (["compress", ".", "--out", "X"], "no config.json"),
        (["compress", "tiny", "--out", "taken"], "exists already"),
        (
            ["compress", "tiny", "--out", "X", "--skip", "*.w1"],
            "'*.w1' in the recipe fits no layer",
        ),
        (["compress", "tiny", "--out", "X", "--override", "*.w1"], "is not NAME:option=value"),
        (["compress", "tiny", "--out", "X", "--override", "*:size=1"], "option 'size'"),
        (["compress", "tiny", "--out", "X", "--samples", "9999"], "fewer than the 9999 samples"),
        (["info", "nowhere"], "neither 'tiny', 'smollm2', nor a folder"),
        (["export", "tiny", "--to", "dense", "--out", "X"], "is not compressed"),
        (["eval", "tiny", "--dtype", "int8"], "dtype 'int8'"),
        (["eval", "tiny", "--text", "short.txt"], "fewer than one window"),
        (["eval", "tiny", "--seqlen", "1"], "seqlen is 1"),
    ],
)
def test_a_wrong_argument_is_one_line_and_code_2(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("a few words")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    done = run(*arguments)
    assert done.exit_code == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("slr: ")]
    assert len(lines) == 1
    assert says in lines[0]
    assert not (tmp_path / "X").exists()


def test_a_failure_in_work_is_one_line_and_code_1(small, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("slr.checkpoint.journal.save_file", full)
    done = run(
        "compress", small, "--out", tmp_path / "x", "--prune", "magnitude", "--iterations", 1
    )
    assert done.exit_code == 1
    assert "slr: No space left on device" in done.stderr
    assert not (tmp_path / "x").exists()


def test_a_full_disk_is_told_without_its_number(small, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    done = run("compress", small, "--out", tmp_path / "x", "--prune", "magnitude")
    assert done.exit_code == 1
    assert f"slr: {tmp_path / 'x'} will need about " in done.stderr


@pytest.mark.parametrize(("command", "says"), [("compress", "goes on"), ("info", "slr: stopped\n")])
def test_control_c_says_whether_the_same_command_goes_on(small, monkeypatch, command, says):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("slr.reports.folder_of", interrupt)
    monkeypatch.setattr("slr.cli.resolve", interrupt)
    done = run(command, small, *(["--out", "x"] if command == "compress" else []))
    assert done.exit_code == 130
    assert says in done.stderr


def test_a_dry_run_says_that_the_place_cannot_be_written(small, tmp_path):
    (tmp_path / "file").touch()
    done = run("compress", small, "--out", tmp_path / "file" / "x", "--dry-run")
    assert done.exit_code == 2
    assert f"slr: cannot write to {tmp_path / 'file' / 'x'}.partial: Not a directory" in done.stderr


def test_what_a_stopped_run_left_is_told_from_a_broken_folder(small, tmp_path):
    out = tmp_path / "x"
    with suppress(KeyboardInterrupt), Journal(out, {}) as journal:
        journal.add("one", {"x": torch.ones(2)}, {})
        raise KeyboardInterrupt
    for given in (out, f"{out}.partial"):
        done = run("info", given)
        assert done.exit_code == 2
        assert "give that command again" in done.stderr


@pytest.mark.parametrize(
    ("load", "policy", "told"), [(9, None, 1), (9, "PASSIVE", 0), (0, None, 0)]
)
def test_a_busy_machine_is_told_of(monkeypatch, capsys, load, policy, told):
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0, 0), raising=False)
    monkeypatch.setattr("torch.get_num_threads", lambda: 4)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if policy:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    foretell(Estimate(100.0, 10**9, 10**6), json_output=False)
    assert capsys.readouterr().err.count("OMP_WAIT_POLICY=PASSIVE") == told


def test_broken_weights_are_one_line_and_code_2(small, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(small, tmp_path / "nan")
    tensors = load_file(tmp_path / "nan" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(tensors, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    done = run("compress", tmp_path / "nan", "--out", tmp_path / "x", "--prune", "magnitude")
    assert done.exit_code == 2
    assert "tensor model.layers.0.mlp.up_proj.weight holds 1 non-finite" in done.stderr
    assert not (tmp_path / "x").exists()


def test_info_and_export(small, tmp_path):
    out = tmp_path / "x"
    options = ["--prune", "magnitude", "--iterations", 2, "--skip", "*.o_proj"]
    options += ["--override", "*.q_proj:rank=4,pattern=0.25"]
    assert run("compress", small, "--out", out, *options).exit_code == 0
    done = run("info", out)
    assert done.exit_code == 0, done.output
    assert "multiplied on this CPU by" in done.stdout
    kinds = [line.split()[0] for line in done.stdout.split("\n\n")[1].splitlines()[1:]]
    assert sorted(kinds) == sorted(
        ["all", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    )
    told = json.loads(run("info", out, "--json").stdout)
    q = told["layers"]["model.layers.0.self_attn.q_proj"]
    assert (q["rank"], q["kept"], q["pattern"]) == (4, 48 * 64, "0.25")
    assert told["parameters"] < told["parameters_before"]
    assert "dense" in run("info", small).stdout
    done = run("export", out, "--to", "peft", "--out", tmp_path / "peft")
    assert done.exit_code == 0, done.output
    assert "adapter" in done.stdout
    card = (out / "README.md").read_text()
    assert "| skip | ['*.o_proj'] |" in card
    assert "| q_proj | 2 | 4 |" in card


def test_under_torchrun_the_first_process_alone_prints(small, monkeypatch):
    from slr.evaluate import comparison

    found = comparison.Comparison({"dense": 2.0})
    monkeypatch.setattr(comparison, "comparison_of", lambda *_, **__: found)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in (("0", "dense  2.000\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        done = run("eval", small, "--seqlen", 16, "--limit", 2)
        assert done.exit_code == 0
        assert done.stdout == said


def test_eval_streamed_is_eval(small, tmp_path):
    out = tmp_path / "x"
    run("compress", small, "--out", out, "--prune", "magnitude", "--iterations", 2)
    options = ["--limit", 3, "--seqlen", 32, "--json"]
    whole = json.loads(run("eval", out, *options).stdout)
    streamed = json.loads(run("eval", out, *options, "--stream").stdout)
    for name, value in streamed["perplexity"].items():
        assert whole["perplexity"][name] == pytest.approx(value, rel=1e-4)
    assert set(whole["versions"]) >= {"slr", "torch", "transformers"}


def test_import_is_light():
    code = "import sys, slr; sys.exit('transformers' in sys.modules or 'datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_embedded_model_is_a_normal_checkpoint():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(slr.tiny.path())
    assert model.config.model_type == "llama"
    assert str(model.dtype) == "torch.bfloat16"
    assert model.config.hidden_size % 64 == model.config.intermediate_size % 64 == 0
    tokenizer = AutoTokenizer.from_pretrained(slr.tiny.path())
    sentence = "def f(x):\n    return x  # naïve\n"
    assert tokenizer.decode(tokenizer(sentence)["input_ids"]) == sentence
    size = sum(f.stat().st_size for f in slr.tiny.path().rglob("*") if f.is_file())
    assert size <= 20e6


def test_bench_runs_a_benchmark_with_its_own_options():
    done = run("bench", "nothing")
    assert done.exit_code == 2
    assert "benchmark 'nothing' is unknown" in done.stderr
    done = run("bench", "metrics", "--", "--help")
    assert done.exit_code == 0, done.output
    assert "--samples" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--prune", "magnitude", "--calibration", "embedded"], "reads no data"),
        (["--prune", "magnitude", "--samples", "4"], "samples=4 has no effect"),
        (["--prune", "magnitude", "--seqlen", "64"], "seqlen=64 has no effect"),
        (["--group", "matrix"], "group 'matrix' has no effect on pattern 2:4"),
        (
            ["--refine", "weights", "--tolerance", "0.1"],
            "tolerance 0.1 has no effect with schedule='paper'",
        ),
        (["--seqlen", "0"], "seqlen is 0; a window needs at least 2 tokens"),
        (["--refine", "none", "--rank", "2"], "rank=2 has no effect with refine='none'"),
        (["--method", "cap", "--config", "x.yaml"], "option --config has no effect with --method"),
        (["--config", "nowhere.yaml"], "config 'nowhere.yaml' cannot be read"),
    ],
)
def test_an_option_without_effect_is_refused(small, tmp_path, arguments, says):
    done = run("compress", small, "--out", tmp_path / "x", *arguments)
    assert done.exit_code == 2, done.output
    assert says in done.stderr
    assert done.stderr.splitlines()[-1].startswith("slr: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--task-folder", "x"], "option --task-folder has no effect without --tasks"),
        (["--tasks", "a", "--text", "embedded"], "option --text has no effect with --tasks"),
        (["--tasks", "a", "--stream"], "option --stream has no effect with --tasks"),
        (["--seqlen", "0"], "seqlen is 0; a window needs at least 2 tokens"),
        (["--limit", "0"], "limit is 0; it must be at least 1"),
    ],
)
def test_eval_refuses_what_has_no_effect(small, arguments, says):
    done = run("eval", small, *arguments)
    assert done.exit_code == 2, done.output
    assert says in done.stderr


def test_a_config_file_whose_options_may_be_overruled(small, tmp_path):
    (tmp_path / "recipe.yaml").write_text("prune: magnitude\niterations: 3\nrank: 4\n")
    out, config = tmp_path / "x", tmp_path / "recipe.yaml"
    done = run("compress", small, "--out", out, "--config", config, "--rank", 2)
    assert done.exit_code == 0, done.output
    recipe = json.loads(run("info", out, "--json").stdout)["recipe"]
    assert (recipe["prune"], recipe["iterations"], recipe["rank"]) == ("magnitude", 3, 2)
