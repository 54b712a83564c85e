"""Time, memory and error of refinement: literal Algorithm 1 (full SVDs) against ours.

    python benchmarks/refine.py [--sizes 1024x1024:32 …] [--literal 2]   time, memory, error
    python benchmarks/refine.py --growth     how our time grows with n, k and T
    python benchmarks/refine.py --llama      one of each shape of LLaMA-7B, summed over its 224
    python benchmarks/refine.py --tiny       every linear of the embedded model
    python benchmarks/refine.py --dtypes     rounding of half precision, in our updates and in-dtype

Each row of the first and third table is one fresh process.  The literal algorithm is timed over
``--literal`` iterations and scaled to ``--iterations`` unless that many are run; then its error is
printed too.  The floor is the time of the three products of each power step at the rate of a
large float32 matrix product, measured in the same process; where the processor multiplies
bfloat16 faster, the search goes below what float32 would allow, and the ratio shows it.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

import slr
from slr.evaluate.origin import provenance
from slr.matrix.filled import OVERSAMPLING, POLISH, SHARE, WARMUP
from slr.matrix.refinement import ramp

SIZES = ("1024x1024:32", "2048x2048:64", "4096x4096:128", "4096x11008:128")
LLAMA_7B = {"4096x4096:128": 128, "11008x4096:128": 64, "4096x11008:128": 32}  # how many of each
WAYS = {
    "paper": {},
    "paper, float32": {"search_dtype": torch.float32},
    "accelerated": {"schedule": "accelerated"},
    "accelerated, float32": {"schedule": "accelerated", "search_dtype": torch.float32},
}


def weight_of(m: int, n: int) -> torch.Tensor:
    """A power-law spectrum plus heavy-tailed entries, like a trained weight."""
    g = torch.Generator().manual_seed(0)
    k = min(m, n) // 4
    s = torch.arange(1, k + 1) ** -0.6
    smooth = (torch.randn(m, k, generator=g) * s) @ torch.randn(k, n, generator=g) / n
    noise = torch.randn(m, n, generator=g)
    return smooth + smooth.std() * noise * noise.abs().sqrt()


def problem(size: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    """W, a 2:4 mask by magnitude, and k, of ``MxN:k``."""
    shape, k = size.split(":")
    m, n = map(int, shape.split("x"))
    W = weight_of(m, n)
    return W, slr.prune(W, "magnitude", "2:4").mask, int(k)


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a 4096³ product, the best of five."""
    a, b = torch.randn(4096, 4096).to(dtype), torch.randn(4096, 4096).to(dtype)
    best = 1e9
    for _ in range(5):
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    return 2 * 4096**3 / best


