"""What all repairs have in common: a rank, what they aim at, how errors are weighed.

The repairs are in :mod:`slr.matrix.steps`, those of other papers in :mod:`slr.matrix.rivals`.
Book: chapter 5.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from slr.matrix.checks import check_count, check_number, check_share
from slr.matrix.metric import Diagonal, Gram, Metric
from slr.matrix.pruners import Known, Task
from slr.matrix.pruners import Step as Either
from slr.matrix.pruning import Pruned
from slr.matrix.result import Refined
from slr.matrix.rounding import Grid, as_grid
from slr.matrix.statistics import GramStatistic

__all__ = ["Gridded", "Iterated", "Repair"]


@dataclass(frozen=True)
class Repair(Either):
    """What is added to a pruned matrix: B A of rank k.

    Args:
        rank: k, the same for every layer; or
        rank_ratio: k as a fraction of the model's hidden size; 1/32 if neither is given.

    Raises:
        ValueError, TypeError: a rank below 1, a ratio that is not above 0 and at most 1, or both.
    """

    rank: int | None = None
    rank_ratio: float | None = None
    changes_mask: ClassVar[bool] = False
    alone: ClassVar[bool] = False  # whether it is all there is to do where nothing is kept
    blind: ClassVar[bool] = False  # whether it is the same whatever the pruner left

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank_ratio is not None:
            raise ValueError("rank and rank_ratio are both given; give one")
        if self.rank is not None:
            check_count("rank", self.rank, "(or refine='none')")
            object.__setattr__(self, "rank", int(self.rank))
        if self.rank_ratio is not None:
            check_number("rank_ratio", self.rank_ratio)
            if not 0 < self.rank_ratio <= 1:
                raise ValueError(
                    f"rank_ratio is {self.rank_ratio}; it must be above 0 and at most 1"
                )
            object.__setattr__(self, "rank_ratio", float(self.rank_ratio))

    def resolved(self, hidden_size: int) -> Repair:
        """The same with a definite rank, for a model of this hidden size."""
        if self.rank is not None:
            return self
        ratio = 1 / 32 if self.rank_ratio is None else self.rank_ratio
        return replace(self, rank=max(1, int(ratio * hidden_size)), rank_ratio=None)

    def aim(self, task: Task) -> Tensor:
        """What S + B A should be, (m, n): W."""
        return task.weight

    def __call__(self, task: Task, pruned: Pruned) -> Refined:
        """S, B, A and mask of one matrix (m, n), from what pruning left; `rank` is definite."""
        raise TypeError(f"{type(self).__name__} is no repair of its own")

    def _metric(self, known: Known) -> Metric | None:
        if self.needs is GramStatistic and known.gram is not None:
            return Gram(known.gram)
        return Diagonal(known.norm) if self.needs and known.norm is not None else None

    def _definite(self) -> int:
        if self.rank is None:
            raise ValueError("the rank is not resolved; call resolved(hidden_size) first")
        return self.rank


@dataclass(frozen=True)
class Iterated(Repair):
    """Base of those that iterate.

    Args:
        iterations: at most so many.
        tolerance: stop when an iteration lowers the error by less than this share of it.
    """

    iterations: int = 50
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("iterations", self.iterations)
        check_share("tolerance", self.tolerance)
        object.__setattr__(self, "iterations", int(self.iterations))


@dataclass(frozen=True)
class Gridded(Iterated):
    """Base of those whose S may have to lie on a grid.

    Args:
        values: grid that the values of S are to lie on, as ``"int4 by 64"``; see
            :mod:`slr.matrix.alternation`.
        factors: with `values`, that of B and A, ``"int8"`` by default; ``"float"`` leaves them.
    """

    values: str | None = None
    factors: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.values is None:
            if self.factors is not None:
                raise ValueError(f"factors={self.factors!r} has no effect without values")
            return
        if self.tolerance:
            raise ValueError(f"tolerance {self.tolerance:g} has no effect with values on a grid")
        object.__setattr__(self, "values", str(as_grid(self.values)))
        factors = "int8" if self.factors is None else str(self.factors)
        if factors != "float" and Grid.parse(factors).group is not None:
            raise ValueError(f"factors is {factors!r}; their grid is of whole rows, as int8")
        object.__setattr__(self, "factors", factors)

    def _grids(self) -> dict[str, Any]:
        """Of :func:`slr.refine`."""
        if self.values is None:
            return {}
        return {
            "grid": self.values, "factors": None if self.factors == "float" else self.factors
        }  # fmt: skip
