"""The best rank-k approximation of a matrix: exactly, or by one step of subspace iteration.

Eckart and Young: among all matrices of rank k, U_k Σ_k V_kᵀ from the singular value
decomposition is nearest to L in Frobenius norm, at distance √(Σ_{i>k} σ_i²).

:func:`truncated_svd` computes it.  :func:`ritz` improves a guess V of the leading right
singular vectors by one block power step; when L changes little from call to call, as in
refinement, that is all it takes.  Book: chapters 4 and 7.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slr.matrix.checks import check_matrix, check_rank

__all__ = ["LowRank", "ritz", "shrink", "truncated_svd"]


class LowRank(NamedTuple):
    """Leading singular triplets: `U` (…, m, r), `s` (…, r) descending, `V` (…, n, r).

    A triplet that the matrix does not have (its rank is lower) is zero.
    """

    U: Tensor
    s: Tensor
    V: Tensor

    def truncate(self, rank: int) -> LowRank:
        """The first `rank` triplets."""
        return LowRank(self.U[..., :rank], self.s[..., :rank], self.V[..., :rank])

    def factors(self) -> tuple[Tensor, Tensor]:
        """B = U Σ (…, m, r) and A = Vᵀ (…, r, n), so that B A is the approximation."""
        return self.U * self.s.unsqueeze(-2), self.V.mT


def truncated_svd(matrix: Tensor, rank: int) -> LowRank:
    """The best rank-`rank` approximation, from a full SVD.

    Args:
        matrix: (…, m, n), finite; computed in its own dtype, float32 at least.
        rank: from 1 to min(m, n).

    Raises:
        ValueError, TypeError: not a finite floating-point matrix, or a rank out of range.

    Cost: O(m n min(m, n)).  Source: Eckart and Young 1936.

    >>> L = truncated_svd(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 2)
    >>> print(L.s)
    tensor([3., 2.])
    """
    check_matrix("matrix", matrix, batch=True)
    check_rank(rank, matrix.shape[-2:])
    work = matrix if matrix.dtype == torch.float64 else matrix.float()
    U, s, Vh = torch.linalg.svd(work, full_matrices=False)
    return LowRank(U, s, Vh.mT).truncate(rank)


def shrink(matrix: Tensor, threshold: float) -> Tensor:
    """U max(Σ - threshold, 0) Vᵀ: the proximal step of `threshold` times the nuclear norm.

    Only the eigenvectors of the smaller of M Mᵀ and Mᵀ M are needed, for
    U max(1 - threshold / Σ, 0) Uᵀ M is the same; in float64, where squaring does no harm.

    Args:
        matrix: M, (m, n).
        threshold: positive.

    Cost: 2 m n q + O(q³) FLOPs in float64, q = min(m, n), a third or less of an SVD's time.
    Source: Cai, Candès and Shen 2010 (singular value thresholding).

    >>> print(shrink(torch.diag(torch.tensor([3.0, 0.5])), 1.0))
    tensor([[2., 0.],
            [0., 0.]])
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    double = wide.double()
    squares, U = torch.linalg.eigh(double @ double.T)
    sigma = squares.clamp_min(0).sqrt()
    kept = sigma > threshold
    U = U[:, kept]
    low = (U * (1 - threshold / sigma[kept])).to(wide.dtype) @ (U.T.to(wide.dtype) @ wide)
    return low if wide is matrix else low.T


def ritz(Y: Tensor, Z: Tensor) -> LowRank:
    """Singular triplets of L within the range of Y, from Y = L V and Z = Lᵀ Y.

    With Q an orthonormal basis of range(Y), these are the triplets of Q Qᵀ L, the part of L
    that one block power step has found.  Neither L nor Q is needed: with
    YᵀY = E diag(d) Eᵀ, Q = Y E d^(-1/2) and Lᵀ Q = Z E d^(-1/2).

    Args:
        Y: (…, m, q) = L V.
        Z: (…, n, q) = Lᵀ Y.

    Returns:
        q triplets, the last ones zero when Y has lower rank; U and V orthonormal to about 1e-6.

    Cost: O((m + n) q²); q×q work in float64, where squaring the condition number is harmless.
    Source: Rayleigh-Ritz for singular triplets; Halko, Martinsson and Tropp 2011, section 5.

    >>> L = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    >>> Y = L @ torch.eye(3)[:, :2]
    >>> print(ritz(Y, L.T @ Y).s)
    tensor([3., 2.])
    """
    floor = 10 * torch.finfo(Y.dtype).eps
    # V came from the last step, so the columns of Y are nearly orthogonal but of very different
    # length: at unit length their Gram matrix is well conditioned.
    wide = Y.double()
    gram = wide.mT @ wide
    length = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    scale = _inverse(length, length > 0)
    d, E = torch.linalg.eigh(gram * scale.unsqueeze(-1) * scale.unsqueeze(-2))
    # Y @ white is orthonormal, but for zero columns where Y had none to give.
    there = d > floor * d.shape[-1]
    white = scale.unsqueeze(-1) * E * _inverse(d.clamp_min(0).sqrt(), there).unsqueeze(-2)
    squares, F = torch.linalg.eigh(white.mT @ (Z.mT @ Z).double() @ white)
    s = squares.flip(-1).clamp_min(0).sqrt()
    kept = s > floor * s[..., :1]
    rotation = (white @ F.flip(-1)) * kept.unsqueeze(-2)
    U = Y @ rotation.to(Y.dtype)
    V = Z @ (rotation * _inverse(s, kept).unsqueeze(-2)).to(Y.dtype)
    return LowRank(U, (s * kept).to(Y.dtype), V)


def _inverse(values: Tensor, where: Tensor) -> Tensor:
    """1 / values where told, else 0."""
    return where / torch.where(where, values, 1.0)
