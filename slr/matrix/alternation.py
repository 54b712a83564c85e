"""W ≈ S + B A with S on a grid: the same alternation, another set.

Algorithm 1 alternates between a low-rank part and the nearest S that has a mask.  Nothing in it
needs a mask: S may lie in any set that one can project on, and what S cannot hold, B A takes.  Here
the set is a grid of a few bits, perhaps on a mask:

- in the ``Identity`` and ``Diagonal`` metrics the step in S is the projection, rounding to the
  nearest code;
- in the ``Gram`` metric it is :func:`~slr.matrix.codes.feed_back`, whose levels are chosen anew,
  and later :func:`~slr.matrix.codes.descend`, which keeps them and never raises the error.

Factors are rounded last, B by columns and A by rows; then S makes up for that.  Grids are not
convex and their levels move, so that the best round is kept, not the last.  Book: chapter 16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slr.matrix.codes import Columns, descend, feed_back
from slr.matrix.filled import OVERSAMPLING, WARMUP
from slr.matrix.lowrank import truncated_svd
from slr.matrix.metric import Diagonal, Gram, Metric, definite
from slr.matrix.result import Coded, Step
from slr.matrix.rounding import Grid, Rounded

__all__ = ["refine_rounded"]

AT_LAST = 2  # sweeps after the factors were rounded


class Found(NamedTuple):
    """S, its codes and B A; `coded` has all of them as they are stored."""

    sparse: Tensor
    B: Tensor
    A: Tensor
    coded: Coded
    steps: list[Step]


def refine_rounded(
    work: Tensor,
    mask: Tensor | None,
    metric: Metric,
    rank: int,
    grid: Grid,
    *,
    factors: Grid | None = None,
    iterations: int,
    generator: torch.Generator,
) -> Found:
    """The alternation; :func:`slr.refine` is its public face and says what the arguments are.

    Args:
        work: W, (m, n), float32.
        mask: bool (m, n), or ``None`` for no mask.
        rank: 0 for a rounded matrix alone.
        factors: grid of whole rows for A and for Bᵀ; ``None`` leaves them as they are.

    Cost: a round takes 3 m n² + 12 m n q FLOPs with ``Gram``, q = k + 8, and an SVD without.

    >>> W = torch.tensor([[1.0, 2.0, 3.1, 0.0], [2.0, 4.0, 6.0, 0.0]])
    >>> found = refine_rounded(W, None, Diagonal(torch.ones(4)), 1, Grid(4, 4), iterations=4,
    ...                        generator=torch.Generator().manual_seed(0))
    >>> bool((W - found.sparse - found.B @ found.A).norm() < 0.05)
    True
    """
    sides = _Gram(work, mask, metric, grid, generator, rank) if isinstance(metric, Gram) else (
        _Weights(work, mask, metric, grid, rank))  # fmt: skip
    m, n = work.shape
    B, A = work.new_zeros(m, 0), work.new_zeros(0, n)
    steps: list[Step] = []
    best: tuple[float, Rounded, Tensor, Tensor] | None = None
    rounded = None
    for turn in range(iterations if rank else 1):
        anew = turn <= iterations // 2
        rounded = sides.rounded(work - B @ A, None if anew else rounded)
        rest = work - sides.kept(rounded)
        if rank:
            B, A = sides.low_rank(rest)
        error = sides.error(rest - B @ A)
        steps.append(Step(rank, error))
        if best is None or error < best[0]:
            best = error, rounded, B, A
    assert best is not None
    _, rounded, B, A = best
    stored = None
    if factors is not None and rank:
        stored = factors.rounded(B.T.contiguous()), factors.rounded(A)
        B, A = stored[0].values().T.contiguous(), stored[1].values()
    rounded = sides.settled(work - B @ A, rounded)
    coded = Coded(rounded, *(stored or (None, None)))
    return Found(sides.kept(rounded), B, A, coded, steps)


class _Weights:
    """The steps without data: projections."""

    def __init__(
        self, work: Tensor, mask: Tensor | None, metric: Metric, grid: Grid, rank: int
    ) -> None:
        self.mask, self.grid, self.rank, self.metric = mask, grid, rank, metric
        loud = metric.scale.to(work) if isinstance(metric, Diagonal) else work.new_ones(())
        self.scale, self.back = loud, (loud > 0) / torch.where(loud > 0, loud, 1)
        self.loudness = loud.square().expand(work.shape[1])

    def kept(self, rounded: Rounded) -> Tensor:
        values = rounded.values()
        return values if self.mask is None else values * self.mask

    def rounded(self, target: Tensor, before: Rounded | None) -> Rounded:
        if self.mask is not None:
            target = target * self.mask
        levels = self.grid.levels(target, self.loudness) if before is None else before.levels
        return self.grid.rounded(target, levels)

    def settled(self, target: Tensor, rounded: Rounded) -> Rounded:
        return self.rounded(target, rounded)

    def low_rank(self, rest: Tensor) -> tuple[Tensor, Tensor]:
        B, A = truncated_svd(rest * self.scale, self.rank).factors()
        return B, A * self.back

    def error(self, E: Tensor) -> float:
        return self.metric.error(E)


class _Gram(_Weights):
    """The steps with second moments of the inputs in view."""

    def __init__(
        self, work: Tensor, mask: Tensor | None, metric: Gram, grid: Grid,
        generator: torch.Generator, rank: int,
    ) -> None:  # fmt: skip
        self.mask, self.grid, self.rank = mask, grid, rank
        H = definite(metric.damped(work))[0]
        self.unit = H.diagonal().mean()  # products stay in range, whatever the units of H
        self.H = H.div_(self.unit)
        self.columns = Columns(self.H)
        self.U: Tensor | None = None
        self.start = torch.randn(
            len(work), min(rank + OVERSAMPLING, *work.shape), generator=generator,
            device=work.device, dtype=work.dtype,
        )  # fmt: skip

    def rounded(self, target: Tensor, before: Rounded | None) -> Rounded:
        if before is None:
            before = feed_back(target, self.columns, self.grid, self.mask)
        return descend(before, target, self.columns, self.mask)

    def settled(self, target: Tensor, rounded: Rounded) -> Rounded:
        return descend(rounded, target, self.columns, self.mask, AT_LAST)

    def low_rank(self, rest: Tensor) -> tuple[Tensor, Tensor]:
        U = self.start if self.U is None else self.U
        for _ in range(WARMUP if self.U is None else 1):
            U = torch.linalg.qr(rest @ (self.H @ (rest.T @ U)))[0]
        A = rest.T @ U
        vectors = torch.linalg.eigh(A.T @ (self.H @ A))[1].flip(1)
        self.U, A = U @ vectors, (A @ vectors).T
        return self.U[:, : self.rank], A[: self.rank]

    def error(self, E: Tensor) -> float:
        square = ((E @ self.H) * E).sum(dtype=torch.float64).clamp_min(0) * self.unit
        return float(square.sqrt())
