"""The mask of S + B A by the alternating direction method of multipliers, in the outputs' metric.

Choosing which entries stay is the hard part of pruning: the best mask is a matter of all entries
of a row at once, for what one entry's going costs depends on which others are there to make up for
it.  ADMM splits S in two: one that is free and fits the outputs, and one, D, that has the pattern,
with a penalty ρ on their difference and a running sum u of it.  In units of the inputs' loudness,
W ← W diag(√H_jj) and H with a diagonal of ones, a round is

    S ← M + ρ (D - u - M) (H + ρ I)⁻¹,  M = W - B A        argmin ‖(M - S) H^½‖² + ρ ‖S - D + u‖²
    D ← the largest entries of S + u                         projection on the pattern
    u ← u + S - D
    B A ← towards the best rank-k part of W - S              one block power step

With a small ρ the mask moves freely, with a large one it settles; ρ grows from 0.1 to 0.8, which
are shares of a diagonal of ones, so that it fits layers of any units.  The inverse is computed anew
`STAGES` times only.  What it ends with is nearly settled: exact swaps of a kept and a pruned entry
of a group lower the error by another thousandth, more rounds by several hundredths.

Book: chapter 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slr.matrix.filled import OVERSAMPLING, WARMUP
from slr.matrix.patterns import Pattern

__all__ = ["choose_mask"]

FIRST, LAST = 0.1, 0.8  # ρ: nothing settles below; nothing moves any more above
STAGES = 6  # values of ρ


def choose_mask(
    weight: Tensor,
    H: Tensor,
    mask: Tensor,
    pattern: Pattern,
    rank: int,
    *,
    rounds: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """The support of S in a pattern such that S + B A is near W in the metric of H.

    Args:
        weight: W, (m, n), float32 or float64.
        H: second moments of the inputs, (n, n), positive definite (damped).
        mask: bool (m, n), where to start.
        pattern: of the mask.
        rank: k of the low-rank part that goes with it.
        rounds: of ADMM; more find better masks, each doubling less so.
        generator: for the start of the power iteration.

    Returns:
        S (m, n), zero off the mask; its mask; and U (m, q), whose first columns B is made of:
        where :func:`slr.matrix.gram.refine_gram` goes on.

    Cost: a round takes 2 m n² + 10 m n q + 2 n² q FLOPs, q = k + 8, and some passes; `STAGES`
        times 2 n³; five matrices of the size of W and two of the size of H.
    Source: the splitting of ALPS (Meng et al. 2024) and, with a low-rank part, 3BASiL
        (Makni et al. 2025); the schedule of ρ is ours.

    >>> from slr.matrix.patterns import NM
    >>> W, H = torch.tensor([[2.0, 1.9, 0.1, 0.1]]), torch.eye(4)
    >>> H[0, 1] = H[1, 0] = 0.9  # the first two say nearly the same
    >>> S, mask, _ = choose_mask(
    ...     W.repeat(8, 1), H, W.repeat(8, 1) > 1, NM(1, 2), 1, rounds=12,
    ...     generator=torch.Generator().manual_seed(0),
    ... )
    >>> mask.sum(1).tolist() == [2] * 8
    True
    """
    loud = H.diagonal().sqrt()
    unit = H / loud / loud[:, None]
    W = weight * loud
    m, n = W.shape
    U = torch.randn(
        m, min(rank + OVERSAMPLING, m, n), generator=generator, device=W.device, dtype=W.dtype
    )
    D, u = W * mask, torch.zeros_like(W)
    rest = W - D
    for _ in range(WARMUP):
        U, B, A = _leading(rest, unit, U, rank)
    penalty, inverse = 0.0, unit
    stages = min(STAGES, rounds)
    for turn in range(rounds):
        stage = turn * stages // rounds
        rho = FIRST * (LAST / FIRST) ** (stage / max(1, stages - 1))
        if rho != penalty:
            u.mul_(penalty / rho)  # it is in units of 1/ρ
            penalty, inverse = rho, _inverse(unit, rho)
        M = torch.addmm(W, B, A, alpha=-1)
        S = torch.addmm(M, D.sub_(u).sub_(M), inverse, alpha=rho)
        torch.sub(W, S, out=rest)
        target = S.add_(u)
        mask = pattern.chosen(target.abs())
        D = target * mask
        u = target.sub_(D)
        U, B, A = _leading(rest, unit, U, rank)
    return D / loud, mask, U


def _leading(rest: Tensor, H: Tensor, U: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The next U (m, q) of the block power step for R H Rᵀ, and B A of rank k from it."""
    U = torch.linalg.qr(rest @ (H @ (rest.T @ U)))[0]
    A = rest.T @ U
    vectors = torch.linalg.eigh(A.T @ (H @ A))[1].flip(1)
    U = U @ vectors
    return U, U[:, :rank], (A @ vectors[:, :rank]).T


def _inverse(H: Tensor, penalty: float) -> Tensor:
    """(H + ρ I)⁻¹."""
    damped = H.clone()
    damped.diagonal().add_(penalty)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))
