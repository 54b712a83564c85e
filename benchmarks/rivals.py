"""Output error and time of the methods of other papers beside ours, on single layers.

    python benchmarks/rivals.py [--model smollm2] [--block 5] [--layers self_attn.q_proj …]

‖(W - S - B A) X‖ / ‖W X‖ on the calibration text, which all of them see, and on a held-out part of
it, with equal pattern and rank, on the inputs of the dense model.
"""

import argparse
import json
import time
from pathlib import Path

import pandas as pd
import torch

import slr
from slr.evaluate.origin import provenance
from slr.matrix.metric import relative
from slr.matrix.pruners import Known
from slr.matrix.statistics import GramStatistic
from slr.model.block import compress_layer
from slr.model.blocks import decoder_blocks
from slr.model.calibrate import first_inputs, observe
from slr.model.recipe import Recipe

LAYERS = ["self_attn.q_proj", "mlp.gate_proj"]
METHODS = {
    "SparseGPT + EoRA": {"prune": "sparsegpt", "refine": "eora"},
    "OATS": {"prune": "wanda", "refine": "oats"},
    "SLiM-LoRA": {"prune": "wanda", "refine": "slim"},
    "HASSLE-free": {"prune": "sparsegpt", "refine": "hassle"},
    "3BASiL": {"prune": "wanda", "refine": "3basil"},
    "outputs refined": {"prune": "wanda", "refine": "activations"},
    "outputs refined, mask by ADMM": {
        "prune": "wanda", "refine": "activations", "update_mask": "admm",
    },
    "the same, 200 iterations": {
        "prune": "wanda", "refine": "activations", "update_mask": "admm", "iterations": 200,
    },
}  # fmt: skip


def known_of(model, windows: torch.Tensor, index: int, layers: list[str]) -> dict[str, Known]:
    """What is known of the inputs of some layers of one block of the dense model."""
    inputs, blocks = first_inputs(model, windows), decoder_blocks(model)
    for i in range(index):
        inputs.run(i, blocks[i], keep=True)
    watched = {name: blocks[index].get_submodule(name) for name in layers}
    with observe(watched, GramStatistic) as statistics:
        inputs.run(index, blocks[index], keep=False)
    return {name: Known.of(statistic) for name, statistic in statistics.items()}


def measured(W: torch.Tensor, seen: Known, unseen: Known, pattern: str, rank: int) -> pd.DataFrame:
    """Every method on one layer."""
    rows = {}
    for name, options in METHODS.items():
        started = time.perf_counter()
        made = compress_layer(W, Recipe(pattern=pattern, rank=rank, **options), known=seen).refined
        rows[name] = {"seconds": time.perf_counter() - started}
        for text, known in (("calibration %", seen), ("held out %", unseen)):
            metric = slr.Gram(known.gram)
            rows[name][text] = 100 * relative(metric.error(W - made.dense()), metric.error(W))
    return pd.DataFrame(rows).T[["calibration %", "held out %", "seconds"]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--block", type=int, default=5)
    parser.add_argument("--layers", nargs="+", default=LAYERS)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--rank", type=int, default=18)
    parser.add_argument("--text", default="general")
    parser.add_argument("--samples", type=int, default=8, help="windows of each text")
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model = slr.load(args.model, dtype=torch.float32)
    drawn = args.text, slr.load_tokenizer(args.model), args.seqlen, args.samples
    texts = slr.data.calibration(*drawn), slr.data.unseen(*drawn)
    seen, unseen = (known_of(model, windows, args.block, args.layers) for windows in texts)
    frames = {}
    for name in args.layers:
        W = decoder_blocks(model)[args.block].get_submodule(name).weight.detach()
        frames[name] = measured(W, seen[name], unseen[name], args.pattern, args.rank)
        print(f"\nblock {args.block}, {name} {tuple(W.shape)}, {args.pattern}, rank {args.rank}")
        print(frames[name].round(2).to_string(), flush=True)
    if args.out:
        told = {k: v for k, v in vars(args).items() if k != "out"}
        tables = {name: frame.to_dict("index") for name, frame in frames.items()}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(
            json.dumps({"options": told, **provenance(), "tables": tables}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
