"""Time, memory and error of refinement: literal Algorithm 1 (full SVDs) against ours.

    python benchmarks/refine.py [--sizes 1024x1024:32 …] [--iterations 50] [--literal 2]

Each row is one fresh process.  The literal algorithm is timed over ``--literal`` iterations and
scaled to ``--iterations`` unless that many are run; then its error is printed too.  The floor is
the FLOPs of the three products of an iteration at the rate of a large float32 matrix product,
measured in the same process.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

import slr
from slr.filled import OVERSAMPLING, WARMUP

SIZES = ("1024x1024:32", "2048x2048:64", "4096x4096:128", "4096x11008:128")
LLAMA_7B = {"4096x4096:128": 128, "11008x4096:128": 64, "4096x11008:128": 32}  # how many of each


def weight_of(m: int, n: int) -> torch.Tensor:
    """A power-law spectrum plus heavy-tailed entries, like a trained weight."""
    g = torch.Generator().manual_seed(0)
    k = min(m, n) // 4
    s = torch.arange(1, k + 1) ** -0.6
    smooth = (torch.randn(m, k, generator=g) * s) @ torch.randn(k, n, generator=g) / n
    noise = torch.randn(m, n, generator=g)
    return smooth + smooth.std() * noise * noise.abs().sqrt()


def matmul_rate() -> float:
    """FLOP/s of a 4096³ float32 product, the best of five."""
    a, b = torch.randn(4096, 4096), torch.randn(4096, 4096)
    best = 1e9
    for _ in range(5):
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    return 2 * 4096**3 / best


def peak_bytes() -> int:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def literal(W, P, k, T, only):
    """Algorithm 1, line by line; seconds for T iterations, and the error if all were run."""
    S = P * W
    started = time.perf_counter()
    for t in range(min(T, only)):
        U, sigma, Vh = torch.linalg.svd(W - S, full_matrices=False)
        r = 1 + (k - 1) * t // (T - 1)
        S = S + P * (U[:, r:] * sigma[r:] @ Vh[r:])
    seconds = (time.perf_counter() - started) / min(T, only) * T
    if only < T:
        return seconds, None
    L = W - S
    U, sigma, Vh = torch.linalg.svd(L, full_matrices=False)
    return seconds, float((L - U[:, :k] * sigma[:k] @ Vh[:k]).norm() / W.norm())


def one(size: str, way: str, T: int, only: int) -> dict:
    """One row, in this process."""
    shape, k = size.split(":")
    (m, n), k = map(int, shape.split("x")), int(k)
    W = weight_of(m, n)
    P = slr.prune(W, "magnitude", "2:4").mask
    row = {"size": shape, "k": k, "way": way}
    if way != "literal":
        rate = matmul_rate()
        row["GFLOP/s"] = rate / 1e9
    before = peak_bytes()
    if way == "literal":
        row["seconds"], row["error"] = literal(W, P, k, T, only)
        row["iterations"] = min(T, only)
    else:
        started = time.perf_counter()
        refined = slr.refine(W, P, k, iterations=T, schedule=way)
        row["seconds"] = time.perf_counter() - started
        row["error"] = refined.error / float(W.norm())
        row["iterations"] = T
        steps = T + 2 * WARMUP - 1
        row["floor"] = steps * 6 * m * n * (k + OVERSAMPLING) / rate
        row["trace"] = [step.error for step in refined.trace]
    row["extra memory / W"] = max(0, peak_bytes() - before) / (4 * m * n)
    return row


def child(size: str, way: str, T: int, only: int) -> dict:
    """The same in a fresh process."""
    command = [sys.executable, __file__, "--one", size, way, str(T), str(only)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def show(rows: list[dict]) -> None:
    """The table."""
    print(f"{'size':>12} {'k':>4} {'way':<12} {'seconds':>9} {'run':>4} {'floor':>7} {'ratio':>6} "
          f"{'error':>8} {'memory':>7} {'speed-up':>9}")  # fmt: skip
    base = {row["size"]: row["seconds"] for row in rows if row["way"] == "literal"}
    for row in rows:
        floor, error = row.get("floor"), row["error"]
        print(
            f"{row['size']:>12} {row['k']:>4} {row['way']:<12} {row['seconds']:>9.2f} "
            f"{row['iterations']:>4} "
            f"{'' if floor is None else format(floor, '.2f'):>7} "
            f"{'' if floor is None else format(row['seconds'] / floor, '.2f'):>6} "
            f"{'' if error is None else format(error, '.5f'):>8} "
            f"{row['extra memory / W']:>6.2f}x {base[row['size']] / row['seconds']:>8.0f}x"
        )


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="*", default=SIZES, help="MxN:k")
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--literal", type=int, default=2, help="iterations of it to time")
    parser.add_argument("--llama", action="store_true", help="sum up the 224 linears of LLaMA-7B")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        size, way, T, only = args.one
        print(json.dumps(one(size, way, int(T), int(only))))
        return
    rows = []
    for size in LLAMA_7B if args.llama else args.sizes:
        paper = child(size, "paper", args.iterations, 0)
        momentum = child(size, "accelerated", args.iterations, 0)
        goal = paper["trace"][-1]
        enough = next(
            (i + 1 for i, e in enumerate(momentum["trace"]) if e <= goal), args.iterations
        )
        rows += [
            child(size, "literal", args.iterations, args.literal),
            paper,
            momentum,
            child(size, "accelerated", enough, 0),
        ]
        show(rows[-4:])
    if args.llama:
        ways = [(i, rows[i]["way"], rows[i]["iterations"]) for i in range(4)]
        for i, way, iterations in ways:
            total = sum(rows[4 * j + i]["seconds"] * c for j, c in enumerate(LLAMA_7B.values()))
            print(f"LLaMA-7B, 224 matrices, {way} ({iterations}): {total / 60:.1f} minutes")
    if args.out:
        about = {
            "command": "python " + " ".join(sys.argv),
            "date": datetime.now(timezone.utc).date().isoformat(),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "torch": torch.__version__,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        kept = [{key: v for key, v in row.items() if key != "trace"} for row in rows]
        args.out.write_text(json.dumps({**about, "rows": kept}, indent=1) + "\n")


if __name__ == "__main__":
    main()
