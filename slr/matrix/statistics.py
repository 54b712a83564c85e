"""What pruning and refinement need to know of a layer's inputs, summed over batches.

All statistics add up in float64 on the CPU or float32 on a GPU, whatever the dtype of the
activations, and two of the same kind can be merged: by :meth:`merge` within a process, by
:meth:`all_reduce` across processes.  Book: chapter 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["CrossStatistic", "GramStatistic", "NormStatistic"]

TILE = 256  # columns of a product: what lies below the diagonal tiles is not computed


class _Statistic:
    """A sum over tokens, and their number."""

    def __init__(self, total: Tensor) -> None:
        self.total = total
        self.tokens = 0

    def merge(self, other: _Statistic) -> None:
        """Add what `other`, of the same kind and width, has seen.

        Raises:
            ValueError: another kind or width.
        """
        if type(other) is not type(self) or other.total.shape != self.total.shape:
            raise ValueError(
                f"cannot merge {type(other).__name__} of shape {tuple(other.total.shape)} "
                f"into {type(self).__name__} of shape {tuple(self.total.shape)}"
            )
        self.total += other.total.to(self.total)
        self.tokens += other.tokens

    def all_reduce(self) -> None:
        """Sum over all processes of the default torch.distributed group."""
        count = torch.tensor(float(self.tokens), dtype=torch.float64, device=self.total.device)
        torch.distributed.all_reduce(self.total)
        torch.distributed.all_reduce(count)
        self.tokens = int(count)

    def _rows(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.total.shape[-1]:
            raise ValueError(f"activations are {x.shape[-1]} wide, not {self.total.shape[-1]}")
        rows = x.detach().reshape(-1, x.shape[-1])
        self.tokens += rows.shape[0]
        return rows.to(self.total.device, torch.float32)


def _accumulator(shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    dtype = torch.float64 if torch.device(device).type == "cpu" else torch.float32
    return torch.zeros(shape, dtype=dtype, device=device)


class NormStatistic(_Statistic):
    """2-norm of each input channel, ‖X[j]‖₂ over all tokens.

    Args:
        channels: n.
        device: where to add up.

    Raises:
        ValueError: activations of another width, in :meth:`update`.

    Cost: 2 n FLOPs a token.  Source: Sun et al. 2024 (Wanda), section 3.

    >>> norm = NormStatistic(2)
    >>> norm.update(torch.tensor([[3.0, 1.0], [4.0, 0.0]]))
    >>> print(norm.norm())
    tensor([5., 1.])
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        super().__init__(_accumulator((channels,), device))

    def update(self, x: Tensor) -> None:
        """Add activations (…, n).  Cost: 2 n FLOPs a token."""
        self.total += self._rows(x).square().sum(0, dtype=self.total.dtype)

    def norm(self) -> Tensor:
        """‖X[j]‖₂, (n,) float32."""
        return self.total.sqrt().float()


class GramStatistic(_Statistic):
    """H = X Xᵀ / tokens, the second moments of the inputs.

    Args:
        channels: n.
        device: where to add up.

    Raises:
        ValueError: activations of another width, in :meth:`update`.

    Cost: n² FLOPs a token for wide inputs, n² numbers.
    Source: Hassibi and Stork 1993 (H of a linear layer).

    >>> gram = GramStatistic(2)
    >>> gram.update(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    >>> print(gram.gram())
    tensor([[5., 1.],
            [1., 2.]])
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        super().__init__(_accumulator((channels, channels), device))

    def update(self, x: Tensor) -> None:
        """Add activations (…, n).  Cost: n (n + TILE) FLOPs a token, in float32 in a batch."""
        rows = self._rows(x)
        for low in range(0, rows.shape[1], TILE):  # upper triangle: H is symmetric
            right = rows[:, low:]
            self.total[low : low + TILE, low:] += right[:, :TILE].T @ right

    def gram(self) -> Tensor:
        """H, (n, n) float32, symmetric.

        Raises:
            ValueError: nothing was added yet.
        """
        if not self.tokens:
            raise ValueError("no activations were added")
        upper = self.total.float().div_(self.tokens).triu_()
        return upper + upper.triu(1).T

    def norm(self) -> Tensor:
        """‖X[j]‖₂, (n,) float32: what :class:`NormStatistic` gives."""
        return self.total.diagonal().sqrt().float()


class CrossStatistic(_Statistic):
    """Y Xᵀ / tokens: how what an output lacks goes with the inputs.

    Args:
        wanted: m, channels of Y.
        channels: n, channels of X.
        device: where to add up.

    Raises:
        ValueError: activations of another width, or other tokens, in :meth:`update`.

    Cost: 2 m n FLOPs a token.  Source: the asymmetric calibration of GPTAQ (Li et al. 2025).

    >>> cross = CrossStatistic(1, 2)
    >>> cross.update(torch.tensor([[2.0], [0.0]]), torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    >>> print(cross.moments())
    tensor([[1., 2.]])
    """

    def __init__(self, wanted: int, channels: int, device: torch.device | str = "cpu") -> None:
        super().__init__(_accumulator((wanted, channels), device))

    def update(self, y: Tensor, x: Tensor) -> None:
        """Add y (…, m) and x (…, n) of the same tokens."""
        rows = self._rows(x)
        lacking = y.detach().reshape(-1, y.shape[-1]).to(rows)
        if lacking.shape != (len(rows), len(self.total)):
            raise ValueError(
                f"y is {tuple(lacking.shape)}; it must be {(len(rows), len(self.total))}"
            )
        self.total += lacking.T @ rows

    def moments(self) -> Tensor:
        """Y Xᵀ / tokens, (m, n) float32."""
        return (self.total / max(1, self.tokens)).float()
