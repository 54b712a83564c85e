"""The plain alternative: perplexity of a model whose weights are only rounded.

    python benchmarks/plain.py --model smollm2 --text FILE --seqlen 1024 --limit 20 --out results

Reads the windows that ``slr eval`` reads with the same options, so that its row stands beside
these.  Prints a table; with ``--out`` writes ``OUT/rounded.json``.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from slr.checkpoint.folder import load_tokenizer, resolve
from slr.evaluate.origin import provenance
from slr.evaluate.reproduction import measure
from slr.matrix.rounding import Grid
from slr.model import data
from slr.model.losses import exponential

GRIDS = {"dense": None, "int8": Grid(8), "int4 by 32": Grid(4, 32)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", default="general")
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    folder = resolve(args.model)
    windows = data.windows(
        data.load_text(args.text), load_tokenizer(folder), args.seqlen, args.limit
    )
    rows = {}
    for name, grid in GRIDS.items():
        losses, _ = measure(folder, grid, windows, dtype=torch.float32)
        rows[name] = float(exponential(losses))
        print(f"{name:<12} {rows[name]:8.3f}", flush=True)
    if args.out:
        told = {
            "command": " ".join(["python", "benchmarks/plain.py", *sys.argv[1:]]),
            "model": args.model, "text": Path(args.text).name, "windows": len(windows),
            "seqlen": args.seqlen, "rows": rows, **provenance(),
        }  # fmt: skip
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "rounded.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
