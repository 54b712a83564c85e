"""One layer whose values are codes of a few bits: y = S x + B (A x) + b, S on a grid.

=============== ===================== ==========================================
tensor          shape                 what
=============== ===================== ==========================================
``codes``       (bits, ⌈kept / 8⌉)    those of the kept entries, row by row, a plane for each bit,
                                      lowest first; (1, kept), whole bytes, for 8 bits
``scale``       (m, groups)           of each group, bfloat16 as int16
``zero``        (bits, ⌈m groups/8⌉)  the code of 0 in each, packed likewise; absent for a symmetric
                                      grid
``bitmask``     (⌈m n / 8⌉,)          the mask; absent if all entries are kept
``B_codes``     (k, m)                of Bᵀ, and ``A_codes`` (k, n), bytes, where they have codes,
``B_scale``     (k,)                  and ``A_scale``; else ``B`` and ``A`` as in other layers
=============== ===================== ==========================================

Scales are stored as integers so that no loader casts them.  Packing and unpacking are exact.
Book: chapter 18.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from slr.layer.bits import pack_codes, pack_mask, unpack_codes, unpack_mask
from slr.layer.by_codes import ByCodes
from slr.layer.linear import SLRLinear
from slr.layer.readonly import read_only
from slr.matrix.checks import check_choice, check_mask
from slr.matrix.patterns import Pattern, parse
from slr.matrix.result import Refined
from slr.matrix.rounding import Grid, Levels, Rounded, as_grid

__all__ = ["RoundedLinear", "factor", "layer_of"]


def layer_of(
    refined: Refined, bias: Tensor | None = None, *, pattern: str | Pattern | None = None
) -> SLRLinear:
    """The layer of a refined matrix: a :class:`RoundedLinear` if that has codes.

    Args:
        refined: of (m, n).
        bias: (m,).
        pattern: for the record.
    """
    if refined.coded is None:
        return SLRLinear.from_refined(refined, bias, pattern=pattern)
    return RoundedLinear(refined, bias, pattern=pattern)


def factor(name: str, codes: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """B (whose codes are of Bᵀ) or A, in float32, from the tensors of this name."""
    values = _rounded(codes, scale, grid).values()
    return values.T.contiguous() if name == "B" else values


def _rounded(codes: Tensor, scale: Tensor, grid: Grid) -> Rounded:
    steps = _scale(scale)[:, None]
    return Rounded(codes, Levels(steps, torch.full_like(steps, 2 ** (grid.bits - 1))), grid)


def _scale(stored: Tensor) -> Tensor:
    return stored.view(torch.bfloat16).float()


class RoundedLinear(ByCodes):
    """A linear layer whose matrix is S + B A with S on a grid, and perhaps B and A too.

    It is used and stored like any :class:`~slr.layer.linear.SLRLinear`; `values`, and `B` and `A`
    if they are rounded, are computed from the codes whenever they are asked for.

    Args:
        refined: with its codes, from :func:`slr.refine`.
        bias: (out,).
        pattern: of the mask, for the record.

    Attributes:
        grid: of S.
        factors: of A and Bᵀ, or ``None``.

    Cost of a forward pass: 2 · in · out + 2 k (in + out) FLOPs a token; on a CPU the codes are
        read once for a few tokens, else S is unpacked, on a CPU some rows at a time.  Memory:
        packed; on a CPU also B and A as floats once they were used.

    >>> import slr
    >>> W = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    >>> layer = layer_of(slr.refine(W, None, 1, grid="int4 by 8", factors="int8"))
    >>> layer
    RoundedLinear(in_features=16, out_features=8, grid=int4 by 8, factors=int8, rank=1, bias=False)
    >>> bool((layer.dense() - W).norm() < 0.2 * W.norm())
    True
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    like: Tensor
    grid: Grid
    factors: Grid | None

    def __init__(
        self, refined: Refined, bias: Tensor | None = None, *,
        pattern: str | Pattern | None = None,
    ) -> None:  # fmt: skip
        coded, mask = refined.coded, refined.mask
        assert coded is not None
        check_mask(mask, coded.sparse.codes)
        m, n = mask.shape
        if bias is not None and bias.shape != (m,):
            raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be ({m},)")
        kept = int(mask.sum())
        self._make(
            (m, n), refined.A.shape[0], kept, bias is not None,
            refined.sparse.dtype, mask.device, pattern, coded.sparse.grid,
            None if coded.B is None else coded.B.grid,
        )  # fmt: skip
        scale, zero = coded.sparse.levels
        self.codes = pack_codes(coded.sparse.codes[mask], self.grid.bits)
        self.scale = scale.bfloat16().view(torch.int16)
        if self.zero is not None:
            self.zero = pack_codes(zero.to(torch.uint8).flatten(), self.grid.bits)
        if self.bitmask is not None:
            self.bitmask = pack_mask(mask)
        if coded.B is None or coded.A is None:
            self._parameters |= {"B": nn.Parameter(refined.B), "A": nn.Parameter(refined.A)}
        else:
            for name, part in (("B", coded.B), ("A", coded.A)):
                setattr(self, f"{name}_codes", part.codes.contiguous())
                setattr(self, f"{name}_scale", part.levels.scale[:, 0].bfloat16().view(torch.int16))
        if bias is not None:
            self.bias = nn.Parameter(bias.contiguous())
        self._alike(self.codes.device)
        self._prepare()

    @classmethod
    def room(
        cls, shape: tuple[int, int], rank: int, kept: int, bias: bool, dtype: torch.dtype,
        device: torch.device | str = "meta", *, pattern: str | Pattern | None = None,
        grid: Grid | str, factors: Grid | str | None = None,
    ) -> RoundedLinear:  # fmt: skip
        """A layer to be filled by a loader, which calls :meth:`check_` when it has."""
        layer = cls.__new__(cls)
        layer._make(
            shape, rank, kept, bias, dtype, torch.device(device), pattern,
            as_grid(grid), as_grid(factors),
        )  # fmt: skip
        return layer

    def _make(
        self, shape: tuple[int, int], rank: int, kept: int, bias: bool, dtype: torch.dtype,
        device: torch.device, pattern: str | Pattern | None, grid: Grid | None,
        factors: Grid | None,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        assert grid is not None
        (m, n), self.grid, self.factors = shape, grid, factors
        self.out_features, self.in_features, self._kept = m, n, kept
        self.pattern = None if pattern is None else parse(pattern)
        self.two_four, self.form, self.starts = False, None, None
        groups = -(-n // (grid.group or n))

        def room(*size: int, kind: torch.dtype = torch.uint8) -> Tensor:
            return torch.empty(size, dtype=kind, device=device)

        def planes(count: int) -> Tensor:
            return room(1, count) if grid.bits == 8 else room(grid.bits, -(-count // 8))

        self.register_buffer("codes", planes(kept))
        self.register_buffer("scale", room(m, groups, kind=torch.int16))
        self.register_buffer("zero", None if grid.symmetric else planes(m * groups))
        self.register_buffer("bitmask", None if kept == m * n else room(-(-m * n // 8)))
        if factors is None or not rank:
            for name, size in (("B", (m, rank)), ("A", (rank, n))):
                self._parameters[name] = nn.Parameter(room(*size, kind=dtype), False)
        else:
            for name, long in (("B", m), ("A", n)):
                self.register_buffer(f"{name}_codes", room(rank, long))
                self.register_buffer(f"{name}_scale", room(rank, kind=torch.int16))
        self.bias = nn.Parameter(room(m, kind=dtype), False) if bias else None
        self.ready = None
        self.register_buffer("like", room(0, kind=dtype), persistent=False)
        self.register_buffer("cached", None, persistent=False)

    def check_(self) -> RoundedLinear:
        """Look at the tensors after they have been set; returns the layer.

        Raises:
            ValueError: they do not belong together.
        """
        count = self.in_features * self.out_features
        if self.bitmask is not None:
            kept = int(unpack_mask(self.bitmask, (count,)).sum())
            if kept != self.kept:
                raise ValueError(f"there are {self.kept} codes, but the bitmask keeps {kept}")
        scales = [self.scale] + [getattr(self, f"{n}_scale") for n in "BA" if self.coded_factors]
        for scale in scales:
            values = _scale(scale)
            if not bool((values.isfinite() & (values > 0)).all()):
                raise ValueError("a scale is not a finite number above 0")
        self._alike(self.codes.device)
        self.cached = None
        self._prepare()
        return self

    @property
    def is_meta(self) -> bool:
        """Whether it is a placeholder."""
        return self.codes.is_meta

    @property
    def kept(self) -> int:
        """How many entries S keeps."""
        return self._kept

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Of what is computed."""
        return self.like.dtype

    @property
    def rank(self) -> int:
        """Rank k of the low-rank part, 0 if there is none."""
        return (self._buffers["A_codes"] if self.coded_factors else self.A).shape[0]  # type: ignore[union-attr]

    @property
    def B(self) -> Tensor:  # type: ignore[override]  # noqa: N802
        """The factor (out, k)."""
        return self._factor("B")

    @property
    def A(self) -> Tensor:  # type: ignore[override]  # noqa: N802
        """The factor (k, in)."""
        return self._factor("A")

    def _factor(self, name: str) -> Tensor:
        if not self.coded_factors:
            return self._parameters[name]  # type: ignore[return-value]
        values = self.coded_factor(name).values().to(self.dtype)
        return values.T.contiguous() if name == "B" else values

    def coded_factor(self, name: str) -> Rounded:
        """A, or of B the transpose, as codes, where they are stored so."""
        assert self.factors is not None
        return _rounded(
            getattr(self, f"{name}_codes"), getattr(self, f"{name}_scale"), self.factors
        )

    def free_factors_(self) -> RoundedLinear:
        """Hold B and A as parameters, so that they can be written; returns the layer."""
        if self.coded_factors:
            found = {name: self._factor(name) for name in "BA"}
            for name, value in found.items():
                del self._buffers[f"{name}_codes"], self._buffers[f"{name}_scale"]
                self._parameters[name] = nn.Parameter(value)
            self.factors = None
            self._prepare()
        return self

    @property
    def mask(self) -> Tensor:
        """Bool (out, in), True = kept: a new tensor, not to be written."""
        if self.bitmask is None:
            return torch.ones(self._shape, dtype=torch.bool, device=self.codes.device)
        return read_only(unpack_mask(self.bitmask, self._shape))

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """The kept values (kept,), row by row: a new tensor, not to be written."""
        if self.is_meta:
            return torch.empty(self.kept, dtype=self.dtype, device="meta")
        return read_only(self._unpacked()[self.mask])

    def rounded(self) -> Rounded:
        """S as codes (m, n); those off the mask are of 0."""
        flat = unpack_codes(self.codes, self.kept)
        scale = _scale(self.scale)
        middle = scale.new_tensor(2.0 ** (self.grid.bits - 1)).expand_as(scale)
        if self.zero is not None:
            middle = unpack_codes(self.zero, scale.numel()).view_as(scale).float()
        levels = Levels(scale, middle)
        if self.bitmask is None:
            return Rounded(flat.view(self._shape), levels, self.grid)
        codes = levels.spread(self.grid, self.in_features).zero.to(torch.uint8)
        codes[self.mask] = flat
        return Rounded(codes, levels, self.grid)

    def _unpacked(self) -> Tensor:
        return self.rounded().values().to(self.dtype)

    def packed(self) -> dict[str, Tensor]:
        """What is stored, by the names above, and ``bias`` if there is one."""
        return {name: tensor.data for name, tensor in self.state_dict().items()}

    def cache_(self, on: bool = True) -> RoundedLinear:
        """Hold S unpacked as well, or no longer; returns the layer."""
        self.cached = self._unpacked() if on else None
        return self

    def use_(self, backend: str) -> RoundedLinear:
        """``"dense"`` unpacks the codes always, ``"auto"`` where our kernels cannot read them."""
        check_choice("backend (of codes)", backend, ("auto", "dense"))
        self.backend = backend
        self._prepare()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> RoundedLinear:
        nn.Module._apply(self, fn, recurse)
        self._prepare()
        return self

    def __getstate__(self) -> dict:
        return {**self.__dict__, "ready": None}

    def __setstate__(self, state: dict) -> None:
        nn.Module.__setstate__(self, state)
        self._prepare()

    def forward(self, x: Tensor) -> Tensor:
        """y = S x + B (A x) + b for x of shape (…, in).

        Raises:
            ValueError: x has another width, or (outside autocast) another dtype than the layer.
        """
        x = self._received(x)
        to = x.dtype
        if self.cached is None and to == self.dtype and self._native(x):
            return self._by_kernels(x)
        S = (self._unpacked() if self.cached is None else self.cached).to(to)
        y = linear(x, S, None if self.bias is None else self.bias.to(to))
        if self.rank:
            y = y + linear(linear(x, self.A.to(to)), self.B.to(to))
        return y

    def extra_repr(self) -> str:
        """Shape, pattern, grids and rank."""
        pattern = "" if self.bitmask is None else f"pattern={self.pattern}, "
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {pattern}"
            f"grid={self.grid}, factors={self.factors}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )
