"""What sparsity induction does to the embedded model: perplexity, pruned and repaired.

    python benchmarks/induction.py [--windows 24] [--samples 16]
                                   [--out results/measured/tiny/induction.json]

Rows: the model as it is ("none"); scaled by the norms of its inputs, not trained ("norms"), or only
where no row of a matrix is scaled ("norms, no rows"); trained on the pruned block's output
("scales"), on the stable rank ("spectral"), on "both", each from no scale at all (start 0) and from
the norms (start 1).  Columns: pruner / repair.  All rows are the same dense model, as its
perplexity and the largest change of a logit show.  With ``--out`` every row is written as soon as
it is measured, and a run that was stopped goes on after the last.  Ten minutes on an idle core.
"""

import argparse
import copy
import json
import sys
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

import slr
from slr.checkpoint.atomic import write_text
from slr.evaluate.origin import provenance
from slr.methods.induction import ROWS, Induction, induce

PATTERNS = ("2:4", "0.5")
MASKS = ("magnitude", "wanda", "sparsegpt")
REPAIRS = ("none", "weights")
LOSSES = {"scales": (1.0, 0.0), "spectral": (0.0, 1.0), "both": (1.0, 0.1)}  # output, spectral
RATES = (0.1, 0.03)  # by start: from the norms there is less to do
EPOCHS, BATCH = 3, 4  # BATCH: windows in a step


def variants(pattern: str) -> dict[str, Induction | None]:
    """How the model is scaled before it is pruned."""
    made: dict[str, Induction | None] = {"none": None, "norms": Induction(pattern, epochs=0)}
    made["norms, no rows"] = Induction(pattern, epochs=0, fixed=ROWS)
    for start, rate in enumerate(RATES):
        for name, (output, spectral) in LOSSES.items():
            made[f"{name}, start {start}"] = Induction(
                pattern, start=start, output=output, spectral=spectral, epochs=EPOCHS, rate=rate
            )
    return made


@torch.no_grad()
def row(
    pattern: str, name: str, options: Induction | None, windows: torch.Tensor, text: torch.Tensor
) -> dict:
    """Scale the model in one way; prune and repair it in all; measure each."""
    model = slr.load("tiny", dtype=torch.float32)
    before = model(input_ids=windows[:4]).logits
    trained = [] if options is None else induce(model, text, options, rows=BATCH)
    change = model(input_ids=windows[:4]).logits - before
    found = {
        "pattern": pattern,
        "scales": name,
        "dense": slr.perplexity(model, windows),
        "largest change of a logit": float(change.abs().max()),
    }
    if options is not None:  # losses before and after training, meaned over the blocks
        for which, label in enumerate(("output loss", "log stable rank")):
            best = [min(t.trace, key=options.weighed)[which] for t in trained]
            found[f"{label}, start"] = sum(t.trace[0][which] for t in trained) / len(trained)
            found[f"{label}, best"] = sum(best) / len(best)
    for mask in MASKS:
        for repair in REPAIRS:
            pruned = copy.deepcopy(model)
            recipe = slr.Recipe(prune=mask, pattern=pattern, refine=repair)
            slr.compress_model(pruned, recipe, text)
            found[f"{mask}/{repair}"] = slr.perplexity(pruned, windows)
    return found


def measure(count: int, samples: int, out: Path | None) -> dict:
    """Every row, but for those that `out` holds already."""
    tokenizer = slr.load_tokenizer("tiny")
    windows, text = (
        slr.data.windows(slr.data.corpus(split), tokenizer, 256, limit)
        for split, limit in (("validation", count), ("calibration", samples))
    )
    about = {
        "model": "slr/tiny/model",
        "text": "embedded validation corpus",
        "windows": len(windows),
        "calibration windows": len(text),
        "seqlen": 256,
        "rank": slr.Recipe().resolved(256).rank,
        "epochs": EPOCHS,
        "rates": list(RATES),
        "windows in a step": BATCH,
        "losses": {name: list(weights) for name, weights in LOSSES.items()},
    }
    rows: list[dict] = []
    if out is not None and out.is_file():
        old = json.loads(out.read_text(encoding="utf-8"))
        if any(old[key] != value for key, value in about.items()):
            raise SystemExit(f"{out} was measured with other settings; remove it to start over")
        rows = old["rows"]
    result = {**about, "command": "python " + " ".join(sys.argv), **provenance(), "rows": rows}
    cells = [(p, n, o) for p in PATTERNS for n, o in variants(p).items()]
    order = [cell[:2] for cell in cells]
    cells.sort(key=lambda cell: "start 0" in cell[1])  # the others first
    for pattern, name, options in tqdm(cells):
        if (pattern, name) in {(r["pattern"], r["scales"]) for r in rows}:
            continue
        rows.append(row(pattern, name, options, windows, text))
        rows.sort(key=lambda r: order.index((r["pattern"], r["scales"])))
        if out is not None:
            write_text(out, json.dumps(result, indent=1) + "\n")
    return result


def table(result: dict) -> pd.DataFrame:
    """Pattern and scales down, perplexity of each pruner and repair across."""
    frame = pd.DataFrame(result["rows"]).set_index(["pattern", "scales"])
    return frame[["dense", *(f"{mask}/{repair}" for mask in MASKS for repair in REPAIRS)]]


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=24, help="to evaluate on, of 256 tokens")
    parser.add_argument("--samples", type=int, default=16, help="to calibrate on, of 256 tokens")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    print(table(measure(args.windows, args.samples, args.out)).round(2).to_string())


if __name__ == "__main__":
    main()
