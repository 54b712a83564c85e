"""Rounding a matrix to a few bits, without looking at anything else: the plain alternative.

A model of b bits a weight is 16 / b times smaller than in bfloat16, whoever made it so; what is
pruned and repaired has to be held against what is only rounded, at the same bytes.  Book: the page
of results.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from slr.matrix.checks import check_matrix

__all__ = ["Grid"]

SCALE = 16  # bits of a scale, bfloat16


@dataclass(frozen=True)
class Grid:
    """The values that the weights of a group may take: 2^bits of them, evenly spaced.

    Args:
        bits: of a weight, from 2 to 8.
        group: consecutive inputs of a row that share a scale and an offset; ``None`` is the whole
            row, with a scale only: then zero is in the middle.

    Raises:
        ValueError: out of range.

    Source: round to nearest, the baseline of GPTQ (Frantar et al. 2023) and every later paper.

    >>> print(Grid(2, group=2).nearest(torch.tensor([[0.9, 3.0, -1.0, 2.0]])))
    tensor([[ 1.,  3., -1.,  2.]])
    >>> print(Grid(4, 32), Grid.parse("int8"), Grid(4, 32).bits_per_weight)
    int4 by 32 int8 4.625
    """

    bits: int
    group: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits is {self.bits}; it must be from 2 to 8")
        if self.group is not None and self.group < 2:
            raise ValueError(f"group is {self.group}; it must be 2 or more")

    @classmethod
    def parse(cls, text: str) -> Grid:
        """The grid of a name; the inverse of ``str``.

        Raises:
            ValueError: it is no name of one.
        """
        found = re.fullmatch(r"int(\d)(?: by (\d+))?", text)
        if not found:
            raise ValueError(f"rounding {text!r} is unknown; it must be as int8 or int4 by 32")
        return cls(int(found[1]), None if found[2] is None else int(found[2]))

    def __str__(self) -> str:
        return f"int{self.bits}" + ("" if self.group is None else f" by {self.group}")

    @property
    def bits_per_weight(self) -> float:
        """With the scales and offsets of its groups; those of whole rows are not counted."""
        return self.bits + (0 if self.group is None else (SCALE + self.bits) / self.group)

    @torch.no_grad()
    def nearest(self, weight: Tensor) -> Tensor:
        """The matrix (m, n) rounded, as values in its own dtype.

        Raises:
            ValueError, TypeError: not a finite floating-point matrix.

        Cost: a few passes.
        """
        check_matrix("weight", weight)
        m, n = weight.shape
        width = self.group or n
        # A last group that is short is filled with its last value, which changes no extreme.
        work = functional.pad(weight.detach().float(), (0, -n % width), mode="replicate")
        work = work.view(m, -1, width)
        low, high = work.amin(-1, keepdim=True), work.amax(-1, keepdim=True)
        if self.group is None:
            steps, offset = 2 ** (self.bits - 1) - 1, -(2 ** (self.bits - 1)) + 1
            scale = _scale(torch.maximum(high, -low) / steps)
            levels = (work / scale).round_().clamp_(offset, steps)
            return self._cut(levels * scale, weight)
        steps = 2**self.bits - 1
        low, high = low.clamp_max(0), high.clamp_min(0)  # zero is on the grid
        scale = _scale((high - low) / steps)
        zero = (-low / scale).round_().clamp_(0, steps)
        levels = (work / scale).round_().add_(zero).clamp_(0, steps)
        return self._cut((levels - zero) * scale, weight)

    def _cut(self, values: Tensor, like: Tensor) -> Tensor:
        return values.flatten(1)[:, : like.shape[1]].to(like.dtype)


def _scale(exact: Tensor) -> Tensor:
    """As it is stored, in bfloat16; 1 for a group of zeros."""
    stored = exact.bfloat16().float()
    return torch.where(stored > 0, stored, 1.0)
