"""All that needs an NVIDIA GPU, in one command of nine minutes: `make gpu`.

    python benchmarks/gpu.py [--seconds 525] [--only kernels,graphs] [--out DIR]
    python benchmarks/gpu.py --dry    # the same code on a CPU, at small sizes, kernels interpreted

Each stage is a process of its own with a time of its own, so that one that crashes, or leaves the
card in error, or does not end, stops no other.  ``OUT/gpu.json`` is written anew after each check:
a run that is cut leaves what it has.  A check passed, failed (with the error's text) or was skipped
(with the reason); so was a stage, or it ran out of time.  The exit code is 1 if any failed.  By
default OUT is ``results/`` and the card's name; a dry run keeps nothing unless OUT is given.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

import slr
from slr.evaluate.origin import provenance

HERE = Path(__file__).resolve().parent
SECONDS = 525  # of the nine minutes; what imports and writes takes the rest
LEAST = 10  # seconds: with less left no stage begins
CHECKS, TIMES = "_gpu_checks.py", "_gpu_times.py"


class Stage(NamedTuple):
    """A name, the file that has it, and the seconds that it may take."""

    name: str
    file: str
    seconds: int


# What decides whether anything else counts comes first; what is left over goes to the last.
STAGES = (
    Stage("kernels", CHECKS, 90),
    Stage("backends", CHECKS, 45),
    Stage("graphs", CHECKS, 80),
    Stage("refinement", CHECKS, 45),
    Stage("tuning", CHECKS, 60),
    Stage("llama", TIMES, 50),
    Stage("blocks", TIMES, 70),
    Stage("linear", TIMES, 60),
    Stage("decode", TIMES, 300),
)


def slug(card: str) -> str:
    """A card's name as a folder's.

    >>> slug("NVIDIA A100-SXM4-80GB")
    'nvidia-a100-sxm4-80gb'
    """
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def environment(dry: bool) -> dict[str, str]:
    """Of a stage: this slr, and Triton's interpreter in a dry run only."""
    root = str(Path(slr.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    mine = {"PYTHONPATH": path, "TRITON_INTERPRET": "1" if dry else "0", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **mine, "TOKENIZERS_PARALLELISM": "false"}


def kill(process: subprocess.Popen) -> None:
    """A stage and all that it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def launch(stage: Stage, seconds: float, out: Path, dry: bool) -> Iterator[dict]:
    """Run a stage in a process of its own; yields its checks as they are done.

    Raises:
        TimeoutError: it was stopped.
        RuntimeError: it ended in an error, whose text follows.
    """
    command = [sys.executable, str(HERE / stage.file), stage.name]
    command += ["--seconds", f"{seconds:.1f}", "--out", str(out), *["--dry"] * dry]
    late = threading.Event()
    with tempfile.TemporaryFile("w+", errors="replace") as told:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=told, text=True, start_new_session=True,
            env=environment(dry),
        )  # fmt: skip
        timer = threading.Timer(seconds, lambda: (late.set(), kill(process)))
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                with suppress(ValueError):  # cut in the middle
                    yield json.loads(line)
            code = process.wait()
        finally:
            timer.cancel()
            kill(process)
            process.wait()
        if late.is_set():
            raise TimeoutError(f"stopped after {seconds:.0f} s")
        if code:
            told.seek(0)
            raise RuntimeError(f"exit code {code}: {told.read()[-3000:].strip()}")


def outcome_of(checks: list[dict], error: Exception | None) -> dict:
    """Of a stage, by its checks and by how its process ended."""
    failed = [c["check"] for c in checks if c["outcome"] == "failed"]
    told = {"failed": failed} if failed else {}
    if isinstance(error, TimeoutError):
        return {"outcome": "failed" if failed else "out of time", **told, "reason": str(error)}
    if error is not None:
        return {"outcome": "failed", **told, "error": str(error) or type(error).__name__}
    if failed or not checks:
        return {"outcome": "failed", **(told or {"error": "it made no check"})}
    if all(c["outcome"] == "skipped" for c in checks):
        reasons = dict.fromkeys(c["reason"] for c in checks)
        return {"outcome": "skipped", "reason": "; ".join(reasons)}
    return {"outcome": "passed"}


def run(
    stages: tuple[Stage, ...], out: Path, dry: bool, seconds: float,
    store: Callable[[list[dict]], None], start: Callable[..., Iterator[dict]] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> list[dict]:  # fmt: skip
    """All stages, one after another, while there is time; `store` is given what there is."""
    began, rows = clock(), []
    for stage in stages:
        left = seconds - (clock() - began)
        row: dict = {"stage": stage.name, "outcome": "begun", "seconds": 0.0, "checks": []}
        rows.append(row)
        if left < LEAST:
            row |= {"outcome": "skipped", "reason": f"no time left of {seconds:g} s"}
            store(rows)
            continue
        since, error = clock(), None
        given = left if dry else min(stage.seconds, left)  # times of their own are those of a GPU
        try:
            for check in (start or launch)(stage, given, out, dry):
                row["checks"].append(check)
                row["seconds"] = round(clock() - since, 1)
                store(rows)
        except Exception as problem:
            error = problem
        row |= outcome_of(row["checks"], error)
        row["seconds"] = round(clock() - since, 1)
        store(rows)
        show(row)
    return rows


def show(row: dict) -> None:
    """A stage in one line, and one for each check that failed."""
    count = {name: 0 for name in ("passed", "failed", "skipped")}
    for check in row["checks"]:
        count[check["outcome"]] += 1
    told = ", ".join(f"{n} {name}" for name, n in count.items() if n) or "no checks"
    print(f"{row['stage']:<11} {row['outcome']:<12} {row['seconds']:>6.1f} s   {told}", flush=True)
    for check in row["checks"]:
        if check["outcome"] == "failed":
            print(f"    {check['check']}: {check['error'].splitlines()[0]}", flush=True)
    if "error" in row or "reason" in row:
        last = (row.get("error") or row["reason"]).splitlines()[-1]
        print(f"    {last}", flush=True)


def card() -> dict | None:
    """What is known of the GPU; ``None`` without one."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    names = ("name", "major", "minor", "total_memory", "multi_processor_count", "L2_cache_size")
    return {n: getattr(found, n, None) for n in names} | {"cuda": torch.version.cuda}


def writer(out: Path, dry: bool, seconds: float) -> Callable[[list[dict]], None]:
    """Writes ``gpu.json`` whole, or leaves the one before."""
    command = "python " + " ".join(["benchmarks/gpu.py", *sys.argv[1:]])
    head = {"command": command, **provenance(), "card": card(), "dry": dry, "limit": seconds}

    def store(rows: list[dict]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        beside = out / "gpu.json.new"
        beside.write_text(json.dumps({**head, "stages": rows}, indent=1) + "\n")
        beside.replace(out / "gpu.json")

    return store


def main() -> int:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all stages together")
    parser.add_argument("--only", help=f"of {','.join(s.name for s in STAGES)}")
    parser.add_argument("--dry", action="store_true", help="on a CPU, at small sizes")
    parser.add_argument("--out", type=Path, help="folder for gpu.json, linear.json, decode.json")
    args = parser.parse_args()
    if not args.dry and not torch.cuda.is_available():
        print("no CUDA device here; --dry rehearses on a CPU", file=sys.stderr)
        return 2
    wanted = args.only.split(",") if args.only else [s.name for s in STAGES]
    unknown = set(wanted) - {s.name for s in STAGES}
    if unknown:
        parser.error(f"--only: no stage is called {', '.join(sorted(unknown))}")
    stages = tuple(s for s in STAGES if s.name in wanted)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the stage ends too
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch)
        if not args.dry and not args.out:
            out = Path("results") / slug(torch.cuda.get_device_name())
        print(f"{'a dry run on the CPU' if args.dry else torch.cuda.get_device_name()}, {out}")
        rows = run(
            stages, out.resolve(), args.dry, args.seconds, writer(out, args.dry, args.seconds)
        )
    return int(any(row["outcome"] == "failed" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
