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

and with three schedules:

- ``schedule="paper"``: the ramp r_t = 1 + ⌊(k-1) t / (T-1)⌋.
- ``schedule="constant"``: rank k throughout; on a problem with an exact answer it finds it where
  the ramp, which is at rank k only once, does not (chapter 6).
- ``schedule="accelerated"``: rank k throughout and Nesterov momentum on the filled-in
  matrix; a lower error in fewer iterations.

The error may be weighed by a :mod:`metric <slr.matrix.metric>`.  Scaling columns commutes with a
mask, so ``Diagonal(d)`` is the same algorithm on W diag(d); ``Gram(H)`` is :mod:`slr.matrix.gram`.

Book: chapters 5 and 6.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from slr.matrix.alternation import refine_rounded
from slr.matrix.assembly import assemble, in_units, posed, scales, working
from slr.matrix.checks import check_choice, check_count, check_share
from slr.matrix.filled import (
    POLISH,
    RANGE,
    Factors,
    Filled,
    FullSVD,
    Subspace,
    row_blocks,
    svd_pays,
)
from slr.matrix.gram import refine_gram
from slr.matrix.metric import Gram, Metric
from slr.matrix.oneshot import svd_repair
from slr.matrix.patterns import Pattern, parse
from slr.matrix.result import Refined, Step, settled
from slr.matrix.rounding import Grid, as_grid

__all__ = ["SCHEDULES", "SEARCHES", "SOLVERS", "ramp", "refine", "svd_repair"]

SCHEDULES = ("paper", "constant", "accelerated")
SOLVERS = ("fast", "exact")
SEARCHES = ("score", "admm")
ROUNDING = 1e-6  # of an error


