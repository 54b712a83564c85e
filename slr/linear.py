"""One layer: y = S x + B (A x) + b.

Book: chapter 5.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from slr.checks import check_mask, check_matrix
from slr.packing import pack_mask, unpack
from slr.patterns import Pattern, parse
from slr.refine import Refined

__all__ = ["SLRLinear"]


class SLRLinear(nn.Module):
    """A linear layer whose matrix is sparse + low rank.

    Attributes:
        weight: S, (out, in), zero off the mask.
        B, A: factors (out, k) and (k, in); k may be 0 (pruned, not repaired).
        bias: (out,) or ``None``.
        mask: bool (out, in), True = kept; a buffer that is not saved with the state.
        pattern: the :class:`~slr.patterns.Pattern` of the mask, or ``None``.

    Cost of a forward pass: 2 nnz(S) + 2 k (in + out) FLOPs a token in principle; S is held
    dense here, so 2 · in · out + 2 k (in + out) are done.

    >>> layer = SLRLinear(torch.eye(3), torch.ones(3, 1), torch.ones(1, 3))
    >>> print(layer(torch.tensor([1.0, 2.0, 3.0])))
    tensor([7., 8., 9.], grad_fn=<AddBackward0>)
    """

    def __init__(
        self,
        weight: Tensor,
        B: Tensor | None = None,
        A: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        pattern: str | Pattern | None = None,
    ) -> None:
        super().__init__()
        check_matrix("weight", weight)
        m, n = weight.shape
        B = weight.new_zeros(m, 0) if B is None else B
        A = weight.new_zeros(0, n) if A is None else A
        if B.shape != (m, A.shape[0]) or A.shape[1] != n:
            raise ValueError(
                f"B has shape {tuple(B.shape)} and A {tuple(A.shape)}; for a weight of shape "
                f"{(m, n)} they must be ({m}, k) and (k, {n})"
            )
        if bias is not None and bias.shape != (m,):
            raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be ({m},)")
        mask = weight != 0 if mask is None else mask
        check_mask(mask, weight)
        if bool(weight[~mask].any()):
            raise ValueError("weight is not zero off the mask")
        self.pattern = None if pattern is None else parse(pattern)
        self.weight = nn.Parameter(weight)
        self.B = nn.Parameter(B)
        self.A = nn.Parameter(A)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.register_buffer("mask", mask, persistent=False)

    mask: Tensor
    values: Tensor
    bitmask: Tensor
    _shape: tuple[int, int]

    @classmethod
    def from_refined(
        cls,
        refined: Refined,
        bias: Tensor | None = None,
        *,
        pattern: str | Pattern | None = None,
    ) -> SLRLinear:
        """The layer of a :class:`~slr.refine.Refined` matrix.

        Args:
            refined: sparse (m, n), B (m, k), A (k, n), mask (m, n).
            bias: (m,).
            pattern: for the record.
        """
        S, B, A, _trace, mask = refined
        return cls(S, B, A, bias, mask=mask, pattern=pattern)

    @classmethod
    def placeholder(
        cls,
        shape: tuple[int, int],
        rank: int,
        kept: int,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str = "meta",
        pattern: str | Pattern | None = None,
    ) -> SLRLinear:
        """A layer to be filled by a loader, with the parameters of :meth:`packed`.

        It cannot run before :meth:`unpack_`.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        m, n = shape

        def room(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(size, dtype=dtype, device=device), False)

        layer.values, layer.B, layer.A = room(kept), room(m, rank), room(rank, n)
        layer.bias = room(m) if bias else None
        bits = torch.empty((m * n + 7) // 8, dtype=torch.uint8, device=device)
        layer.register_buffer("bitmask", bits)
        layer.pattern = None if pattern is None else parse(pattern)
        layer._shape = (m, n)
        return layer

    def packed(self) -> dict[str, Tensor]:
        """What is stored: ``values``, ``bitmask``, ``B``, ``A`` and ``bias`` if there is one."""
        stored = {"values": self.weight.data[self.mask], "bitmask": pack_mask(self.mask)}
        stored |= {"B": self.B.data, "A": self.A.data}
        return stored if self.bias is None else {**stored, "bias": self.bias.data}

    def unpack_(self) -> SLRLinear:
        """Make a filled placeholder a layer that runs, in place; returns it.

        Raises:
            ValueError: its values and bitmask do not belong together.
        """
        S, mask = unpack(self.values.data, self.bitmask, self._shape)
        del self.values, self.bitmask, self._shape
        self.weight = nn.Parameter(S)
        self.register_buffer("mask", mask, persistent=False)
        return self

    @property
    def in_features(self) -> int:
        """Number of inputs, n."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """Number of outputs, m."""
        return self.weight.shape[0]

    @property
    def rank(self) -> int:
        """Rank k of the low-rank part, 0 if there is none."""
        return self.A.shape[0]

    def dense(self) -> Tensor:
        """S + B A as one (out, in) matrix."""
        return torch.addmm(self.weight, self.B, self.A)

    def forward(self, x: Tensor) -> Tensor:
        """y = S x + B (A x) + b for x of shape (…, in)."""
        y = linear(x, self.weight, self.bias)
        return y + linear(linear(x, self.A), self.B) if self.rank else y

    def extra_repr(self) -> str:
        """Shape, pattern and rank."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"pattern={self.pattern}, rank={self.rank}, bias={self.bias is not None}"
        )
