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

Book: chapter 2.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from slr.checks import check_mask, check_matrix, check_rank
from slr.lowrank import LowRank, ritz, truncated_svd

__all__ = ["SCHEDULES", "SOLVERS", "Refined", "Step", "ramp", "refine", "svd_repair"]

SCHEDULES = ("paper", "accelerated")
SOLVERS = ("fast", "exact")
OVERSAMPLING = 8  # extra directions that the fast solver carries
WARMUP = 3  # power steps on the first L, and again on the last
BLOCK = 4_000_000  # entries of L that exist at a time


class Step(NamedTuple):
    """One iteration: the `rank` used and the `error` ‖W - S - B A‖_F of its (S, [W - S]_rank).

    Taken from singular values, ‖L‖² - Σσ², an iteration's error is resolved down to about
    3e-4 ‖L‖ in float32; the last one, the result's, is computed directly.
    """

    rank: int
    error: float


class Refined(NamedTuple):
    """W ≈ sparse + B A.

    `sparse` (m, n) is zero off the mask; `B` is (m, k) and `A` (k, n), with orthogonal columns
    and orthonormal rows; `trace` has one :class:`Step` an iteration, and last the result's own.
    """

    sparse: Tensor
    B: Tensor
    A: Tensor
    trace: tuple[Step, ...]

    @property
    def error(self) -> float:
        """‖W - S - B A‖_F, computed before rounding to the dtype of the factors."""
        return self.trace[-1].error

    def dense(self) -> Tensor:
        """sparse + B A, (m, n)."""
        return self.sparse + self.B @ self.A


