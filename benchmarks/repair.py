"""Perplexity of the embedded model, pruned and repaired: the table of the README.

    python benchmarks/repair.py [--limit WINDOWS] [--out results/measured/tiny]

Prints the table; with ``--out`` also writes ``repair.json`` (with provenance) and the figure
``repair.svg`` there.  Twenty minutes for 64 windows on two cores.
"""

import argparse
import json
import sys
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

import slr
from slr.evaluate.origin import provenance

PATTERNS = ("0.5", "0.6", "0.7", "2:4", "4:8")
MASKS = ("magnitude", "wanda", "sparsegpt")
REPAIRS = {
    "none": "pruned",
    "svd": "SVD",
    "eora": "EoRA",
    "weights": "refined",
    "diagonal": "diagonal",
    "activations": "Gram",
    "updated": "Gram, mask updated",
}


def options(repair: str) -> dict:
    """Of a recipe."""
    if repair == "updated":
        return {"refine": "activations", "update_mask": True}
    return {"refine": repair}


def measure(limit: int | None) -> dict:
    """Every cell of masks × patterns × repairs, and the dense model."""
    tokenizer = slr.load_tokenizer("tiny")
    windows = slr.data.windows(slr.data.corpus("validation"), tokenizer, 512, limit)
    calibration = slr.data.windows(slr.data.corpus("calibration"), tokenizer, 512, 32)
    dense = slr.perplexity(slr.load("tiny", dtype=torch.float32), windows)
    cells = [(m, p, r) for m in MASKS for p in PATTERNS for r in REPAIRS]
    rows = []
    for mask, pattern, repair in tqdm(cells, desc="cells"):
        model = slr.load("tiny", dtype=torch.float32)
        recipe = slr.Recipe(prune=mask, pattern=pattern, **options(repair))
        reports = slr.compress_model(model, recipe, calibration)
        rows.append(
            {
                "mask": mask,
                "pattern": pattern,
                "repair": REPAIRS[repair],
                "perplexity": slr.perplexity(model, windows),
                "relative error": sum(r.error for r in reports) / len(reports),
            }
        )
    return {
        "model": "slr/tiny/model",
        "text": "embedded validation corpus",
        "windows": windows.shape[0],
        "seqlen": windows.shape[1],
        "calibration windows": calibration.shape[0],
        "recipe": slr.Recipe().resolved(256).as_dict() | {"prune": "mask", "pattern": "pattern"},
        "dense": dense,
        "rows": rows,
        "command": "python " + " ".join(sys.argv),
        **provenance(),
    }


def table(result: dict) -> pd.DataFrame:
    """Masks and patterns down, perplexity and error of each repair across."""
    frame = pd.DataFrame(result["rows"]).pivot(index=["mask", "pattern"], columns="repair")
    frame = frame.reindex(PATTERNS, level="pattern")
    return frame.reindex(columns=list(REPAIRS.values()), level="repair")


def draw(result: dict, file: Path) -> None:
    """The figure of the README."""
    from matplotlib import pyplot as plt

    from slr.chapters.plots import grouped_bars, use_style

    use_style()
    kinds = {"pruned": "sparse", "SVD": "svd", "refined": "refined", "Gram": "low rank"}
    values = table(result)["perplexity"]
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 3.4), sharey=True)
    for axes, mask in zip(panels, ("magnitude", "wanda"), strict=True):
        rows = values[list(kinds)].loc[mask].to_dict("index")
        grouped_bars(rows, kinds, ylabel="perplexity", line=("dense", result["dense"]), axes=axes)
        axes.set_title(f"{mask} mask")
        axes.set_ylim(bottom=0.9 * result["dense"])
    panels[1].set_ylabel("")
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=None, help="windows to evaluate on")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    result = measure(args.limit)
    print(f"dense {result['dense']:.3f}, {result['windows']} windows of {result['seqlen']} tokens")
    print(table(result).round(4).to_string())
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        part = args.out / "repair.json.part"
        part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        part.rename(args.out / "repair.json")
        draw(result, args.out / "repair.svg")


if __name__ == "__main__":
    main()
