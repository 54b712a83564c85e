"""`make gpu` without a GPU: its dry run, and what it makes of failures and of time that is up."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import slr

ROOT = Path(__file__).parent.parent
FILE = ROOT / "benchmarks" / "gpu.py"
NAMES = [
    "kernels", "backends", "graphs", "refinement", "tuning", "llama", "blocks", "linear", "decode",
]  # fmt: skip


def command(*options, cwd=ROOT):
    root = str(Path(slr.__file__).parent.parent)
    code = f"import sys; sys.path.insert(0, {root!r}); import runpy; sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-c", code, str(FILE), *options], capture_output=True, text=True, cwd=cwd
    )


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu_benchmark", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """The dry run, and its gpu.json."""
    out = tmp_path_factory.mktemp("gpu")
    done = command("--dry", "--seconds", "100000", "--out", str(out))
    return done, out, json.loads((out / "gpu.json").read_text())


def test_the_dry_run_passes(rehearsed):
    done, out, told = rehearsed
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert [row["stage"] for row in told["stages"]] == NAMES
    assert {row["outcome"] for row in told["stages"]} == {"passed"}, done.stdout
    assert told["command"].startswith("python benchmarks/gpu.py --dry")
    assert told["dry"]
    for name in ("date", "versions", "processor"):
        assert told[name], name
    assert sorted(f.name for f in out.iterdir()) == ["decode.json", "gpu.json", "linear.json"]


def test_what_needs_a_gpu_is_skipped_with_its_reason_and_nothing_else_is(rehearsed):
    told = {row["stage"]: row["checks"] for row in rehearsed[2]["stages"]}
    skipped = [c for checks in told.values() for c in checks if c["outcome"] == "skipped"]
    kinds = {c["check"].split()[0] for c in skipped}
    assert kinds == {"graph", "cutlass", "cusparselt", "triton"}
    for check in skipped:
        assert "CUDA device" in check["reason"] or "float32 is not" in check["reason"], check
    for name in ("kernels", "refinement", "tuning", "llama", "linear", "decode"):
        assert {c["outcome"] for c in told[name]} == {"passed"}, name
    best = [c for c in told["blocks"] if c["check"] == "best"]
    assert [c["tokens"] for c in best] == [1, 3]
    for check in best:
        assert check["over floor"] <= check["now over floor"]
        assert set(check["best"]) == {
            "ROWS", "GROUPS", "WARPS", "STAGES", "PARTS", "COLUMNS", "RANKS"
        }  # fmt: skip


class Clock:
    """A clock that only stages move."""

    now = 100.0

    def __call__(self):
        return self.now


def stages(gpu, **seconds):
    return tuple(gpu.Stage(name, "none.py", value) for name, value in seconds.items())


def run(gpu, listed, start, tmp_path, seconds=100.0, clock=None):
    stored = []
    rows = gpu.run(
        listed, tmp_path, False, seconds, lambda rows: stored.append(json.dumps(rows)), start,
        clock or Clock(),
    )  # fmt: skip
    assert json.loads(stored[-1]) == rows
    return rows, [json.loads(text) for text in stored]


def test_a_stage_that_fails_is_reported_and_stops_no_other(gpu, tmp_path, capsys):
    def start(stage, seconds, out, dry):
        yield {"check": "first", "outcome": "passed"}
        if stage.name == "wrong":
            yield {"check": "second", "outcome": "failed", "error": "AssertionError: 1 is not 2"}
        if stage.name == "broken":
            raise RuntimeError("exit code -11: an illegal memory access")
        if stage.name == "slow":
            raise TimeoutError("stopped after 9 s")

    listed = stages(gpu, wrong=9, broken=9, slow=9, fine=9)
    rows, stored = run(gpu, listed, start, tmp_path)
    assert [row["outcome"] for row in rows] == ["failed", "failed", "out of time", "passed"]
    assert rows[0]["failed"] == ["second"]
    assert "illegal memory access" in rows[1]["error"]
    assert rows[2]["reason"] == "stopped after 9 s"
    assert [len(row["checks"]) for row in rows] == [2, 1, 1, 1]
    # What there is has been written after every check: a run that is cut leaves it.
    assert stored[0][0]["outcome"] == "begun"
    assert stored[0][0]["checks"] == rows[0]["checks"][:1]
    told = capsys.readouterr().out
    assert "second: AssertionError: 1 is not 2" in told
    assert "exit code -11" in told


def test_a_stage_that_only_skips_says_why_and_one_without_checks_has_failed(gpu, tmp_path):
    def start(stage, seconds, out, dry):
        if stage.name == "elsewhere":
            yield {"check": "a", "outcome": "skipped", "reason": "no GPU"}
            yield {"check": "b", "outcome": "skipped", "reason": "no GPU"}

    rows, _ = run(gpu, stages(gpu, elsewhere=9, empty=9), start, tmp_path)
    assert (rows[0]["outcome"], rows[0]["reason"]) == ("skipped", "no GPU")
    assert (rows[1]["outcome"], rows[1]["error"]) == ("failed", "it made no check")


def test_when_the_time_is_up_later_stages_are_skipped(gpu, tmp_path):
    clock, given = Clock(), {}

    def start(stage, seconds, out, dry):
        given[stage.name] = seconds
        clock.now += 40
        yield {"check": "a", "outcome": "passed"}

    listed = stages(gpu, one=60, two=60, three=60, four=60)
    rows, _ = run(gpu, listed, start, tmp_path, 83.0, clock)
    assert given == {"one": 60, "two": 43.0}  # no more than there is
    assert [row["outcome"] for row in rows] == ["passed", "passed", "skipped", "skipped"]
    assert rows[2]["reason"] == "no time left of 83 s"
    assert rows[0]["seconds"] == 40


def test_a_process_is_stopped_or_its_error_told(gpu, tmp_path):
    with pytest.raises(TimeoutError, match="stopped after 0 s"):
        list(gpu.launch(gpu.STAGES[0], 0.0, tmp_path, True))
    nothing = gpu.Stage("nothing", gpu.CHECKS, 60)
    with pytest.raises(RuntimeError, match=r"exit code 2: (.|\n)*invalid choice: 'nothing'"):
        list(gpu.launch(nothing, 600.0, tmp_path, True))


def test_a_check_that_fails_in_its_stage_is_a_line_of_its_output(gpu, tmp_path, monkeypatch):
    code = (
        "from _gpu_stage import main, within\n"
        "def broken(run):\n"
        "    print('libraries print')\n"
        "    run.check('near', lambda: {'error': within('y', 0.5, 0.1)}, tokens=1)\n"
        "    run.check('nan', lambda: {'error': within('y', float('nan'), 0.1)})\n"
        "    run.check('fine', lambda: {'error': within('y', 0.05, 0.1)})\n"
        "raise SystemExit(main({'broken': broken}))\n"
    )
    (tmp_path / "broken.py").write_text(code)
    (tmp_path / "_gpu_stage.py").write_text((FILE.parent / "_gpu_stage.py").read_text())
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    near, nan, fine = gpu.launch(gpu.Stage("broken", "broken.py", 60), 600.0, tmp_path, True)
    assert near["tokens"] == 1
    assert near["error"] == "AssertionError: y: error 0.5, allowed 0.1"
    assert [c["outcome"] for c in (near, nan, fine)] == ["failed", "failed", "passed"]
    assert "y: error nan" in nan["error"]


def test_the_exit_code_tells_whether_a_stage_failed(gpu, tmp_path, monkeypatch):
    for outcome, code in (("failed", 1), ("passed", 0)):
        check = {"check": "a", "outcome": outcome, "error": "ValueError"}
        monkeypatch.setattr(gpu, "launch", lambda *_, check=check: iter([check]))
        monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry", "--out", str(tmp_path)])
        assert gpu.main() == code
        assert {
            row["outcome"] for row in json.loads((tmp_path / "gpu.json").read_text())["stages"]
        } == {outcome}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_a_dry_run_leaves_nothing(tmp_path):
    done = command("--only", "llama", cwd=tmp_path)
    assert done.returncode == 2
    assert "no CUDA device here" in done.stderr
    done = command("--dry", "--seconds", "9999", "--only", "llama", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "llama       passed" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_stage_that_is_unknown_is_named(gpu, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry", "--only", "llama,lama"])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 2
    assert "no stage is called lama" in capsys.readouterr().err


def test_make_gpu_takes_a_python_that_has_torch_for_cuda(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] || exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    options = ["--dry", "--seconds", "9999", "--only", "llama", "--out", str(tmp_path / "out")]
    make = ["make", "-s", "gpu", f"PYTHON={python}", f"GPU={' '.join(options)}"]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert told["command"] == " ".join(["python benchmarks/gpu.py", *options])
    assert [row["outcome"] for row in told["stages"]] == ["passed"]


def test_a_card_has_a_folder_and_slr_bench_lists_the_benchmark_alone(gpu):
    from slr import measurements

    assert gpu.slug("NVIDIA H200") == "nvidia-h200"
    assert not [name for name in measurements.benchmarks() if name.startswith("_")]
