"""A grid: the values that a weight of a few bits may take, and a matrix rounded to them.

A model of b bits a weight is 16 / b times smaller than in bfloat16, whoever made it so; what is
pruned and repaired has to be held against what is only rounded, at the same bytes.  A grid is also
what the other part of W ≈ S + B A may have to lie on, instead of a mask or besides one
(:mod:`slr.matrix.alternation`).  Book: chapter 18.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from slr.matrix.checks import check_integer, check_matrix

__all__ = ["Grid", "Levels", "Rounded", "as_grid"]

SCALE = 16  # bits of a scale, bfloat16
CLIPS = 16  # shares of a group's range that are tried, from 1 down to a half


class Levels(NamedTuple):
    """The grids of all groups of a matrix (m, n): value = (code - zero) · scale.

    `scale` (m, groups), float32 but representable in bfloat16, above 0; `zero` (m, groups), the
    code of value 0, whole numbers in float32; groups = ⌈n / group⌉.
    """

    scale: Tensor
    zero: Tensor

    def spread(self, grid: Grid, n: int) -> Levels:
        """One for each entry: both (m, n)."""
        width = grid.group or n
        return Levels(*(each.repeat_interleave(width, 1)[:, :n] for each in self))


class Rounded(NamedTuple):
    """A matrix as codes: `codes` uint8 (m, n), the `levels` of its groups, and the `grid`."""

    codes: Tensor
    levels: Levels
    grid: Grid

    def values(self) -> Tensor:
        """The matrix (m, n) in float32.

        Cost: one pass.
        """
        scale, zero = self.levels.spread(self.grid, self.codes.shape[1])
        return (self.codes.float() - zero).mul_(scale)

    def times(self, unit: float) -> Rounded:
        """The same times a power of two."""
        return self._replace(levels=Levels(self.levels.scale * unit, self.levels.zero))


@dataclass(frozen=True)
class Grid:
    """The values that the weights of a group may take: 2^bits of them, evenly spaced.

    Args:
        bits: of a weight, from 2 to 8.
        group: consecutive inputs of a row that share a scale; ``None`` is the whole row.
        symmetric: whether zero is in the middle, so that there is no offset to store.  By default
            that of a whole row is, and that of a group is not.

    Raises:
        ValueError, TypeError: out of range, or no integers; whole rows that are not symmetric.

    Source: round to nearest, the baseline of GPTQ (Frantar et al. 2023) and every later paper.

    >>> print(Grid(2, group=2).nearest(torch.tensor([[0.9, 3.0, -1.0, 2.0]])))
    tensor([[ 1.,  3., -1.,  2.]])
    >>> print(Grid(4, 32), Grid.parse("int8"), Grid(4, 32).bits_per_weight)
    int4 by 32 int8 4.625
    """

    bits: int
    group: int | None = None
    symmetric: bool | None = None

    def __post_init__(self) -> None:
        check_integer("bits", self.bits)
        check_integer("group", 2 if self.group is None else self.group)
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits is {self.bits}; it must be from 2 to 8")
        if self.group is not None and self.group < 2:
            raise ValueError(f"group is {self.group}; it must be 2 or more")
        if self.symmetric is None:
            object.__setattr__(self, "symmetric", self.group is None)
        if self.group is None and not self.symmetric:
            raise ValueError("a grid of whole rows has no offset; give a group, or symmetric=True")

    @classmethod
    def parse(cls, text: str) -> Grid:
        """The grid of a name; the inverse of ``str``.

        Raises:
            ValueError: it is no name of one.
        """
        found = re.fullmatch(r"int(\d)(?: by (\d+))?( symmetric)?", text)
        if not found:
            raise ValueError(f"rounding {text!r} is unknown; it must be as int8 or int4 by 32")
        group = None if found[2] is None else int(found[2])
        return cls(int(found[1]), group, True if found[3] else None)

    def __str__(self) -> str:
        if self.group is None:
            return f"int{self.bits}"
        return f"int{self.bits} by {self.group}" + (" symmetric" if self.symmetric else "")

    @property
    def bits_per_weight(self) -> float:
        """With the scales and offsets of its groups; those of whole rows are not counted."""
        offset = 0 if self.symmetric else self.bits
        return self.bits + (0 if self.group is None else (SCALE + offset) / self.group)

    @property
    def codes(self) -> tuple[int, int]:
        """The least and the largest code."""
        return int(bool(self.symmetric)), 2**self.bits - 1

    def levels(self, weight: Tensor, loudness: Tensor | None = None) -> Levels:
        """The grids that suit the groups of a matrix.

        Args:
            weight: (m, n), finite.
            loudness: (n,), how much an error in each column weighs.  Given, less than the range
                of a group is tried too, for a finer grid may be worth a clipped weight, and the
                least weighed square error counts; without it, all of the range is covered.

        Cost: a few passes; with `loudness` about 10 for each of `CLIPS`.
        """
        parts = self._grouped(weight)
        low, high = parts.amin(-1), parts.amax(-1)
        if loudness is None:
            return self._covering(low, high)
        loud = functional.pad(loudness.float(), (0, -weight.shape[1] % parts.shape[-1]))
        loud = loud.view(1, -1, parts.shape[-1])
        best, least = self._covering(low, high), torch.full_like(low, torch.inf)
        for clip in torch.linspace(1, 0.5, CLIPS).tolist():
            tried = self._covering(low * clip, high * clip)
            scale, zero = tried.scale[..., None], tried.zero[..., None]
            near = (parts / scale).round_().add_(zero).clamp_(*self.codes).sub_(zero).mul_(scale)
            error = near.sub_(parts).square_().mul_(loud).sum(-1)
            better = error < least
            least = torch.where(better, error, least)
            best = Levels(*(torch.where(better, a, b) for a, b in zip(tried, best, strict=True)))
        return best

    def _grouped(self, weight: Tensor) -> Tensor:
        """(m, groups, width) in float32; a short last group is filled with its last value."""
        m, n = weight.shape
        width = self.group or n
        work = functional.pad(weight.detach().float(), (0, -n % width), mode="replicate")
        return work.view(m, -1, width)

    def _covering(self, low: Tensor, high: Tensor) -> Levels:
        """Of grids from `low` to `high`; zero is on them."""
        least, most = self.codes
        if self.symmetric:
            scale = _scale(torch.maximum(high, -low) * 2 / (most - least))
            return Levels(scale, torch.full_like(scale, (most + 1) // 2))
        low, high = low.clamp_max(0), high.clamp_min(0)
        scale = _scale((high - low) / most)
        return Levels(scale, (-low / scale).round_().clamp_(0, most))

    def rounded(self, weight: Tensor, levels: Levels | None = None) -> Rounded:
        """A matrix (m, n) rounded to the nearest codes.

        Cost: a few passes.
        """
        levels = self.levels(weight) if levels is None else levels
        scale, zero = levels.spread(self, weight.shape[1])
        codes = (weight.detach().float() / scale).round_().add_(zero).clamp_(*self.codes)
        return Rounded(codes.to(torch.uint8), levels, self)

    @torch.no_grad()
    def nearest(self, weight: Tensor) -> Tensor:
        """The matrix (m, n) rounded, as values in its own dtype.

        Raises:
            ValueError, TypeError: not a finite floating-point matrix.

        Cost: a few passes.
        """
        check_matrix("weight", weight)
        return self.rounded(weight).values().to(weight.dtype)


def as_grid(grid: Grid | str | None) -> Grid | None:
    """A grid or its name as a grid.

    Cost: none.

    >>> as_grid("int4 by 64")
    Grid(bits=4, group=64, symmetric=False)
    """
    if grid is not None and not isinstance(grid, str | Grid):
        raise TypeError(f"a grid is {grid!r}; it must be a Grid or its name, as 'int4 by 64'")
    return Grid.parse(grid) if isinstance(grid, str) else grid


def _scale(exact: Tensor) -> Tensor:
    """As it is stored, the next larger bfloat16; 1 for a group of zeros."""
    stored = exact.bfloat16()
    bits = stored.view(torch.int16)
    larger = torch.where(stored.float() < exact, bits + 1, bits).view(torch.bfloat16).float()
    return torch.where(larger > 0, larger, 1.0)
