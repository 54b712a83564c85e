"""Loss of a causal language model on token windows: in each, every token but the first is predicted
from those before it.

Book: chapter 1.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slr.model.heads import logits, tokens_at_once

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["TOKENS_AT_ONCE", "exponential", "window_losses"]

TOKENS_AT_ONCE = 2048  # in a forward pass; the logits are taken of fewer, see slr.model.heads


def window_losses(model: PreTrainedModel, ids: Tensor, outputs: Tensor | None = None) -> Tensor:
    """Mean negative log-likelihood of the predictions of each window, in nats.

    Args:
        model: a causal language model.
        ids: int64 (rows, seqlen), on its device.
        outputs: of the last decoder block, as for :func:`slr.model.heads.logits`.

    Returns:
        float64 (rows,), on the CPU; the loss of a token in float32, the mean in float64.
    """
    targets = ids[:, 1:].long().flatten().split(tokens_at_once(model))
    found = [
        nn.functional.cross_entropy(part.float(), target, reduction="none").double().cpu()
        for part, target in zip(logits(model, ids, outputs), targets, strict=True)
    ]
    return torch.cat(found).view(len(ids), -1).mean(1)


def exponential(losses: Tensor) -> float:
    """Perplexity from the mean loss of each window; NaN and infinity bring a warning.

    Args:
        losses: (windows,) in nats, of windows of one length.

    >>> print(f"{exponential(torch.tensor([1.0, 3.0], dtype=torch.float64)):.4f}")
    7.3891
    """
    mean = float(losses.mean())
    try:
        value = math.exp(mean)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        warnings.warn(
            f"the perplexity is {value}: the mean loss is {mean:.4g} nats; the weights may be "
            "broken, or too large for the dtype",
            stacklevel=2,
        )
    return value
