"""One layer: y = S x + B (A x) + b, with S as it is stored.

Book: chapters 5 and 17.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from slr.layer.backed import Backed
from slr.layer.backends import sparse_cores
from slr.layer.bits import pack_mask, unpack_mask
from slr.layer.few import few_tokens
from slr.layer.packing import check_packed
from slr.layer.product import dense, sparse_linear
from slr.layer.readonly import read_only
from slr.layer.sparse24 import TWO_FOUR, check_two_four, is_two_four
from slr.matrix.checks import check_mask, check_matrix
from slr.matrix.patterns import NM, Pattern, parse
from slr.matrix.pruners import PRUNERS, Known, Pruner, step_of
from slr.matrix.result import Refined
from slr.matrix.statistics import GramStatistic, NormStatistic
from slr.matrix.steps import REPAIRS, NoRepair, Repair, prune_and_repair

__all__ = ["SLRLinear"]


class SLRLinear(Backed):
    """A linear layer whose matrix is sparse + low rank.

    Args:
        weight: S (out, in), zero off the mask.
        B, A: factors (out, k) and (k, in), k = 0 if left out.
        bias: (out,).
        mask: bool (out, in), True = kept; by default where `weight` is not zero, and for an n:m
            pattern n of every m.
        pattern: of the mask, for the record; 2:4 is checked.

    Attributes:
        values: the kept weights (kept,), row by row; what is trained of S.
        bitmask: the mask, a bit an entry, uint8; see :mod:`slr.layer.packing`.
        B, A, bias: as above; ``bias`` may be ``None``.
        out_features, in_features: m and n.
        pattern: the :class:`~slr.matrix.patterns.Pattern` of the mask, or ``None``.
        two_four: whether the mask keeps 2 of every 4.

    State dicts hold ``values``, ``bitmask``, ``B``, ``A`` and ``bias``, as the files do.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a weight that is not zero off its
            mask, or a 2:4 pattern whose mask does not keep 2 of every 4.

    Cost of a forward pass: 2 · in · out + 2 k (in + out) FLOPs a token, and unpacking S once,
        row block by row block.  Memory: packed.

    >>> layer = SLRLinear(torch.eye(3), torch.ones(3, 1), torch.ones(1, 3))
    >>> print(layer(torch.tensor([1.0, 2.0, 3.0])).detach())
    tensor([7., 8., 9.])
    """

    cached: Tensor | None
    bias: Tensor | None

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
        weight = weight.detach()
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
        self.pattern = None if pattern is None else parse(pattern)
        if mask is None:
            mask = weight != 0
            if isinstance(self.pattern, NM):  # a kept weight may be zero
                mask = self.pattern.select(mask.float())
        check_mask(mask, weight)
        if bool(weight[~mask].any()):
            raise ValueError("weight is not zero off the mask")
        self.values = nn.Parameter(weight[mask])
        self.B = nn.Parameter(B)
        self.A = nn.Parameter(A)
        self.bias = None if bias is None else nn.Parameter(bias.contiguous())
        self.register_buffer("bitmask", pack_mask(mask))
        self._rooms()
        self.check_()

    @classmethod
    def from_refined(
        cls, refined: Refined, bias: Tensor | None = None, *, pattern: str | Pattern | None = None
    ) -> SLRLinear:
        """The layer of a :class:`~slr.matrix.result.Refined` matrix.

        Args:
            refined: sparse (m, n), B (m, k), A (k, n), mask (m, n).
            bias: (m,).
            pattern: for the record.
        """
        S, B, A = refined[:3]
        return cls(S, B, A, bias, mask=refined.mask, pattern=pattern)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        prune: str | Pruner = "magnitude",
        pattern: str | float | Pattern = "2:4",
        refine: str | Repair | NoRepair = "weights",
        statistic: NormStatistic | GramStatistic | None = None,
        **options: Any,
    ) -> SLRLinear:
        """A dense layer, pruned and repaired; it is not changed.

        Args:
            linear: with a weight (out, in).
            prune, pattern, refine: by name or as objects, as for :class:`slr.Recipe`.
            statistic: of the layer's inputs, from :func:`slr.observe`, for steps that look at data.
            options: of the repair, as ``rank``; by default 1/32 of the inputs.

        >>> SLRLinear.from_linear(nn.Linear(64, 32), rank=2)
        SLRLinear(in_features=64, out_features=32, pattern=2:4, rank=2, bias=True)
        """
        repair = step_of("refine", refine, REPAIRS, options).resolved(linear.in_features)
        pruner, wanted = step_of("prune", prune, PRUNERS, {}), parse(pattern)
        known = Known.of(statistic)
        made = prune_and_repair(linear.weight.detach(), pruner, wanted, repair, known).refined
        bias = None if linear.bias is None else linear.bias.detach()
        return cls.from_refined(made, bias, pattern=wanted)

    @classmethod
    def placeholder(
        cls, shape: tuple[int, int], rank: int, kept: int, bias: bool, dtype: torch.dtype,
        device: torch.device | str = "meta", pattern: str | Pattern | None = None,
    ) -> SLRLinear:  # fmt: skip
        """A layer to be filled by a loader, which calls :meth:`check_` when it has."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        m, n = shape

        def room(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(size, dtype=dtype, device=device), False)

        layer.values, layer.B, layer.A = room(kept), room(m, rank), room(rank, n)
        layer.bias = room(m) if bias else None
        bits = torch.empty((m * n + 7) // 8, dtype=torch.uint8, device=device)
        layer.register_buffer("bitmask", bits)
        layer._rooms()
        layer.pattern = None if pattern is None else parse(pattern)
        layer.two_four = False
        return layer

    def _rooms(self) -> None:
        self.out_features, self.in_features = len(self.B), self.A.shape[1]
        self.register_buffer("cached", None, persistent=False)
        self.register_buffer("form", None, persistent=False)
        self.starts = None

    def check_(self) -> SLRLinear:
        """Look at values and bitmask after they have been set, and make ready; returns the layer.

        Raises:
            ValueError: they do not belong together, or are not of a 2:4 pattern that they should
                be of.
        """
        check_packed(self.values.data, self.bitmask, self._shape)
        self._alike(self.values.device)
        if self.pattern == TWO_FOUR:
            check_two_four(self.bitmask, self._shape)
        self.two_four = is_two_four(self.bitmask, self._shape)
        self.cached = None
        self._prepare()
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not self.is_meta:
            try:
                self.check_()
            except ValueError as error:
                errors: list[str] = args[-1]
                errors.append(f"{prefix.rstrip('.')}: {error}")

    @property
    def kept(self) -> int:
        """How many entries S keeps."""
        return self.values.numel()

    @property
    def is_meta(self) -> bool:
        """Whether it is a placeholder, or partly."""
        return self.values.is_meta or self.bitmask.is_meta

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Of S and of what is computed."""
        return self.values.dtype

    @property
    def rank(self) -> int:
        """Rank k of the low-rank part, 0 if there is none."""
        return self.A.shape[0]

    @property
    def weight(self) -> Tensor:
        """S (out, in), unpacked: a new tensor, not to be written; gradients reach ``values``."""
        return read_only(self._unpacked())

    def _unpacked(self) -> Tensor:
        return dense(self.values, self.bitmask, *self._shape, self.two_four)

    @property
    def mask(self) -> Tensor:
        """Bool (out, in), True = kept: a new tensor, not to be written."""
        return read_only(unpack_mask(self.bitmask, self._shape))

    def packed(self) -> dict[str, Tensor]:
        """What is stored: ``values``, ``bitmask``, ``B``, ``A`` and ``bias`` if there is one."""
        stored = {"values": self.values.data, "bitmask": self.bitmask}
        stored |= {"B": self.B.data, "A": self.A.data}
        return stored if self.bias is None else {**stored, "bias": self.bias.data}

    def dense(self) -> Tensor:
        """S + B A as one (out, in) matrix."""
        return torch.addmm(self._unpacked(), self.B, self.A)

    def cache_(self, on: bool = True) -> SLRLinear:
        """Hold S unpacked as well, or no longer; returns the layer.

        As fast as a dense layer where our CPU kernels are missing, at the memory of one and more.
        S is taken to be constant from then on: ``values`` asks for no gradient.
        """
        if on:
            self.values.requires_grad_(False)
        self.cached = self._unpacked() if on else None
        return self

    def forward(self, x: Tensor) -> Tensor:
        """y = S x + B (A x) + b for x of shape (…, in).

        On a GPU the backend goes by the tokens, that is, by the product of all dimensions of x
        but the last; see :meth:`choice`.

        Raises:
            ValueError: x has another width, or (outside autocast) another dtype than S.
        """
        values, bias, cached = self.values, self.bias, self.cached
        B, A, m, n = self.B, self.A, self.out_features, self.in_features
        x = self._received(x)
        if x.dtype != values.dtype:  # autocast
            values = values.to(x.dtype)
            bias, cached = (None if part is None else part.to(x.dtype) for part in (bias, cached))
        if not values.numel() and self.rank:  # W = B A
            return linear(linear(x, A), B, bias)
        name = self._backend(x, values) if cached is None else ""
        if name in ("native", "triton"):
            S = (values, self.bitmask, self.starts)
            return few_tokens(x, *S, B, A, bias, self.two_four, name)
        flat = x.reshape(-1, n)
        if cached is not None:
            y = linear(flat, cached, bias)
        elif self.form is not None and name in ("cutlass", "cusparselt"):
            y = sparse_cores(flat, values, self.bitmask, self.form, bias, m, name)
        else:
            y = sparse_linear(flat, values, self.bitmask, bias, m, self.two_four)
        if self.rank:
            y.addmm_(linear(flat, A), B.T.to(y.dtype))
        return y.view(*x.shape[:-1], m)

    def extra_repr(self) -> str:
        """Shape, pattern and rank."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"pattern={self.pattern}, rank={self.rank}, bias={self.bias is not None}"
        )
