"""S as it is stored: the kept values in order, and one bit an entry for the mask.

=============== ================= ==========================================
tensor          shape             what
=============== ================= ==========================================
``values``      (kept,)           S on the mask, row by row, model dtype
``bitmask``     (⌈m n / 8⌉,)      the mask, one bit an entry, lowest first, uint8
=============== ================= ==========================================

For 2:4 in 16 bits that is 0.5625 of the dense bytes, as much as the hardware's own layout.
Packing and unpacking are exact.  Book: chapter 2.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["pack_mask", "unpack", "unpack_mask"]


def pack_mask(mask: Tensor) -> Tensor:
    """A boolean tensor as bits, lowest bit first: uint8 (⌈count / 8⌉,) on the CPU.

    Cost: one pass.

    >>> pack_mask(torch.tensor([True, False, True])).tolist()
    [5]
    """
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), bitorder="little"))


def unpack_mask(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of :func:`pack_mask`, on the device of `bits`.

    Cost: one pass.

    >>> unpack_mask(torch.tensor([5], dtype=torch.uint8), (3,)).tolist()
    [True, False, True]
    """
    count = torch.Size(shape).numel()
    flat = np.unpackbits(bits.cpu().numpy(), count=count, bitorder="little")
    return torch.from_numpy(flat).view(torch.bool).view(shape).to(bits.device)


def unpack(values: Tensor, bits: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """S (m, n) in the dtype and on the device of `values`, and its mask.

    Raises:
        ValueError: the bits do not fit the shape, or there are not as many values as bits set.

    Cost: two passes.

    >>> print(unpack(torch.tensor([3.0, 4.0]), torch.tensor([6], dtype=torch.uint8), (2, 2))[0])
    tensor([[0., 3.],
            [4., 0.]])
    """
    if bits.shape != ((shape[0] * shape[1] + 7) // 8,):
        raise ValueError(f"a bitmask of {bits.numel()} bytes is not that of a {shape} matrix")
    mask = unpack_mask(bits, shape).to(values.device)
    kept = int(mask.sum())
    if values.shape != (kept,):
        raise ValueError(f"there are {values.numel()} values, but the bitmask keeps {kept}")
    S = values.new_zeros(shape)
    S[mask] = values
    return S, mask
