"""Stages of ``benchmarks/gpu.py`` that measure times; one runs as a process.

python benchmarks/_gpu_times.py llama|blocks|linear|decode [--dry] [--out DIR]
"""

import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from _gpu_stage import Run, SkipCheck, main
from linear import LLAMA, floor, on_cpu, on_gpu, rates
from refine import LLAMA_7B, weight_of

import slr
from slr.layer import kernels
from slr.layer.backends import choose, machine
from slr.layer.bits import pack_mask
from slr.matrix.metric import Gram

SPARE = 0.15  # of a stage's time: with less left it comes to an end by itself
CHOICES = {  # of constants in slr/layer/kernels.py, of the second launch and of the first
    "ROWS": (8, 16, 32, 64), "GROUPS": (32, 64, 128, 256), "WARPS": (2, 4, 8),
    "STAGES": (1, 2, 3, 5), "PARTS": (4, 8, 16, 32), "COLUMNS": (64, 128, 256, 512),
    "RANKS": (16, 32, 64, 128),
}  # fmt: skip


# ---- llama: the time of 224 matrices


def llama(run: Run) -> None:
    """Seconds of each distinct shape of LLaMA-7B, refined a few times, and of all 224."""
    sizes = {"64x48:4": 128, "80x48:4": 64, "48x80:4": 32} if run.dry else LLAMA_7B
    T = 4 if run.dry else 50
    spent: dict[str, dict[str, float]] = {way: {} for way in ("paper", "accelerated", "outputs")}
    for way in spent:  # libraries load
        refined(run, *matrix(run, "256x256:8"), T, way)
    for size in sizes:
        W, mask, H, k = matrix(run, size)
        for way, seconds in spent.items():
            found = run.check(
                f"{way} {size}",
                lambda way=way, p=(W, mask, H, k): timed(run, *p, T, way), iterations=T,
            )  # fmt: skip
            if found:
                seconds[size] = found["seconds"]
        del W, mask, H
    for way, seconds in spent.items():
        run.check(f"{way}, 224 matrices", lambda s=seconds: total(s, sizes))


