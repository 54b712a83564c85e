"""Oracles: papers transcribed literally, slow and plain, and random problems to try them on."""

import torch
from torch import Tensor


def algorithm_1(W: Tensor, P: Tensor, k: int, T: int) -> tuple[Tensor, Tensor, Tensor]:
    """Targeted Low-rank Refinement, Algorithm 1, line by line, with full SVDs.

    Returns S_T and the factors B = U_k Σ_k, A = V_kᵀ of the rank-k truncation of L_T.
    """
    S = W * P
    for t in range(T):
        L = W - S
        U, sigma, Vh = torch.linalg.svd(L, full_matrices=False)
        r = 1 + (k - 1) * t // (T - 1) if T > 1 else k
        S = S + P * (U[:, r:] @ torch.diag(sigma[r:]) @ Vh[r:])
    L = W - S
    U, sigma, Vh = torch.linalg.svd(L, full_matrices=False)
    return S, U[:, :k] * sigma[:k], Vh[:k]


def constant_rank(W: Tensor, P: Tensor, k: int, T: int) -> tuple[Tensor, Tensor]:
    """Algorithm 1 without its ramp: rank k in each of T iterations, with full SVDs.

    Returns S and M = [W - S_T]_k, S being W - M on the mask.
    """
    S = W * P
    for _ in range(T + 1):
        U, sigma, Vh = torch.linalg.svd(W - S, full_matrices=False)
        M = U[:, :k] @ torch.diag(sigma[:k]) @ Vh[:k]
        S = P * (W - M)
    return S, M


def select_slowly(scores: Tensor, n: int, m: int) -> Tensor:
    """n kept of every m, one group at a time with sorted(); of equals the later one stays."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for i in range(scores.shape[0]):
        for start in range(0, scores.shape[1], m):
            group = sorted(range(start, start + m), key=lambda j: (float(scores[i, j]), j))
            mask[i, group[m - n :]] = True
    return mask


def realistic(m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A matrix with decaying spectrum and heavy-tailed entries, like a trained weight."""
    g = torch.Generator().manual_seed(seed)
    k = min(m, n)
    U = torch.linalg.qr(torch.randn(m, k, generator=g))[0]
    V = torch.linalg.qr(torch.randn(n, k, generator=g))[0]
    smooth = (U * torch.arange(1, k + 1) ** -0.6) @ V.T
    noise = torch.randn(m, n, generator=g) * torch.randn(m, n, generator=g).abs()
    return (smooth + 0.3 * smooth.std() * noise).to(dtype)


def sparsegpt_slowly(W: Tensor, H: Tensor, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """SparseGPT for n of every m kept, one column at a time in float64, blocks left out.

    Returns the mask, the updated weight, and the rows in which no decision was close: in the
    others a rounding may decide otherwise, and every later column of the row follows.
    """
    W, H = W.double().clone(), H.double().clone()
    H += 0.01 * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    U = torch.linalg.cholesky(torch.linalg.inv(H)).T
    mask = torch.ones_like(W, dtype=torch.bool)
    clear = torch.ones(len(W), dtype=torch.bool)
    for i in range(W.shape[1]):
        if i % m == 0:
            scores = W[:, i : i + m] ** 2 / U.diagonal()[i : i + m] ** 2
            mask[:, i : i + m] = select_slowly(scores, n, m)
            ranked = scores.sort(dim=1).values
            clear &= ranked[:, m - n - 1] < (1 - 1e-3) * ranked[:, m - n]
        error = W[:, i] * ~mask[:, i] / U[i, i]
        W[:, i:] -= torch.outer(error, U[i, i:])
    return mask, W * mask, clear


def activations(tokens: int, n: int, seed: int = 0) -> Tensor:
    """Correlated inputs (tokens, n), some channels loud."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=g) / n**0.5 + torch.eye(n)
    loud = torch.rand(n, generator=g).exp() ** 2
    return torch.randn(tokens, n, generator=g) @ mix * loud


def admm_slowly(
    W: Tensor, H: Tensor, mask: Tensor, pattern, k: int, penalties: list[float]
) -> tuple[Tensor, Tensor]:
    """ADMM for S + B A as 3BASiL's paper writes it, one ρ for each round; D and its mask.

    With a running sum V = ρ u, one solve a round, and exact low-rank steps.
    """
    N = torch.diag(H.diagonal().sqrt())
    Hn = torch.linalg.inv(N) @ H @ torch.linalg.inv(N)
    root = torch.linalg.cholesky(Hn)
    Wn, V = W @ N, torch.zeros_like(W)
    D = Wn * mask

    def low(rest: Tensor) -> Tensor:
        U, s, Vh = torch.linalg.svd(rest @ root, full_matrices=False)
        return U[:, :k] @ torch.diag(s[:k]) @ Vh[:k] @ torch.linalg.inv(root)

    BA = low(Wn - D)
    for rho in penalties:
        left = (Wn - BA) @ Hn - V + rho * D
        S = torch.linalg.solve(Hn + rho * torch.eye(len(H), dtype=H.dtype), left.T).T
        mask = pattern.select((S + V / rho).abs())
        D = (S + V / rho) * mask
        V = V + rho * (S - D)
        BA = low(Wn - S)
    return D @ torch.linalg.inv(N), mask
