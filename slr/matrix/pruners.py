"""Pruners as objects: how to choose what stays of a matrix, and what has to be known for it.

Each is frozen and says in ``needs`` which statistic of the layer's inputs it looks at.
:data:`PRUNERS` maps names to classes.  Book: chapters 1 and 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from slr.matrix.patterns import NM, Pattern
from slr.matrix.pruning import Pruned, prune
from slr.matrix.statistics import GramStatistic, NormStatistic

__all__ = [
    "PRUNERS", "Known", "Like", "Magnitude", "Pruner", "Random", "SparseGPT", "Statistic", "Step",
    "Task", "Wanda", "named", "options_of", "step_of",
]  # fmt: skip

Statistic = type[NormStatistic] | type[GramStatistic] | None


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of a layer's inputs.

    Attributes:
        norm: ‖X[j]‖₂, (n,).
        gram: X Xᵀ / tokens, (n, n).
        lacking: Y Xᵀ / tokens, (m, n), where Y is what W X should be and is not, because the
            inputs are not the dense model's; see :mod:`slr.model.streams`.
    """

    norm: Tensor | None = None
    gram: Tensor | None = None
    lacking: Tensor | None = None

    @classmethod
    def of(cls, statistic: NormStatistic | GramStatistic | None) -> Known:
        """What a statistic tells."""
        if statistic is None:
            return cls()
        gram = statistic.gram() if isinstance(statistic, GramStatistic) else None
        return cls(statistic.norm(), gram)

    @property
    def silent(self) -> bool:
        """Whether what is known says that no channel ever carried anything."""
        loud = [self.norm, None if self.gram is None else self.gram.diagonal()]
        return any(each is not None and not bool(each.any()) for each in loud)

    def alike(self) -> Known:
        """The same kinds of knowledge of inputs that are all alike: norms 1, moments those of I."""
        norm = None if self.norm is None else torch.ones_like(self.norm)
        gram = None if self.gram is None else torch.eye(len(self.gram)).to(self.gram)
        return Known(norm, gram)


class Task(NamedTuple):
    """One matrix (m, n), the pattern it is to have, what is known of its inputs, and chance."""

    weight: Tensor
    pattern: Pattern
    known: Known
    generator: torch.Generator


@dataclass(frozen=True)
class Step:
    """Base of both kinds."""

    name: ClassVar[str] = ""
    needs: ClassVar[Statistic] = None

    def options(self) -> dict:
        """Its options and their values, as plain data."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Pruner(Step):
    """How to choose what stays of a matrix; see :mod:`slr.matrix.pruning`."""

    moves: ClassVar[bool] = False  # whether kept weights change too

    def __call__(self, task: Task) -> Pruned:
        """Mask and kept weights of one matrix (m, n)."""
        known = task.known
        return prune(
            task.weight, self.name, task.pattern, generator=task.generator,
            activation_norm=known.norm if self.needs else None,
            gram=known.gram if self.needs is GramStatistic else None,
        )  # fmt: skip


@dataclass(frozen=True)
class Magnitude(Pruner):
    """Keep the largest \\|W\\|; no data is read."""

    name: ClassVar[str] = "magnitude"


@dataclass(frozen=True)
class Random(Pruner):
    """Keep any: a control."""

    name: ClassVar[str] = "random"


@dataclass(frozen=True)
class Wanda(Pruner):
    """Keep the largest \\|W\\| · ‖X‖₂ (Sun et al. 2024)."""

    name: ClassVar[str] = "wanda"
    needs: ClassVar[Statistic] = NormStatistic


@dataclass(frozen=True)
class SparseGPT(Pruner):
    """By the Hessian X Xᵀ; spreads each pruned weight's error over others (Frantar 2023)."""

    name: ClassVar[str] = "sparsegpt"
    needs: ClassVar[Statistic] = GramStatistic
    moves: ClassVar[bool] = True


@dataclass(frozen=True)
class Like(Pruner):
    """Keep what a model that was pruned before has kept: its weights that are not zero.

    The weights themselves are those of the model that is compressed, the reference of that one.

    Args:
        folder: of the pruned model.
        other: its matrix (m, n), read when it is wanted; :class:`slr.model.masks.Masks` finds it.
    """

    name: ClassVar[str] = "like"
    folder: str
    other: Callable[[], Tensor] | None = field(default=None, compare=False, repr=False)

    def __call__(self, task: Task) -> Pruned:
        """The other matrix's mask, if it has the pattern, and these weights on it."""
        if self.other is None:
            raise ValueError(f"prune={str(self)!r} is for a model, whose layers have names")
        weight, pattern = task.weight, task.pattern
        mask = self.other().to(weight.device) != 0
        density = float(mask.float().mean())
        if isinstance(pattern, NM):
            fits = pattern.verify(mask)
        else:  # rows may differ, as those of SparseGPT do, if the matrix as a whole does not
            fits = abs(density - pattern.density) <= SLACK
        if not fits:
            raise ValueError(
                f"its weights in {self.folder} do not have the pattern {pattern}: "
                f"{density:.1%} of them are not zero; give the pattern that they have, by "
                "overrides where layers differ"
            )
        return Pruned(mask, weight * mask)

    def options(self) -> dict:
        """None besides its name."""
        return {}

    def __str__(self) -> str:
        return f"{self.name} {self.folder}"


SLACK = 0.01  # of the fraction kept, in a mask that is given
PRUNERS: dict[str, type[Pruner]] = {c.name: c for c in (Magnitude, Random, Wanda, SparseGPT, Like)}


def named(kind: str, name: object, table: dict) -> type:
    """The class of a name in a table.

    Raises:
        ValueError: there is none.

    Cost: none.

    >>> named("prune", "wanda", PRUNERS).__name__
    'Wanda'
    """
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"{kind} {name!r} is unknown; it must be one of {', '.join(table)}")
    return table[name]


def options_of(step: type) -> set[str]:
    """Names of the options of a class.

    Cost: none.

    >>> options_of(Wanda)
    set()
    """
    return {field.name for field in fields(step)}


def step_of(kind: str, step: Any, table: dict, options: dict) -> Any:
    """The object of a name and its options; an object takes no more options.

    Raises:
        ValueError: an unknown name, or an option that has no effect.

    Cost: none.

    >>> step_of("prune", "wanda", PRUNERS, {})
    Wanda()
    >>> step_of("prune", "like my/pruned-model", PRUNERS, {}).folder
    'my/pruned-model'
    """
    if isinstance(step, str) and step.split(" ")[0] == Like.name and kind == "prune":
        folder = step[len(Like.name) :].strip()
        if not folder:
            raise ValueError(f"prune {step!r} lacks a folder; give it as 'like FOLDER'")
        step = Like(folder)
    made = isinstance(step, tuple(table.values()))
    known = set() if made else options_of(named(kind, step, table))
    for key, value in options.items():
        if key not in known:
            raise ValueError(
                f"{key}={value!r} has no effect with {kind}={str(step)!r}; leave it out"
            )
    return step if made else table[step](**options)