def matrix(run: Run, size: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """W, a 2:4 mask by magnitude, H of 2048 random inputs, and k."""
    shape, k = size.split(":")
    W = weight_of(*map(int, shape.split("x"))).to(run.device)
    X = torch.randn(2048, W.shape[1], device=run.device)
    return W, slr.prune(W, "magnitude", "2:4").mask, X.T @ X / len(X), int(k)


def refined(run: Run, W, mask, H, k: int, T: int, way: str) -> float:
    """The relative error of one repair, by the weights or, with a mask by ADMM, the outputs."""
    options: dict = {"schedule": way}
    if way == "outputs":
        options = {"metric": Gram(H), "update_mask": "2:4", "search": "admm"}
    made = slr.refine(W, mask, k, iterations=T, **options)
    if run.device == "cuda":
        torch.cuda.synchronize()
    return made.error


def timed(run: Run, W, mask, H, k: int, T: int, way: str) -> dict:
    """The median of some, of fewer if time is short."""
    if run.left() < 2:
        raise SkipCheck("the stage's time is up")
    took, error, cuda = [], 0.0, run.device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    for _ in range(3):
        started = time.perf_counter()
        error = refined(run, W, mask, H, k, T, way)
        took.append(time.perf_counter() - started)
        if 9 * took[-1] > run.left():
            break
    found = {"seconds": statistics.median(took), "runs": len(took), "error": error}
    if cuda:
        peak = torch.cuda.max_memory_allocated() - before
        found["memory, of the matrix"] = peak / W.nbytes
    return found


def total(seconds: dict[str, float], sizes: dict[str, int]) -> dict:
    """Of all matrices, from one of each shape."""
    if seconds.keys() != sizes.keys():
        raise SkipCheck(f"not measured: {', '.join(sizes.keys() - seconds.keys())}")
    return {"seconds": sum(seconds[s] * count for s, count in sizes.items())}


# ---- blocks: the constants of our kernel, by measurement


def blocks(run: Run) -> None:
    """Other block sizes of the Triton kernel: their times over the floor of bytes, and the best."""
    shapes, rank, tokens = (["32x64", "48x32"], 4, (1, 3)) if run.dry else (LLAMA, 128, (1, 16))
    try:
        choose((64, 64), torch.bfloat16, machine(torch.device(run.device)), 1, backend="triton")
    except ValueError as reason:
        return void(run, str(reason))
    torch.set_grad_enabled(False)
    small = (1 << 20, 64) if run.dry else (1 << 29, 8192)
    measured = rates(run.device, torch.bfloat16, *small)
    run.check("rates", lambda: measured)
    many = (2, 1 << 16) if run.dry else (64, 400 << 20)  # copies, bytes of all
    layers, wholes = {}, {}
    for shape in shapes:
        parts, wholes[shape] = packed(*map(int, shape.split("x")), rank, run.device)
        count = max(2, min(many[0], many[1] // sum(part.nbytes for part in parts)))
        layers[shape] = [tuple(part.clone() for part in parts) for _ in range(count)]
    for i, count in enumerate(tokens):
        problems = {}
        for shape, W in wholes.items():
            x = torch.randn(count, W.shape[1], device=run.device).to(torch.bfloat16)
            least = floor(*W.shape, rank, count, 2, measured, True)
            problems[shape] = (layers[shape], x, (x @ W.T).double(), least)
        share = (1 - SPARE) * run.left() / (len(tokens) - i)
        sweep(run, count, problems, share)


def packed(m: int, n: int, rank: int, device: str) -> tuple[tuple, torch.Tensor]:
    """Values, bits and factors of a random matrix in bfloat16, and the dense one."""
    W = (torch.randn(m, n, device=device) / n**0.5).bfloat16()
    mask = slr.patterns.parse("2:4").select(W.abs())
    B = (torch.randn(m, rank, device=device) / rank**0.5).bfloat16()
    A = (torch.randn(rank, n, device=device) / n**0.5).bfloat16()
    return (W[mask], pack_mask(mask), B, A), torch.addmm(W * mask, B, A)


def void(run: Run, reason: str) -> None:
    """The whole stage in one check that is skipped."""

    def skip() -> dict:
        raise SkipCheck(reason)

    run.check("block sizes", skip)


def sweep(run: Run, tokens: int, problems: dict, seconds: float) -> None:
    """Try settings, each row told, until the time is up or there are none left; then the best."""
    known: dict[tuple, float] = {}
    until = time.monotonic() + seconds

    def score(setting: dict) -> float:
        """Mean time over floor, infinite if it cannot run."""
        key = tuple(setting.values())
        if key not in known:
            call = lambda: measured_with(setting, run, problems)  # noqa: E731
            found = run.check("block sizes", call, tokens=tokens, **setting)
            known[key] = found["over floor"] if found else math.inf
        return known[key]

    before = {name: getattr(kernels, name) for name in CHOICES}
    score(before)
    best = dict(before)
    for setting in settings(run, best, tokens):
        if time.monotonic() > until:
            break
        if score(setting) < score(best):
            best.update(setting)
    told = {"tokens": tokens, "over floor": score(best), "tried": len(known), "best": best}
    finished = time.monotonic() <= until
    run.check("best", lambda: {**told, "now over floor": score(before), "all tried": finished})


def settings(run: Run, best: dict, tokens: int) -> Iterator[dict]:
    """What to try: tiles and warps together, then the rest one by one, from the best so far."""
    together = ("ROWS", "GROUPS", "WARPS")
    alone = [name for name in CHOICES if name not in together]
    if tokens > 1:
        alone.remove("PARTS")  # of one token only
    near = {
        name: sorted(CHOICES[name], key=lambda v, n=name: apart(v, best[n])) for name in CHOICES
    }
    grid = sorted(
        itertools.product(*(near[name] for name in together)),
        key=lambda values: sum(apart(v, best[n]) for v, n in zip(values, together, strict=True)),
    )
    if run.dry:
        grid, alone = grid[:2], alone[:1]
        near = {name: values[:2] for name, values in near.items()}
    for values in grid:
        yield {**best, **dict(zip(together, values, strict=True))}
    for name in alone:
        for value in near[name]:
            yield {**best, name: value}


def apart(one: int, other: int) -> float:
    """Doublings between two sizes."""
    return abs(math.log2(one / other))


def measured_with(setting: dict, run: Run, problems: dict) -> dict:
    """Milliseconds of each shape with some block sizes, and their mean over the floor."""
    before = {name: getattr(kernels, name) for name in setting}
    ms, over = {}, []
    try:
        for name, value in setting.items():
            setattr(kernels, name, value)
        for shape, (copies, x, right, least) in problems.items():
            ms[shape] = milliseconds(run, copies, x, right)
            over.append(ms[shape] / least)
    except Exception as error:
        if setting != before and type(error).__module__.startswith("triton"):
            raise SkipCheck(f"{type(error).__name__}: {str(error)[:300]}") from error
        raise
    finally:
        for name, value in before.items():
            setattr(kernels, name, value)
    return {"ms": ms, "over floor": statistics.geometric_mean(over)}


def milliseconds(run: Run, copies: list, x: torch.Tensor, right: torch.Tensor) -> float:
    """Of one product by the kernel, its result looked at."""

    def call(parts, x):
        return kernels.multiply(x, *parts, None)

    error = float((call(copies[0], x).double() - right).norm() / right.norm())
    assert error < 0.02, f"the product is wrong, by {error:.3g} of itself"
    if run.device == "cuda":
        return on_gpu(call, copies, x, 8)["ms"]
    return on_cpu({"": (call, copies)}, x, 1)[""]["ms"]


# ---- linear and decode: the other benchmarks, in the time that is left


def linear(run: Run) -> None:
    """`benchmarks/linear.py`, which writes linear.json."""
    options = ["--tokens", "1,16,512,4096", "--ranks", "128", "--dtypes", "bfloat16"]
    options += ["--repeats", "12"]
    if run.dry:
        options = ["--device", "cpu", "--shapes", "32x64", "--tokens", "1,20", "--ranks", "4"]
        options += ["--dtypes", "float32", "--rotate", "1", "--repeats", "2"]
        options += ["--rates", "1", "--side", "64"]
    program(run, "linear", options, lambda rows: {"speed-ups": [r["speed-up"] for r in rows]})


def decode(run: Run) -> None:
    """`benchmarks/decode.py`, which writes decode.json, also of what it has when it is stopped."""
    options = ["--shapes", "tinyllama,llama-7b", "--new", "32", "--runs", "2"]
    if run.dry:
        options = ["--device", "cpu", "--shapes", "toy", "--new", "2", "--runs", "1"]
        options += ["--rates", "1"]
    program(run, "decode", options, lambda rows: {"tokens/s": [r["tokens/s"] for r in rows]})


def program(run: Run, name: str, options: list[str], read: Callable[[list], dict]) -> None:
    """Another benchmark, and what its rows say."""

    def call() -> dict:
        file = Path(__file__).with_name(f"{name}.py")
        command = [sys.executable, str(file), *options, "--out", str(run.out)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, f"exit code {done.returncode}: {done.stdout[-1500:]}"
        rows = json.loads((run.out / f"{name}.json").read_text())["rows"]
        return {"file": f"{name}.json", "rows": len(rows), **read(rows)}

    run.check(f"benchmarks/{name}.py", call, options=" ".join(options))


if __name__ == "__main__":
    stages = {f.__name__: f for f in (llama, blocks, linear, decode)}
    raise SystemExit(main(stages))
