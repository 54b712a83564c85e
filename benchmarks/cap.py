"""CAP on the embedded model: the learned allocation against uniform and greedy ones.

    python benchmarks/cap.py [--balance-ratio 1] [--refit] [--steps 200] [--out FILE]

All choices are among the same candidates and keep exactly the same number of parameters.  Loss is
the mean negative log-likelihood a token, in nats, on held-out text; learned rows are over the seeds
of the masks that were tried.  ``start`` is the learned policy before its first step.  The rows
``magnitude`` and ``refine`` (rank 8, fewer entries) have as many parameters, and no policy.
The file is written anew after each row.  Ten minutes on two free cores.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import slr
from slr.evaluate.origin import provenance
from slr.methods.cap import Policy, Pool, allocate, excess_loss, propose
from slr.methods.cap.policy import soften

RANK = 8  # of the rows "refine"


def model() -> torch.nn.Module:
    """The embedded one, dense."""
    return slr.load("tiny", dtype=torch.float32)


def row(choice: str, made: torch.nn.Module, reports: list, windows: torch.Tensor, **more) -> dict:
    """One line: validation loss, kept parameters, and where they are."""
    layers = {r.name: [*r.shape, r.rank, r.kept] for r in reports}
    return {
        "choice": choice,
        "loss": math.log(slr.perplexity(made, windows)),
        "parameters": sum(r.kept + r.rank * sum(r.shape) for r in reports),
        "in triplets": sum(r.rank * sum(r.shape) for r in reports),
        "relative error": statistics.mean(r.error for r in reports),
        **more,
        "layers": layers,
    }


def equal_parameters(block: torch.nn.Module, budget: float, rank: int) -> dict:
    """Overrides of a recipe that spend a budget exactly: on B A of a rank, and on whole entries.

    By the last part of a layer's name, as ``"*.q_proj"``; all blocks are shaped as this one.
    """
    overrides = {}
    for name, layer in block.named_modules():
        if not isinstance(layer, torch.nn.Linear):
            continue
        m, n = layer.weight.shape
        entries = budget * m * n - rank * (m + n)
        pruned = 1 - math.floor(entries / m) / n + 1e-9  # whole entries of a row
        overrides[f"*.{name.rpartition('.')[2]}"] = {"pattern": f"{pruned:.9f}"}
    return overrides


def others(budget: float, calibration: torch.Tensor, windows: torch.Tensor) -> Iterator[dict]:
    """Magnitude pruning, and refinement with as many parameters in all."""
    for choice, refine in (("magnitude", "none"), ("refine, weights", "weights"),
                           ("refine, activations", "activations")):  # fmt: skip
        made, rank = model(), 0 if refine == "none" else RANK
        recipe = slr.Recipe(
            prune="magnitude", pattern="0.5", refine=refine, rank=rank or None,
            overrides=equal_parameters(made.model.layers[0], budget, rank),
        )  # fmt: skip
        reports = slr.compress_model(made, recipe, calibration)
        yield row(choice, made, reports, windows)


def choices(
    args: argparse.Namespace, found: dict, calibration: torch.Tensor, windows: torch.Tensor
) -> Iterator[dict]:
    """Uniform, greedy, and the learned one from the start to every seed."""
    runs = [(method, {"method": method}) for method in ("uniform", "greedy")]
    runs += [("start", {"steps": 0}), *(("learned", {"seed": seed}) for seed in args.seeds)]
    for choice, options in runs:
        made, losses, started = model(), [], time.perf_counter()
        more = dict(options)
        if "seed" in options:
            generator = torch.Generator().manual_seed(options["seed"])
            more = {"generator": generator, "steps": args.steps}
        reports = allocate(
            made, calibration, args.budget, found=found, refit=args.refit, losses=losses,
            **{"prior": args.prior, "rate": args.rate, "batch": args.batch, **more},
        )  # fmt: skip
        seconds = time.perf_counter() - started
        seed = {k: v for k, v in options.items() if k == "seed"}
        yield row(choice, made, reports, windows, **seed, seconds=seconds, tried=losses)


def variance(args: argparse.Namespace, found: dict, calibration: torch.Tensor) -> Iterator[dict]:
    """Variance of the gradient's estimate at the start, summed over the groups, by batch.

    Of the same masks; ``excess`` is the loss above the dense model's, ``baseline`` the excess less
    the mean of the five before.
    """
    pool, dense = Pool(found), model()
    spend = pool.budget(args.budget)
    start = soften(getattr(pool, args.prior)(), pool.costs, spend)
    policy, generator = Policy(pool.costs, spend, start), torch.Generator().manual_seed(0)
    s = policy.probabilities
    masks = [policy.sample(generator) for _ in range(args.masks)]
    scores = torch.stack([(m.double() - s) / (s * (1 - s) + policy.epsilon) for m in masks])
    for batch in (1, 4, 16):
        excess = excess_loss(dense, pool, calibration, batch, args.refit)
        losses = torch.tensor(
            [excess(mask * pool.costs, k) for k, mask in enumerate(masks)]
        ).double()
        level = torch.tensor(
            [math.log(slr.perplexity(dense, part)) for part in calibration.split(batch)]
        )
        raw = losses + level[torch.arange(len(masks)) % len(level)]
        window = policy.window
        before = losses.unfold(0, window, 1).mean(1)[:-1]
        for kind, weight in (("raw", raw), ("excess", losses), ("baseline", None)):
            w = losses[window:] - before if weight is None else weight[window:]
            found_ = w[:, None] * scores[window:]
            yield {"batch": batch, "loss": kind, "variance": float(found_.var(0).sum()),
                   "of the loss": float(w.var())}  # fmt: skip


def show(line: dict) -> None:
    """One line of the table."""
    name = f"{line['choice']} {line['seed']}" if "seed" in line else line["choice"]
    rest = ""
    if "parameters" in line:
        rest = (
            f"{line['parameters']:>12,} {line['in triplets'] / line['parameters']:>11.3f}"
            f" {line['relative error']:>8.4f}"
        )
    print(f"{name:<20} {line['loss']:>8.4f} {math.exp(line['loss']):>8.2f} {rest}", flush=True)


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=0.5, help="of the linears' parameters")
    parser.add_argument("--share", type=int, default=16, help="triplets in a group")
    parser.add_argument("--balance-ratio", type=float, default=1.0, help="λ √max(m, n)")
    parser.add_argument("--refit", action="store_true", help="kept entries are W - B A")
    parser.add_argument("--prior", default="uniform", help="uniform or greedy")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--batch", type=int, default=4, help="windows that a mask is tried on")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--masks", type=int, default=48, help="to estimate the variance from")
    parser.add_argument("--windows", type=int, default=24, help="of 256 tokens to measure on")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    tokenizer = slr.load_tokenizer("tiny")
    windows = slr.data.windows(slr.data.corpus("validation"), tokenizer, 256, args.windows)
    calibration = slr.data.windows(slr.data.corpus("calibration"), tokenizer, 128, 128)
    result = {
        "command": "python " + " ".join(sys.argv), "model": "slr/tiny/model",
        "text": "embedded validation corpus", "options": {**vars(args), "out": None},
        **provenance(), "rows": [], "variance": [],
    }  # fmt: skip

    def add(part: str, line: dict) -> None:
        result[part].append(line)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    print(f"{'choice':<20} {'loss':>8} {'ppl':>8} {'parameters':>12} {'in triplets':>11} "
          f"{'error':>8}")  # fmt: skip
    rows = [{"choice": "dense", "loss": math.log(slr.perplexity(model(), windows))}]
    found = dict(propose(model(), share=args.share, balance_ratio=args.balance_ratio))
    for lines in (rows, choices(args, found, calibration, windows),
                  others(args.budget, calibration, windows)):  # fmt: skip
        for line in lines:
            show(line)
            add("rows", line)
    losses = [line["loss"] for line in result["rows"] if line["choice"] == "learned"]
    if len(losses) > 1:
        mean, spread = statistics.mean(losses), statistics.stdev(losses)
        print(f"learned: mean {mean:.4f}, standard deviation {spread:.4f}, {len(losses)} seeds")
    for line in variance(args, found, calibration):
        print(line, flush=True)
        add("variance", line)


if __name__ == "__main__":
    main()
