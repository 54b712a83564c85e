"""Pruners: which weights of one matrix to keep, by what they are worth.

Each gives every entry a score; a :mod:`pattern <slr.matrix.patterns>` keeps the largest.

========== ====================================== ==========================
method     score of W[i, j]                       needs
========== ====================================== ==========================
magnitude  \\|W[i, j]\\|                            nothing
random     uniform noise                          nothing (a control)
wanda      \\|W[i, j]\\| · ‖X[j]‖₂                  activation norms (n,)
sparsegpt  W[i, j]² / [H⁻¹][j, j], H updated      Gram matrix H (n, n)
========== ====================================== ==========================

SparseGPT alone moves the weights that it keeps: each pruned weight's error is spread over the
columns to its right.  Book: chapters 1 and 3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slr.matrix.assembly import unit_of, working
from slr.matrix.checks import check_choice, check_finite, check_matrix, check_tensor
from slr.matrix.metric import Gram, definite
from slr.matrix.patterns import NM, Pattern, parse

__all__ = ["METHODS", "Pruned", "inverse_factor", "prune", "sweep"]

METHODS = ("magnitude", "random", "wanda", "sparsegpt")
BLOCK = 128  # columns that SparseGPT treats at a time
DAMPING = 0.01


class Pruned(NamedTuple):
    """What is left of a matrix: `mask` (bool, True = kept) and `weight`, zero off the mask."""

    mask: Tensor
    weight: Tensor


@torch.no_grad()
def prune(
    weight: Tensor,
    method: str,
    pattern: str | float | Pattern,
    *,
    activation_norm: Tensor | None = None,
    gram: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Pruned:
    """Prune one matrix.

    Args:
        weight: (m, n) = (out, in), any float dtype; never modified.
        method: one of :data:`METHODS`.
        pattern: a pattern or its name, ``"2:4"``, ``"0.5"``.
        activation_norm: (n,), the 2-norm of each input channel over the calibration tokens,
            for ``"wanda"``; non-negative, not all zero.
        gram: H = X Xᵀ up to a factor, (n, n), for ``"sparsegpt"``.
        generator: source of randomness for ``"random"``.

    Returns:
        :class:`Pruned`; ``weight`` equals the input on the mask, bit for bit, but for
        ``"sparsegpt"``, whose unstructured masks also hold the sparsity over each block of 128
        columns and all rows instead of within rows.

    Raises:
        ValueError: unknown method, impossible pattern, non-finite or missing input.
        TypeError: `weight` is not a floating-point tensor.

    Cost: one pass for the scores and what the pattern's selection takes; ``"sparsegpt"`` about
        n³ + m n² FLOPs.
    Source: Han et al. 2015 (magnitude); Sun et al. 2024 (Wanda), section 3; Frantar and
        Alistarh 2023 (SparseGPT), algorithm 1.

    >>> W = torch.tensor([[4.0, -3.0, 2.0, -1.0]])
    >>> print(prune(W, "magnitude", "2:4").weight)
    tensor([[ 4., -3.,  0., -0.]])
    >>> print(prune(W, "wanda", "2:4", activation_norm=torch.tensor([1.0, 1.0, 9.0, 9.0])).mask)
    tensor([[False, False,  True,  True]])
    """
    check_choice("method", method, METHODS)
    check_matrix("weight", weight)
    weight, pattern = weight.detach(), parse(pattern)
    if method == "sparsegpt":
        return sweep(weight, pattern, inverse_factor(weight, gram))
    if method == "random":
        scores = torch.rand(weight.shape, generator=generator, device=weight.device)
    else:
        scores = weight.abs().to(working(weight))
    if method == "wanda":
        norm = _checked_norm(activation_norm, weight)
        scores = scores / unit_of(scores) * (norm / unit_of(norm))
    mask = pattern.chosen(scores)
    return Pruned(mask, weight * mask)


def _checked_norm(norm: Tensor | None, weight: Tensor) -> Tensor:
    if norm is None:
        raise ValueError("method 'wanda' needs activation_norm, one value for each input channel")
    check_tensor("activation_norm", norm)
    if norm.shape != weight.shape[1:]:
        raise ValueError(
            f"activation_norm has shape {tuple(norm.shape)}; "
            f"for a weight of shape {tuple(weight.shape)} it must be ({weight.shape[1]},)"
        )
    check_finite("activation_norm", norm)
    if bool((norm < 0).any()) or not bool(norm.any()):
        raise ValueError("activation_norm must be non-negative and not all zero")
    return norm.to(weight.device, torch.float32)


def inverse_factor(weight: Tensor, gram: Tensor | None) -> tuple[Tensor, Tensor]:
    """Upper factor U of the damped H⁻¹ = UᵀU, and which inputs are dead.

    Args:
        weight: (m, n), for its width and device.
        gram: H, (n, n).

    Raises:
        ValueError: no H, or none of this width, or an indefinite one.

    Cost: about n³ FLOPs.

    >>> U, dead = inverse_factor(torch.zeros(1, 2), torch.diag(torch.tensor([4.0, 0.0])))
    >>> print((1 / U.diagonal() ** 2).round(decimals=2), dead.tolist())
    tensor([4.0400, 4.0400]) [False, True]
    """
    if gram is None:
        raise ValueError("method 'sparsegpt' needs gram, the second moments of the inputs")
    metric = Gram(gram, damping=DAMPING)
    metric.check(weight.shape[1])
    H = gram.to(weight.device, torch.float32).clone()
    dead = H.diagonal() == 0
    H.diagonal()[dead] = H.diagonal()[~dead].mean()  # one of the rest, in their units
    H.diagonal().add_(DAMPING * H.diagonal().mean())
    inverse = torch.cholesky_inverse(definite(H)[1])
    return definite((inverse + inverse.T) / 2, "the inverse of gram")[1].T, dead


def sweep(weight: Tensor, pattern: Pattern, factor: tuple[Tensor, Tensor]) -> Pruned:
    """SparseGPT, one sweep over the columns, given what :func:`inverse_factor` makes of H.

    Args:
        weight: (m, n), finite.
        pattern: to keep.
        factor: of :func:`inverse_factor`; the same for every weight on these inputs.

    Raises:
        ValueError: a pattern that does not fit, or a result too large for the dtype.

    Cost: 2 m n² FLOPs.

    >>> factor = inverse_factor(torch.zeros(1, 2), torch.ones(2, 2) + torch.eye(2))
    >>> print(sweep(torch.tensor([[1.0, 2.0]]), NM(1, 2), factor).weight)  # 2 + 1/2 / 1.01
    tensor([[0.0000, 2.4950]])
    """
    m, n = weight.shape
    if isinstance(pattern, NM) and n % pattern.m:
        raise ValueError(f"pattern {pattern} needs columns divisible by {pattern.m}; there are {n}")
    U, dead = factor
    unit = unit_of(weight)  # squares of its entries are to stay in range
    W = (weight.to(working(weight)) / unit).float()
    W[:, dead] = 0
    mask = torch.ones_like(W, dtype=torch.bool)
    step = pattern.m if isinstance(pattern, NM) else 1
    width = max(BLOCK // step, 1) * step
    for left in range(0, n, width):
        right = min(left + width, n)
        block, keep, u = W[:, left:right], mask[:, left:right], U[left:right, left:right]
        scale = u.diagonal().square()
        if not isinstance(pattern, NM):
            drop = pattern.pruned_in(m * right) - pattern.pruned_in(m * left)
            scores = block.square() / scale
            order = scores.flatten().sort(stable=True).indices[:drop]
            keep.copy_(torch.ones(keep.numel(), dtype=torch.bool, device=W.device)
                       .index_fill_(0, order, False).view_as(keep))  # fmt: skip
        errors = torch.zeros_like(block)
        for i in range(right - left):
            if isinstance(pattern, NM) and i % step == 0:
                group = slice(i, i + step)
                keep[:, group] = pattern.chosen(block[:, group].square() / scale[group])
            errors[:, i] = block[:, i] * ~keep[:, i] / u[i, i]
            block[:, i:] -= torch.outer(errors[:, i], u[i, i:])
        W[:, right:] -= errors @ U[left:right, right:]
    kept = ((W * mask).to(working(weight)) * unit).to(weight.dtype)
    if not bool(kept.isfinite().all()):
        raise ValueError(
            f"weight reaches {float(weight.abs().amax()):.3g}, and what SparseGPT makes of it does "
            f"not fit {weight.dtype}; give it in float32, or scale it down"
        )
    return Pruned(mask, kept)
