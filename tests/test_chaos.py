"""The short form of `make chaos`; kills are in test_journal and test_pipeline."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "args",
    [
        ("chaos", "--kills", "10", "--only", "pairs,sources,journals"),
        ("corrupt", "--scale", "0.04"),
    ],
)
def test_nothing_is_lost_and_nothing_is_silent(args):
    name, *options = args
    done = subprocess.run(
        [sys.executable, "-m", f"slr.benchmarks.{name}", *options],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert len(rows) == {"chaos": 3, "corrupt": 8}[name]
    assert all(int(row[-4]) >= 2 for row in rows)
