"""One 2:4 + low-rank layer against the dense one: time, and time over its floor.

    python benchmarks/linear.py [--tokens 1,16,4096] [--ranks 0,128] [--out DIR]   # on a CUDA GPU
    python benchmarks/linear.py --device cpu --out results/cpu                     # a smaller table

On a GPU: medians of CUDA-graph replays timed by CUDA events, each replay running over copies of the
layer that together are several times the L2 cache.  The floor is the larger of the bytes (packed S,
factors, x and y) over the card's copy rate and the operations over its matmul rate, both measured
first.  On a CPU: the least of the processor's times, which others on the machine disturb least, and
the median of wall times; weights in rotation too; one thread.
"""

import argparse
import copy
import json
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from torch.nn.functional import linear
from tqdm import tqdm

import slr
from slr.evaluate.origin import provenance
from slr.layer.backends import choose, machine

LLAMA = ["4096x4096", "11008x4096", "4096x11008"]
DEFAULTS = {  # device: shapes, tokens, ranks, dtypes, MiB of weights in rotation
    "cuda": (LLAMA, [1, 4, 16, 64, 512, 4096], [0, 64, 128], ["bfloat16", "float16"], 400),
    "cpu": (["1024x1024", "4096x4096"], [1, 16, 512], [0, 128], ["bfloat16", "float32"], 70),
}


def problem(m: int, n: int, rank: int, dtype: torch.dtype, device: str):
    """A random layer and its dense matrix."""
    weight = torch.randn(m, n, device=device) / n**0.5
    mask = slr.patterns.parse("2:4").select(weight.abs())
    B = torch.randn(m, rank, device=device) / max(rank, 1) ** 0.5
    A = torch.randn(rank, n, device=device) / n**0.5
    layer = slr.SLRLinear(weight * mask, B, A, mask=mask, pattern="2:4").to(dtype)
    return layer.requires_grad_(False), (weight * mask + B @ A).to(dtype)


def ways(layer, dense, tokens: int, device: str) -> dict:
    """What is timed, by name: something to copy, and what to do with a copy and x."""
    found = {
        "dense": (dense, lambda W, x: linear(x, W)),
        "slr": (layer, lambda mine, x: mine(x)),
    }
    if device == "cpu":
        found["slr, cached"] = (copy.deepcopy(layer).cache_(), lambda mine, x: mine(x))
        return found
    shape, where = tuple(dense.shape), machine(layer.values.device)
    for name in ("cutlass", "cusparselt", "dense"):
        try:
            choose(shape, dense.dtype, where, tokens, backend=name)
            mine = copy.deepcopy(layer).use_(name)
            found[f"slr, {name}"] = (mine, lambda mine, x: mine(x))
        except (ValueError, RuntimeError) as error:
            print(f"  without {name}: {str(error).splitlines()[0]}", file=sys.stderr)
    try:
        alone = torch.sparse.to_sparse_semi_structured(layer.weight.clone())
        found["torch, S alone"] = (alone, lambda S, x: linear(x, S))
    except (RuntimeError, NotImplementedError) as error:
        print(f"  without torch's own: {str(error).splitlines()[0]}", file=sys.stderr)
    return found


