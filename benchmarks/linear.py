"""One sparse + low-rank layer against the dense one: time, and time over its floor.

    python benchmarks/linear.py [--tokens 1,16,4096] [--ranks 0,128] [--out DIR]   # on a CUDA GPU
    python benchmarks/linear.py --device cpu --out results/cpu

On a GPU: medians of CUDA-graph replays timed by CUDA events, each replay running over copies of the
layer that together are several times the L2 cache.  The floor is the larger of the bytes (packed S,
factors, x and y) over the card's copy rate and the operations over its matmul rate, both measured
first.  On a CPU: medians of wall times with all threads, the ways taking turns so that what else
the machine does meets them alike; copies that together are beyond any cache.  The floor takes the
rate of copying or of summing, whichever is higher.
"""

import argparse
import copy
import functools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn.functional import linear
from tqdm import tqdm

import slr
from slr.evaluate.origin import provenance
from slr.layer import native
from slr.layer.backends import FEW, choose, machine
from slr.layer.compiled import SETS, library

LLAMA = ["4096x4096", "11008x4096", "4096x11008"]
DEFAULTS = {  # device: shapes, tokens, ranks, dtypes, MiB of weights in rotation
    "cuda": (LLAMA, [1, 4, 16, 64, 512, 4096], [0, 64, 128], ["bfloat16", "float16"], 400),
    "cpu": (LLAMA, [1, 4, 16, 512], [128], ["bfloat16", "float32"], 2048),
}
PATTERNS = {"cuda": ["2:4"], "cpu": ["2:4", "0.5"]}


def problem(m: int, n: int, rank: int, dtype: torch.dtype, device: str, pattern: str = "2:4"):
    """A random layer and its dense matrix."""
    weight = torch.randn(m, n, device=device) / n**0.5
    mask = slr.patterns.parse(pattern).select(weight.abs())
    B = torch.randn(m, rank, device=device) / max(rank, 1) ** 0.5
    A = torch.randn(rank, n, device=device) / n**0.5
    layer = slr.SLRLinear(weight * mask, B, A, mask=mask, pattern=pattern).to(dtype)
    return layer.requires_grad_(False), (weight * mask + B @ A).to(dtype)


def ways(layer, dense, tokens: int, device: str) -> dict:
    """What is timed, by name: something to copy, and what to do with a copy and x."""
    found = {
        "dense": (dense, lambda W, x: linear(x, W)),
        "slr": (layer, lambda mine, x: mine(x)),
    }
    if device == "cpu":
        by_torch = copy.deepcopy(layer).use_("cpu")
        found["slr, torch's operations"] = (by_torch, lambda mine, x: mine(x))
        for best in SETS[: library().best] if tokens <= FEW and not native.missing() else ():
            found[f"slr, {best}"] = (layer, functools.partial(multiplied, best))
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


def multiplied(best: str, layer, x: torch.Tensor) -> torch.Tensor:
    """By our kernels with no better instructions than these."""
    S = (layer.values, layer.bitmask, layer.starts)
    return native.multiply(x, *S, layer.B, layer.A, layer.bias, best=best)


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


