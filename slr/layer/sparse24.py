"""2:4: two of every four weights kept, as values and 2-bit places, the layout of sparse hardware.

=========== ================ ==================================================================
tensor      shape            what
=========== ================ ==================================================================
``values``  (m, n / 2)       the kept weights, row by row
``indices`` (⌈m n / 8⌉,)     4 bits for each group of four: the place of its first kept weight,
                             and, two bits higher, that of its second; two groups in a byte
=========== ================ ==================================================================

A bitmask (:mod:`slr.layer.packing`) has 4 bits for a group too, so that the two turn into one
another by a table of 16 entries, nothing moves, and a file's tensors are what a GPU computes with.
In 16 bits both take 0.5625 of the dense bytes.  Book: chapter 17.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from slr.matrix.patterns import NM

__all__ = ["check_two_four", "cutlass_metadata", "expand_", "indices_of", "is_two_four", "look_up"]

TWO_FOUR = NM(2, 4)
# The two kept places of a group, by its four bits (place j is bit j); none if it keeps not two.
PLACES = [tuple(j for j in range(4) if bits >> j & 1) for bits in range(16)]
CODES = [p[0] | p[1] << 2 if len(p) == 2 else 0 for p in PLACES]  # 4 bits -> two 2-bit places
ALL, LOW, HIGH = -1, 0xFFFFFFFF, -1 << 32


@cache
def _bytes(entries: tuple[int, ...], device: torch.device) -> Tensor:
    """uint8 (256,): a table of 16 applied to both halves of a byte."""
    both = [entries[b & 15] | entries[b >> 4] << 4 for b in range(256)]
    return torch.tensor(both, dtype=torch.uint8, device=device)


def look_up(table: list[int], codes: Tensor) -> Tensor:
    """Both halves of every byte, each by a table of 16 entries of 4 bits: uint8, same shape.

    Cost: one look-up a byte.

    >>> hex(int(look_up([15 - i for i in range(16)], torch.tensor(0x2F, dtype=torch.uint8))))
    '0xd0'
    """
    return _bytes(tuple(table), codes.device)[codes.int()]


def indices_of(bitmask: Tensor) -> Tensor:
    """The 2-bit places, two groups a byte, of a 2:4 bitmask: uint8, same shape.

    Cost: one look-up a byte.

    >>> [bin(int(x)) for x in indices_of(torch.tensor([0b1010_0011], dtype=torch.uint8))]
    ['0b11010100']
    """
    return look_up(CODES, bitmask)


def _groups(bitmask: Tensor, count: int) -> Tensor:
    """How many of its four every group keeps: uint8 (count,)."""
    kept = look_up([len(p) for p in PLACES], bitmask)
    return torch.stack((kept & 15, kept >> 4), 1).flatten()[:count]


def is_two_four(bitmask: Tensor, shape: tuple[int, int]) -> bool:
    """Does a bitmask of a matrix (m, n) keep exactly 2 of every 4?

    Cost: one look-up a byte.

    >>> is_two_four(torch.tensor([0b0011_0101], dtype=torch.uint8), (2, 4))
    True
    """
    m, n = shape
    return n % 4 == 0 and bool((_groups(bitmask, m * n // 4) == 2).all())


def check_two_four(bitmask: Tensor, shape: tuple[int, int]) -> None:
    """Raise ValueError, with row and group, unless a bitmask keeps exactly 2 of every 4.

    Cost: one look-up a byte.

    >>> check_two_four(torch.tensor([0b0111_0101], dtype=torch.uint8), (2, 4))
    Traceback (most recent call last):
    ValueError: row 1, columns 0 to 3: 3 weights are kept; 2:4 keeps exactly 2 of every 4
    """
    m, n = shape
    if n % 4:
        raise ValueError(f"2:4 needs columns divisible by 4, but there are {n}")
    kept = _groups(bitmask, m * n // 4)
    wrong = (kept != 2).nonzero()
    if len(wrong):
        row, group = divmod(int(wrong[0]), n // 4)
        raise ValueError(
            f"row {row}, columns {4 * group} to {4 * group + 3}: {int(kept[wrong[0]])} weights "
            "are kept; 2:4 keeps exactly 2 of every 4"
        )


@cache
def _words(entry: Callable[[int], int], device: torch.device) -> Tensor:
    """Two int64 for each byte, one a group, in one complex number, which is looked up at once."""
    both = [[entry(b & 15), entry(b >> 4)] for b in range(256)]
    whole = torch.tensor(both, dtype=torch.int64, device=device)
    return torch.view_as_complex(whole.view(torch.float64))


def _first(bits: int) -> int:
    """Of 16-bit values: how far the first of a group moves; out of sight if there is none."""
    return 16 * PLACES[bits][0] if len(PLACES[bits]) == 2 else 64


def _second(bits: int) -> int:
    """The same for the second value, which comes at place 1."""
    return 16 * (PLACES[bits][1] - 1) if len(PLACES[bits]) == 2 else 64


# Of 32-bit values, places 0 and 1, and 2 and 3, are one word each: the two values of the group,
# shifted so that the right one is in place, and masked.
def _left_shift(bits: int) -> int:
    return 32 if bits & 3 == 2 else 0


def _left_mask(bits: int) -> int:
    return {0: 0, 1: LOW, 2: HIGH, 3: ALL}[bits & 3]


def _right_shift(bits: int) -> int:
    return 32 if bits >> 2 == 1 else 0


def _right_mask(bits: int) -> int:
    return {0: 0, 1: LOW, 2: HIGH, 3: ALL}[bits >> 2]


def expand_(out: Tensor, values: Tensor, bitmask: Tensor) -> Tensor:
    """out ← the 2:4 matrix of these values and bits, in place; returns `out`.

    Args:
        out: (h, n), contiguous.
        values: (h n / 2,), same dtype and device.
        bitmask: uint8 (⌈h n / 8⌉,), 2:4.

    Cost: a group of four is one or two 64-bit words, made by shifts, without a branch: about ten
    passes over them.  64-bit values take :func:`torch.Tensor.scatter_`, which is slower.

    >>> bits = torch.tensor([0b1010], dtype=torch.uint8)
    >>> print(expand_(torch.empty(1, 4), torch.tensor([5.0, 6.0]), bits))
    tensor([[0., 5., 0., 6.]])
    """
    groups = values.numel() // 2
    values = values if values.is_contiguous() else values.contiguous()
    if values.storage_offset() % 4:  # it is looked at as longer words
        values = values.clone()
    if out.itemsize == 8:
        return _scatter_(out, values, bitmask)
    index = bitmask.int()

    def words(entry: Callable[[int], int]) -> Tensor:
        found = torch.index_select(_words(entry, bitmask.device), 0, index)
        return torch.view_as_real(found).view(torch.int64).view(-1)[:groups]

    if out.itemsize == 2:
        whole = out.view(-1).view(torch.int64)
        pair = values.view(torch.int32).to(torch.int64)
        torch.bitwise_and(pair, 0xFFFF, out=whole)
        whole.bitwise_left_shift_(words(_first))
        pair.bitwise_and_(0xFFFF0000).bitwise_left_shift_(words(_second))
        whole.bitwise_or_(pair)
        return out
    pair, halves = values.view(torch.int64), out.view(-1).view(torch.int64).view(-1, 2)
    moved = torch.bitwise_left_shift(pair, words(_left_shift))
    torch.bitwise_and(moved, words(_left_mask), out=halves[:, 0])
    torch.bitwise_right_shift(pair, words(_right_shift), out=moved)
    torch.bitwise_and(moved, words(_right_mask), out=halves[:, 1])
    return out


def places(bitmask: Tensor, groups: int) -> Tensor:
    """Places 0 to 3 of the two kept weights of each group: int64 (groups, 2)."""
    codes = indices_of(bitmask)
    every = torch.stack((codes & 3, codes >> 2 & 3, codes >> 4 & 3, codes >> 6), 1)
    return every.view(-1, 2)[:groups].long()


def _scatter_(out: Tensor, values: Tensor, bitmask: Tensor) -> Tensor:
    groups = values.numel() // 2
    out.zero_().view(-1, 4).scatter_(1, places(bitmask, groups), values.view(-1, 2))
    return out


def cutlass_metadata(indices: Tensor, shape: tuple[int, int]) -> Tensor:
    """The places of a 2:4 matrix in the order in which CUTLASS reads them: int16 (m, n / 16).

    Two bytes of `indices` are one entry; tensor cores read them in tiles, so that they are
    reordered.  With `values` they are what
    ``torch.sparse.SparseSemiStructuredTensorCUTLASS`` holds.

    Args:
        indices: of 16-bit values.
        shape: (m, n), m divisible by 32 and n by 64.

    Raises:
        ValueError: another shape.

    Cost: one pass over the indices, and some over their offsets.
    Source: CUTLASS, ``host_reorder.h``, as transcribed in ``torch.sparse``.

    >>> cutlass_metadata(torch.zeros(32 * 64 // 8, dtype=torch.uint8), (32, 64)).shape
    torch.Size([32, 4])
    """
    from torch.sparse._semi_structured_conversions import (
        _calculate_meta_reordering_scatter_offsets as offsets,
    )

    m, n = shape
    if m % 32 or n % 64:
        raise ValueError(f"CUTLASS needs rows divisible by 32 and columns by 64, not {shape}")
    plain = indices.view(torch.int16)
    where = offsets(m, n // 16, torch.int16, indices.device)
    return torch.empty_like(plain).scatter_(0, where, plain).view(m, n // 16)
