"""Oracles for :mod:`slr.matrix.rivals`: the papers transcribed literally, slow and plain, float64.

Full SVDs, explicit roots and explicit inverses throughout.  Nothing here guards silent channels.
"""

import torch
from helpers import sparsegpt_slowly
from torch import Tensor


def best_of_rank(M: Tensor, k: int) -> Tensor:
    """[M]_k."""
    U, s, Vh = torch.linalg.svd(M, full_matrices=False)
    s[k:] = 0
    return U @ torch.diag(s) @ Vh


def root_of(H: Tensor) -> Tensor:
    """The symmetric H^½."""
    values, Q = torch.linalg.eigh(H)
    return Q @ torch.diag(values.sqrt()) @ Q.T


def low_rank_for_outputs(R: Tensor, H: Tensor, k: int) -> Tensor:
    """argmin over rank k of ‖(R - L) H^½‖: [R H^½]_k H^-½."""
    root = root_of(H)
    return best_of_rank(R @ root, k) @ torch.linalg.inv(root)


def oats_slowly(W: Tensor, norm: Tensor, pattern, k: int, T: int) -> tuple[Tensor, Tensor]:
    """OATS: S and L after T alternations."""
    D = torch.diag(norm)
    scaled, S = W @ D, torch.zeros_like(W)
    for _ in range(T):
        L = best_of_rank(scaled - S, k)
        S = (scaled - L) * pattern.select((scaled - L).abs())
    return S @ torch.linalg.inv(D), L @ torch.linalg.inv(D)


def slim_slowly(W: Tensor, left: Tensor, mask: Tensor, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """SLiM-LoRA without quantisation: S and L, given what pruning left."""
    error = (W - left) @ torch.diag(x)
    L = best_of_rank(error, k) @ torch.linalg.inv(torch.diag(x))
    S = W - L
    S[~mask] = 0
    return S, L


def hassle_slowly(W: Tensor, H: Tensor, n: int, m: int, k: int, T: int) -> tuple[Tensor, Tensor]:
    """HASSLE-free with SparseGPT for n of every m kept: S and L after T of both steps."""
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    L = torch.zeros_like(W)
    for _ in range(T):
        S = sparsegpt_slowly(W - L, H, n, m)[1]
        L = low_rank_for_outputs(W - S, damped, k)
    return S, L


def basil_slowly(
    W: Tensor, H: Tensor, start: Tensor, pattern, k: int, T: int, settled: float = 0.0003
) -> tuple[Tensor, Tensor, int]:
    """3BASiL from a pruned matrix: S, L refitted to it, and how many rounds it took, T at most.

    Transposed as in its paper: a column for each output.
    """
    H = (
        H
        + 0.005 * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
        + 0.005 * torch.diag(H.diagonal())
    )
    N = torch.diag(H.diagonal().sqrt())
    back = torch.linalg.inv(N)
    Ht = back @ H @ back
    eye = torch.eye(len(H), dtype=H.dtype)
    target, D, rho = N @ W.T, N @ start.T, 0.1
    V, L, before = torch.zeros_like(D), torch.zeros_like(W), D.T != 0
    for t in range(1, T + 1):
        S = torch.linalg.inv(Ht + rho * eye) @ (Ht @ (target - N @ L.T) - V + rho * D)
        Z = S + V / rho
        now = pattern.select(Z.T.abs())
        D = Z * now.T
        V = V + rho * (S - D)
        L = low_rank_for_outputs(W - (back @ S).T, H, k)
        if t % 10 == 0:
            share = float((now != before).sum()) / float(now.sum())
            if share == 0 or (t >= 100 and share < settled):
                break
            rho *= 1.1 if share > 0.1 else 1.05 if share > 0.005 else 1.02
            before = now
    S = (back @ (S * pattern.select(S.T.abs()).T)).T
    return S, low_rank_for_outputs(W - S, H, k), t
