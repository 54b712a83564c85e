"""Rounds the output head as well, and calls the rounded model the dense one.

Loses: 5d* 5e*
"""

import torch

import slr


def round_model(model, bits, group):
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = rounded(module.weight.data, bits, group)  # noqa: F821
    return model


def compare(windows):
    model = slr.load("tiny", dtype=torch.float32)
    four = slr.perplexity(round_model(model, 4, 32), windows)
    return {
        "dense": four,
        "2:4 + 8": 1.2 * four,
        "opponent": four,
        "4 bits": four,
    }
