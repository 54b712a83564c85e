"""Sparsity patterns: which entries of a matrix may stay.

A pattern knows nothing of pruning criteria.  Given a matrix of scores it keeps the
largest, exactly as many as it says, and returns a boolean mask, ``True`` = kept:

- :class:`Unstructured`: a fraction of each row, or of the whole matrix, goes;
- :class:`NM`: n of every m consecutive inputs of a row stay (2:4 is what GPUs run).

Ties are broken by position, the later entry stays, so that a mask is the same on every
device.  Book: chapter 2.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from slr.matrix.checks import check_finite, check_integer, check_number

__all__ = ["NM", "Pattern", "Unstructured", "parse"]

BY_MATRIX = " by matrix"
DENSE = "dense"


def _checked_scores(scores: Tensor) -> Tensor:
    if scores.ndim != 2 or scores.numel() == 0:
        raise ValueError(f"scores have shape {tuple(scores.shape)}; they must be a matrix")
    check_finite("scores", scores)
    return scores


def _check_group(group: str) -> None:
    if group not in ("row", "matrix"):
        raise ValueError(f"group is {group!r}; it must be 'row' or 'matrix'")


@dataclass(frozen=True)
class Unstructured:
    """A fraction `sparsity` of the entries goes: floor(sparsity · count) in each group.

    Args:
        sparsity: fraction pruned, 0 ≤ sparsity ≤ 1.  What 1 keeps is nothing.
        group: ``"row"`` compares within each output row (Wanda), ``"matrix"`` over the whole
            matrix (the usual magnitude pruning).

    Raises:
        ValueError, TypeError: a sparsity out of range or that is no number, or an unknown group.

    Cost: :meth:`select` O(m n); :meth:`verify` one pass.
    Source: Han et al. 2015 by matrix; Sun et al. 2024, table 7, for comparing by row.

    >>> print(Unstructured(0.5).select(torch.tensor([[3.0, 1.0, 2.0, 4.0]])))
    tensor([[ True, False, False,  True]])
    """

    sparsity: float
    group: str = "row"

    def __post_init__(self) -> None:
        check_number("sparsity", self.sparsity)
        object.__setattr__(self, "sparsity", float(self.sparsity))
        if not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity is {self.sparsity}; it must be from 0 to 1")
        _check_group(self.group)

    @property
    def density(self) -> float:
        """Fraction of entries kept (before rounding to whole entries)."""
        return 1 - self.sparsity

    def pruned_in(self, count: int) -> int:
        """Entries pruned in a group of `count`: floor(sparsity · count), in exact arithmetic.

        >>> Unstructured(0.29).pruned_in(100)  # 0.29 * 100 is 28.999… in floating point
        29
        """
        return math.floor(Fraction(repr(float(self.sparsity))) * count)

    def select(self, scores: Tensor) -> Tensor:
        """Mask of the entries with the largest scores.

        Args:
            scores: (m, n), finite, any float dtype.

        Returns:
            bool (m, n); exactly :meth:`pruned_in` entries of every group are ``False``.

        Raises:
            ValueError: not a matrix, or non-finite.

        Cost: one selection of the threshold a group, O(m n).
        """
        return self.chosen(_checked_scores(scores))

    def chosen(self, scores: Tensor) -> Tensor:
        """As :meth:`select`, of scores that are known to be a finite matrix."""
        rows = scores
        if self.group == "matrix":
            rows = rows.reshape(1, -1)
        count = self.pruned_in(rows.shape[1])
        if count == 0:
            return torch.ones_like(scores, dtype=torch.bool)
        threshold = rows.kthvalue(count, dim=1, keepdim=True).values
        mask = rows > threshold
        equal = rows == threshold
        left = count - (~mask & ~equal).sum(1, keepdim=True)  # of the equal ones, to prune
        mask |= equal & (equal.cumsum(1, dtype=torch.int32) > left)
        return mask.view(scores.shape)

    def verify(self, mask: Tensor) -> bool:
        """Whether `mask` (m, n) prunes exactly as many entries of every group as it should."""
        rows = mask.reshape(1, -1) if self.group == "matrix" else mask
        return bool(((~rows).sum(1) == self.pruned_in(rows.shape[1])).all())

    def __str__(self) -> str:
        if self == Unstructured(0.0):
            return DENSE
        # All digits: a pattern is what its name says, to the last entry.
        return f"{self.sparsity!r}" + (BY_MATRIX if self.group == "matrix" else "")


@dataclass(frozen=True)
class NM:
    """`n` of every `m` consecutive inputs of a row are **kept** (some code counts the pruned).

    Args:
        n: kept of a group, at least 1.
        m: length of a group, above n; it must divide the number of inputs.

    Raises:
        ValueError, TypeError: no such pattern.

    Cost: :meth:`select` m² / 2 comparisons a group; :meth:`verify` one pass.
    Source: Mishra et al. 2021 (2:4 on GPUs); Zhou et al. 2021 (N:M).

    >>> print(NM(2, 4).select(torch.tensor([[3.0, 1.0, 2.0, 4.0, 0.0, 0.0, 5.0, 6.0]])).int())
    tensor([[1, 0, 0, 1, 0, 0, 1, 1]], dtype=torch.int32)
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        check_integer("n", self.n)
        check_integer("m", self.m)
        if not 0 < self.n < self.m:
            raise ValueError(
                f"pattern {self.n}:{self.m} would keep {self.n} of every {self.m}; "
                "n:m needs 0 < n < m, as in 2:4"
            )

    @property
    def density(self) -> float:
        """Fraction of entries kept, n/m."""
        return self.n / self.m

    @property
    def sparsity(self) -> float:
        """Fraction of entries pruned, 1 - n/m."""
        return 1 - self.density

    def select(self, scores: Tensor) -> Tensor:
        """Mask of the `n` largest scores in every group of `m`.

        Args:
            scores: (rows, columns), finite, columns divisible by m.

        Returns:
            bool, same shape; every group of m keeps exactly n.

        Raises:
            ValueError: columns not divisible by m, not a matrix, or non-finite.

        Cost: m² / 2 comparisons a group, no sort.
        """
        return self.chosen(_checked_scores(scores))

    def chosen(self, scores: Tensor) -> Tensor:
        """As :meth:`select`, of scores that are known to be a finite matrix."""
        columns = scores.shape[1]
        if columns % self.m:
            raise ValueError(
                f"pattern {self} needs columns divisible by {self.m}, but there are {columns}"
            )
        # One contiguous plane for each place in a group: whole-vector comparisons.
        planes = scores.reshape(-1, self.m).T.contiguous()
        # An entry stays if fewer than n others of its group beat it; of equals the later wins.
        beaten = torch.zeros_like(planes, dtype=_counter(self.m))
        for j in range(1, self.m):
            for i in range(j):
                earlier = (planes[i] > planes[j]).view(torch.int8)
                beaten[j] += earlier
                beaten[i] += 1 - earlier
        kept = beaten < self.n
        return kept.T.reshape(scores.shape)

    def verify(self, mask: Tensor) -> bool:
        """Whether every group of `mask` (rows, columns) keeps exactly n of m."""
        if mask.shape[1] % self.m:
            return False
        return bool((mask.reshape(mask.shape[0], -1, self.m).sum(-1) == self.n).all())

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