def on_gpu(call, copies: list, x: torch.Tensor, repeats: int) -> dict:
    """Median milliseconds of a call, by graph replays over all copies, and of eager calls."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for one in copies:
            call(one, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one in copies:
            call(one, x)

    def timed(run) -> float:
        found = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            found.append(start.elapsed_time(end) / len(copies))
        return statistics.median(found[2:])

    return {"ms": timed(graph.replay), "eager ms": timed(lambda: [call(c, x) for c in copies])}


def on_cpu(call, copies: list, x: torch.Tensor, repeats: int) -> dict:
    """Least processor and median wall milliseconds of a call."""
    used, wall = [], []
    for i in range(repeats * len(copies)):
        one = copies[i % len(copies)]
        started, clock = time.perf_counter(), time.process_time()
        call(one, x)
        used.append(1e3 * (time.process_time() - clock))
        wall.append(1e3 * (time.perf_counter() - started))
    skip = len(copies)
    return {"ms": min(used[skip:]), "wall ms": statistics.median(wall[skip:])}


def rates(device: str, dtype: torch.dtype) -> dict:
    """Copy rate in GB/s and matmul rate in TFLOP/s, measured on random data."""
    size = 1 << (29 if device == "cuda" else 25)
    a, b = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    side = 8192 if device == "cuda" else 1024
    x, w = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    timed = on_gpu if device == "cuda" else on_cpu
    copied = timed(lambda b, a: b.copy_(a), [b], a, 12)["ms"]
    multiplied = timed(lambda w, x: x @ w, [w], x, 12)["ms"]
    return {"copy GB/s": 2 * size / copied / 1e6, "matmul TFLOP/s": 2 * side**3 / multiplied / 1e9}


def floor(m: int, n: int, rank: int, tokens: int, size: int, measured: dict, packed: bool) -> float:
    """Least milliseconds: bytes over the copy rate, or operations over the matmul rate."""
    kept = m * n // 2 if packed else m * n
    factors = rank * (m + n) if packed else 0
    moved = size * (kept + factors + tokens * (m + n)) + (m * n // 8 if packed else 0)
    work = 2 * tokens * (kept + factors)
    return max(moved / measured["copy GB/s"] / 1e6, work / measured["matmul TFLOP/s"] / 1e9)


@torch.no_grad()
def measure(args) -> list[dict]:
    """One row for each shape, dtype, rank and number of tokens."""
    rows, reserve = [], args.rotate << 20
    timed = on_gpu if args.device == "cuda" else on_cpu
    cases = [(s, d, k) for s in args.shapes for d in args.dtypes for k in args.ranks]
    measured = {d: rates(args.device, getattr(torch, d)) for d in args.dtypes}
    for shape, name, rank in tqdm(cases, desc="layers"):
        (m, n), dtype = map(int, shape.split("x")), getattr(torch, name)
        layer, dense = problem(m, n, rank, dtype, args.device)
        for tokens in args.tokens:
            x = torch.randn(tokens, n, device=args.device).to(dtype)
            row = {"shape": shape, "dtype": name, "rank": rank, "tokens": tokens, "ways": {}}
            row["backend"] = layer.choice(tokens).backend
            count = max(2, reserve // (dense.nbytes // 2))
            count = 2 if tokens > 64 else count  # then activations alone exceed the cache
            for way, (original, call) in ways(layer, dense, tokens, args.device).items():
                if isinstance(original, torch.nn.Module):
                    copies = [copy.deepcopy(original) for _ in range(count)]
                else:
                    copies = [original.clone() for _ in range(count)]
                repeats = max(3, args.repeats // (count if args.device == "cpu" else 1))
                times = timed(call, copies, x, repeats)
                packed = way != "dense"
                k = 0 if way == "torch, S alone" else rank
                least = floor(m, n, k, tokens, dtype.itemsize, measured[name], packed)
                row["ways"][way] = {**times, "floor ms": least, "over floor": times["ms"] / least}
            row["speed-up"] = row["ways"]["dense"]["ms"] / row["ways"]["slr"]["ms"]
            rows.append(row)
    return [{"rates": measured}, *rows]


def main() -> int:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    for name in ("shapes", "tokens", "ranks", "dtypes"):
        parser.add_argument(f"--{name}", help="separated by commas")
    parser.add_argument("--rotate", type=int, help="MiB of weights in rotation")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path, help="folder for linear.json")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; --device cpu measures a smaller table", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore", message="The PyTorch API of SparseSemi")
    shapes, tokens, ranks, dtypes, rotate = DEFAULTS[args.device]
    args.shapes = args.shapes.split(",") if args.shapes else shapes
    args.dtypes = args.dtypes.split(",") if args.dtypes else dtypes
    args.tokens = [int(t) for t in args.tokens.split(",")] if args.tokens else tokens
    args.ranks = [int(k) for k in args.ranks.split(",")] if args.ranks else ranks
    args.rotate = args.rotate or rotate
    torch.manual_seed(0)
    if args.device == "cpu":
        torch.set_num_threads(1)
    head, *rows = measure(args)
    for row in rows:
        times = ", ".join(f"{way} {t['ms']:.3f}" for way, t in row["ways"].items())
        print(
            f"{row['shape']} {row['dtype']} rank {row['rank']}, {row['tokens']} tokens, ms:", times
        )
    if args.out:
        command = "python " + " ".join(["benchmarks/linear.py", *sys.argv[1:]])
        found = {"command": command, **provenance(), **head, "rows": rows}
        found["triton"] = machine(torch.device(args.device)).triton
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "linear.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
