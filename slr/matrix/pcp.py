"""Principal component pursuit: a low-rank and a sparse part by convex optimisation.

    min ‖L‖_* + λ ‖S‖₁   subject to   L + S = W   (and S = 0 off the mask)

Without a mask this is robust PCA, which CAP starts from.  With one it is the paper's baseline
"PCP with mask": the pruned entries of W must be matched by L alone, the kept ones may differ by a
sparse S.  Solved by the inexact augmented Lagrange multiplier method, one shrinkage of singular
values an iteration.  Book: chapter 6.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from slr.matrix.assembly import unit_of, working
from slr.matrix.checks import check_count, check_mask, check_matrix
from slr.matrix.lowrank import shrink
from slr.matrix.refinement import svd_repair
from slr.matrix.result import Refined

__all__ = ["Pursuit", "pcp_repair", "pursue"]

GROWTH = 1.5  # of the penalty in an iteration


class Pursuit(NamedTuple):
    """W = `low` + `sparse` to within `gap` (relative), after `iterations`."""

    low: Tensor
    sparse: Tensor
    iterations: int
    gap: float


@torch.no_grad()
def pursue(
    weight: Tensor,
    mask: Tensor | None = None,
    *,
    balance: float | None = None,
    tolerance: float = 1e-7,
    iterations: int = 200,
) -> Pursuit:
    """Principal component pursuit of one matrix.

    Args:
        weight: (m, n), finite, any float dtype; computed in float32 at least.
        mask: bool (m, n), where S may be non-zero; everywhere if ``None`` (robust PCA).
        balance: λ; 1/√max(m, n) by default.
        tolerance: stop when ‖W - L - S‖_F ≤ tolerance ‖W‖_F.
        iterations: at most so many, with a warning if they did not suffice.

    Returns:
        :class:`Pursuit`; `sparse` is zero off the mask.

    Raises:
        ValueError: bad shapes, non-finite weights, a non-positive option.

    Cost: :func:`slr.matrix.lowrank.shrink` an iteration, about 30 of them.
    Source: Candès et al. 2011; inexact ALM of Lin, Chen and Ma 2010.

    >>> W = torch.ones(8, 8)
    >>> W[2, 3] = 10.0
    >>> found = pursue(W)
    >>> round(float(found.sparse[2, 3]), 3), int((found.sparse.abs() > 1e-3).sum())
    (9.0, 1)
    """
    check_matrix("weight", weight)
    if mask is not None:
        check_mask(mask, weight)
    check_count("iterations", iterations)
    lam = 1 / max(weight.shape) ** 0.5 if balance is None else balance
    if not lam > 0 or not tolerance > 0:
        raise ValueError(f"balance {lam} and tolerance {tolerance} must be positive")
    unit = unit_of(weight)
    W = weight.detach().to(working(weight)) / unit
    size = W.norm()
    if size == 0:
        return Pursuit(W.clone(), W.clone(), 0, 0.0)
    spectral = torch.linalg.matrix_norm(W, 2)
    dual = W / torch.maximum(spectral, W.abs().max() / lam)
    penalty = 1.25 / float(spectral)
    largest = penalty * 1e7
    S = torch.zeros_like(W)
    gap = 1.0
    for count in range(1, iterations + 1):
        L = shrink(W - S + dual / penalty, 1 / penalty)
        S = torch.nn.functional.softshrink(W - L + dual / penalty, lam / penalty)
        if mask is not None:
            S.masked_fill_(~mask, 0)
        rest = W - L - S
        dual += penalty * rest
        gap = float(rest.norm() / size)
        if gap <= tolerance:
            return Pursuit(L * unit, S * unit, count, gap)
        penalty = min(penalty * GROWTH, largest)
    warnings.warn(
        f"principal component pursuit stopped after {iterations} iterations at a gap of {gap:.1e}",
        RuntimeWarning,
        stacklevel=2,
    )
    return Pursuit(L * unit, S * unit, iterations, gap)


def pcp_repair(weight: Tensor, mask: Tensor, rank: int, **options) -> Refined:
    """The paper's PCP baseline: S from :func:`pursue` with the mask, then [W - S]_k.

    Args:
        weight: (m, n).
        mask: bool (m, n), True = kept.
        rank: k.
        options: as :func:`pursue`.

    Returns:
        :class:`~slr.matrix.result.Refined` in the dtype of `weight`.

    Cost: as :func:`pursue`, and one SVD more.
    Source: the baseline "PCP" of the paper; public text leaves its details open.

    >>> W, mask = torch.ones(8, 8), torch.eye(8).bool()
    >>> W[2, 2] = 10.0
    >>> pcp_repair(W, mask, 1).error < 1e-3
    True
    """
    options = {"tolerance": 1e-6, **options}
    found = pursue(weight, mask, **options)
    return svd_repair(weight, mask, rank, sparse=found.sparse)
