"""Our own kernels for a CPU: y = S x + B (A x) + b, and S unpacked, fast.

They are in ``native.cpp``: AMX, AVX-512 (VBMI2 and BF16), AVX2 and plain C++, chosen when they run,
for any mask and shape, in bfloat16, float16 and float32.  A token is bound by the bytes that are
read, so everything is read once and as it is stored.  Book: chapter 17.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slr.layer.compiled import SETS, chosen, library

__all__ = ["DTYPES", "in_use", "missing", "multiply", "row_starts", "spread_", "tiled"]

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # as `Kind` in native.cpp


def missing() -> str:
    """Why the kernels cannot be used on this machine; empty if they can.

    Cost: the first call on a machine compiles them, some seconds.

    >>> missing() == "" or missing()
    True
    """
    return library().missing


def tiled() -> bool:
    """Whether they have matrix units here (AMX), which make many tokens fast in bfloat16.

    >>> tiled() in (True, False)
    True
    """
    return not missing() and SETS[library().best] == "amx"


def in_use() -> str:
    """What multiplies packed layers on this CPU, in a few words.

    >>> in_use().split()[0] in ("slr's", "torch's")
    True
    """
    problem = missing()
    if problem:
        return f"torch's operations, for {problem}"
    return f"slr's kernels, {SETS[library().best]}, {torch.get_num_threads()} threads"


def row_starts(bitmask: Tensor, shape: tuple[int, int]) -> Tensor | None:
    """Where the values of each row begin: int64 (m + 1,); ``None`` if all rows keep equally many.

    Args:
        bitmask: uint8 (⌈m n / 8⌉,), on a CPU.
        shape: (m, n).

    Cost: one pass over the mask.

    >>> row_starts(torch.tensor([0b0110], dtype=torch.uint8), (2, 2))
    >>> row_starts(torch.tensor([0b0111], dtype=torch.uint8), (2, 2)).tolist()
    [0, 2, 3]
    """
    m, n = shape
    starts, found = torch.empty(m + 1, dtype=torch.int64), library()
    threads, at = torch.get_num_threads(), starts.data_ptr()
    return starts if found.starts(found.best, threads, m, n, bitmask.data_ptr(), at) else None


def multiply(
    x: Tensor, values: Tensor, bitmask: Tensor, starts: Tensor | None, B: Tensor, A: Tensor,
    bias: Tensor | None, *, best: str | None = None,
) -> Tensor:  # fmt: skip
    """y = S x + B (A x) + b, S packed, nothing differentiated.

    Args:
        x: (…, n), of :data:`DTYPES`; meant for up to 16 tokens, or with matrix units for some
            hundreds, right for any number.
        values: (kept,), the dtype of `x`, like all that follow.
        bitmask: uint8 (⌈m n / 8⌉,), of any mask.
        starts: from :func:`row_starts`.
        B, A: (m, k) and (k, n), k may be 0.
        bias: (m,).
        best: of :data:`~slr.layer.compiled.SETS`, to use no better instructions.

    Returns:
        (…, m); sums are in float32, A x is rounded to the dtype.

    Cost: reads values, bits and factors once for each 16 tokens (8 without AVX-512, 512 on matrix
        units).  Memory: on matrix units x once more, and two megabytes a thread.

    >>> bits, v, none = torch.tensor([6], dtype=torch.uint8), torch.tensor([3.0, 4.0]), None
    >>> multiply(torch.eye(2), v, bits, none, torch.ones(2, 1), torch.ones(1, 2), none).tolist()
    [[1.0, 5.0], [4.0, 1.0]]
    """
    if best is None:
        return OPERATOR(x, values, bitmask, starts, B, A, bias)
    return _multiply(x, values, bitmask, starts, B, A, bias, best)


def alike(x: Tensor, *parts: Tensor | None) -> list[Any]:
    """Tensors as the kernels read them, contiguous; all must have the dtype of the first.

    >>> alike(torch.ones(1), torch.ones(1).half())
    Traceback (most recent call last):
    ValueError: x is torch.float32, but a part of the layer torch.float16
    """
    for part in parts:
        if part is not None and part.dtype != x.dtype:
            raise ValueError(f"x is {x.dtype}, but a part of the layer {part.dtype}")
    return [None if part is None else part.contiguous() for part in (x, *parts)]


def _multiply(
    x: Tensor, values: Tensor, bitmask: Tensor, starts: Tensor | None, B: Tensor, A: Tensor,
    bias: Tensor | None, best: str | None = None,
) -> Tensor:  # fmt: skip
    (m, k), n, kept = B.shape, x.shape[-1], values.numel()
    y = x.new_empty(*x.shape[:-1], m)
    x, values, B, A, bias = alike(x, values, B, A, bias)
    library().few(
        DTYPES[x.dtype], chosen(best), torch.get_num_threads(), x.numel() // n, m, n, k,
        x.data_ptr(), values.data_ptr(), kept, bitmask.data_ptr(),
        None if starts is None else starts.data_ptr(), kept // m,
        B.data_ptr(), A.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr(),
    )  # fmt: skip
    return y


# torch.ops.slr.native: in C++ where `operators.cpp` was compiled, which has no Python at all.
torch.library.define(
    "slr::native",
    "(Tensor x, Tensor values, Tensor bitmask, Tensor? starts, Tensor B, Tensor A, Tensor? bias)"
    " -> Tensor",
)
torch.library.impl("slr::native", "default")(_multiply)
OPERATOR = torch.ops.slr.native.default


@torch.library.register_fake("slr::native")
def _(x, values, bitmask, starts, B, A, bias):
    return x.new_empty(*x.shape[:-1], B.shape[0])


def spread_(
    out: Tensor, values: Tensor, bitmask: Tensor, starts: Tensor | None, rows: int, top: int = 0, *,
    best: str | None = None,
) -> Tensor:  # fmt: skip
    """out ← rows of S from `top` on, unpacked, in place; returns `out`.

    Args:
        out: (h, n), contiguous, of 2 or 4 bytes a value.
        values, bitmask, starts: of all of S.
        rows: m of S.
        top: the first row.
        best: as for :func:`multiply`.

    Cost: reads their values and bits, writes `out`.

    >>> bits, v = torch.tensor([6], dtype=torch.uint8), torch.tensor([3.0, 4.0])
    >>> spread_(torch.empty(1, 2), v, bits, None, 2, top=1).tolist()
    [[4.0, 0.0]]
    """
    values = values if values.is_contiguous() else values.contiguous()
    library().spread(
        out.itemsize, chosen(best), torch.get_num_threads(), rows, out.shape[1], top, len(out),
        values.data_ptr(), values.numel(), bitmask.data_ptr(),
        None if starts is None else starts.data_ptr(), values.numel() // rows, out.data_ptr(),
    )  # fmt: skip
    return out
