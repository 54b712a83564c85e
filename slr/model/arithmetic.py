"""In which dtype blocks are run: their own, but float32 where 16-bit products are slow.

A CPU without bfloat16 instructions multiplies bfloat16 matrices several times slower than float32
ones.  Weights stay in their dtype; only while a block runs are they widened, which is exact.

Book: chapter 10.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["compute_dtype", "computing"]


def _fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 (AMX, AVX-512 BF16)."""
    asks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, ask, bool)() for ask in asks)


def compute_dtype(dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """The dtype to run blocks of weights of `dtype` in on `device`.

    >>> compute_dtype(torch.float16, "cuda"), compute_dtype(torch.float16, "cpu")
    (torch.float16, torch.float32)
    """
    if torch.device(device).type != "cpu" or dtype.itemsize >= 4:
        return dtype
    return dtype if dtype is torch.bfloat16 and _fast_bfloat16() else torch.float32


@contextmanager
def computing(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """While open, the floating parameters of a module are in `dtype`.

    Afterwards they are, bit for bit, what they were.

    Memory: those that `dtype` does not hold exactly are kept beside.

    >>> lin = nn.Linear(2, 2).bfloat16()
    >>> with computing(lin, torch.float32):
    ...     lin.weight.dtype
    torch.float32
    >>> lin.weight.dtype
    torch.bfloat16
    """
    others = [p for p in module.parameters() if p.is_floating_point() and p.dtype != dtype]
    exact = [torch.promote_types(p.dtype, dtype) == dtype for p in others]
    were = [p.data if not same else p.dtype for p, same in zip(others, exact, strict=True)]
    try:
        for parameter in others:
            parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for parameter, was in zip(others, were, strict=True):
            parameter.data = parameter.data.to(was) if isinstance(was, torch.dtype) else was