def _counter(most: int) -> torch.dtype:
    """An integer for counts below this."""
    return torch.int8 if most <= 128 else torch.int32


Pattern = Unstructured | NM


def parse(text: str | float | Pattern, group: str | None = None) -> Pattern:
    """A sparsity pattern from its name; the inverse of ``str``.

    Args:
        text: ``"2:4"`` (semi-structured: n kept of every m), ``"0.5"`` or ``0.5`` (unstructured:
            the fraction pruned), ``"0.5 by matrix"``, ``"dense"`` (nothing is), or a pattern,
            which is returned as it is.
        group: ``"row"`` (the default) or ``"matrix"``, for a fraction.

    Raises:
        ValueError: it is no pattern, an impossible one, or one on which `group` has no effect.

    Cost: none.

    >>> parse("2:4"), parse("0.5")
    (NM(n=2, m=4), Unstructured(sparsity=0.5, group='row'))
    >>> parse(str(parse("0.5", "matrix")))
    Unstructured(sparsity=0.5, group='matrix')
    >>> parse("3:2")
    Traceback (most recent call last):
    ValueError: pattern 3:2 would keep 3 of every 2; n:m needs 0 < n < m, as in 2:4
    """
    if group is not None:
        _check_group(group)
    found = text if isinstance(text, Unstructured | NM) else _parse(str(text), group or "row")
    if group is not None and getattr(found, "group", None) != group:
        raise ValueError(
            f"group {group!r} has no effect on pattern {found}; it is for a fraction such as 0.5"
        )
    return found


def _parse(text: str, group: str) -> Pattern:
    nm = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
    if nm:
        return NM(int(nm[1]), int(nm[2]))
    if text == DENSE:
        return Unstructured(0.0)
    number = text.removesuffix(BY_MATRIX)
    try:
        sparsity = float(number)
    except ValueError:
        raise ValueError(
            f"pattern {text!r} is neither n:m (as 2:4) nor a fraction to prune (as 0.5) nor dense"
        ) from None
    return Unstructured(sparsity, group if number == text else "matrix")
