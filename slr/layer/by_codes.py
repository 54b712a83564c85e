"""The part of a layer of codes that multiplies by our own kernels, and what these read.

Book: chapter 16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slr.layer import native, native_codes
from slr.layer.bits import unpack_codes
from slr.layer.linear import SLRLinear
from slr.layer.product import wants_operator
from slr.matrix.rounding import Grid

__all__ = ["ByCodes"]

ROWS = 1024  # of S unpacked at a time


class ByCodes(SLRLinear):
    """Base of :class:`~slr.layer.rounded.RoundedLinear`: its kernels on a CPU."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    grid: Grid
    _ready: tuple | None

    def _native(self, x: Tensor) -> bool:
        """Whether our kernels can be used: on a CPU, when nothing is differentiated or compiled."""
        if x.device.type != "cpu" or x.dtype not in native_codes.KINDS or self.is_meta:
            return False
        return not wants_operator(x, *self.parameters()) and not native.missing()

    def _prepared(self) -> tuple:
        """What our kernels read, made once: S as it lies, and B and A if they have codes."""
        if self._ready is None:
            zero, starts = None, None
            if self.zero is not None:
                zero = unpack_codes(self.zero, self.scale.numel()).contiguous()
            if self.bitmask is not None:
                starts = native.row_starts(self.bitmask, self._shape)
            group = self.grid.group or self.in_features
            parts = (self.bitmask, starts)
            S = native_codes.CodedMatrix(
                self._shape, self.grid.bits, self.codes, self.kept, self.scale, zero, group, *parts
            )
            low = None
            if "B" not in self._parameters and self.rank:
                low = self.B.float(), self.A.float()
            self._ready = (S, low, S.struct())
        return self._ready

    def _by_kernels(self, x: Tensor) -> Tensor:
        """y by our own kernels: few tokens from the codes, many from blocks of rows."""
        S, low, struct = self._prepared()
        flat, (m, n) = x.reshape(-1, self.in_features), self._shape
        if len(flat) <= native_codes.FEW:
            if low is None and self.rank:
                low = self.B.float(), self.A.float()
            y = native_codes.few_tokens(flat, S, self.bias, low, struct=struct)
            return y.view(*x.shape[:-1], m)
        y = flat.new_empty(len(flat), m)
        room = flat.new_empty(min(ROWS, m), n)
        for top in range(0, m, ROWS):
            rows = native_codes.rows_(room[: min(ROWS, m - top)], S, top)
            torch.mm(flat, rows.T, out=y[:, top : top + ROWS])
        if self.bias is not None:
            y += self.bias
        if self.rank:
            y.addmm_(flat @ self.A.T, self.B.T)
        return y.view(*x.shape[:-1], m)