def ramp(rank: int, iterations: int) -> list[int]:
    """The paper's ranks r_t = 1 + ⌊(k-1) t / (T-1)⌋, in integers.

    >>> ramp(4, 7)
    [1, 1, 2, 2, 3, 3, 4]
    """
    last = max(1, iterations - 1)
    return [rank if iterations == 1 else 1 + (rank - 1) * t // last for t in range(iterations)]


def svd_repair(weight: Tensor, mask: Tensor, rank: int) -> Refined:
    """The one-shot baseline: prune, then the best rank-k approximation of what was pruned.

    Args:
        weight: (m, n), any float dtype.
        mask: bool (m, n), True = kept.
        rank: from 1 to min(m, n).

    Returns:
        :class:`Refined` with ``sparse`` = weight on the mask, in the dtype of `weight`.

    Cost: one SVD, O(m n min(m, n)).

    >>> W = torch.tensor([[4.0, 1.0], [2.0, 5.0]])
    >>> svd_repair(W, W > 3, 1).error  # off-diagonal [[0, 1], [2, 0]] keeps its 2
    1.0
    """
    work = _checked(weight, mask, rank)
    sparse = work * mask
    return _finish(weight, work, sparse, truncated_svd(work - sparse, rank), [])


def refine(
    weight: Tensor,
    mask: Tensor,
    rank: int,
    *,
    iterations: int = 50,
    solver: str = "fast",
    schedule: str = "paper",
    generator: torch.Generator | None = None,
) -> Refined:
    """Refine a pruned matrix into sparse + low rank, without data.

    Args:
        weight: (m, n) = (out, in), the dense matrix before pruning; never modified.
        mask: bool (m, n), True = kept (a kept weight may well be zero).
        rank: k of the low-rank part, from 1 to min(m, n).
        iterations: T, at least 1.
        solver: ``"fast"`` or ``"exact"``.
        schedule: ``"paper"`` (rank ramp) or ``"accelerated"`` (rank k with momentum).
        generator: for the fast solver's random start; one seeded with 0 when ``None``, so
            that equal inputs give equal outputs.

    Returns:
        :class:`Refined` in the dtype of `weight`, computed in float32 (float64 for float64).
        Its low-rank part is the best rank-k approximation of weight - sparse (for
        ``"fast"`` to solver accuracy).  Under ``"accelerated"`` a last step sets
        sparse = weight - B A on the mask, so that the error is all off the mask.

    Raises:
        ValueError: shapes that differ, a rank out of range, non-finite weights, an unknown
            solver or schedule.
        TypeError: `weight` is not floating point or `mask` not boolean.

    Cost: ``fast`` about 6 T m n (k + 8) FLOPs and `BLOCK` floats beside the result; ``exact``
        T full SVDs.
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
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} is unknown; it must be one of {', '.join(SOLVERS)}")
    if schedule not in SCHEDULES:
        raise ValueError(
            f"schedule {schedule!r} is unknown; it must be one of {', '.join(SCHEDULES)}"
        )
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; it must be at least 1")
    work = _checked(weight, mask, rank)
    leading: _FullSVD | _Subspace
    if solver == "fast":
        generator = generator or torch.Generator(work.device).manual_seed(0)
        width = min(rank + OVERSAMPLING, *work.shape)
        leading = _Subspace(work, mask, width, generator)
    else:
        leading = _FullSVD(work, mask)

    paper = schedule == "paper"
    ranks = ramp(rank, iterations) if paper else [rank] * iterations
    steps: list[Step] = []
    theta = 1.0
    fill = previous = None
    for r in ranks:
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
                torch.cat([(1 + beta) * B, -beta * previous[0]], 1),
                torch.cat([A, previous[1]]),
            )
        previous = (B, A)

    for _ in range(WARMUP if solver == "fast" else 1):
        low, _ = leading(fill, rank)
    sparse = _sparse_part(work, mask, fill if paper else low.factors())
    return _finish(weight, work, sparse, low, steps)


def _checked(weight: Tensor, mask: Tensor, rank: int) -> Tensor:
    check_matrix("weight", weight)
    check_mask(mask, weight)
    check_rank(rank, weight.shape)
    return weight if weight.dtype == torch.float64 else weight.float()


def _finish(
    weight: Tensor, work: Tensor, sparse: Tensor, low: LowRank, steps: list[Step]
) -> Refined:
    B, A = low.factors()
    error = float(torch.addmm(work - sparse, B, A, alpha=-1).double().norm())
    dtype = weight.dtype
    trace = (*steps, Step(A.shape[0], error))
    return Refined(sparse.to(dtype), B.to(dtype).contiguous(), A.to(dtype).contiguous(), trace)


def _tail(norm2: Tensor, low: LowRank) -> float:
    """‖L - [L]_r‖_F from ‖L‖² and the leading singular values."""
    return float((norm2 - low.s.double().square().sum()).clamp_min(0).sqrt())


def _filled(work: Tensor, mask: Tensor, fill) -> Tensor:
    """L = W off the mask, B A on it (0 before there is a B A)."""
    if fill is None:
        return work.masked_fill(mask, 0)
    return torch.where(mask, fill[0] @ fill[1], work)


class _FullSVD:
    """[L]_r by a full SVD."""

    def __init__(self, work: Tensor, mask: Tensor) -> None:
        self.work, self.mask = work, mask

    def __call__(self, fill, rank: int) -> tuple[LowRank, Tensor]:
        L = _filled(self.work, self.mask, fill)
        return truncated_svd(L, rank), L.double().square().sum()


class _Subspace:
    """[L]_r by one power step from the last right singular vectors, L made block by block."""

    def __init__(self, work: Tensor, mask: Tensor, width: int, generator: torch.Generator) -> None:
        self.work, self.mask, self.width, self.generator = work, mask, width, generator
        self.V = self._random(width)
        for _ in range(WARMUP - 1):
            self(None, width)

    def _random(self, columns: int) -> Tensor:
        n, work = self.work.shape[1], self.work
        return torch.randn(
            n, columns, generator=self.generator, device=work.device, dtype=work.dtype
        )

    def __call__(self, fill, rank: int) -> tuple[LowRank, Tensor]:
        (m, n), q = self.work.shape, self.V.shape[1]
        Y = self.work.new_empty(m, q)
        Z = self.work.new_zeros(n, q)
        norm2 = self.work.new_zeros((), dtype=torch.float64)
        height = max(1, BLOCK // n)
        for top in range(0, m, height):
            rows = slice(top, top + height)
            block_fill = fill and (fill[0][rows], fill[1])
            L = _filled(self.work[rows], self.mask[rows], block_fill)
            Y[rows] = L @ self.V
            Z += L.T @ Y[rows]
            norm2 += L.square().sum(dtype=torch.float64)
        low = ritz(Y, Z)
        lost = self.width - len(low.s)  # L had lower rank; later it may not
        self.V = torch.cat([low.V, self._random(lost)], 1) if lost else low.V
        return _padded(low, rank).truncate(rank), norm2


def _padded(low: LowRank, rank: int) -> LowRank:
    """Zero triplets appended when L has fewer than `rank`."""
    lack = rank - len(low.s)
    if lack <= 0:
        return low
    pad = torch.nn.functional.pad
    return LowRank(pad(low.U, (0, lack)), pad(low.s, (0, lack)), pad(low.V, (0, lack)))


def _sparse_part(work: Tensor, mask: Tensor, fill) -> Tensor:
    """S = P∘(W - B A)."""
    return (work - fill[0] @ fill[1]).masked_fill_(~mask, 0)
