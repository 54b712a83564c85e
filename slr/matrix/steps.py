"""The two steps of a layer as objects: a pruner chooses what stays, a repair makes up for the rest.

Each is frozen, holds the options that have an effect on it and no others, and says in ``needs``
what has to be known of the layer's inputs.  :data:`PRUNERS` and :data:`REPAIRS` map their names to
classes, for recipes, the command line and files alike.  Pruners: :mod:`slr.matrix.pruners`;
repairs of other papers, to compare with: :mod:`slr.matrix.rivals`.  Book: chapter 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from slr.matrix.checks import check_choice
from slr.matrix.gram import aimed
from slr.matrix.metric import Gram
from slr.matrix.patterns import Pattern
from slr.matrix.pcp import pcp_repair
from slr.matrix.pruners import PRUNERS, Known, Pruner, Statistic, Step, Task
from slr.matrix.pruning import Pruned
from slr.matrix.refinement import SCHEDULES, refine, svd_repair
from slr.matrix.repair import Gridded, Iterated, Repair
from slr.matrix.result import Refined
from slr.matrix.rivals import OATS, HASSLEFree, SLiM, ThreeBASiL
from slr.matrix.rounding import as_grid
from slr.matrix.statistics import GramStatistic, NormStatistic

__all__ = [
    "OATS", "PCP", "PRUNERS", "REPAIRS", "SVD", "Compressed", "EoRA", "HASSLEFree", "Iterated",
    "Known", "NoRepair", "Outputs", "Repair", "Rounding", "SLiM", "ScaledWeights", "ThreeBASiL",
    "Weights", "prune_and_repair",
]  # fmt: skip


@dataclass(frozen=True)
class Weights(Gridded):
    """Algorithm 1 of the paper on the weights: no data is read.

    Args:
        schedule: one of :data:`slr.matrix.refinement.SCHEDULES`; the paper's ramp has to be run
            to its end, so that `tolerance` does not go with it.
    """

    name: ClassVar[str] = "weights"
    schedule: str = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("schedule", self.schedule, SCHEDULES)
        if self.tolerance and self.schedule == "paper":
            raise ValueError(
                f"tolerance {self.tolerance:g} has no effect with schedule='paper', whose ramp is "
                "run to its end; leave it out or give schedule='accelerated'"
            )
        if self.values is not None and self.schedule != "paper":
            raise ValueError(f"schedule={self.schedule!r} has no effect with values on a grid")

    def __call__(self, task: Task, pruned: Pruned) -> Refined:
        """See :func:`slr.refine`."""
        return refine(
            task.weight, pruned.mask, self._definite(), metric=self._metric(task.known),
            iterations=self.iterations, schedule=self.schedule, tolerance=self.tolerance,
            generator=task.generator, **self._grids(),
        )  # fmt: skip


@dataclass(frozen=True)
class ScaledWeights(Weights):
    """The same with each input channel weighed by its activation norm."""

    name: ClassVar[str] = "diagonal"
    needs: ClassVar[Statistic] = NormStatistic


@dataclass(frozen=True)
class Outputs(Gridded):
    """Refinement of the layer's outputs, in the metric of the Hessian X Xᵀ (Gram).

    Args:
        update_mask: choose the mask anew: ``"admm"`` in the first eight ninths of the iterations
            (:mod:`slr.matrix.admm`), or ``True``, by a score in the first half.
        asymmetric: ask a layer for what the dense model puts out there, not for what its own
            weights make of inputs that the layers before it have spoilt.
    """

    name: ClassVar[str] = "activations"
    needs: ClassVar[Statistic] = GramStatistic
    update_mask: bool | str = False
    asymmetric: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.update_mask, bool) and self.update_mask != "admm":
            raise ValueError(
                f"update_mask is {self.update_mask!r}; it must be 'admm', true (by score) or false"
            )

    def aim(self, task: Task) -> Tensor:
        """W, or with `asymmetric` what makes up for the inputs too; see :func:`aimed`."""
        metric, lacking = self._metric(task.known), task.known.lacking
        if not self.asymmetric or lacking is None or not isinstance(metric, Gram):
            return task.weight
        return aimed(task.weight, metric, lacking)

    @property
    def changes_mask(self) -> bool:  # type: ignore[override]
        """Whether the mask of the pruner is not the result's."""
        return bool(self.update_mask)

    def __call__(self, task: Task, pruned: Pruned) -> Refined:
        """See :func:`slr.refine`."""
        anew = bool(self.update_mask) and task.pattern.density < 1
        return refine(
            task.weight, pruned.mask, self._definite(), metric=self._metric(task.known),
            iterations=self.iterations, tolerance=self.tolerance, generator=task.generator,
            update_mask=task.pattern if anew else None,
            search="admm" if anew and self.update_mask == "admm" else "score", **self._grids(),
        )  # fmt: skip


