"""A repair's problem, checked, and its result: errors, units, and the dtype it is stored in.

Singular values to the fourth power have to stay in range, so that a matrix of very large or very
small entries is computed in other units, a power of two, which changes no digit.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from slr.matrix.checks import check_mask, check_matrix, check_rank
from slr.matrix.filled import Factors, keep_, row_blocks
from slr.matrix.metric import Diagonal, Gram, Identity, Metric
from slr.matrix.result import Refined, Step

__all__ = ["assemble", "in_units", "posed", "scales", "unit_of", "working"]

LEAST, MOST = 2.0**-20, 2.0**16  # of the largest entry that needs no other unit


def posed(
    weight: Tensor, mask: Tensor | None, rank: int, metric: Metric | None = None, *,
    coded: bool = False,
) -> tuple[Metric, Tensor]:  # fmt: skip
    """The metric, ``Identity()`` if there is none, and the weight without its history.

    With `coded`, for one matrix on a grid, the rank may be 0 and the mask be left out.

    Raises:
        ValueError, TypeError: the problem is not well posed: shapes that differ, a rank out of
            range, non-finite weights, a metric of another width or kind.

    Cost: a pass.

    >>> posed(torch.zeros(2, 2), torch.ones(2, 2) > 0, 1)[0]
    Identity()
    """
    check_matrix("weight", weight, batch=not coded)
    if mask is not None or not coded:
        check_mask(mask, weight)  # type: ignore[arg-type]
    if rank != 0 or not coded:
        check_rank(rank, weight.shape[-2:])
    metric = Identity() if metric is None else metric
    if not isinstance(metric, Identity | Diagonal | Gram):
        raise TypeError(f"metric is {metric!r}; it must be Identity(), Diagonal(d) or Gram(H)")
    metric.check(weight.shape[-1])
    if isinstance(metric, Gram) and weight.ndim != 2:
        raise ValueError("Gram refines one matrix at a time, but weight is a stack")
    return metric, weight.detach()


def scales(metric: Metric, like: Tensor) -> tuple[Tensor, Tensor]:
    """Column scales of a Diagonal metric and their inverse, 0 for a silent channel; else ones.

    Cost: none.

    >>> scales(Diagonal(torch.tensor([2.0, 0.0])), torch.zeros(()))
    (tensor([2., 0.]), tensor([0.5000, 0.0000]))
    """
    if not isinstance(metric, Diagonal):
        one = like.new_ones(())
        return one, one
    scale = metric.scale.to(like.device, like.dtype)
    return scale, (scale > 0) / torch.where(scale > 0, scale, 1)


def working(weight: Tensor) -> torch.dtype:
    """The dtype to compute in: float32, or float64 for float64.

    Cost: none.

    >>> working(torch.zeros(1, dtype=torch.float16))
    torch.float32
    """
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def unit_of(value: Tensor) -> float:
    """A power of two to divide by: 1 for entries of a usual size.

    Cost: one pass.

    >>> unit_of(torch.tensor([3.0])), unit_of(torch.tensor([3e19])) == 2.0**64
    (1.0, True)
    """
    largest = float(value.abs().amax())
    if largest == 0 or LEAST <= largest <= MOST:
        return 1.0
    return 2.0 ** math.floor(math.log2(largest))


def in_units(weight: Tensor, metric: Metric, solve: Callable[..., Refined]) -> Refined:
    """The result of `solve`, in units in which its products stay in range, and in its dtype.

    Args:
        weight: W, (…, m, n), finite.
        metric: of the errors.
        solve: of a weight, a metric, and the unit that the weight was divided by, usually 1.

    Returns:
        S, B and A in the dtype of `weight`, the trace in units of W.

    Raises:
        ValueError: they do not fit this dtype.

    Cost: a pass; a copy of `weight` in other units, if it needs them.

    >>> from slr.matrix.metric import Identity
    >>> W = torch.full((2, 2), 1e30)
    >>> once = lambda W, M, unit: assemble(W, W > 0, (W[:, :1], W[:1] * 0), [], M, lambda r: W)
    >>> float(in_units(W, Identity(), once).sparse[0, 0]) == float(W[0, 0])
    True
    """
    unit, loud = unit_of(weight), 1.0
    if isinstance(metric, Diagonal):
        loud = unit_of(metric.scale)
    if unit == loud == 1.0:
        return _stored(solve(weight, metric, 1.0), weight)
    if loud != 1.0 and isinstance(metric, Diagonal):
        metric = Diagonal(metric.scale / loud)
    small = weight.to(working(weight)) / unit
    found = solve(small, metric, unit)
    trace = tuple(Step(step.rank, step.error * unit * loud) for step in found.trace)
    coded = None if found.coded is None else found.coded.times(unit)
    large = Refined(found.sparse * unit, found.B * unit, found.A, trace, found.mask, coded)
    return _stored(large, weight)


def _stored(found: Refined, weight: Tensor) -> Refined:
    """In the dtype of the weight; where a factor does not fit, both become as large."""
    S, B, A = found.sparse, found.B, found.A
    most = torch.finfo(weight.dtype).max
    if B.numel() and not max(float(B.abs().amax()), float(A.abs().amax())) <= most:
        mine, other = B.abs().amax(-2, keepdim=True), A.abs().amax(-1, keepdim=True).mT
        there = (mine > 0) & (other > 0)
        share = (
            torch.where(there, mine / torch.where(there, other, 1), 1).sqrt().log2().ceil().exp2()
        )
        B, A = B / share, A * share.mT
    S, B, A = (part.to(weight.dtype).contiguous() for part in (S, B, A))
    for part in (S, B, A):
        if not bool(part.isfinite().all()):
            raise ValueError(
                f"weight reaches {float(weight.abs().amax()):.3g}, and its sparse and low-rank "
                f"parts do not fit {weight.dtype}; give it in float32, or scale it down"
            )
    return Refined(S, B, A, found.trace, found.mask, found.coded)


def assemble(
    weight: Tensor,
    mask: Tensor,
    low: Factors,
    steps: list[Step],
    metric: Metric,
    kept: Callable[[slice], Tensor],
) -> Refined:
    """The result, S in the dtype of `weight`, B and A as they are.

    Args:
        weight: W, (…, m, n).
        mask: bool (…, m, n).
        low: B (…, m, k) and A (…, k, n).
        steps: of the trace so far.
        metric: of the error.
        kept: gives S of some rows, right on the mask at least.

    Cost: 2 m n k FLOPs and what the metric takes.

    >>> from slr.matrix.metric import Identity
    >>> W = torch.tensor([[3.0, 4.0]])
    >>> none = torch.zeros(1, 1), torch.zeros(1, 2)
    >>> assemble(W, W > 3, none, [], Identity(), lambda rows: W[rows]).error
    3.0
    """
    B, A = low
    sparse = torch.empty_like(weight, memory_format=torch.contiguous_format)
    square = 0.0
    for rows in row_blocks(weight, share=8):
        S = keep_(kept(rows).to(B.dtype, copy=True), mask[..., rows, :])
        sparse[..., rows, :] = S
        rest = weight[..., rows, :] - S
        rest -= B[..., rows, :] @ A
        square += metric.error(rest) ** 2
    trace = (*steps, Step(A.shape[-2], square**0.5))
    return Refined(sparse, B, A, trace, mask)
