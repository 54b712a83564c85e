"""A 2:4 matrix in the layout of sparse hardware, to look at; layers hold bits instead of places.

Book: chapter 17.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from slr.layer.bits import pack_mask
from slr.layer.sparse24 import TWO_FOUR, check_two_four, expand_, indices_of, look_up
from slr.matrix.checks import check_mask, check_matrix

__all__ = ["Packed24", "bitmask_of", "pack", "unpack"]


class Packed24(NamedTuple):
    """A 2:4 matrix (m, n) as `values` (m, n / 2) and `indices` (⌈m n / 8⌉,)."""

    values: Tensor
    indices: Tensor


def bitmask_of(indices: Tensor) -> Tensor:
    """The inverse of :func:`indices_of`.

    Cost: one look-up a byte.

    >>> import torch
    >>> [bin(int(x)) for x in bitmask_of(torch.tensor([0b1101_0100], dtype=torch.uint8))]
    ['0b10100011']
    """
    masks = [1 << (c & 3) | 1 << (c >> 2) if c & 3 < c >> 2 else 0 for c in range(16)]
    return look_up(masks, indices)


def pack(weight: Tensor, mask: Tensor | None = None) -> Packed24:
    """A 2:4 matrix as values and 2-bit places.

    Args:
        weight: (m, n), any float dtype and device, n divisible by 4.
        mask: bool (m, n), exactly 2 of every 4; by default where `weight` is not zero, and zeros
            up to two a group.

    Raises:
        ValueError: not 2:4; the first row and group that are not, by number.

    Cost: a few passes.

    >>> import torch
    >>> values, indices = pack(torch.tensor([[0.0, 5.0, 0.0, 6.0]]))
    >>> values.tolist(), bin(int(indices))
    ([[5.0, 6.0]], '0b1101')
    """
    check_matrix("weight", weight)
    m, n = weight.shape
    if n % 4:
        raise ValueError(f"2:4 needs columns divisible by 4, but there are {n}")
    if mask is None:
        some = weight != 0
        mask = TWO_FOUR.select(some.float()) | some
    check_mask(mask, weight)
    bits = pack_mask(mask)
    check_two_four(bits, (m, n))
    if bool(weight[~mask].any()):
        raise ValueError("weight is not zero off the mask")
    return Packed24(weight[mask].view(m, n // 2), indices_of(bits))


def unpack(packed: Packed24) -> Tensor:
    """The inverse of :func:`pack`: (m, n), bit for bit.

    Cost: a few passes.

    >>> import torch
    >>> unpack(pack(torch.tensor([[0.0, 5.0, 0.0, 6.0]]))).tolist()
    [[0.0, 5.0, 0.0, 6.0]]
    """
    values, indices = packed
    m, half = values.shape
    S = values.new_empty(m, 2 * half)
    expand_(S, values.reshape(-1), bitmask_of(indices))
    return S