def ramp(rank: int, iterations: int) -> list[int]:
    """The paper's ranks r_t = 1 + ⌊(k-1) t / (T-1)⌋, in integers.

    Args:
        rank: k, at least 1.
        iterations: T, at least 1; for T = 1 the one rank is k.

    Cost: T integers.  Source: Algorithm 1.

    >>> ramp(4, 7)
    [1, 1, 2, 2, 3, 3, 4]
    """
    last = max(1, iterations - 1)
    return [rank if iterations == 1 else 1 + (rank - 1) * t // last for t in range(iterations)]


@torch.no_grad()
def refine(
    weight: Tensor,
    mask: Tensor | None,
    rank: int,
    *,
    iterations: int = 50,
    metric: Metric | None = None,
    solver: str = "fast",
    schedule: str = "paper",
    tolerance: float = 0.0,
    generator: torch.Generator | None = None,
    search_dtype: torch.dtype | None = None,
    update_mask: Pattern | str | None = None,
    search: str = "score",
    grid: Grid | str | None = None,
    factors: Grid | str | None = None,
) -> Refined:
    """Refine a pruned matrix, or a stack of them, into sparse + low rank.

    The set that S has to lie in is a mask, or a grid of a few bits, or both.

    Args:
        weight: (m, n) = (out, in) or (batch, m, n), dense, before pruning; never modified.
        mask: bool, same shape, True = kept (a kept weight may well be zero).  It may be that of
            another matrix, say of a model that was fine-tuned from this one: then this is what
            the authors' code does with a reference model, whose weight is `weight`.
        rank: k of the low-rank part, from 1 to min(m, n); with a `grid` also 0.
        iterations: T, at least 1.
        metric: how errors are weighed; ``None`` is ``Identity()``, the paper, data-free.
        solver: ``"fast"`` or ``"exact"``.  (``Gram`` has one solver of its own.)
        schedule: ``"paper"`` (rank ramp), ``"constant"`` (rank k) or ``"accelerated"`` (rank k
            with momentum).
        tolerance: stop once an iteration lowers the error by less than this share of it; 0
            never stops.  Not with ``schedule="paper"``, whose ramp is made for T iterations.
        generator: for the fast solver's random start; one seeded with 0 when ``None``, so
            that equal inputs give equal outputs.
        search_dtype: of the products in all but the fast solver's last steps: ``torch.float32``
            or ``torch.bfloat16`` (sums in float32).  ``None`` takes bfloat16 for matrices
            from 2^20 entries on where the processor multiplies it several times faster; the
            errors agree to about 1e-5 of themselves.
        update_mask: with ``Gram`` only: a pattern, in which the mask is chosen anew; `mask` is
            then where to start, and stays as it is if there is one iteration only.
        search: how: in the first half of the iterations by the ``"score"``, ``|W - B A| √diag(H)``,
            or by ``"admm"`` (:mod:`slr.matrix.admm`) in the first eight ninths, which then are not
            in the trace.
        grid: of the values of S, as ``"int4 by 64"``: see :mod:`slr.matrix.alternation`, which
            takes a dozen rounds at most.  With `update_mask` the mask is chosen first, as if there
            were none.
        factors: with a `grid`: that of B, by columns, and A, by rows, as ``"int8"``.

    Returns:
        :class:`Refined` in the dtype of `weight`, computed in float32 (float64 for float64).
        Its low-rank part is the best rank-k approximation of weight - sparse (for
        ``"fast"`` to solver accuracy).  Without a ramp a last step sets sparse = weight - B A on
        the mask, so that the error is all off the mask.  But for ``Gram`` and grids, its error is
        never above that of :func:`svd_repair`: a fast result that is no better is done again
        exactly, and an exact one gives way to it.  The trace then holds both and is longer than
        `iterations` + 1.

    Raises:
        ValueError: shapes that differ, a rank out of range, non-finite weights, an unknown
            solver or schedule, a metric of another width.
        TypeError: `weight` is not floating point or `mask` not boolean.

    Cost: ``fast`` about 6 T m n (k + 8) FLOPs (accelerated: 8), thrice that for a rank above a
        32nd of the side, and, beside the result, some `BLOCK` floats; ``exact`` T full SVDs, as
        ``fast`` where :func:`~slr.matrix.filled.svd_pays`.  Where singular values are of very
        different size, products are in float64.  ``Gram``: see :func:`slr.matrix.gram.refine_gram`.
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
    check_choice("solver", solver, SOLVERS)
    check_choice("schedule", schedule, SCHEDULES)
    check_count("iterations", iterations)
    check_share("tolerance", tolerance)
    if search_dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"search_dtype is {search_dtype}; it must be float32 or bfloat16")
    grid, factors = as_grid(grid), as_grid(factors)
    _check_grids(grid, factors, mask, rank, solver, schedule, tolerance)
    metric, weight = posed(weight, mask, rank, metric, coded=grid is not None)
    pattern = _check_search(update_mask, search, mask, metric)
    generator = generator or torch.Generator(weight.device).manual_seed(0)
    if grid is not None:
        if pattern is not None:
            mask = refine(
                weight, mask, max(rank, 1), iterations=iterations, metric=metric,
                generator=generator, update_mask=pattern, search=search,
            ).mask  # fmt: skip
        codes = {"factors": factors, "iterations": iterations, "generator": generator}
        return in_units(weight, metric, lambda W, M, _: _by_codes(W, mask, M, rank, grid, **codes))
    assert mask is not None
    if isinstance(metric, Gram):
        limits = {"iterations": iterations, "tolerance": tolerance, "search": search}
        return in_units(
            weight, metric,
            lambda W, M, _: _by_outputs(W, mask, M, rank, pattern, generator, **limits),
        )  # fmt: skip
    if tolerance and schedule == "paper":
        raise ValueError(
            f"tolerance {tolerance:g} has no effect with schedule='paper', whose ramp is run to "
            "its end"
        )
    exact = solver == "exact" or svd_pays(weight, rank)
    return in_units(
        weight, metric,
        lambda W, M, _: _by_weights(
            W, mask, M, rank, exact, generator, search_dtype,
            iterations=iterations, schedule=schedule, tolerance=tolerance,
        ),
    )  # fmt: skip


def _by_codes(
    weight: Tensor, mask: Tensor | None, metric: Metric, rank: int, grid: Grid, **options: Any
) -> Refined:
    """Refine with S on a grid."""
    found = refine_rounded(weight.float(), mask, metric, rank, grid, **options)
    kept = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
    made = assemble(
        weight, kept, (found.B, found.A), found.steps, metric, lambda rows: found.sparse[rows]
    )
    return made._replace(coded=found.coded)


def _by_outputs(
    weight: Tensor, mask: Tensor, metric: Metric, rank: int, update_mask: Pattern | None,
    generator: torch.Generator, **limits: Any,
) -> Refined:  # fmt: skip
    """Refine in the Gram metric."""
    assert isinstance(metric, Gram)
    kept, chosen, low, steps = refine_gram(
        weight.to(working(weight)), mask, metric, rank, generator=generator,
        update_mask=update_mask, **limits,
    )  # fmt: skip
    return assemble(weight, chosen, low, steps, metric, lambda rows: kept[rows])


def _by_weights(
    weight: Tensor, mask: Tensor, metric: Metric, rank: int, exact: bool,
    generator: torch.Generator, search: torch.dtype | None, **limits: Any,
) -> Refined:  # fmt: skip
    """Refine in the other metrics; what is no better than one SVD is done again, exactly."""
    scale, back = scales(metric, weight.new_empty((), dtype=working(weight)))
    filled = Filled(weight, mask, scale, working(weight))
    leading = FullSVD(filled, rank) if exact else Subspace(filled, rank, generator, search)
    if leading.range > RANGE and weight.device.type in ("cpu", "cuda"):  # which have float64
        filled = Filled(weight, mask, scale, torch.float64)
        leading = FullSVD(filled, rank) if exact else Subspace(filled, rank, generator)
    fill, steps = _iterate(leading, rank, **limits)
    B, A = leading.last(fill, rank).factors()
    # In units of the weight again.  Channels of scale 0 keep their weights.
    low = B, A * back
    last = (fill[0], fill[1] * back) if limits["schedule"] == "paper" else low

    def kept(rows: slice) -> Tensor:
        return weight[..., rows, :] - last[0][..., rows, :] @ last[1]

    one_shot, eps = leading.one_shot(rank) * (1 + ROUNDING), torch.finfo(filled.dtype).eps
    del leading, filled  # and their buffers
    refined = assemble(weight, mask, low, steps, metric, kept)
    if refined.error <= one_shot or refined.error <= one_shot + 16 * eps * _size(weight, metric):
        return refined
    if not exact:
        better = _by_weights(weight, mask, metric, rank, True, generator, None, **limits)
    else:
        better = svd_repair(weight, mask, rank, metric)
    return better._replace(trace=(*refined.trace, *better.trace))


def _size(weight: Tensor, metric: Metric) -> float:
    """‖W‖ in a metric."""
    return math.sqrt(sum(metric.error(weight[..., rows, :]) ** 2 for rows in row_blocks(weight)))


def _iterate(
    leading: FullSVD | Subspace, rank: int, iterations: int, schedule: str, tolerance: float
) -> tuple[Factors, list[Step]]:
    """The alternation; returns the last filled-in factors and the steps."""
    paper = schedule == "paper"
    steps: list[Step] = []
    theta = 1.0
    fill: Factors | None = None
    previous: Factors | None = None
    for t, r in enumerate(ramp(rank, iterations) if paper else [rank] * iterations):
        polish = schedule != "accelerated" and t >= iterations - POLISH
        low, error = leading(fill, r, steps=1 + polish)
        steps.append(Step(r, error))
        B, A = low.factors()
        if schedule != "accelerated" or previous is None:
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
        if not paper and settled(steps, tolerance):
            break
    assert fill is not None
    return fill, steps


def _check_search(
    update_mask: Pattern | str | None, search: str, mask: Tensor | None, metric: Metric
) -> Pattern | None:  # fmt: skip
    """The pattern in which the mask is chosen anew, if it is."""
    check_choice("search", search, SEARCHES)
    if update_mask is None:
        if search != "score":
            raise ValueError(f"search={search!r} needs update_mask, a pattern")
        return None
    if not isinstance(metric, Gram):
        raise ValueError("update_mask needs metric=Gram(…)")
    if mask is None:
        raise ValueError("update_mask needs a mask to start from, but mask is None")
    return parse(update_mask)


def _check_grids(
    grid: Grid | None, factors: Grid | None, mask: Tensor | None, rank: int, solver: str,
    schedule: str, tolerance: float,
) -> None:  # fmt: skip
    """Raise ValueError for an option without effect."""
    if grid is None:
        if factors is not None:
            raise ValueError(f"factors={str(factors)!r} has no effect without grid")
        if mask is None:
            raise ValueError("mask is None; give a mask (bool, True where kept), a grid, or both")
        return
    if factors is not None and factors.group is not None:
        raise ValueError(f"factors is {factors}; their grid is of whole rows, as int8")
    if factors is not None and not rank:
        raise ValueError(f"factors={str(factors)!r} has no effect with rank 0; leave it out")
    given = (
        ("solver", solver, "fast"),
        ("schedule", schedule, "paper"),
        ("tolerance", tolerance, 0),
    )
    for name, value, default in given:
        if value != default:
            raise ValueError(f"{name}={value!r} has no effect with a grid; leave it out")
