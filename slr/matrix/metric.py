"""How an error E = W - S - B A is weighed.

============ ======================= ==========================================
metric       ‖E‖²                    knows
============ ======================= ==========================================
Identity()   Σ E²                    nothing: the paper's, data-free
Diagonal(d)  Σ E² d_j²               how loud each input channel is
Gram(H)      tr(E H Eᵀ)              all second moments of the inputs, H = X Xᵀ
============ ======================= ==========================================

With H = X Xᵀ / tokens the last is ‖E X‖_F² / tokens, the layer's mean squared output error on
the calibration text; Diagonal is what is left of it when H is taken to be diagonal, with
d = √diag(H).  Book: chapter 8.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from slr.matrix.checks import check_finite, check_number, check_tensor

__all__ = ["Diagonal", "Gram", "Identity", "Metric", "definite", "relative"]


@dataclass(frozen=True)
class Identity:
    """The Frobenius norm: all entries of E (m, n) count alike.  Source: the paper.

    >>> Identity().error(torch.tensor([[3.0, 4.0]]))
    5.0
    """

    def check(self, columns: int) -> None:
        """Fits every matrix."""

    def error(self, E: Tensor) -> float:
        """‖E‖_F of E (m, n)."""
        return float(E.double().norm())


@dataclass(frozen=True, eq=False)
class Diagonal:
    """Each input channel j weighed by `scale[j]`: ‖E diag(scale)‖_F.

    Args:
        scale: (n,), non-negative, not all zero; for example activation norms.  Channels of
            scale 0 never carry a signal: nothing is asked of them.

    >>> Diagonal(torch.tensor([1.0, 0.0])).error(torch.tensor([[3.0, 4.0]]))
    3.0
    """

    scale: Tensor

    def __post_init__(self) -> None:
        check_tensor("scale", self.scale)
        if self.scale.ndim != 1:
            raise ValueError(f"scale has shape {tuple(self.scale.shape)}; it must be (inputs,)")
        check_finite("scale", self.scale)
        if bool((self.scale < 0).any()) or not bool(self.scale.any()):
            raise ValueError("scale must be non-negative and not all zero")

    def check(self, columns: int) -> None:
        """Raise ValueError unless the weight has as many columns as `scale` entries."""
        if self.scale.shape[0] != columns:
            have = self.scale.shape[0]
            raise ValueError(f"scale has {have} entries, but the weight has {columns} columns")

    def error(self, E: Tensor) -> float:
        """‖E diag(scale)‖_F of E (m, n)."""
        return float((E.double() * self.scale.to(E.device).double()).norm())


@dataclass(frozen=True, eq=False)
class Gram:
    """All second moments of the inputs: √tr(E H Eᵀ).

    Args:
        matrix: H, the Hessian of the layer's squared output error, (n, n), symmetric positive
            semidefinite, as :class:`slr.GramStatistic` gives it.
        damping: `damping` · mean(diag H) is added to the diagonal where H is inverted or solved
            with, against overfitting to the calibration text; the error itself is undamped.

    Raises:
        ValueError: not square, not symmetric, non-finite, a negative diagonal or all zero.

    >>> H = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    >>> Gram(H).error(torch.tensor([[3.0, 2.0]]))
    5.0
    """

    matrix: Tensor
    damping: float = 0.01

    def __post_init__(self) -> None:
        H = self.matrix
        check_tensor("gram", H)
        check_number("damping", self.damping)
        if H.ndim != 2 or H.shape[0] != H.shape[1]:
            raise ValueError(f"gram has shape {tuple(H.shape)}; it must be (inputs, inputs)")
        check_finite("gram", H)
        if not self.damping > 0:
            raise ValueError(f"damping is {self.damping}; it must be above 0")
        diagonal = H.diagonal()
        if bool((diagonal < 0).any()) or not bool(diagonal.any()):
            raise ValueError("gram must have a non-negative diagonal that is not all zero")
        atol = 1e-4 * float(diagonal.max())
        for low in range(0, len(H), 256):  # without copies of the size of H
            rows = slice(low, low + 256)
            if torch.allclose(H[rows], H.T[rows], rtol=1e-3, atol=atol):
                continue
            raise ValueError("gram is not symmetric")

    def check(self, columns: int) -> None:
        """Raise ValueError unless the weight has as many columns as H."""
        if self.matrix.shape[0] != columns:
            raise ValueError(
                f"gram is {self.matrix.shape[0]} wide, but the weight has {columns} columns"
            )

    def error(self, E: Tensor) -> float:
        """√tr(E H Eᵀ) of E (m, n), H undamped; summed in float64."""
        E = E if E.dtype == torch.float64 else E.float()
        return float(((E @ self.matrix.to(E)) * E).sum(dtype=torch.float64).clamp_min(0).sqrt())

    def damped(self, like: Tensor) -> Tensor:
        """H + damping · mean(diag H) · I in the dtype and on the device of `like`."""
        H = self.matrix.to(like.device, like.dtype).clone()
        H.diagonal().add_(self.damping * H.diagonal().mean())
        return H


Metric = Identity | Diagonal | Gram


def relative(error: float, size: float) -> float:
    """An error as a share of the size of what it is of; both zero or above.

    Of something of size zero it is 0 if there is no error and 1 if there is one.

    Cost: none.

    >>> relative(1.0, 2.0), relative(0.0, 0.0), relative(3.0, 0.0)
    (0.5, 0.0, 1.0)
    """
    if size < 1e-300:  # a quotient might overflow
        return float(error > 0)
    return error / size


def definite(matrix: Tensor, what: str = "gram") -> tuple[Tensor, Tensor]:
    """A positive definite matrix and its factor; more damping, with a warning, if it is not.

    Args:
        matrix: (n, n), symmetric; already damped once.
        what: its name, for messages.

    Returns:
        The matrix, damped more if it had to be, and its lower Cholesky factor.

    Raises:
        ValueError: indefinite even with its whole mean diagonal added.

    Cost: n³/3 FLOPs.  Source: the damping of GPTQ and SparseGPT, made to say what it does.

    >>> H, C = definite(torch.tensor([[4.0, 2.0], [2.0, 5.0]]))
    >>> print(C)
    tensor([[2., 0.],
            [1., 2.]])
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    if not info:
        return matrix, factor
    mean = matrix.diagonal().mean()
    for share in (1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        more = matrix.clone()
        more.diagonal().add_(share * mean)
        factor, info = torch.linalg.cholesky_ex(more)
        if not info:
            warnings.warn(
                f"{what} is not positive definite; damped by {share:g} more of its mean diagonal",
                RuntimeWarning,
                stacklevel=2,
            )
            return more, factor
    raise ValueError(f"{what} is indefinite: no damping up to its mean diagonal mends it")
