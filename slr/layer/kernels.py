"""Our own Triton kernel for a 2:4 matrix and few tokens: y = S x + B (A x) + b.

Few tokens take the time of reading the matrix, so everything is read once, as it is stored: the
values, the bits of the mask and the factors.  A first launch makes t = A x in parts; the second,
by far the larger, computes S x and adds B t and b before anything is written.  Sums are in float32.

The bits of a group of four are turned into places where they are used: of a group's two weights
the first lies at place 0, 1 or 2, the last at 1, 2 or 3, so one token needs two selections a
group; several tokens go to the tensor cores as four products, one a place.

``TRITON_INTERPRET=1``, set before, runs the kernels on a CPU, slowly: that is how they are tested.
They have not been run on a GPU yet, and their block sizes are guesses: ``make gpu`` measures what
others would do.  Book: chapter 17.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

except ImportError:
    triton = None


def _without(kernel):
    """Without Triton the kernels are only text; :mod:`slr.layer.backends` does not choose them."""
    return kernel


jit: Any = _without if triton is None else triton.jit

__all__ = ["multiply"]

ROWS, GROUPS = 16, 64  # of S at a time
RANKS, COLUMNS = 16, 128  # of A at a time
WARPS, STAGES = 4, 3  # of a block of threads, and loads under way, for S
PARTS = 8  # of the columns of A, so that its few rows keep many multiprocessors busy
SLAB = 16  # tokens at a time if there are several, the least that tensor cores take


@jit
def _pairs(pair, BF16: tl.constexpr):
    """Two 16-bit floats in one 32-bit word, the lower first, as float32."""
    if BF16:  # a float32 with 16 bits less
        first = (pair << 16).to(tl.float32, bitcast=True)
        second = (pair & -65536).to(tl.float32, bitcast=True)
    else:
        first = pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        second = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return first, second


@jit
def _dot(a, b, WIDE: tl.constexpr):
    """a b' with sums in float32.  WIDE: in float32, for the interpreter has no bfloat16."""
    if WIDE:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, tl.trans(b))


