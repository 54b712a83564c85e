"""What refinement returns: S, B A, the mask, and what each iteration did.

Book: chapter 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from slr.matrix.rounding import Rounded

__all__ = ["Coded", "Refined", "Step", "settled"]


class Step(NamedTuple):
    """One iteration: the `rank` used and the `error` ‖W - S - B A‖_F of its (S, [W - S]_rank).

    Taken from singular values, ‖L‖² - Σσ², an iteration's error is resolved down to about
    3e-4 ‖L‖ in float32; the last one, the result's, is computed directly.  In another metric the
    error is in that metric.  For a stack of matrices it is the root of the sum of squares.
    """

    rank: int
    error: float


def settled(steps: Sequence[Step], tolerance: float) -> bool:
    """Whether the last step lowered the error by less than this share of it; 0 never settles.

    Cost: none.

    >>> settled([Step(1, 2.0), Step(1, 1.9)], 0.1)
    True
    """
    if not tolerance or len(steps) < 2:
        return False
    return steps[-2].error - steps[-1].error < tolerance * steps[-2].error


class Coded(NamedTuple):
    """The parts as codes of a few bits: `sparse` (m, n), right on the mask, Bᵀ (k, m) and A (k, n).

    B and A are ``None`` where they are not rounded.
    """

    sparse: Rounded
    B: Rounded | None = None
    A: Rounded | None = None

    def times(self, unit: float) -> Coded:
        """S and B times a power of two."""
        return Coded(self.sparse.times(unit), self.B and self.B.times(unit), self.A)


class Refined(NamedTuple):
    """W ≈ sparse + B A.

    `sparse` (…, m, n) is zero off `mask`, which is True where kept; `B` is (…, m, k) and `A`
    (…, k, n); `trace` has one :class:`Step` an iteration, and last the result's own.  `coded` is
    what is stored, where that is codes: then the others are its values.
    """

    sparse: Tensor
    B: Tensor
    A: Tensor
    trace: tuple[Step, ...]
    mask: Tensor
    coded: Coded | None = None

    @property
    def error(self) -> float:
        """‖W - S - B A‖ in the metric, computed before rounding to the dtype of the factors."""
        return self.trace[-1].error

    def dense(self) -> Tensor:
        """sparse + B A, (…, m, n)."""
        return self.sparse + self.B @ self.A
