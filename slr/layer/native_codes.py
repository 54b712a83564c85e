"""Our own kernels for values that are codes: y = S x + b for few tokens, and rows of S, on a CPU.

They are in ``codes.cpp``, compiled with the others (:mod:`slr.layer.compiled`).  Book: chapter 16.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slr.layer.compiled import chosen, library

__all__ = ["FEW", "KINDS", "CodedMatrix", "few_tokens", "rows_"]

FEW = 8  # tokens up to which codes are multiplied as they lie
KINDS = {torch.bfloat16: 0, torch.float32: 2}  # as `Kind` in codes.cpp
PAD = 64


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
        KINDS[out.dtype], chosen(best), torch.get_num_threads(), ctypes.addressof(struct), top,
        len(out), out.data_ptr(),
    )  # fmt: skip
    return out


def few_tokens(
    x: Tensor, S: CodedMatrix, bias: Tensor | None = None,
    low: tuple[Tensor, Tensor] | None = None, *, struct: Any = None, best: str | None = None,
) -> Tensor:  # fmt: skip
    """y = S x + B (A x) + b, in the dtype of x, sums in float32; nothing is differentiated.

    Args:
        x: (tokens, n), of any float dtype; meant for up to :data:`FEW` tokens.
        S: the matrix.
        bias: (m,).
        low: B (m, k) and A (k, n) in float32, in which torch is quicker for few tokens.
        struct: of S, if it was made before.
        best: as for :func:`rows_`.

    Returns:
        (tokens, m).

    Cost: reads the codes once for each 8 tokens.
    """
    (m, n), tokens = S.shape, len(x)
    wide = -(-n // PAD) * PAD
    padded = x.float().contiguous()
    if wide > n:
        padded = torch.nn.functional.pad(padded, (0, wide - n))
    y = torch.empty(tokens, m)
    own = None if bias is None else bias.float().contiguous()
    struct = S.struct() if struct is None else struct
    library().codes_few(
        chosen(best), torch.get_num_threads(), ctypes.addressof(struct), tokens, wide,
        padded.data_ptr(), None if own is None else own.data_ptr(), y.data_ptr(),
    )  # fmt: skip
    if low is not None:
        y.addmm_(padded[:, :n] @ low[1].T, low[0].T)
    return y.to(x.dtype)
