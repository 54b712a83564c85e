"""A boolean mask as bits, lowest first: how it is stored, an eighth of a byte an entry.

Book: chapter 2.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["pack_mask", "unpack_mask"]


def pack_mask(mask: Tensor) -> Tensor:
    """A boolean tensor as bits, lowest bit first: uint8 (⌈count / 8⌉,), on its device.

    Cost: one pass.

    >>> pack_mask(torch.tensor([True, False, True])).tolist()
    [5]
    """
    bits = torch.from_numpy(np.packbits(mask.cpu().numpy(), bitorder="little"))
    return bits.to(mask.device)


def unpack_mask(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of :func:`pack_mask`, on the device of `bits`.

    Cost: one pass.

    >>> unpack_mask(torch.tensor([5], dtype=torch.uint8), (3,)).tolist()
    [True, False, True]
    """
    count = torch.Size(shape).numel()
    if bits.device.type == "cpu":
        flat = np.unpackbits(bits.numpy(), count=count, bitorder="little")
        return torch.from_numpy(flat).view(torch.bool).view(shape)
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    every = (bits.unsqueeze(-1) >> places) & 1
    return every.flatten()[:count].bool().view(shape)