@jit
def _factor(
    x, A, t, tokens, n, k, width,
    ONE: tl.constexpr, WIDE: tl.constexpr,
    SLAB: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """t (parts, tokens, k) in float32: x A' over each part of the columns."""
    ranks = tl.program_id(0) * RANKS + tl.arange(0, RANKS)
    part = tl.program_id(1)
    rows = tl.program_id(2) * SLAB + tl.arange(0, SLAB)
    end = tl.minimum((part + 1) * width, n)
    total = tl.zeros((SLAB, RANKS), dtype=tl.float32)
    for start in range(part * width, end, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = columns < end
        there = (ranks[:, None] < k) & inside[None, :]
        a = tl.load(A + ranks[:, None].to(tl.int64) * n + columns[None, :], mask=there, other=0.0)
        if ONE:
            mine = tl.load(x + columns, mask=inside, other=0.0).to(tl.float32)
            total += tl.sum(a.to(tl.float32) * mine[None, :], 1)[None, :]
        else:
            there = (rows[:, None] < tokens) & inside[None, :]
            mine = tl.load(x + rows[:, None] * n + columns[None, :], mask=there, other=0.0)
            total += _dot(mine, a, WIDE)
    there = (rows[:, None] < tokens) & (ranks[None, :] < k)
    tl.store(t + (part * tokens + rows[:, None]) * k + ranks[None, :], total, mask=there)


@jit
def _kept(
    bits, out, start, place, there, m, quarters, WHOLE: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    """Four bits of the mask for each group."""
    if WHOLE:  # rows begin with a whole byte: each is read once
        half = start // 2 + tl.arange(0, GROUPS // 2)
        byte_there = (out[:, None] < m) & (half < quarters // 2)[None, :]
        at = out[:, None].to(tl.int64) * (quarters // 2) + half[None, :]
        byte = tl.load(bits + at, mask=byte_there, other=0).to(tl.int32)
        kept = tl.interleave(byte & 15, byte >> 4)
    else:
        byte = tl.load(bits + place // 2, mask=there, other=0).to(tl.int32)
        kept = (byte >> (4 * (place % 2)).to(tl.int32)) & 15
    return kept


@jit
def _product(
    x, pairs, bits, B, t, bias, y, tokens, m, n, k, parts,
    ONE: tl.constexpr, WIDE: tl.constexpr, BF16: tl.constexpr, WHOLE: tl.constexpr,
    BIAS: tl.constexpr, RANK: tl.constexpr,
    SLAB: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """y (tokens, m) = x S' + t B' + b; RANK is k rounded up, 0 for none."""
    out = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = tl.program_id(1) * SLAB + tl.arange(0, SLAB)
    quarters = n // 4
    if ONE:
        sums = tl.zeros((ROWS, GROUPS), dtype=tl.float32)
    total = tl.zeros((SLAB, ROWS), dtype=tl.float32)
    for start in range(0, quarters, GROUPS):
        groups = start + tl.arange(0, GROUPS)
        inside = groups < quarters
        there = (out[:, None] < m) & inside[None, :]
        place = out[:, None].to(tl.int64) * quarters + groups[None, :]
        first, last = _pairs(tl.load(pairs + place, mask=there, other=0), BF16)
        kept = _kept(bits, out, start, place, there, m, quarters, WHOLE, GROUPS)
        if ONE:
            x0 = tl.load(x + 4 * groups, mask=inside, other=0.0).to(tl.float32)[None, :]
            x1 = tl.load(x + 4 * groups + 1, mask=inside, other=0.0).to(tl.float32)[None, :]
            x2 = tl.load(x + 4 * groups + 2, mask=inside, other=0.0).to(tl.float32)[None, :]
            x3 = tl.load(x + 4 * groups + 3, mask=inside, other=0.0).to(tl.float32)[None, :]
            with_first = tl.where(kept & 1 != 0, x0, tl.where(kept & 2 != 0, x1, x2))
            with_last = tl.where(kept & 8 != 0, x3, tl.where(kept & 4 != 0, x2, x1))
            sums += first * with_first + last * with_last
        else:
            some = (rows[:, None] < tokens) & inside[None, :]
            for j in tl.static_range(4):
                # The weight at place j: the first if no place before is kept, or the last, or 0.
                earlier = kept & ((1 << j) - 1)
                w = tl.where(earlier == 0, first, last)
                w = tl.where(kept & (1 << j) != 0, w, 0.0)
                at = rows[:, None] * n + 4 * groups[None, :] + j
                mine = tl.load(x + at, mask=some, other=0.0)
                total += _dot(mine, w.to(mine.dtype), WIDE)
    if ONE:
        total += tl.sum(sums, 1)[None, :]
    if RANK:
        ranks = tl.arange(0, RANK)
        there = (out[:, None] < m) & (ranks < k)[None, :]
        b = tl.load(B + out[:, None].to(tl.int64) * k + ranks[None, :], mask=there, other=0.0)
        u = tl.zeros((SLAB, RANK), dtype=tl.float32)
        there = (rows[:, None] < tokens) & (ranks < k)[None, :]
        for part in range(parts):
            u += tl.load(
                t + (part * tokens + rows[:, None]) * k + ranks[None, :], mask=there, other=0.0
            )
        if ONE:
            total += tl.sum(b.to(tl.float32) * u, 1)[None, :]
        else:
            total += _dot(u.to(b.dtype), b, WIDE)
    if BIAS:
        total += tl.load(bias + out, mask=out < m, other=0.0).to(tl.float32)[None, :]
    there = (rows[:, None] < tokens) & (out[None, :] < m)
    at = rows[:, None].to(tl.int64) * m + out[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=there)


def multiply(
    x: Tensor, values: Tensor, bitmask: Tensor, B: Tensor, A: Tensor, bias: Tensor | None
) -> Tensor:
    """y = S x + B (A x) + b, S 2:4, by the kernels above; nothing is differentiated.

    Args:
        x: (…, n), float16 or bfloat16; meant for up to 16 tokens, right for any number.
        values: (m n / 2,), the dtype of `x`, like all that follow.
        bitmask: uint8 (⌈m n / 8⌉,).
        B, A: (m, k) and (k, n), k may be 0.
        bias: (m,).

    Returns:
        (…, m).

    Raises:
        ImportError: Triton is not installed.

    Cost: reads 1.125 m n + 2 k (m + n) bytes for each 16 tokens.
    """
    if jit is _without:
        raise ImportError("the triton backend needs triton: pip install triton")
    (m, k), n = B.shape, x.shape[-1]
    tokens = x.numel() // n
    one, y = tokens == 1, x.new_empty(*x.shape[:-1], m)
    if tokens == 0:
        return y
    x, values, B, A = x.contiguous(), values.detach().contiguous(), B.contiguous(), A.contiguous()
    if values.storage_offset() % 2:  # pairs are read as 32-bit words
        values = values.clone()
    slab = 1 if one else SLAB
    slabs, parts = -(-tokens // slab), 1
    t, wide = y, x.device.type == "cpu"
    if k:
        width = max(COLUMNS, -(-n // (PARTS if one else 1) // COLUMNS) * COLUMNS)
        parts = -(-n // width)
        t = x.new_empty(parts, tokens, k, dtype=torch.float32)
        _factor[(-(-k // RANKS), parts, slabs)](
            x, A, t, tokens, n, k, width,
            ONE=one, WIDE=wide, SLAB=slab, RANKS=RANKS, COLUMNS=COLUMNS,
        )  # fmt: skip
    padded = max(16, 1 << (k - 1).bit_length()) if k else 0
    _product[(-(-m // ROWS), slabs)](
        x, values.view(torch.int32), bitmask, B, t, y if bias is None else bias, y,
        tokens, m, n, k, parts,
        ONE=one, WIDE=wide, BF16=x.dtype == torch.bfloat16, WHOLE=n % 8 == 0, BIAS=bias is not None,
        RANK=padded, SLAB=slab, ROWS=ROWS, GROUPS=GROUPS, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return y
