"""Pruners: which weights of one matrix to keep, by what they are worth.

Each gives every entry a score; a :mod:`pattern <slr.patterns>` keeps the largest.

========== ====================================== ==========================
method     score of W[i, j]                       needs
========== ====================================== ==========================
magnitude  \\|W[i, j]\\|                            nothing
random     uniform noise                          nothing (a control)
wanda      \\|W[i, j]\\| · ‖X[j]‖₂                  activation norms (n,)
========== ====================================== ==========================

Book: chapter 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slr.checks import check_finite, check_matrix
from slr.patterns import Pattern, parse

__all__ = ["METHODS", "Pruned", "prune"]

METHODS = ("magnitude", "random", "wanda")


class Pruned(NamedTuple):
    """What is left of a matrix: `mask` (bool, True = kept) and `weight`, zero off the mask."""

    mask: Tensor
    weight: Tensor


def prune(
    weight: Tensor,
    method: str,
    pattern: str | float | Pattern,
    *,
    activation_norm: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Pruned:
    """Prune one matrix.

    Args:
        weight: (m, n) = (out, in), any float dtype; never modified.
        method: one of :data:`METHODS`.
        pattern: a pattern or its name, ``"2:4"``, ``"0.5"``.
        activation_norm: (n,), the 2-norm of each input channel over the calibration tokens,
            for ``"wanda"``; non-negative, not all zero.
        generator: source of randomness for ``"random"``.

    Returns:
        :class:`Pruned`; ``weight`` equals the input on the mask, bit for bit.

    Raises:
        ValueError: unknown method, impossible pattern, non-finite or missing input.
        TypeError: `weight` is not a floating-point tensor.

    Cost: one pass for the scores and what the pattern's selection takes.
    Source: Han et al. 2015 (magnitude); Sun et al. 2024 (Wanda), section 3.

    >>> W = torch.tensor([[4.0, -3.0, 2.0, -1.0]])
    >>> print(prune(W, "magnitude", "2:4").weight)
    tensor([[ 4., -3.,  0., -0.]])
    >>> print(prune(W, "wanda", "2:4", activation_norm=torch.tensor([1.0, 1.0, 9.0, 9.0])).mask)
    tensor([[False, False,  True,  True]])
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown; it must be one of {', '.join(METHODS)}")
    check_matrix("weight", weight)
    pattern = parse(pattern)
    if method == "random":
        scores = torch.rand(weight.shape, generator=generator, device=weight.device)
    else:
        scores = weight.abs().float()
    if method == "wanda":
        scores = scores * _checked_norm(activation_norm, weight)
    mask = pattern.select(scores)
    return Pruned(mask, weight * mask)


def _checked_norm(norm: Tensor | None, weight: Tensor) -> Tensor:
    if norm is None:
        raise ValueError("method 'wanda' needs activation_norm, one value for each input channel")
    if norm.shape != weight.shape[1:]:
        raise ValueError(
            f"activation_norm has shape {tuple(norm.shape)}; "
            f"for a weight of shape {tuple(weight.shape)} it must be ({weight.shape[1]},)"
        )
    check_finite("activation_norm", norm)
    if bool((norm < 0).any()) or not bool(norm.any()):
        raise ValueError("activation_norm must be non-negative and not all zero")
    return norm.to(weight.device, torch.float32)
