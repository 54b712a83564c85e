"""The part of a layer of codes that multiplies by our own kernels, and what these read.

Book: chapter 18.
"""

from __future__ import annotations

from torch import Tensor

from slr.layer import native, native_codes
from slr.layer.bits import unpack_codes
from slr.layer.linear import SLRLinear
from slr.layer.native_codes import CodedMatrix
from slr.layer.product import differentiates
from slr.matrix.rounding import Grid

__all__ = ["ByCodes"]


class ByCodes(SLRLinear):
    """Base of :class:`~slr.layer.rounded.RoundedLinear`: its kernels on a CPU.

    Attributes:
        ready: S as our kernels read it, and B and A as numbers if they have codes; ``None`` where
            there are no kernels.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    grid: Grid
    ready: tuple[CodedMatrix, Tensor | None, Tensor | None] | None

    @property
    def coded_factors(self) -> bool:
        """Whether B and A are stored as codes."""
        return "B" not in self._parameters

    def _prepare(self) -> None:
        """Make ready for our kernels, where the tensors are now."""
        self.ready = None
        if self.codes.device.type != "cpu" or native.missing() or self.backend == "dense":
            return
        zero, starts, mine = None, None, self.coded_factors and self.rank > 0
        if self.zero is not None:
            zero = unpack_codes(self.zero, self.scale.numel()).contiguous()
        if self.bitmask is not None:
            starts = native.row_starts(self.bitmask, self._shape)
        group = min(self.grid.group or self.in_features, self.in_features)
        S = CodedMatrix(
            self._shape, self.grid.bits, self.codes, self.kept, self.scale, zero, group,
            self.bitmask, starts,
        )  # fmt: skip
        self.ready = S, self.B if mine else None, self.A if mine else None
        self.most = native_codes.most(self.dtype, group, self.in_features)

    def _native(self, x: Tensor) -> bool:
        """Whether our kernels can be used: on a CPU, when nothing is differentiated."""
        if self.ready is None or x.device.type != "cpu" or x.dtype not in native_codes.KINDS:
            return False
        return not differentiates(x, *self._parameters.values())

    def _by_kernels(self, x: Tensor) -> Tensor:
        """y by our own kernels."""
        assert self.ready is not None
        S, B, A = self.ready
        B, A = self.B if B is None else B, self.A if A is None else A
        few = x.numel() <= self.most * self.in_features
        return (native_codes.multiply if few else native_codes.by_rows)(x, S, B, A, self.bias)
