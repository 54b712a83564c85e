"""Targeted low-rank refinement: W ≈ S + B A with S on a given mask and B A of rank k.

Algorithm 1 of the paper repeats, for t = 0 … T-1 from S = P∘W,

    L = W - S,    U Σ Vᵀ = svd(L),    S ← S + P∘(U_{r:} Σ_{r:} V_{r:}ᵀ),    r = r_t,

with a rank that ramps from 1 to k.  On its support the update *is* S = P∘(W - [L]_r), so
that L = W - S equals W off the mask and [L]_r on it: the pruned entries of W are
observations, and the kept ones are filled in by a matrix of rank r.  This module computes in
that form, for which only W, P and thin factors are needed:

- ``solver="exact"``: a full SVD in each iteration; the reference.
- ``solver="fast"``: L changes little from one iteration to the next, so one block power step
  from the last singular vectors replaces the SVD, and L is never stored: row block by row
  block, fill in (B A on the mask), then L V and Lᵀ(L V).

and with two schedules:

- ``schedule="paper"``: the ramp r_t = 1 + ⌊(k-1) t / (T-1)⌋.
- ``schedule="accelerated"``: rank k throughout and Nesterov momentum on the filled-in
  matrix; a lower error in fewer iterations.

The error may be weighed by a :mod:`metric <slr.metric>`.  Scaling columns commutes with a mask,
so ``Diagonal(d)`` is the same algorithm on W diag(d); ``Gram(H)`` is :mod:`slr.gram`.

Book: chapter 2.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from slr.checks import check_mask, check_matrix, check_rank
from slr.lowrank import LowRank, ritz, truncated_svd
from slr.metric import Diagonal, Gram, Identity, Metric

__all__ = ["SCHEDULES", "SOLVERS", "Refined", "Step", "ramp", "refine", "svd_repair"]

SCHEDULES = ("paper", "accelerated")
SOLVERS = ("fast", "exact")
OVERSAMPLING = 8  # extra directions that the fast solver carries
WARMUP = 3  # power steps on the first L, and again on the last
BLOCK = {"cpu": 1 << 19, "cuda": 1 << 26}  # entries of L that exist at a time: cache, occupancy


class Step(NamedTuple):
    """One iteration: the `rank` used and the `error` ‖W - S - B A‖_F of its (S, [W - S]_rank).

    Taken from singular values, ‖L‖² - Σσ², an iteration's error is resolved down to about
    3e-4 ‖L‖ in float32; the last one, the result's, is computed directly.  In another metric the
    error is in that metric.  For a stack of matrices it is the root of the sum of squares.
    """

    rank: int
    error: float


class Refined(NamedTuple):
    """W ≈ sparse + B A.

    `sparse` (…, m, n) is zero off the mask; `B` is (…, m, k) and `A` (…, k, n); `trace` has one
    :class:`Step` an iteration, and last the result's own.
    """

    sparse: Tensor
    B: Tensor
    A: Tensor
    trace: tuple[Step, ...]

    @property
    def error(self) -> float:
        """‖W - S - B A‖ in the metric, computed before rounding to the dtype of the factors."""
        return self.trace[-1].error

    def dense(self) -> Tensor:
        """sparse + B A, (…, m, n)."""
        return self.sparse + self.B @ self.A


def ramp(rank: int, iterations: int) -> list[int]:
    """The paper's ranks r_t = 1 + ⌊(k-1) t / (T-1)⌋, in integers.

    >>> ramp(4, 7)
    [1, 1, 2, 2, 3, 3, 4]
    """
    last = max(1, iterations - 1)
    return [rank if iterations == 1 else 1 + (rank - 1) * t // last for t in range(iterations)]


def svd_repair(
    weight: Tensor,
    mask: Tensor,
    rank: int,
    metric: Metric | None = None,
    *,
    sparse: Tensor | None = None,
) -> Refined:
    """The one-shot baseline: prune, then the best rank-k approximation of what was pruned.

    Args:
        weight: (…, m, n), any float dtype.
        mask: bool (…, m, n), True = kept.
        rank: from 1 to min(m, n).
        metric: what "best" means; ``Gram(H)`` gives EoRA's repair.
        sparse: what pruning left, if it moved the kept weights (SparseGPT); weight on the mask
            by default.

    Returns:
        :class:`Refined` with `sparse` as given, in the dtype of `weight`.

    Raises:
        ValueError, TypeError: as :func:`refine`.

    Cost: one SVD, O(m n min(m, n)); with ``Gram`` also a Cholesky factor of H.
    Source: the SVD baseline of the paper; Liu et al. 2024 (EoRA).

    >>> W = torch.tensor([[4.0, 1.0], [2.0, 5.0]])
    >>> svd_repair(W, W > 3, 1).error  # off-diagonal [[0, 1], [2, 0]] keeps its 2
    1.0
    """
    work = _checked(weight, mask, rank)
    metric = _checked_metric(metric, work)
    kept = work * mask if sparse is None else sparse.to(work)
    rest = work - kept
    if isinstance(metric, Gram):
        from slr.gram import best_low_rank

        B, A = best_low_rank(rest, metric, rank)
    else:
        scale, back = _scales(metric, work)
        B, A = truncated_svd(rest * scale, rank).factors()
        A = A * back
    return _finish(weight, work, kept, B, A, [], metric)


def refine(
    weight: Tensor,
    mask: Tensor,
    rank: int,
    *,
    iterations: int = 50,
    metric: Metric | None = None,
    solver: str = "fast",
    schedule: str = "paper",
    tolerance: float = 0.0,
    generator: torch.Generator | None = None,
) -> Refined:
    """Refine a pruned matrix, or a stack of them, into sparse + low rank.

    Args:
        weight: (m, n) = (out, in) or (batch, m, n), dense, before pruning; never modified.
        mask: bool, same shape, True = kept (a kept weight may well be zero).
        rank: k of the low-rank part, from 1 to min(m, n).
        iterations: T, at least 1.
        metric: how errors are weighed; ``None`` is ``Identity()``, the paper, data-free.
        solver: ``"fast"`` or ``"exact"``.  (``Gram`` has one solver of its own.)
        schedule: ``"paper"`` (rank ramp) or ``"accelerated"`` (rank k with momentum).
        tolerance: stop once an iteration lowers the error by less than this share of it; 0
            never stops.  Not with ``schedule="paper"``, whose ramp is made for T iterations.
        generator: for the fast solver's random start; one seeded with 0 when ``None``, so
            that equal inputs give equal outputs.

    Returns:
        :class:`Refined` in the dtype of `weight`, computed in float32 (float64 for float64).
        Its low-rank part is the best rank-k approximation of weight - sparse (for
        ``"fast"`` to solver accuracy).  Under ``"accelerated"`` a last step sets
        sparse = weight - B A on the mask, so that the error is all off the mask.

    Raises:
        ValueError: shapes that differ, a rank out of range, non-finite weights, an unknown
            solver or schedule, a metric of another width.
        TypeError: `weight` is not floating point or `mask` not boolean.

    Cost: ``fast`` about 6 T m n (k + 8) FLOPs and, beside the result, some `BLOCK` floats;
        ``exact`` T full SVDs.  ``Gram``: see :func:`slr.gram.refine_gram`.
    Source: Targeted Low-rank Refinement (ICML 2025), Algorithm 1; momentum: Nesterov 1983 in
        the form of Beck and Teboulle 2009.

    >>> torch.manual_seed(0).initial_seed()
    0
    >>> W = torch.randn(64, 48)
    >>> mask = W.abs() > 0.7
    >>> refined = refine(W, mask, rank=4)
    >>> refined.error < svd_repair(W, mask, rank=4).error
    True
    """
    _check_choices(iterations, solver, schedule, tolerance)
    work = _checked(weight, mask, rank)
    metric = _checked_metric(metric, work)
    generator = generator or torch.Generator(work.device).manual_seed(0)
    if isinstance(metric, Gram):
        from slr.gram import refine_gram

        kept, B, A, steps = refine_gram(
            work, mask, metric, rank,
            iterations=iterations, tolerance=tolerance, generator=generator,
        )  # fmt: skip
        return _finish(weight, work, kept, B, A, steps, metric)

    scale, back = _scales(metric, work)
    scaled = work if isinstance(metric, Identity) else work * scale
    leading: _FullSVD | _Subspace
    if solver == "fast":
        width = min(rank + OVERSAMPLING, *work.shape[-2:])
        leading = _Subspace(scaled, mask, width, generator)
    else:
        leading = _FullSVD(scaled, mask)
    fill, steps = _iterate(leading, rank, iterations, schedule, tolerance)
    for _ in range(WARMUP if solver == "fast" else 1):
        low, _norm2 = leading(fill, rank)
    B, A = low.factors()
    last = fill if schedule == "paper" else (B, A)
    # P∘(W - B A) in the metric's units, and back; channels of scale 0 keep their weights.
    low_part = (last[0] @ last[1]) if isinstance(metric, Identity) else last[0] @ (last[1] * back)
    kept = torch.sub(work, low_part, out=low_part).masked_fill_(~mask, 0)
    return _finish(weight, work, kept, B, A * back, steps, metric)


def _iterate(leading, rank: int, iterations: int, schedule: str, tolerance: float):
    """The alternation; returns the last filled-in factors and the steps."""
    paper = schedule == "paper"
    steps: list[Step] = []
    theta = 1.0
    fill = previous = None
    for r in ramp(rank, iterations) if paper else [rank] * iterations:
        low, norm2 = leading(fill, r)
        steps.append(Step(r, _tail(norm2, low)))
        B, A = low.factors()
        if paper or previous is None:
            fill = (B, A)
        else:
            following = (1 + math.sqrt(1 + 4 * theta**2)) / 2
            beta = (theta - 1) / following
            theta = following
            fill = (
                torch.cat([(1 + beta) * B, -beta * previous[0]], -1),
                torch.cat([A, previous[1]], -2),
            )
        previous = (B, A)
        if not paper and len(steps) > 1:
            before, now = steps[-2].error, steps[-1].error
            if tolerance and before - now < tolerance * before:
                break
    return fill, steps


def _check_choices(iterations: int, solver: str, schedule: str, tolerance: float) -> None:
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} is unknown; it must be one of {', '.join(SOLVERS)}")
    if schedule not in SCHEDULES:
        raise ValueError(
            f"schedule {schedule!r} is unknown; it must be one of {', '.join(SCHEDULES)}"
        )
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; it must be at least 1")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance is {tolerance}; it must be from 0 to below 1")


def _checked(weight: Tensor, mask: Tensor, rank: int) -> Tensor:
    check_matrix("weight", weight, batch=True)
    check_mask(mask, weight)
    check_rank(rank, weight.shape[-2:])
    return weight if weight.dtype == torch.float64 else weight.float()


def _checked_metric(metric: Metric | None, work: Tensor) -> Metric:
    metric = Identity() if metric is None else metric
    if not isinstance(metric, Identity | Diagonal | Gram):
        raise TypeError(f"metric is {metric!r}; it must be Identity(), Diagonal(d) or Gram(H)")
    metric.check(work.shape[-1])
    if isinstance(metric, Gram) and work.ndim != 2:
        raise ValueError("Gram refines one matrix at a time, but weight is a stack")
    return metric


def _scales(metric: Metric, work: Tensor) -> tuple[Tensor, Tensor]:
    """Column scales of a Diagonal metric and their inverse, 0 for a silent channel; else ones."""
    if not isinstance(metric, Diagonal):
        one = work.new_ones(())
        return one, one
    scale = metric.scale.to(work.device, work.dtype)
    return scale, (scale > 0) / torch.where(scale > 0, scale, 1)


def _finish(
    weight: Tensor,
    work: Tensor,
    sparse: Tensor,
    B: Tensor,
    A: Tensor,
    steps: list[Step],
    metric: Metric,
) -> Refined:
    rest = work - sparse
    rest -= B @ A
    trace = (*steps, Step(A.shape[-2], metric.error(rest)))
    dtype = weight.dtype
    return Refined(sparse.to(dtype), B.to(dtype).contiguous(), A.to(dtype).contiguous(), trace)


def _tail(norm2: Tensor, low: LowRank) -> float:
    """‖L - [L]_r‖_F from ‖L‖² and the leading singular values."""
    return float((norm2 - low.s.double().square().sum()).clamp_min(0).sqrt())


class _FullSVD:
    """[L]_r by a full SVD."""

    def __init__(self, work: Tensor, mask: Tensor) -> None:
        self.work, self.mask = work, mask

    def __call__(self, fill, rank: int) -> tuple[LowRank, Tensor]:
        inside = 0 if fill is None else fill[0] @ fill[1]
        L = torch.where(self.mask, inside, self.work)
        return truncated_svd(L, rank), L.double().square().sum()


class _Subspace:
    """[L]_r by one power step from the last right singular vectors, L made block by block."""

    def __init__(self, work: Tensor, mask: Tensor, width: int, generator: torch.Generator) -> None:
        self.work, self.mask, self.generator = work, mask, generator
        *batch, m, n = work.shape
        row = n * math.prod(batch)
        self.height = min(m, max(16, BLOCK.get(work.device.type, 1 << 24) // row))
        self.block = work.new_empty(*batch, self.height, n)
        self.V = self._random(n, width)
        for _ in range(WARMUP - 1):
            self(None, width)

    def _random(self, rows: int, columns: int) -> Tensor:
        shape = (*self.work.shape[:-2], rows, columns)
        device, dtype = self.work.device, self.work.dtype
        return torch.randn(shape, generator=self.generator, device=device, dtype=dtype)

    def __call__(self, fill, rank: int) -> tuple[LowRank, Tensor]:
        *batch, m, n = self.work.shape
        width = self.V.shape[-1]
        Y = self.work.new_empty(*batch, m, width)
        Z = self.work.new_zeros(*batch, n, width)
        accumulate = torch.baddbmm if batch else torch.addmm
        norm2 = self.work.new_zeros((), dtype=torch.float64)
        for top in range(0, m, self.height):
            rows = slice(top, min(top + self.height, m))
            L = self.block[..., : rows.stop - top, :]
            W, P = self.work[..., rows, :], self.mask[..., rows, :]
            if fill is None:
                torch.mul(W, ~P, out=L)
            else:
                torch.matmul(fill[0][..., rows, :], fill[1], out=L)
                torch.where(P, L, W, out=L)
            part = L @ self.V
            Y[..., rows, :] = part
            accumulate(Z, L.mT, part, out=Z)
            norm2 += torch.linalg.vector_norm(L).double().square()
        low = ritz(Y, Z)
        missing = (low.s == 0).unsqueeze(-2)  # L had lower rank; later it may not
        self.V = torch.where(missing, self._random(n, width), low.V) if missing.any() else low.V
        return low.truncate(rank), norm2
