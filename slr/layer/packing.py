"""S as it is stored, and as a layer holds it: the kept values in order, and one bit an entry.

=============== ================= ==========================================
tensor          shape             what
=============== ================= ==========================================
``values``      (kept,)           S on the mask, row by row, model dtype
``bitmask``     (⌈m n / 8⌉,)      the mask, one bit an entry, lowest first, uint8
=============== ================= ==========================================

For 2:4 in 16 bits that is 0.5625 of the dense bytes, as much as the hardware's own layout.
Packing and unpacking are exact; :func:`blocks` unpacks a few rows at a time, into one buffer.
Book: chapters 2 and 17.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from slr.layer import native
from slr.layer.bits import unpack_mask
from slr.layer.sparse24 import expand_, places
from slr.matrix.filled import INTEGER

__all__ = ["blocks", "check_packed", "keep", "unpack"]

ROWS = 1024  # unpacked at a time on a CPU: with fewer, or other numbers, torch is slower
BLOCK = {"cuda": 1 << 26}  # entries unpacked at a time elsewhere


def _rows(shape: tuple[int, int], device: torch.device) -> list[slice]:
    """Slices of rows, of a multiple of 8 each, so that every one begins with a whole byte."""
    m, n = shape
    if device.type == "cpu":
        height = ROWS if m >= 2 * ROWS else -(-m // 8) * 8
    else:
        height = max(8, BLOCK.get(device.type, 1 << 24) // n // 8 * 8)
    return [slice(top, min(top + height, m)) for top in range(0, m, height)]


def blocks(
    values: Tensor, bits: Tensor, shape: tuple[int, int], two_four: bool = False
) -> Iterator[tuple[slice, Tensor]]:
    """S a few rows at a time: their slice, and they themselves (h, n), which the next overwrite.

    Args:
        values: (kept,), any float dtype.
        bits: uint8, of a mask that keeps as many.
        shape: (m, n) of S.
        two_four: the mask is known to keep 2 of every 4, which is unpacked faster.

    Cost: one pass over values and bits; fewer than 2048 rows of S exist at a time on a CPU.

    >>> v, bits = torch.tensor([3.0, 4.0]), torch.tensor([6], dtype=torch.uint8)
    >>> for rows, S in blocks(v, bits, (2, 2)):
    ...     print(rows, S.tolist())
    slice(0, 2, None) [[0.0, 3.0], [4.0, 0.0]]
    """
    n = shape[1]
    slices = _rows(shape, values.device)
    buffer = values.new_empty(slices[0].stop, n) if slices else values
    after: Tensor | int = 0  # values before these rows
    if values.device.type == "cpu" and buffer.itemsize in (2, 4) and not native.missing():
        starts = None if two_four else native.row_starts(bits, shape)
        for rows in slices:
            S = buffer[: rows.stop - rows.start]
            yield rows, native.spread_(S, values, bits, starts, shape[0], rows.start)
        return
    for rows in slices:
        S = buffer[: rows.stop - rows.start]
        mine = bits[rows.start * n // 8 : -(-rows.stop * n // 8)]
        if two_four and S.itemsize < 8:
            expand_(S, values[rows.start * n // 2 : rows.stop * n // 2], mine)
        else:
            after = _fill_(S, values, mine, after)
        yield rows, S


def _fill_(S: Tensor, values: Tensor, bits: Tensor, after: Tensor | int) -> Tensor:
    """S ← its values, those `after` so many; returns how many lie before the next rows.

    Every entry looks up the last value up to it, and those off the mask are cleared: no branch,
    and nothing that waits for a GPU.
    """
    mask = unpack_mask(bits, tuple(S.shape))
    place = mask.view(-1).cumsum(0, dtype=torch.int32 if values.numel() < 1 << 31 else torch.int64)
    last = place[-1:] + after
    place += after - 1
    if values.numel():
        torch.index_select(values, 0, place.clamp_(min=0), out=S.view(-1))
    kind = INTEGER.get(S.itemsize)
    if kind is None or S.device.type != "cpu":
        S.masked_fill_(~mask, 0)
    else:  # ten times as fast
        S.view(kind).bitwise_and_(mask.view(torch.int8).to(kind).neg_())
    return last


def keep(dense: Tensor, bits: Tensor, two_four: bool = False) -> Tensor:
    """The entries of a matrix (h, n) on a mask, row by row: (kept,).

    Args:
        dense: (h, n).
        bits: uint8, of the mask.
        two_four: the mask is known to keep 2 of every 4, so that nothing need be counted.

    Cost: one pass.

    >>> keep(torch.tensor([[1.0, 3.0], [4.0, 2.0]]), torch.tensor([6], dtype=torch.uint8)).tolist()
    [3.0, 4.0]
    """
    if two_four:
        return dense.reshape(-1, 4).gather(1, places(bits, dense.numel() // 4)).view(-1)
    return dense[unpack_mask(bits, tuple(dense.shape))]


def unpack(values: Tensor, bits: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """S (m, n) in the dtype and on the device of `values`, and its mask.

    Raises:
        ValueError: the bits do not fit the shape, or there are not as many values as bits set.

    Cost: two passes.

    >>> print(unpack(torch.tensor([3.0, 4.0]), torch.tensor([6], dtype=torch.uint8), (2, 2))[0])
    tensor([[0., 3.],
            [4., 0.]])
    """
    check_packed(values, bits, shape)
    S = values.new_empty(shape)
    for rows, block in blocks(values, bits, shape):
        S[rows] = block
    return S, unpack_mask(bits, shape)


def check_packed(values: Tensor, bits: Tensor, shape: tuple[int, int]) -> None:
    """Raise ValueError unless bits and values belong to a matrix of this shape.

    Cost: one pass over the bits.

    >>> check_packed(torch.ones(1), torch.tensor([6], dtype=torch.uint8), (2, 2))
    Traceback (most recent call last):
    ValueError: there are 1 values, but the bitmask keeps 2
    """
    count = shape[0] * shape[1]
    if bits.shape != ((count + 7) // 8,):
        raise ValueError(f"a bitmask of {bits.numel()} bytes is not that of a {shape} matrix")
    kept = int(unpack_mask(bits, (count,)).sum())
    if values.shape != (kept,):
        raise ValueError(f"there are {values.numel()} values, but the bitmask keeps {kept}")
