"""The exact low-rank step that all rivals share, without an SVD of the whole matrix.

The best B A of rank k for a rest R in the metric of F Fᵀ is U Uᵀ R, where U are the leading left
singular vectors of the image R F.  They are eigenvectors of the smaller of its two Gram matrices,
in float64, where squaring does no harm.  Book: chapter 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["leading", "projected"]


def leading(image: Tensor, rank: int) -> Tensor:
    """Orthonormal leading left singular vectors.

    Args:
        image: M, (m, n).
        rank: k, from 1 to min(m, n).

    Returns:
        U (m, k) such that U Uᵀ M is the best rank-k approximation of M, also where M has a lower
        rank than that.

    Cost: 2 m n q + O(q³) FLOPs in float64, q = min(m, n).

    >>> U = leading(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 5.0]]), 1)
    >>> print(U.abs())
    tensor([[0.],
            [1.]])
    """
    wide = image.double()
    m, n = wide.shape
    if m <= n:
        U = torch.linalg.eigh(wide @ wide.T)[1][:, -rank:].flip(1)
    else:
        V = torch.linalg.eigh(wide.T @ wide)[1][:, -rank:].flip(1)
        U = torch.linalg.qr(wide @ V)[0]
    return U.to(image.dtype)


def projected(rest: Tensor, image: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best B A of rank k for a rest R, given its image R F.

    Args:
        rest: R = W - S, (m, n).
        image: R F, (m, n), where H = F Fᵀ is the metric.
        rank: k.

    Returns:
        B (m, k) with orthonormal columns, A = Bᵀ R (k, n), and the error ‖(R - B A) F‖.

    Cost: that of :func:`leading`, and 6 m n k FLOPs.

    >>> R = torch.diag(torch.tensor([4.0, 3.0]))
    >>> B, A, error = projected(R, R, 1)
    >>> print((B @ A).round(decimals=4), round(error, 4))
    tensor([[4., 0.],
            [0., 0.]]) 3.0
    """
    B = leading(image, rank)
    error = (image - B @ (B.T @ image)).square().sum(dtype=torch.float64).sqrt()
    return B, B.T @ rest, float(error)