def memory(field: str) -> int:
    """Bytes of VmRSS (resident now) or VmHWM (at most, since it was last reset)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(field)


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


def flops(m: int, n: int, k: int, T: int, way: str) -> float:
    """Of the three products of every power step, those at start and end included."""
    accelerated = way.startswith("accelerated")
    ranks = [k] * T if accelerated else ramp(k, T)
    fills = [0] + [r if t == 0 or not accelerated else 2 * r for t, r in enumerate(ranks)]
    polish = 0 if accelerated else min(POLISH, T)
    # The first L and one SVD of it, the iterations, twice the last of a ramp, and the last L.
    fills = [0] * (2 * WARMUP - 1) + fills[:-1] + fills[T - polish : -1] + WARMUP * [fills[-1]]
    steps_at_a_time = 3 if SHARE * k > min(m, n) else 1
    return 2 * m * n * steps_at_a_time * sum(fill + 2 * (k + OVERSAMPLING) for fill in fills)


def one(size: str, way: str, T: int, only: int) -> dict:
    """One row, in this process."""
    W, P, k = problem(size)
    m, n = W.shape
    row = {"size": size.split(":")[0], "k": k, "way": way, "T": T, "run": T}
    rate, half = matmul_rate(torch.float32), matmul_rate(torch.bfloat16)
    row["GFLOP/s"] = {"float32": rate / 1e9, "bfloat16": half / 1e9}
    if way != "literal":  # so that libraries load what they need before memory is looked at
        slr.refine(W[:256].clone(), P[:256].clone(), min(k, 64), iterations=12, **WAYS[way])
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = memory("VmRSS")
    if way == "literal":
        row["seconds"], row["error"] = literal(W, P, k, T, only)
        row["run"] = min(T, only)
    else:
        started = time.perf_counter()
        refined = slr.refine(W, P, k, iterations=T, **WAYS[way])
        row["seconds"] = time.perf_counter() - started
        row["error"] = refined.error / float(W.norm())
        row["floor"] = flops(m, n, k, T, way) / rate
    row["memory"] = max(0, memory("VmHWM") - before) / (4 * m * n)
    return row


def child(size: str, way: str, T: int, only: int = 0) -> dict:
    """The same in a fresh process."""
    command = [sys.executable, __file__, "--one", size, way, str(T), str(only)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def compare(size: str, T: int, only: int) -> list[dict]:
    """Rows of one size: literal, every way of ours, and the fewest steps to the paper's error."""
    rows = [child(size, "literal", T, only), *(child(size, way, T) for way in WAYS)]
    goal = rows[1]["error"]
    few = 2 * T // 5
    while (row := child(size, "accelerated", few))["error"] > goal and few < T:
        few += 1
    rows.append(row)
    base = rows[0]["seconds"]
    for row in rows:
        row["speed-up"] = base / row["seconds"]
    return rows


def show(rows: list[dict]) -> None:
    """The table."""
    print(
        f"{'size':>11} {'k':>4} {'way':<21} {'T':>3} {'seconds':>9} {'floor':>6} {'ratio':>6} "
        f"{'error':>8} {'memory':>7} {'speed-up':>9}"
    )
    for row in rows:
        floor, error = row.get("floor"), row["error"]
        scaled = f" (timed over {row['run']})" if row["run"] < row["T"] else ""
        print(
            f"{row['size']:>11} {row['k']:>4} {row['way']:<21} {row['T']:>3} "
            f"{row['seconds']:>9.2f} {format(floor, '6.2f') if floor else '':>6} "
            f"{format(row['seconds'] / floor, '6.2f') if floor else '':>6} "
            f"{format(error, '.5f') if error else '':>8} "
            f"{row['memory']:>6.2f}x {row['speed-up']:>8.0f}x{scaled}"
        )
    sys.stdout.flush()


def table(args: argparse.Namespace) -> list[dict]:
    """Literal against ours at every size."""
    rows = []
    for size in args.sizes:
        rows += compare(size, args.iterations, args.literal)
        show(rows[-len(WAYS) - 2 :])
    return rows


def llama(args: argparse.Namespace) -> list[dict]:
    """One of each shape of LLaMA-7B, and the sum over its 224 matrices."""
    rows = []
    for size in LLAMA_7B:
        rows += compare(size, args.iterations, args.literal)
        show(rows[-len(WAYS) - 2 :])
    each = len(WAYS) + 2
    for i in range(each):
        total = sum(rows[each * j + i]["seconds"] * c for j, c in enumerate(LLAMA_7B.values()))
        way = rows[i]["way"] + (" to the paper's error" if i == each - 1 else "")
        print(f"LLaMA-7B, 224 matrices, {way}: {total / 60:.1f} minutes")
        rows.append({"way": way, "llama_7b_minutes": total / 60})
    return rows