def on_cpu(ways: dict, x: torch.Tensor, repeats: int) -> dict:
    """Median wall milliseconds of each way: {name: (call, copies)}, which take turns."""
    found: dict[str, list[float]] = {way: [] for way in ways}
    for i in range(repeats + 1):
        for turn, (way, (call, copies)) in enumerate(ways.items()):
            # Ways that share copies are far from one another in them.
            one = copies[(i + turn * len(copies) // len(ways)) % len(copies)]
            started = time.perf_counter()
            call(one, x)
            found[way].append(1e3 * (time.perf_counter() - started))
    return {way: {"ms": statistics.median(each[1:])} for way, each in found.items()}


def rates(device: str, dtype: torch.dtype, size: int = 1 << 29, side: int | None = None) -> dict:
    """Bytes moved in GB/s and matmul rate in TFLOP/s, measured on random data."""
    side = side or (8192 if device == "cuda" else 2048)
    a, b = (torch.empty(size, dtype=torch.uint8, device=device).random_() for _ in range(2))
    x, w = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    calls = {
        "copied": (lambda b, a: b.copy_(a), [b], a),
        "summed": (lambda words, _: words.sum(), [b.view(torch.int64)], a),
        "multiplied": (lambda w, x: x @ w, [w], x),
    }
    if device == "cuda":
        ms = {name: on_gpu(call, one, x, 12)["ms"] for name, (call, one, x) in calls.items()}
    else:
        ms = {
            name: on_cpu({"": (call, one)}, x, 6)[""]["ms"]
            for name, (call, one, x) in calls.items()
        }
    rate = max(2 * size / ms["copied"], size / ms["summed"]) / 1e6
    return {"bytes GB/s": rate, "matmul TFLOP/s": 2 * side**3 / ms["multiplied"] / 1e9}


def floor(m: int, n: int, rank: int, tokens: int, size: int, measured: dict, packed: bool) -> float:
    """Least milliseconds: bytes over the rate of bytes, or operations over the matmul rate."""
    kept = m * n // 2 if packed else m * n
    factors = rank * (m + n) if packed else 0
    moved = size * (kept + factors + tokens * (m + n)) + (m * n // 8 if packed else 0)
    work = 2 * tokens * (kept + factors)
    return max(moved / measured["bytes GB/s"] / 1e6, work / measured["matmul TFLOP/s"] / 1e9)


def copies_of(original, count: int) -> list:
    """As many as that, of a layer or a matrix."""
    if isinstance(original, torch.nn.Module):
        return [copy.deepcopy(original) for _ in range(count)]
    return [original.clone() for _ in range(count)]


def times_of(layer, dense: torch.Tensor, x: torch.Tensor, args) -> dict:
    """Of each way, over copies that no cache holds."""
    few = max(2, (args.rotate << 20) // dense.nbytes)
    count = 2 if len(x) > 64 else few  # then activations alone exceed the cache
    found, kept = {}, {}
    for way, (original, call) in ways(layer, dense, len(x), args.device).items():
        if args.device == "cuda":
            found[way] = on_gpu(call, copies_of(original, 2 * count), x, max(3, args.repeats))
        elif id(original) not in kept:
            kept[id(original)] = copies_of(original, count)
            found[way] = (call, kept[id(original)])
        else:
            found[way] = (call, kept[id(original)])
    if args.device == "cuda":
        return found
    return on_cpu(found, x, args.repeats if len(x) > 64 else max(args.repeats, 2 * count))


@torch.no_grad()
def measure(args) -> Iterator[dict]:
    """The rates; then one row for each shape, dtype, pattern, rank and number of tokens."""
    sizes = [(s, d, p) for s in args.shapes for d in args.dtypes for p in PATTERNS[args.device]]
    large = (args.rates << 20, args.side)
    measured = {d: rates(args.device, getattr(torch, d), *large) for d in args.dtypes}
    yield {"rates": measured}
    for (shape, name, pattern), rank in tqdm(
        [(s, k) for s in sizes for k in args.ranks], desc="layers"
    ):
        (m, n), dtype = map(int, shape.split("x")), getattr(torch, name)
        layer, dense = problem(m, n, rank, dtype, args.device, pattern)
        for tokens in args.tokens:
            x = torch.randn(tokens, n, device=args.device).to(dtype)
            row = {"shape": shape, "dtype": name, "pattern": pattern, "rank": rank}
            row |= {"tokens": tokens, "backend": layer.choice(tokens).backend, "ways": {}}
            for way, times in times_of(layer, dense, x, args).items():
                k = 0 if way == "torch, S alone" else rank
                least = floor(m, n, k, tokens, dtype.itemsize, measured[name], way != "dense")
                row["ways"][way] = {**times, "floor ms": least, "over floor": times["ms"] / least}
            row["speed-up"] = row["ways"]["dense"]["ms"] / row["ways"]["slr"]["ms"]
            yield row


def store(args, rates: dict, rows: list[dict]) -> None:
    """What there is so far, where it was measured and how."""
    command = "python " + " ".join(["benchmarks/linear.py", *sys.argv[1:]])
    found = {"command": command, **provenance(), **rates, "rows": rows}
    found["triton"] = machine(torch.device(args.device)).triton
    found["native"] = native.in_use() if args.device == "cpu" else ""
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "linear.json").write_text(json.dumps(found, indent=1) + "\n")


def main() -> int:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    for name in ("shapes", "tokens", "ranks", "dtypes"):
        parser.add_argument(f"--{name}", help="separated by commas")
    parser.add_argument("--rotate", type=int, help="MiB of weights in rotation")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--rates", type=int, default=512, help="MiB copied for the rate of bytes")
    parser.add_argument("--side", type=int, help="of the matrices for the rate of operations")
    parser.add_argument("--out", type=Path, help="folder for linear.json")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; --device cpu measures the CPU", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore", message="The PyTorch API of SparseSemi")
    shapes, tokens, ranks, dtypes, rotate = DEFAULTS[args.device]
    args.shapes = args.shapes.split(",") if args.shapes else shapes
    args.dtypes = args.dtypes.split(",") if args.dtypes else dtypes
    args.tokens = [int(t) for t in args.tokens.split(",")] if args.tokens else tokens
    args.ranks = [int(k) for k in args.ranks.split(",")] if args.ranks else ranks
    args.rotate = args.rotate or rotate
    torch.manual_seed(0)
    found = measure(args)
    measured, rows = next(found), []
    for row in found:
        rows.append(row)
        times = ", ".join(f"{way} {t['ms']:.3f}" for way, t in row["ways"].items())
        print(
            f"{row['shape']} {row['dtype']} {row['pattern']} rank {row['rank']}, {row['tokens']} "
            f"tokens, {row['speed-up']:.2f} of dense, ms: {times}"
        )
        if args.out:
            store(args, measured, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
