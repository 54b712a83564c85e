"""W ≈ S + B A with S on a grid: the same alternation, another set.

Algorithm 1 alternates between a low-rank part and the nearest S that has a mask.  Nothing in it
needs a mask: S may lie in any set that one can project on, and what S cannot hold, B A takes.  Here
the set is a grid of a few bits, perhaps on a mask:

- in the ``Identity`` and ``Diagonal`` metrics the step in S is the projection, rounding to the
  nearest code;
- in the ``Gram`` metric it is :func:`~slr.matrix.codes.feed_back`, whose levels are chosen anew,
  and later :func:`~slr.matrix.codes.descend`, which keeps them and never raises the error.

Two starts are tried for a few rounds, S of all of W and B A of W: the second is better where some
directions of W are much larger than the rest, which would make all steps of a grid wide.  Factors
are rounded last, B by columns and A by rows; then S makes up for that.  Grids are not convex and
their levels move, so that the best round is kept, not the last.  Book: chapter 18.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from slr.matrix.assembly import scales
from slr.matrix.codes import Columns, descend, feed_back
from slr.matrix.filled import OVERSAMPLING, WARMUP
from slr.matrix.lowrank import truncated_svd
from slr.matrix.metric import Gram, Metric, definite
from slr.matrix.result import Coded, Step
from slr.matrix.rounding import Grid, Rounded

__all__ = ["refine_rounded"]

AT_LAST = 2  # sweeps when B A is final
TRIED = 3  # rounds from each of two starts
MOST = 12  # rounds: from eight to sixteen an error falls by some thousandths of itself


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
        iterations: rounds, `MOST` at most.

    Cost: a round takes 3 m n² + 12 m n q FLOPs with ``Gram``, q = k + 8, and an SVD without;
        `TRIED` rounds are taken twice.

    >>> from slr.matrix.metric import Diagonal
    >>> W = torch.tensor([[1.0, 2.0, 3.1, 0.0], [2.0, 4.0, 6.0, 0.0]])
    >>> found = refine_rounded(W, None, Diagonal(torch.ones(4)), 1, Grid(4, 4), iterations=4,
    ...                        generator=torch.Generator().manual_seed(0))
    >>> bool((W - found.sparse - found.B @ found.A).norm() < 0.05)
    True
    """
    iterations = min(iterations, MOST)
    made = _Gram if isinstance(metric, Gram) else _Weights
    sides = made(work, mask, metric, grid, rank, generator)
    m, n = work.shape
    none = Low(work.new_zeros(m, 0), work.new_zeros(0, n))
    if not rank:
        path = _Path(none).walk(work, sides, 1, 1)
    else:
        few = min(TRIED, iterations)
        paths = [_Path(none), _Path(sides.low_rank(work, None))]
        for each in paths:
            each.walk(work, sides, few, iterations)
        path = min(paths, key=lambda each: each.settled(work, sides, factors)[0])
        path.walk(work, sides, iterations - few, iterations)
    _, rounded, low = path.settled(work, sides, factors)
    coded = Coded(rounded, *(low.codes or (None, None)))
    return Found(sides.kept(rounded), low.B, low.A, coded, path.steps)


class Low(NamedTuple):
    """B A, what to start the next power step from, and the codes of Bᵀ and A if they have some."""

    B: Tensor
    A: Tensor
    U: Tensor | None = None
    codes: tuple[Rounded, Rounded] | None = None

    def coded(self, factors: Grid | None) -> Low:
        """The same with rounded factors."""
        if factors is None:
            return self
        codes = factors.rounded(self.B.T.contiguous()), factors.rounded(self.A)
        B, A = codes[0].values().T.contiguous(), codes[1].values()
        return Low(B, A, self.U, codes)


class _Path:
    """The rounds from one start, B A: where they are, their errors, and the best so far."""

    def __init__(self, low: Low) -> None:
        self.low = low
        self.rounded: Rounded | None = None
        self.steps: list[Step] = []
        self.best: list[tuple[float, Rounded, Low]] = []

    def walk(self, work: Tensor, sides: _Weights, rounds: int, total: int) -> _Path:
        """Some more rounds, of so many in all; returns itself."""
        for _ in range(rounds):
            before = None if len(self.steps) <= total // 2 else self.rounded
            self.rounded = sides.rounded(work - self.low.B @ self.low.A, before)
            rest = work - sides.kept(self.rounded)
            if sides.rank:
                self.low = sides.low_rank(rest, self.low.U)
            error = sides.error(rest - self.low.B @ self.low.A)
            self.steps.append(Step(sides.rank, error))
            if not self.best or error < self.best[0][0]:
                self.best = [(error, self.rounded, self.low)]
        return self

    def settled(
        self, work: Tensor, sides: _Weights, factors: Grid | None
    ) -> tuple[float, Rounded, Low]:
        """The best with its factors rounded, S making up for that, and its error."""
        _, rounded, low = self.best[0]
        low = low.coded(factors)
        rounded = sides.settled(work - low.B @ low.A, rounded)
        return sides.error(work - sides.kept(rounded) - low.B @ low.A), rounded, low


class _Weights:
    """The steps without data: projections."""

    def __init__(
        self, work: Tensor, mask: Tensor | None, metric: Any, grid: Grid, rank: int,
        generator: torch.Generator,
    ) -> None:  # fmt: skip
        self.mask, self.grid, self.rank, self.metric = mask, grid, rank, metric
        self.scale, self.back = scales(metric, work)
        self.loudness = self.scale.square().expand(work.shape[1])

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

    def low_rank(self, rest: Tensor, U: Tensor | None) -> Low:
        B, A = truncated_svd(rest * self.scale, self.rank).factors()
        return Low(B, A * self.back)

    def error(self, E: Tensor) -> float:
        return self.metric.error(E)


class _Gram(_Weights):
    """The steps with second moments of the inputs in view."""

    def __init__(
        self, work: Tensor, mask: Tensor | None, metric: Any, grid: Grid, rank: int,
        generator: torch.Generator,
    ) -> None:  # fmt: skip
        self.mask, self.grid, self.rank = mask, grid, rank
        H = definite(metric.damped(work))[0]
        self.unit = H.diagonal().mean()  # products stay in range, whatever the units of H
        self.H = H.div_(self.unit)
        self.columns = Columns(self.H)
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

    def low_rank(self, rest: Tensor, U: Tensor | None) -> Low:
        rounds = 1 if U is not None else WARMUP
        U = self.start if U is None else U
        for _ in range(rounds):
            U = torch.linalg.qr(rest @ (self.H @ (rest.T @ U)))[0]
        A = rest.T @ U
        vectors = torch.linalg.eigh(A.T @ (self.H @ A))[1].flip(1)
        U, A = U @ vectors, (A @ vectors).T
        return Low(U[:, : self.rank], A[: self.rank], U)

    def error(self, E: Tensor) -> float:
        square = ((E @ self.H) * E).sum(dtype=torch.float64).clamp_min(0) * self.unit
        return float(square.sqrt())
