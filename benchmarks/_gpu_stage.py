"""What the stages of ``benchmarks/gpu.py`` share: a process that tells its checks line by line."""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

EPS = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-23}


class SkipCheck(Exception):  # noqa: N818
    """A check that cannot be made here; its text is the reason."""


class Run:
    """One stage in the making.

    Attributes:
        dry: on the CPU, at small sizes.
        device: where to compute.
        out: folder of results.
    """

    def __init__(self, dry: bool, seconds: float, out: Path, stream: IO[str]) -> None:
        self.dry, self.out, self.stream = dry, out, stream
        self.device = "cpu" if dry else "cuda"
        self._until = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until the stage is stopped."""
        return self._until - time.monotonic()

    def check(self, name: str, call: Callable[[], dict], **about) -> dict | None:
        """Make a check and tell how it went; what it found if it passed."""
        row, started = {"check": name, **about}, time.monotonic()
        try:
            row |= {"outcome": "passed", **call()}
        except SkipCheck as reason:
            row |= {"outcome": "skipped", "reason": str(reason)}
        except Exception as error:
            row |= {"outcome": "failed", "error": f"{type(error).__name__}: {error}"[:2000]}
            if not isinstance(error, AssertionError):
                row["traceback"] = traceback.format_exc()[-3000:]
        row["took"] = round(time.monotonic() - started, 3)
        self.stream.write(json.dumps(row) + "\n")
        self.stream.flush()
        return row if row["outcome"] == "passed" else None


def distance(got: Tensor, exact: Tensor) -> float:
    """‖got - exact‖ / ‖exact‖, in float64 on the CPU."""
    got, exact = got.detach().cpu().double(), exact.detach().cpu().double()
    assert got.shape == exact.shape, f"shape {tuple(got.shape)}, not {tuple(exact.shape)}"
    return float((got - exact).norm() / exact.norm().clamp_min(1e-30))


def within(what: str, found: float, allowed: float) -> float:
    """The error that was found; raise AssertionError if it is above what is allowed, or NaN."""
    assert found <= allowed, f"{what}: error {found:.3g}, allowed {allowed:.3g}"
    return found


def main(stages: Mapping[str, Callable[[Run], None]]) -> int:
    """Run one of the stages of a file; standard output has its checks and nothing else."""
    parser = argparse.ArgumentParser(description="A stage of benchmarks/gpu.py.")
    parser.add_argument("stage", choices=list(stages))
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    with os.fdopen(os.dup(1), "w") as stream:
        os.dup2(2, 1)  # what libraries print goes elsewhere
        sys.stdout = sys.stderr
        torch.manual_seed(0)
        stages[args.stage](Run(args.dry, args.seconds, args.out, stream))
    return 0
