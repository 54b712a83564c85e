"""Baseline of the project *A pattern of your own*: 2:4, and 2:4 of shuffled inputs."""

import torch
from torch import Tensor

import slr
from course.projects import linears, main, tiny, windows


def dealt(weight: Tensor) -> Tensor:
    """An order of the inputs in which loud columns are in different groups of four."""
    return weight.norm(dim=0).argsort().view(4, -1).T.flatten()


def shuffled(weight: Tensor) -> Tensor:
    """The 2:4 mask in the order of `dealt`, in the old order again."""
    order = dealt(weight)
    mask = slr.prune(weight[:, order], "magnitude", "2:4").mask
    return mask[:, order.argsort()]


def by(pattern: str):
    """What chooses the mask of a pattern by magnitude."""
    return lambda weight: slr.prune(weight, "magnitude", pattern).mask


CHOICES = {"0.5": by("0.5"), "4:8": by("4:8"), "2:4 shuffled": shuffled, "2:4": by("2:4")}


@torch.no_grad()
def baseline(small: bool = False) -> list[dict]:
    """Energy kept and perplexity of each way to choose half of the weights."""
    text = windows("validation", 1 if small else 4)
    rows = [{"mask": "dense", "energy kept": 1.0, "perplexity": slr.perplexity(tiny(), text)}]
    for name, choose in CHOICES.items():
        model = tiny()
        kept = whole = 0.0
        for _, layer in linears(model):
            mask = choose(layer.weight)
            whole += layer.weight.square().sum().item()
            layer.weight *= mask
            kept += layer.weight.square().sum().item()
        found = slr.perplexity(model, text)
        rows.append({"mask": name, "energy kept": kept / whole, "perplexity": found})
    return rows


if __name__ == "__main__":
    main(baseline)