@dataclass(frozen=True)
class SVD(Repair):
    """One SVD of what pruning took away; of the weight itself where a pattern keeps nothing."""

    name: ClassVar[str] = "svd"
    alone: ClassVar[bool] = True

    def __call__(self, task: Task, pruned: Pruned) -> Refined:
        """See :func:`slr.svd_repair`."""
        rank, metric = self._definite(), self._metric(task.known)
        return svd_repair(task.weight, pruned.mask, rank, metric, sparse=pruned.weight)


@dataclass(frozen=True)
class EoRA(SVD):
    """One SVD in the metric of the outputs (Liu et al. 2024)."""

    name: ClassVar[str] = "eora"
    needs: ClassVar[Statistic] = GramStatistic


@dataclass(frozen=True)
class PCP(Repair):
    """Principal component pursuit with the mask: a baseline of the paper."""

    name: ClassVar[str] = "pcp"

    def __call__(self, task: Task, pruned: Pruned) -> Refined:
        """See :func:`slr.matrix.pcp.pcp_repair`."""
        # As the paper's toolkit weighs S: by the sum of one column, not of all n of them.
        weight = task.weight
        balance = 1 / (weight.shape[1] * max(weight.shape) ** 0.5)
        return pcp_repair(weight, pruned.mask, self._definite(), balance=balance, tolerance=1e-3)


@dataclass(frozen=True)
class NoRepair(Step):
    """Nothing is added: the model is pruned only, and the factors have rank 0."""

    name: ClassVar[str] = "none"
    changes_mask: ClassVar[bool] = False
    alone: ClassVar[bool] = False
    blind: ClassVar[bool] = False
    rank: ClassVar[None] = None

    def resolved(self, hidden_size: int) -> NoRepair:
        """Itself."""
        return self

    def __call__(self, task: Task, pruned: Pruned) -> Refined:
        """What pruning left."""
        (m, n), zeros = task.weight.shape, task.weight.new_zeros
        none = zeros(m, 0), zeros(0, n)
        return Refined(pruned.weight, *none, (), pruned.mask)

    def aim(self, task: Task) -> Tensor:
        """W."""
        return task.weight


@dataclass(frozen=True)
class Rounding(NoRepair):
    """What stays is rounded with the outputs in view (GPTQ, Frantar et al. 2023): no B A.

    Args:
        values: the grid, as ``"int4 by 64"``.
    """

    name: ClassVar[str] = "gptq"
    needs: ClassVar[Statistic] = GramStatistic
    values: str = "int4 by 64"

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", str(as_grid(self.values)))

    def __call__(self, task: Task, pruned: Pruned) -> Refined:
        """See :func:`slr.refine`."""
        assert task.known.gram is not None
        metric = Gram(task.known.gram)
        return refine(task.weight, pruned.mask, 0, grid=self.values, metric=metric)


REPAIRS: dict[str, type[Repair] | type[NoRepair]] = {
    c.name: c
    for c in (
        Weights, ScaledWeights, Outputs, SVD, EoRA, PCP, OATS, SLiM, HASSLEFree, ThreeBASiL,
        Rounding, NoRepair,
    )
}  # fmt: skip


class Compressed(NamedTuple):
    """One matrix as S + B A (`refined`), what pruning left of it, and what S + B A should be."""

    refined: Refined
    pruned: Pruned
    target: Tensor


def prune_and_repair(
    weight: Tensor,
    pruner: Pruner,
    pattern: Pattern,
    repair: Repair | NoRepair,
    known: Known | None = None,
    generator: torch.Generator | None = None,
) -> Compressed:
    """Both steps, on one matrix.

    Args:
        weight: (m, n).
        pruner, pattern, repair: what to do; the repair's rank is definite.
        known: of the layer's inputs.
        generator: for a random mask and the solver's start; seeded with 0 when ``None``.

    Raises:
        ValueError: a step that needs a statistic and has none, or what the steps say.

    Cost: that of the steps.

    >>> from slr.matrix.pruners import Magnitude
    >>> from slr.matrix.patterns import NM
    >>> made = prune_and_repair(torch.randn(8, 8), Magnitude(), NM(2, 4), SVD(rank=1))
    >>> made.refined.A.shape
    torch.Size([1, 8])
    """
    known = known or Known()
    have = {NormStatistic: known.norm, GramStatistic: known.gram}
    for step in (pruner, repair):
        if step.needs is not None and have[step.needs] is None:
            kind = step.needs.__name__
            raise ValueError(f"{str(step)!r} needs a {kind} of the layer's inputs, see slr.observe")
    generator = generator or torch.Generator(weight.device).manual_seed(0)
    task = Task(weight, pattern, known, generator)
    pruned, target = pruner(task), repair.aim(task)
    return Compressed(repair(task._replace(weight=target), pruned), pruned, target)
