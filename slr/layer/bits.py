"""A boolean mask as bits, lowest first, an eighth of a byte an entry; codes as planes of bits.

Book: chapter 2.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["pack_codes", "pack_mask", "unpack_codes", "unpack_mask"]


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


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes (count,) below 2^bits as uint8 (bits, ⌈count / 8⌉), a plane for each bit, lowest first.

    For 8 bits they stay bytes, (1, count).

    Cost: `bits` passes.

    >>> pack_codes(torch.tensor([1, 2, 3], dtype=torch.uint8), 2).tolist()
    [[5], [6]]
    """
    if bits == 8:
        return codes[None].contiguous()
    return torch.stack([pack_mask((codes >> bit) & 1 > 0) for bit in range(bits)])


def unpack_codes(planes: Tensor, count: int) -> Tensor:
    """The inverse of :func:`pack_codes`: uint8 (count,).

    Cost: `bits` passes.

    >>> unpack_codes(torch.tensor([[5], [6]], dtype=torch.uint8), 3).tolist()
    [1, 2, 3]
    """
    if len(planes) == 1:
        return planes[0]
    codes = torch.zeros(count, dtype=torch.uint8, device=planes.device)
    for bit, plane in enumerate(planes):
        codes += unpack_mask(plane, (count,)).to(torch.uint8) << bit
    return codes
