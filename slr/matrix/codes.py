"""Rounding to a grid with the outputs in view: error feedback, and descent in the codes.

Both lower tr(E H Eᵀ), E = T - S, over matrices S on a grid, perhaps with a mask:

- :func:`feed_back`, one pass over the columns: what rounding one takes away is made up for by
  those that follow, as far as the inputs allow (GPTQ); off the mask the value is 0;
- :func:`descend`, any number of passes: each column in turn takes the codes that are best while
  all others stay.  Nothing it does raises the error.

Book: chapter 18.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slr.matrix.metric import definite
from slr.matrix.rounding import Grid, Rounded

__all__ = ["Columns", "descend", "feed_back"]

BLOCK = 128  # columns between two updates of all the others


class Columns:
    """What rounding needs to know of the inputs, for as many roundings as are wanted.

    Args:
        H: second moments of the inputs, (n, n), positive definite (damped).

    Cost: about n³ FLOPs.
    """

    def __init__(self, H: Tensor) -> None:
        # The loudest first: what comes late has little left to make up for it.
        self.order = H.diagonal().argsort(descending=True, stable=True)
        self.loudness = H.diagonal()
        self.H = H[self.order][:, self.order]
        inverse = torch.cholesky_inverse(definite(self.H)[1])
        self.U = definite((inverse + inverse.T) / 2, "the inverse of gram")[1].T.contiguous()

    def sorted(self, matrix: Tensor) -> Tensor:
        """The columns of (m, n) in this order, as rows: (n, m), contiguous."""
        return matrix.T[self.order].contiguous()

    def back(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`sorted`."""
        matrix = torch.empty_like(rows)
        matrix[self.order] = rows
        return matrix.T.contiguous()


def feed_back(target: Tensor, columns: Columns, grid: Grid, mask: Tensor | None = None) -> Rounded:
    """T rounded column by column, the rest making up for each.

    Args:
        target: T, (m, n), float32.
        columns: of the inputs.
        grid: to round to; its levels suit T.
        mask: bool (m, n), True = kept; off it the codes are those of 0.

    Cost: the levels, and m n² FLOPs.
    Source: GPTQ (Frantar et al. 2023), its columns in descending order of diag(H), the levels
        chosen before; with a mask SparseGPT's joint step.

    >>> H, T = torch.tensor([[1.0, 0.9], [0.9, 1.0]]), torch.tensor([[0.5, 0.5], [3.0, -3.0]])
    >>> print(feed_back(T, Columns(H), Grid(2, 2, symmetric=True)).values())
    tensor([[ 0.5000,  0.5000],
            [ 3.0000, -3.0000]])
    """
    levels = grid.levels(target, columns.loudness)
    scale, zero = (columns.sorted(each) for each in levels.spread(grid, target.shape[1]))
    T, (low, high), U = columns.sorted(target), grid.codes, columns.U
    off = None if mask is None else ~columns.sorted(mask)
    codes = torch.empty_like(T)
    n = len(T)
    for left in range(0, n, BLOCK):
        right = min(left + BLOCK, n)
        block, errors, u = T[left:right], torch.empty_like(T[left:right]), U[left:right, left:right]
        for i in range(right - left):
            j = left + i
            code = (block[i] / scale[j]).round_().add_(zero[j]).clamp_(low, high)
            if off is not None:
                code = torch.where(off[j], zero[j], code)
            codes[j] = code
            errors[i] = (block[i] - (code - zero[j]).mul_(scale[j])) / u[i, i]
            block[i + 1 :].addr_(u[i, i + 1 :], errors[i], alpha=-1)
        T[right:].addmm_(U[left:right, right:].T, errors, alpha=-1)
    return Rounded(columns.back(codes).to(torch.uint8), levels, grid)


def descend(
    rounded: Rounded, target: Tensor, columns: Columns, mask: Tensor | None = None,
    sweeps: int = 1,
) -> Rounded:  # fmt: skip
    """Better codes, column by column: no step raises the error.

    Args:
        rounded: where to start.
        target: T, (m, n), float32.
        columns: of the inputs.
        mask: bool (m, n); off it nothing moves.
        sweeps: passes over all columns.

    Cost: 2 m n² FLOPs for the start and each sweep.
    Source: cyclic coordinate descent, as QuantEase (Behdin et al. 2023).

    >>> from slr.matrix.rounding import Levels
    >>> H, T = torch.tensor([[1.0, 0.9], [0.9, 1.0]]), torch.tensor([[0.4, 0.4]])
    >>> grid = Grid(2, 2, symmetric=True)
    >>> start = grid.rounded(T, Levels(torch.ones(1, 1), torch.full((1, 1), 2.0)))
    >>> print(start.values(), descend(start, T, Columns(H)).values())
    tensor([[0., 0.]]) tensor([[1., 0.]])
    """
    grid, levels = rounded.grid, rounded.levels
    scale, zero = (columns.sorted(each) for each in levels.spread(grid, target.shape[1]))
    (low, high), H = grid.codes, columns.H
    codes = columns.sorted(rounded.codes).float()
    keep = None if mask is None else columns.sorted(mask)
    image = H @ (columns.sorted(target) - (codes - zero).mul_(scale))  # H Eᵀ
    inverse = 1 / H.diagonal()
    for _ in range(sweeps):
        for left in range(0, len(H), BLOCK):
            right = min(left + BLOCK, len(H))
            block, square = image[left:right].clone(), H[left:right, left:right]
            moved = torch.empty_like(block)
            for i in range(right - left):
                j = left + i
                step = (block[i] * inverse[j]).div_(scale[j])
                code = (codes[j] + step).round_().clamp_(low, high)
                if keep is not None:
                    code = torch.where(keep[j], code, codes[j])
                torch.sub(code, codes[j], out=moved[i])
                codes[j] = code
                moved[i].mul_(scale[j])
                block.addr_(square[i], moved[i], alpha=-1)
            image.addmm_(H[:, left:right], moved, alpha=-1)
    return Rounded(columns.back(codes).to(torch.uint8), levels, grid)