def growth(args: argparse.Namespace) -> list[dict]:
    """Our time against n, k and T, one at a time from (2048, 64, 50)."""
    rows = []
    settings = [(n, 64, 50) for n in (512, 1024, 2048, 4096, 8192)]
    settings += [(2048, k, 50) for k in (8, 16, 32, 64, 128, 256)]
    settings += [(2048, 64, T) for T in (10, 25, 50, 100, 200)]
    print(f"{'n':>5} {'k':>4} {'T':>4} {'paper':>8} {'accelerated':>12}   seconds")
    for n, k, T in settings:
        W, P, _ = problem(f"{n}x{n}:{k}")
        row = {"n": n, "k": k, "T": T}
        for schedule in ("paper", "accelerated"):
            slr.refine(W, P, k, iterations=2, schedule=schedule)
            started = time.perf_counter()
            slr.refine(W, P, k, iterations=T, schedule=schedule)
            row[schedule] = time.perf_counter() - started
        rows.append(row)
        print(f"{n:>5} {k:>4} {T:>4} {row['paper']:>8.2f} {row['accelerated']:>12.2f}", flush=True)
    return rows


def tiny(args: argparse.Namespace) -> list[dict]:
    """Every linear of the embedded model, one after the other."""
    blocks = slr.load("tiny", dtype=torch.float32).model.layers
    linears = [m.weight.data for m in blocks.modules() if isinstance(m, torch.nn.Linear)]
    k, T, rows = 8, args.iterations, []
    masks = [slr.prune(W, "magnitude", "2:4").mask for W in linears]
    print(f"{len(linears)} matrices, k = {k}, T = {T}")
    for way in ("literal", *WAYS):
        started, errors = time.perf_counter(), []
        for W, P in zip(linears, masks, strict=True):
            if way == "literal":
                errors.append(literal(W, P, k, T, T)[1])
            else:
                refined = slr.refine(W, P, k, iterations=T, **WAYS[way])
                errors.append(refined.error / float(W.norm()))
        seconds, error = time.perf_counter() - started, sum(errors) / len(errors)
        rows.append({"way": way, "seconds": seconds, "mean relative error": error})
        print(f"{way:<21} {seconds:>8.2f} s   mean error {error:.5f}", flush=True)
    return rows


def dtypes(args: argparse.Namespace) -> list[dict]:
    """Error beyond Algorithm 1 in float64, on weights of 512², k = 16."""
    rows = []
    print("error over that of float64, after rounding the factors: ours, and updates in-dtype")
    for dtype in (torch.float16, torch.bfloat16):
        W, P, k = problem("512x512:16")
        W, T = W.to(dtype), args.iterations
        S = W * P
        for r in ramp(k, T):
            U, sigma, Vh = torch.linalg.svd((W - S).float(), full_matrices=False)
            S = S + P * (U[:, r:] * sigma[r:] @ Vh[r:]).to(dtype)
        B, A = slr.matrix.lowrank.truncated_svd(W - S, k).factors()
        best = slr.refine(W.double(), P, k, iterations=T, solver="exact").error
        results = {
            "in-dtype": (S, B.to(dtype), A.to(dtype)),
            "ours, exact": slr.refine(W, P, k, iterations=T, solver="exact")[:3],
            "ours, fast": slr.refine(W, P, k, iterations=T)[:3],
        }
        row = {}
        for way, factors in results.items():
            S, B, A = (factor.double() for factor in factors)
            row[way] = float((W.double() - S - B @ A).norm()) / best - 1
        rows.append({"dtype": str(dtype), **row})
        print(f"{dtype!s:<15}", "   ".join(f"{v:+.2e} {way}" for way, v in row.items()))
    return rows


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="*", default=SIZES, help="MxN:k")
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--literal", type=int, default=2, help="iterations of it to time")
    for measure in (llama, growth, tiny, dtypes):
        parser.add_argument(
            f"--{measure.__name__}", dest="measure", action="store_const", const=measure,
            help=measure.__doc__.splitlines()[0],
        )  # fmt: skip
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        size, way, T, only = args.one
        print(json.dumps(one(size, way, int(T), int(only))))
        return
    rows = (args.measure or table)(args)
    if args.out:
        about = {"command": "python " + " ".join(sys.argv), **provenance()}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
