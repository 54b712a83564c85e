"""What the sliders of the page *Try it* show, measured once.

    python benchmarks/sliders.py [--only paths] [--limit WINDOWS] [--out results/measured]

Prints a table of perplexity by sparsity and rank on the embedded model, and one of errors by
iteration on a matrix of SmolLM2; with ``--out`` also writes ``tiny/sparsity_rank.json`` and
``smollm2/schedules.json`` there, with provenance.  Ten minutes on one core.
"""

import argparse
import json
import sys
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

import slr
from slr.checkpoint.atomic import write_text
from slr.evaluate.origin import provenance

SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
RANKS = (0, 4, 8, 16, 32, 64)
RECIPE = {"prune": "wanda", "refine": "weights", "schedule": "accelerated", "iterations": 30}
LAYER = "model.layers.15.mlp.gate_proj"
PATH_RANKS = (4, 9, 18, 36, 72)
ITERATIONS = 50


def recipe(sparsity: float, rank: int) -> slr.Recipe:
    """Of one cell; without a rank there is nothing to repair with."""
    options = RECIPE | {"rank": rank} if rank else {"prune": "wanda", "refine": "none"}
    return slr.Recipe(pattern=str(sparsity), **options)


def in_layers(model: torch.nn.Module, sparsity: float | None = None, rank: int = 0) -> int:
    """Bytes of the blocks' linear layers in 16 bits: values, a bit for each place, factors."""
    shapes = [
        (m.out_features, m.in_features)
        for m in model.model.layers.modules()
        if isinstance(m, torch.nn.Linear)
    ]
    storage = "dense" if sparsity is None else "bitmask"
    pattern = None if sparsity is None else str(sparsity)
    each = [slr.matrix_account(s, pattern, rank, storage=storage) for s in shapes]
    return round(sum(account.bytes for account in each))


def grid(limit: int | None) -> dict:
    """Perplexity and bytes of the embedded model for every sparsity and rank."""
    tokenizer = slr.load_tokenizer("tiny")
    windows = slr.data.windows(slr.data.corpus("validation"), tokenizer, 512, limit)
    calibration = slr.data.windows(slr.data.corpus("calibration"), tokenizer, 512, 16)
    dense = slr.load("tiny", dtype=torch.float32)
    rows = []
    for sparsity, rank in tqdm([(s, k) for s in SPARSITIES for k in RANKS], desc="cells"):
        model = slr.load("tiny", dtype=torch.float32)
        slr.compress_model(model, recipe(sparsity, rank), calibration)
        found = slr.perplexity(model, windows)
        cell = {"sparsity": sparsity, "rank": rank, "perplexity": found}
        rows.append(cell | {"bytes": in_layers(dense, sparsity, rank)})
    return {
        "model": "slr/tiny/model",
        "text": "embedded validation corpus",
        "windows": windows.shape[0],
        "seqlen": windows.shape[1],
        "calibration windows": calibration.shape[0],
        "recipe": RECIPE,
        "dense": {"perplexity": slr.perplexity(dense, windows), "bytes": in_layers(dense)},
        "rows": rows,
    }


def paths() -> dict:
    """The relative error in each iteration, for the ramp and for momentum, of one matrix."""
    W = slr.load("smollm2", dtype=torch.float32).get_submodule(LAYER).weight.data
    mask = slr.prune(W, "magnitude", "2:4").mask
    rows = []
    for rank in tqdm(PATH_RANKS, desc="ranks"):
        for schedule in ("paper", "accelerated"):
            found = slr.refine(W, mask, rank, iterations=ITERATIONS, schedule=schedule)
            trace = found.trace[:ITERATIONS]
            cell = {"rank": rank, "schedule": schedule, "ranks": [s.rank for s in trace]}
            rows.append(cell | {"errors": [s.error for s in trace], "last": found.error})
        rows[-1]["one shot"] = rows[-2]["one shot"] = slr.svd_repair(W, mask, rank).error
    return {
        "matrix": LAYER,
        "shape": list(W.shape),
        "norm": W.norm().item(),
        "pattern": "2:4",
        "rows": rows,
    }


def keep(result: dict, file: Path) -> None:
    """Writes a result with where it comes from."""
    result |= {"command": "python " + " ".join(sys.argv), **provenance()}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(result, indent=1) + "\n")


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("paths", "grid"), help="one of the two")
    parser.add_argument("--limit", type=int, default=None, help="windows to evaluate on")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    if args.only != "grid":
        path = paths()
        last = pd.DataFrame(path["rows"]).pivot(index="rank", columns="schedule", values="last")
        print((last / path["norm"]).round(4).to_string())
        if args.out:
            keep(path, args.out / "smollm2" / "schedules.json")
    if args.only != "paths":
        cells = grid(args.limit)
        table = pd.DataFrame(cells["rows"]).pivot(index="sparsity", columns="rank")["perplexity"]
        print(f"dense {cells['dense']['perplexity']:.2f}")
        print(table.round(2).to_string())
        if args.out:
            keep(cells, args.out / "tiny" / "sparsity_rank.json")


if __name__ == "__main__":
    main()
