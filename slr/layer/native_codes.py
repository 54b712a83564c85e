"""Our own kernels for values that are codes: y = S x + B (A x) + b, and rows of S, on a CPU.

They are in ``codes.cpp``, compiled with the others (:mod:`slr.layer.compiled`).  Book: chapter 18.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slr.layer import native
from slr.layer.compiled import chosen, library

__all__ = ["KINDS", "CodedMatrix", "by_rows", "most", "multiply", "rows_"]

FEW = 8  # tokens up to which codes are multiplied as they lie,
TILED = 1024  # and where there are matrix units for them
ROWS = 1024  # of S unpacked at a time
KINDS = (torch.bfloat16, torch.float32)


class _Coded(ctypes.Structure):
    _fields_ = [
        ("m", ctypes.c_int64), ("n", ctypes.c_int64), ("bits", ctypes.c_int),
        ("planes", ctypes.c_void_p), ("stride", ctypes.c_int64), ("kept", ctypes.c_int64),
        ("scale", ctypes.c_void_p), ("zero", ctypes.c_void_p), ("group", ctypes.c_int64),
        ("mask", ctypes.c_void_p), ("starts", ctypes.c_void_p), ("each", ctypes.c_int64),
    ]  # fmt: skip


class CodedMatrix(NamedTuple):
    """S (m, n) as codes, on a CPU, all contiguous.

    Attributes:
        shape: (m, n).
        bits: of a code.
        planes: from :func:`slr.layer.bits.pack_codes`.
        kept: how many codes there are.
        scale: int16 (m, groups), bfloat16 by its bits.
        zero: uint8 (m, groups), or ``None`` for 2^(bits - 1).
        group: columns that share a scale.
        mask: uint8 bits, or ``None`` if all entries are kept.
        starts: from :func:`slr.layer.native.row_starts`, of the mask.
    """

    shape: tuple[int, int]
    bits: int
    planes: Tensor
    kept: int
    scale: Tensor
    zero: Tensor | None
    group: int
    mask: Tensor | None
    starts: Tensor | None

    def struct(self) -> _Coded:
        """As the library reads it; this has to live as long."""
        m, n = self.shape

        def at(tensor: Tensor | None) -> int | None:
            return None if tensor is None else tensor.data_ptr()

        return _Coded(
            m, n, self.bits, at(self.planes), self.planes.shape[1], self.kept, at(self.scale),
            at(self.zero), self.group, at(self.mask), at(self.starts), self.kept // m,
        )  # fmt: skip


def rows_(out: Tensor, S: CodedMatrix, top: int = 0, *, best: str | None = None) -> Tensor:
    """out ← rows of S from `top` on, in place; returns `out`.

    Args:
        out: (h, n), contiguous, float32 or bfloat16.
        S: the matrix.
        top: the first row.
        best: of :data:`~slr.layer.compiled.SETS`, to use no better instructions.

    Cost: reads their codes, writes `out`.
    """
    struct = S.struct()
    library().codes_rows(
        out.itemsize, chosen(best), torch.get_num_threads(), ctypes.addressof(struct), top,
        len(out), out.data_ptr(),
    )  # fmt: skip
    return out


def multiply(
    x: Tensor, S: CodedMatrix, B: Tensor, A: Tensor, bias: Tensor | None = None, *,
    best: str | None = None,
) -> Tensor:  # fmt: skip
    """y = S x + B (A x) + b; nothing is differentiated.

    Args:
        x: (…, n), of :data:`KINDS`; for :func:`most` tokens or fewer, right for any number.
        S: the matrix.
        B, A: (m, k) and (k, n), the dtype of `x`, k may be 0.
        bias: (m,).
        best: as for :func:`rows_`.

    Returns:
        (…, m); sums are in float32, A x is rounded to the dtype; from 9 tokens on matrix units S
        is rounded to it as well.  Where x is not finite, y may be NaN.

    Cost: reads codes and factors once for each 8 tokens, or 512 on matrix units.
    """
    parts = _parts(S, B, A, bias)
    return OPERATOR(x, *parts) if best is None else _multiply(x, *parts, best=best)


def by_rows(x: Tensor, S: CodedMatrix, B: Tensor, A: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same for many tokens: 1024 rows of S at a time are unpacked, for torch to multiply.

    Cost: 2 tokens (m n + k (m + n)) FLOPs, and unpacking S once.
    """
    return _operator_by_rows(x, *_parts(S, B, A, bias))


def most(dtype: torch.dtype, group: int, columns: int) -> int:
    """Tokens up to which :func:`multiply` is faster than unpacking rows for torch to multiply.

    >>> most(torch.float32, 64, 4096)
    8
    """
    fits = group % 16 == 0 or group >= columns
    return TILED if fits and dtype == torch.bfloat16 and native.tiled() else FEW


def _parts(S: CodedMatrix, B: Tensor, A: Tensor, bias: Tensor | None) -> tuple:
    """What the operators take beside x."""
    return S.planes, S.scale, S.zero, S.mask, S.starts, B, A, bias, S.bits, S.group, S.kept


def _multiply(x: Tensor, *parts: Any, best: str | None = None) -> Tensor:
    planes, scale, zero, mask, starts, B, A, bias, bits, group, kept = parts
    (m, k), n = B.shape, x.shape[-1]
    y = x.new_empty(*x.shape[:-1], m)
    x, B, A, bias = native.alike(x, B, A, bias)
    struct = CodedMatrix((m, n), bits, planes, kept, scale, zero, group, mask, starts).struct()
    library().codes(
        native.DTYPES[x.dtype], chosen(best), torch.get_num_threads(), x.numel() // n,
        ctypes.addressof(struct), k, x.data_ptr(), B.data_ptr(), A.data_ptr(),
        None if bias is None else bias.data_ptr(), y.data_ptr(),
    )  # fmt: skip
    return y


def _by_rows(x: Tensor, *parts: Any) -> Tensor:
    planes, scale, zero, mask, starts, B, A, bias, bits, group, kept = parts
    m, n = len(B), x.shape[-1]
    S = CodedMatrix((m, n), bits, planes, kept, scale, zero, group, mask, starts)
    flat = x.reshape(-1, n)
    y, room = x.new_empty(len(flat), m), x.new_empty(min(ROWS, m), n)
    for top in range(0, m, ROWS):
        rows = rows_(room[: min(ROWS, m - top)], S, top)
        torch.mm(flat, rows.T, out=y[:, top : top + ROWS])
    if bias is not None:
        y += bias
    if B.shape[1]:
        y.addmm_(flat @ A.T, B.T)
    return y.view(*x.shape[:-1], m)


# Operators of torch, as slr::native in native.py; the second is in Python always.
def _define(name, function):
    schema = (
        "(Tensor x, Tensor planes, Tensor scale, Tensor? zero, Tensor? mask, Tensor? starts, "
        "Tensor B, Tensor A, Tensor? bias, int bits, int group, int kept) -> Tensor"
    )
    torch.library.define(name, schema)
    torch.library.impl(name, "default")(function)
    fake = lambda x, *parts: x.new_empty(*x.shape[:-1], parts[5].shape[0])  # noqa: E731
    torch.library.register_fake(name, fake)


_define("slr::native_codes", _multiply)
_define("slr::native_codes_by_rows", _by_rows)
OPERATOR = torch.ops.slr.native_codes.default
_operator_by_rows = torch.ops.slr.native_codes_by_rows.default
