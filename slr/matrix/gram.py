"""Refinement that looks at activations: least error on the layer's *outputs*.

The error is tr(E H Eᵀ), E = W - S - B A, with H the second moments of the inputs.  Two steps
alternate, and each is the exact minimiser in one unknown or goes towards it:

- given S, with R = W - S and H = C Cᵀ: B A = U Uᵀ R, where U are the leading left singular
  vectors of R C, that is the leading eigenvectors of R H Rᵀ;
- given B A, with T = W - B A: each row of S is a least-squares problem on its kept entries,
  S ← argmin over the mask of tr((T - S) H (T - S)ᵀ), by preconditioned conjugate gradients.

Neither needs a factor of H: U is warm-started from round to round and improved by one block power
step, and the gradient iteration starts from the last S.  This goes beyond the paper; HASSLE-free
and 3BASiL minimise the same objective by other means.  The first half is EoRA's repair, the second
is what SparseGPT approximates.  The mask may be chosen anew: between the two, by the score of Wanda
on what the low-rank part leaves, or before them, by :mod:`slr.matrix.admm`.  Book: chapter 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slr.matrix.admm import choose_mask
from slr.matrix.checks import check_rank
from slr.matrix.filled import OVERSAMPLING, WARMUP, Factors
from slr.matrix.metric import Gram, definite
from slr.matrix.patterns import Pattern
from slr.matrix.result import Step, settled

__all__ = ["aimed", "best_low_rank", "masked_least_squares", "refine_gram"]

GRADIENT_STEPS = 4  # of conjugate gradients in a round
RIDGE = 1.0  # of an aim, in means of the diagonal of H: a tenth of it fits the text too well
SEARCH = 8  # rounds of ADMM to one of the alternation: each takes a fourth as long
REFRESH = 10  # rounds after which (W - S) H is computed anew, for rounding adds up


def aimed(weight: Tensor, metric: Gram, lacking: Tensor) -> Tensor:
    """The matrix whose outputs on the same inputs come near to what they should be.

    That is argmin over V of ‖V X - (W X + Y)‖² / tokens + λ ‖V - W‖², W + Y Xᵀ (X Xᵀ + λ I)⁻¹:
    what to refine instead of W where earlier layers have made an error of the inputs X.

    Args:
        weight: W, (m, n).
        metric: H = X Xᵀ / tokens; λ is `RIDGE` means of its diagonal.
        lacking: Y Xᵀ / tokens, (m, n).

    Returns:
        V (m, n), in the dtype of W.

    Cost: n³/3 + 2 m n² FLOPs.  Source: GPTAQ (Li et al. 2025), for the inputs; the ridge, and
        that Y may hold the error of a residual stream, are ours.

    >>> V = aimed(torch.eye(2), Gram(torch.eye(2)), torch.ones(2, 2))
    >>> print(V)
    tensor([[1.5000, 0.5000],
            [0.5000, 1.5000]])
    """
    H = metric.matrix.to(weight.device, torch.float32).clone()
    H.diagonal().add_(RIDGE * H.diagonal().mean())
    shift = torch.cholesky_solve(lacking.to(H).T, definite(H)[1]).T
    return (weight.float() + shift).to(weight.dtype)


def best_low_rank(rest: Tensor, metric: Gram, rank: int) -> tuple[Tensor, Tensor]:
    """The B A of rank k that minimises tr((R - B A) H (R - B A)ᵀ), exactly.

    Args:
        rest: R = W - S, (m, n).
        metric: H, damped before it is factored.
        rank: from 1 to min(m, n).

    Returns:
        B (m, k) with orthonormal columns, and A = Bᵀ R (k, n).

    Raises:
        ValueError: a rank out of range, or an indefinite H.

    Cost: a Cholesky factor of H and an SVD of (m, n).  Source: EoRA, in other words.

    >>> R = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    >>> B, A = best_low_rank(R, Gram(torch.diag(torch.tensor([100.0, 1.0]))), 1)
    >>> print((B @ A).round(decimals=4).abs())
    tensor([[2., 0.],
            [0., 0.]])
    """
    check_rank(rank, rest.shape)
    factor = definite(metric.damped(rest))[1]
    U = torch.linalg.svd(rest @ factor, full_matrices=False)[0][:, :rank]
    return U, U.T @ rest


def masked_least_squares(
    target: Tensor, mask: Tensor, H: Tensor, start: Tensor, steps: int
) -> Tensor:
    """Towards argmin over S on the mask of tr((T - S) H (T - S)ᵀ), all rows at once.

    Conjugate gradients with the diagonal of H as preconditioner; no step raises the error.

    Args:
        target: T, (m, n).
        mask: bool (m, n).
        H: (n, n), positive definite.
        start: S to start from, zero off the mask.
        steps: at least 1; n of them would be exact.

    Returns:
        S (m, n), zero off the mask.

    Cost: 2 (steps + 1) m n² FLOPs.
    Source: conjugate gradients of Hestenes and Stiefel 1952, Jacobi preconditioner.

    >>> H = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> T, P = torch.tensor([[1.0, 1.0]]), torch.tensor([[True, False]])
    >>> print(masked_least_squares(T, P, H, torch.zeros(1, 2), 1))  # 1 + 1/2 makes up for the other
    tensor([[1.5000, 0.0000]])
    """
    S = start.clone()
    _descend(S, (target - S) @ H, mask, H, steps)
    return S


def _descend(S: Tensor, image: Tensor, mask: Tensor, H: Tensor, steps: int) -> None:
    """The steps, in place; `image` is (T - S) H, all of it, and stays so."""
    inverse = 1 / H.diagonal()
    gradient = image * mask
    direction = gradient * inverse
    power = (gradient * direction).sum(1, keepdim=True)
    for step in range(steps):
        product = direction @ H
        curvature = (direction * product).sum(1, keepdim=True)
        size = torch.where(curvature > 0, power / curvature.clamp_min(1e-38), 0)
        S.addcmul_(size, direction)
        image.addcmul_(size, product, value=-1)
        if step + 1 == steps:
            break
        gradient = torch.mul(image, mask, out=product)
        conditioned = gradient * inverse
        following = (gradient * conditioned).sum(1, keepdim=True)
        share = torch.where(power > 0, following / power.clamp_min(1e-38), 0)
        direction = torch.addcmul(conditioned, share, direction, out=conditioned)
        power = following


def refine_gram(
    work: Tensor,
    mask: Tensor,
    metric: Gram,
    rank: int,
    *,
    iterations: int,
    tolerance: float,
    generator: torch.Generator,
    update_mask: Pattern | None = None,
    search: str = "score",
) -> tuple[Tensor, Tensor, Factors, list[Step]]:
    """The alternation; :func:`slr.refine` is its public face and says what the arguments are.

    Returns:
        S (m, n), its mask, B (m, k) and A (k, n), and the steps, whose errors are in the damped
        metric.

    Cost: a round takes 2 GRADIENT_STEPS m n² + 12 m n q FLOPs, q = k + 8, and a few matrices of the
        size of W; one of ADMM 2 m n² + 10 m n q.

    >>> W, H = torch.tensor([[2.0, 1.0]]), torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> S, mask, (B, A), steps = refine_gram(
    ...     W, torch.tensor([[True, False]]), Gram(H), 1, iterations=3, tolerance=0.0,
    ...     generator=torch.Generator().manual_seed(0),
    ... )
    >>> bool((S + B @ A - W).norm() < 1e-5)  # rank 1 is all of a single row
    True
    """
    H = definite(metric.damped(work))[0]
    # One scale for all of H: products stay in range in float32 whatever its units.
    unit = H.diagonal().mean()
    H.div_(unit)  # our own copy
    if update_mask is not None and search == "admm":
        rounds = iterations * SEARCH // (SEARCH + 1)
        S, mask, U = choose_mask(
            work, H, mask, update_mask, rank, rounds=rounds, generator=generator
        )  # fmt: skip
        iterations, update_mask = iterations - rounds, None
    else:
        m, n = work.shape
        width = min(rank + OVERSAMPLING, m, n)
        U = torch.randn(m, width, generator=generator, device=work.device, dtype=work.dtype)
        S = work * mask
    image = (work - S) @ H  # (W - S) H follows S; only the descent multiplies by H
    _descend(S, image, mask, H, GRADIENT_STEPS)
    loudness = H.diagonal().sqrt()
    steps: list[Step] = []
    for turn in range(iterations):
        R = work - S
        if turn and turn % REFRESH == 0:
            torch.matmul(R, H, out=image)
        for _ in range(WARMUP if turn == 0 else 1):
            U = torch.linalg.qr(image @ (R.T @ U))[0]
        A, AH = R.T @ U, image.T @ U
        vectors = torch.linalg.eigh(A.T @ AH)[1].flip(1)
        U, A, AH = U @ vectors, (A @ vectors).T, (AH @ vectors).T
        B, A, AH = U[:, :rank], A[:rank], AH[:rank]
        if update_mask is not None and turn < iterations // 2:
            target = torch.addmm(work, B, A, alpha=-1)
            mask = update_mask.chosen(target.abs() * loudness)
            S = torch.where(mask & (S != 0), S, target * mask)
            torch.matmul(work - S, H, out=image)
        image.addmm_(B, AH, alpha=-1)  # now (W - B A - S) H
        _descend(S, image, mask, H, GRADIENT_STEPS)
        rest = torch.addmm(work, B, A, alpha=-1).sub_(S)
        error = rest.mul_(image).sum(dtype=torch.float64).clamp_min(0) * unit
        image.addmm_(B, AH)
        steps.append(Step(rank, float(error.sqrt())))
        if settled(steps, tolerance):
            break
    return S, mask, (B, A), steps
