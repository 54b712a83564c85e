"""Six projects: for each a text with its rubric, and a baseline that runs in less than two minutes.

    python -m course.projects.pattern [--small]

`--small` shows only that it runs.  What the baselines share is here.
"""

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import slr

NAMES = ("pattern", "calibration", "ranks", "rounding", "training", "speed")


def tiny() -> nn.Module:
    """The embedded model, dense, in float32."""
    return slr.load("tiny", dtype=torch.float32)


def windows(split: str, count: int, seqlen: int = 256) -> Tensor:
    """Token windows (count, seqlen), spread over the embedded text."""
    tokenizer = slr.load_tokenizer("tiny")
    return slr.data.windows(slr.data.corpus(split), tokenizer, seqlen=seqlen, limit=count)


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of the blocks, by name; these are what is compressed."""
    for name, module in model.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module


def bits(reports: list, width: int = 16) -> float:
    """Bits a weight of S + B A, 2:4 with places in 2 bits, over the layers of some reports."""
    entries = sum(r.shape[0] * r.shape[1] for r in reports)
    factors = sum(r.rank * sum(r.shape) for r in reports)
    return (sum(r.kept for r in reports) * (width + 2) + factors * width) / entries


def show(rows: list[dict]) -> list[dict]:
    """Prints a table; returns its rows."""
    widths = {key: max(len(key), *(len(text(row[key])) for row in rows)) for key in rows[0]}
    print("  ".join(f"{key:>{width}}" for key, width in widths.items()))
    for row in rows:
        print("  ".join(f"{text(row[key]):>{width}}" for key, width in widths.items()))
    return rows


def text(value: object) -> str:
    """A number to three decimals, anything else as it is."""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def main(baseline: Callable[[bool], list[dict]]) -> None:
    """Runs a baseline from the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true", help="only show that it runs")
    torch.manual_seed(0)
    show(baseline(parser.parse_args().small))
