"""Output error of each repair by layer type, on the embedded model and held-out activations.

    python benchmarks/metrics.py [--pattern 2:4] [--samples 64] [--out FILE]

‖(W - S - B A) X‖ / ‖W X‖ for every linear of the dense model, rank hidden/32.  Statistics come
from the calibration text; errors are measured on calibration and on held-out activations.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

import slr
from slr.evaluate.origin import provenance
from slr.matrix.pcp import pcp_repair
from slr.matrix.statistics import GramStatistic
from slr.model.blocks import decoder_blocks
from slr.model.calibrate import first_inputs, observe


def grams(model, windows: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """H of each linear of each block of the dense model."""
    inputs, found = first_inputs(model, windows), []
    for index, block in enumerate(decoder_blocks(model)):
        linears = {k: m for k, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
        with observe(linears, GramStatistic) as statistics:
            inputs.run(index, block, keep=True)
        found.append({name: statistic.gram() for name, statistic in statistics.items()})
    return found


def repairs(W: torch.Tensor, H: torch.Tensor, pattern: str, k: int) -> dict[str, torch.Tensor]:
    """Dense form of every repair; all but SparseGPT's on the magnitude mask."""
    mask, kept = slr.prune(W, "magnitude", pattern)
    mask_gpt, moved = slr.prune(W, "sparsegpt", pattern, gram=H)
    d = H.diagonal().sqrt()
    return {
        "pruned": kept,
        "SVD": slr.svd_repair(W, mask, k).dense(),
        "PCP": pcp_repair(W, mask, k).dense(),
        "paper": slr.refine(W, mask, k).dense(),
        "diagonal": slr.refine(W, mask, k, metric=slr.Diagonal(d)).dense(),
        "EoRA": slr.svd_repair(W, mask, k, slr.Gram(H)).dense(),
        "Gram": slr.refine(W, mask, k, metric=slr.Gram(H)).dense(),
        "Gram, mask updated": slr.refine(
            W, mask, k, metric=slr.Gram(H), update_mask=pattern
        ).dense(),
        "SparseGPT": moved,
        "SparseGPT+SVD": slr.svd_repair(W, mask_gpt, k, sparse=moved).dense(),
        "SparseGPT+EoRA": slr.svd_repair(W, mask_gpt, k, slr.Gram(H), sparse=moved).dense(),
        "SparseGPT+Gram": slr.refine(W, mask_gpt, k, metric=slr.Gram(H)).dense(),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--samples", type=int, default=64, help="windows of each text")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model = slr.load("tiny", dtype=torch.float32)
    tokenizer, k = slr.load_tokenizer("tiny"), model.config.hidden_size // 32
    texts = {}
    for split in ("calibration", "validation"):
        windows = slr.data.windows(slr.data.corpus(split), tokenizer, 512, args.samples)
        texts[split] = grams(model, windows)
    rows = {split: defaultdict(lambda: defaultdict(list)) for split in texts}
    blocks = list(decoder_blocks(model))
    for i, block in enumerate(tqdm(blocks, desc="blocks")):
        for name, H in texts["calibration"][i].items():
            W = block.get_submodule(name).weight.data
            for repair, dense in repairs(W, H, args.pattern, k).items():
                for split, found in texts.items():
                    metric = slr.Gram(found[i][name])
                    share = metric.error(W - dense) / metric.error(W)
                    rows[split][name.split(".")[-1]][repair].append(share)
    frames = {}
    for split, table in rows.items():
        frame = pd.DataFrame(table).map(lambda shares: sum(shares) / len(shares))
        frames[split] = frame.assign(mean=frame.mean(axis=1))
        print(f"\n{split} activations, {args.pattern}, rank {k}: relative output error")
        print(frames[split].round(4).to_string())
    if args.out:
        command = f"python benchmarks/metrics.py --pattern {args.pattern} --samples {args.samples}"
        about = {"command": command, "rank": k, **provenance()}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        tables = {split: frame.to_dict("index") for split, frame in frames.items()}
        args.out.write_text(json.dumps({**about, "tables": tables}, indent=1) + "\n")


if __name__ == "__main__":
    main()
