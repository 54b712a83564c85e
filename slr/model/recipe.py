"""A recipe: everything that decides how a model is compressed, besides the model and its text.

It is made of small objects (a pruner, a pattern, a repair), which names and options become when
it is made: a combination that means nothing, or an option without effect, is refused there and
then, whoever asks.  Book: chapter 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from slr.matrix.checks import check_choice, check_count
from slr.matrix.patterns import Pattern, Unstructured, parse
from slr.matrix.pruners import PRUNERS, Pruner, named, options_of, step_of
from slr.matrix.rounding import Grid
from slr.matrix.statistics import GramStatistic, NormStatistic
from slr.matrix.steps import REPAIRS, NoRepair, Repair
from slr.model.checks import check_seed, check_seqlen
from slr.model.choices import (
    STEPS,
    check_names,
    check_steps,
    plain,
    plainly,
    regrouped,
    repair_of,
    without_effect,
)

__all__ = ["PRESETS", "Recipe"]

PREPARATIONS = ("none", "induction")
PRESETS: dict[str, dict[str, Any]] = {
    "best": {},  # with a mask
    "int4": {"pattern": "dense", "values": "int4 by 64"},  # with codes instead: smaller and better
    "paper": {"refine": "weights"},
}
# Options of the steps, which are given flat; `group` is the pattern's.
OPTIONS = (
    "rank", "rank_ratio", "iterations", "schedule", "tolerance", "update_mask", "asymmetric",
    "values", "factors",
)  # fmt: skip
# Not of single layers.
WHOLE = ("prepare", "tune", "samples", "seqlen", "seed", "skip", "overrides")


class Recipe:
    """How to compress, by names or objects.

    Args:
        prune: a pruner, or its name in :data:`slr.matrix.steps.PRUNERS`: ``"magnitude"``,
            ``"random"``, ``"wanda"``, ``"sparsegpt"``; or ``"like FOLDER"``: the mask of the same
            model, pruned before by anybody, which this one is the reference of.
        pattern: a sparsity pattern, or its name: ``"2:4"`` (semi-structured), the fraction to
            prune, ``"0.5"`` (unstructured), or ``"dense"``.  ``"1.0"`` keeps nothing, W ≈ B A: with
            ``prune="magnitude"`` and ``refine="svd"`` or ``"eora"``.
        group: of a fraction, ``"row"`` (default) or ``"matrix"``.
        refine: a repair, or its name in :data:`slr.matrix.steps.REPAIRS`: Algorithm 1 on the
            ``"weights"`` (the paper, data-free), on weights scaled by activation norms
            (``"diagonal"``) or on the layer's outputs, by the Hessian (``"activations"``); one
            shot, ``"svd"`` of the weights or ``"eora"`` of the outputs; ``"pcp"``, principal
            component pursuit; ``"gptq"``, rounding alone; or ``"none"``.
            Of other papers, to compare with (:mod:`slr.matrix.rivals`): ``"oats"``, whose mask is
            its own, ``"slim"``, ``"hassle"`` and ``"3basil"``.  When ``None``, the best for what is
            read anyway: ``"activations"``, asymmetric and with ADMM's mask, after a pruner that
            reads data, else ``"weights"`` with the accelerated schedule.
        rank: rank of the low-rank part, the same for every layer; or
        rank_ratio: rank as a fraction of the hidden size, 1/32 by default (128 for 4096).
        iterations: of the refinement, 50 by default; of OATS 80, HASSLE-free 20, 3BASiL 400.
        schedule: of a refinement of weights, ``"paper"`` (default), or see
            :data:`slr.matrix.refinement.SCHEDULES`.
        tolerance: stop refining when an iteration lowers the error by less than this share of
            it; 0 by default.  Not for the paper's schedule, whose ramp has to be run to its end.
        update_mask: with ``refine="activations"``: choose the mask anew, ``"admm"`` or, by a
            score, ``True``.
        asymmetric: with ``refine="activations"``: ask each layer for what the dense model puts
            out there, so that it makes up for the layers before it (:mod:`slr.model.streams`).
        values: grid of a few bits that the kept weights are rounded to, as ``"int4 by 64"``, in
            one alternation with the low-rank part (:mod:`slr.matrix.alternation`); with pattern
            ``"dense"``, which keeps all, the only thing that makes S smaller.
        factors: with `values`, grid of B and A: ``"int8"`` by default, or ``"float"``.
        prepare: ``"induction"`` first rescales each block so that it prunes better
            (:mod:`slr.methods.induction`), or ``"none"``.
        tune: passes over the calibration windows in which each block, compressed, learns to put
            out what the dense model does (:mod:`slr.model.tuning`); 0, none, by default.
        samples: calibration windows, for methods that look at data; when ``None``
            :data:`slr.model.data.SAMPLES`, or all that there are.
        seqlen: tokens in each; the model's longest context, 1024 at most, when ``None``.
        seed: for the windows that are drawn, random masks and the solver's start.
        skip: names of layers to leave dense (ignored modules), with ``*`` for anything:
            ``["*.down_proj", "model.layers.0.*"]``.
        overrides: other options for some layers (target modules), by such names; of several that
            fit, the later counts: ``{"*.o_proj": {"rank": 64, "pattern": "0.4"}}``.

    Attributes:
        prune, pattern, refine: the objects.

    Raises:
        ValueError: an unknown name, a value out of range, or an option that has no effect.
        TypeError: a value of another type.

    >>> Recipe(prune="wanda", pattern="2:4").resolved(hidden_size=4096).rank
    128
    >>> Recipe(pattern="3:2")
    Traceback (most recent call last):
    ValueError: pattern 3:2 would keep 3 of every 2; n:m needs 0 < n < m, as in 2:4
    >>> Recipe(refine="svd", iterations=10)
    Traceback (most recent call last):
    ValueError: iterations=10 has no effect with refine='svd'; leave it out
    >>> recipe = Recipe(skip=["*.o_proj"], overrides={"*.q_proj": {"pattern": "0.4"}})
    >>> print(recipe.layer("model.layers.0.self_attn.q_proj", 4096).pattern)
    0.4
    >>> recipe.layer("model.layers.0.self_attn.o_proj", 4096) is None
    True
    """

    prune: Pruner
    pattern: Pattern
    refine: Repair | NoRepair
    prepare: str
    tune: int
    samples: int | None
    seqlen: int | None
    seed: int
    skip: tuple[str, ...]
    overrides: dict[str, dict]

    def __init__(
        self,
        prune: str | Pruner = "wanda",
        pattern: str | float | Pattern = "2:4",
        *,
        group: str | None = None,
        refine: str | Repair | NoRepair | None = None,
        rank: int | None = None,
        rank_ratio: float | None = None,
        iterations: int | None = None,
        schedule: str | None = None,
        tolerance: float | None = None,
        update_mask: bool | str | None = None,
        asymmetric: bool | None = None,
        values: str | Grid | None = None,
        factors: str | Grid | None = None,
        prepare: str = "none",
        tune: int = 0,
        samples: int | None = None,
        seqlen: int | None = None,
        seed: int = 0,
        skip: Sequence[str] = (),
        overrides: Mapping[str, Mapping] | None = None,
    ) -> None:
        overrides = {} if overrides is None else overrides
        check_names(skip, overrides)
        check_choice("prepare", prepare, PREPARATIONS)
        if tune != 0:
            check_count("tune", tune)
        check_seed(seed)
        given = (
            rank, rank_ratio, iterations, schedule, tolerance, update_mask, asymmetric,
            *(None if grid is None else str(grid) for grid in (values, factors)),
        )  # fmt: skip
        options = {k: v for k, v in zip(OPTIONS, given, strict=True) if v is not None}
        pruner, pattern = step_of("prune", prune, PRUNERS, {}), parse(pattern, group)
        self._set(
            prune=pruner, pattern=pattern, refine=repair_of(pruner, pattern, refine, options),
            prepare=prepare, tune=int(tune), seed=int(seed), skip=tuple(skip),
            overrides={name: plain(wanted) for name, wanted in overrides.items()},
        )  # fmt: skip
        self._checked()
        self.variants()  # all overrides are looked at
        if samples is not None:
            check_count("samples", samples)
        if seqlen is not None:
            check_seqlen(seqlen)
        for name, value in (("samples", samples), ("seqlen", seqlen)):
            if value is not None and not self.needs_data:
                raise ValueError(
                    f"{name}={value} has no effect with prune={str(self.prune)!r} and "
                    f"refine={str(self.refine)!r}, which read no data; leave it out"
                )
        self._set(samples=plainly(samples), seqlen=plainly(seqlen))

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a recipe cannot be changed; make another one with {name}={value!r}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((self.prune, self.pattern, self.refine, self.seed))

    def __repr__(self) -> str:
        told = {k: v for k, v in self.as_dict().items() if v not in (None, [], {}, "none", False)}
        told["seed"] = self.seed
        return f"Recipe({', '.join(f'{k}={v!r}' for k, v in told.items())})"

    @classmethod
    def fitting(cls, **options: Any) -> Recipe:
        """A recipe of those of the options that have an effect: a table's, common to its cells.

        >>> Recipe.fitting(prune="magnitude", refine="svd", rank=3, iterations=9, samples=4)
        Recipe(prune='magnitude', pattern='2:4', refine='svd', rank=3, seed=0)
        """
        known = {f"{k}": options.pop(k) for k in STEPS if k in options}
        pruner = step_of("prune", known.get("prune", "wanda"), PRUNERS, {})
        pattern = parse(known.get("pattern", "2:4"))
        fit = options_of(type(repair_of(pruner, pattern, known.get("refine"), {})))
        if pattern.density == 1:
            fit -= {"update_mask"}
        if options.get("schedule", "paper") == "paper":
            fit -= {"tolerance"} if "schedule" in fit else set()
        options = {k: v for k, v in options.items() if v is not None}
        options = {k: v for k, v in options.items() if k in fit or k not in OPTIONS}
        if not isinstance(pattern, Unstructured):
            options.pop("group", None)
        data = {k: options.pop(k) for k in ("samples", "seqlen") if k in options}
        found = cls(**known, **options)
        return cls(**known, **options, **data) if found.needs_data else found

    @classmethod
    def from_dict(cls, told: Mapping) -> Recipe:
        """The recipe that a folder or a result file tells of, of this version or an earlier one."""
        return cls.fitting(**{k: v for k, v in told.items() if v is not None})

    @property
    def rank(self) -> int | None:
        """Of the low-rank part; ``None`` if it is not definite, or there is none."""
        return self.refine.rank

    def resolved(self, hidden_size: int) -> Recipe:
        """The same recipe with a definite `rank` for a model of this hidden size."""
        return self._with(refine=self.refine.resolved(hidden_size))

    def layer(self, name: str, hidden_size: int) -> Recipe | None:
        """The recipe of one layer by its full name, resolved; ``None`` if it stays dense."""
        if any(fnmatchcase(name, pattern) for pattern in self.skip):
            return None
        mine = self
        for pattern, options in self.overrides.items():
            if fnmatchcase(name, pattern):
                mine = mine._override(pattern, options)
        return mine._with(skip=(), overrides={}).resolved(hidden_size)

    def pruned_by(self, pruner: Pruner) -> Recipe:
        """The same with another pruner, which is not checked."""
        return self._with(prune=pruner)

    def variants(self) -> list[Recipe]:
        """The recipe, and what each override makes of it."""
        return [self, *(self._override(n, options) for n, options in self.overrides.items())]

    def _checked(self) -> Recipe:
        """Itself, if its steps go together; see :func:`slr.model.choices.check_steps`."""
        check_steps(self.prune, self.pattern, self.refine)
        return self

    def pruned_only(self) -> Recipe:
        """The same without any repair."""
        overrides = {
            name: {k: v for k, v in options.items() if k in ("prune", "pattern", "group")}
            for name, options in self.overrides.items()
        }
        return self._with(refine=NoRepair(), tune=0, overrides=overrides)

    @property
    def keeps_weights(self) -> bool:
        """Whether what pruning leaves is the source's weights on the masks of the result."""
        return self.prepare == "none" and not any(
            each.prune.moves or each.refine.changes_mask for each in self.variants()
        )

    def _with(self, **values: Any) -> Recipe:
        made = object.__new__(Recipe)
        made._set(**{**vars(self), **values})
        return made

    def _override(self, name: str, options: Mapping) -> Recipe:
        """With the options of one override; those of a step that it replaces go with it."""
        where = f"overrides[{name!r}]"
        wrong = sorted(set(options) - {*STEPS, *OPTIONS, "group"})
        if wrong:
            raise ValueError(f"{where}: option {wrong[0]!r} is not one of a layer")
        wanted = {k: v for k, v in options.items() if k in OPTIONS}
        try:
            refine, kept = options.get("refine"), self.refine.options()
            if refine is None:
                refine = str(self.refine)
            else:  # the rank is the model's, whatever the repair
                fit = options_of(named("refine", refine, REPAIRS))
                kept = {k: v for k, v in kept.items() if k in fit and k.startswith("rank")}
            pattern = regrouped(options.get("pattern", self.pattern), options.get("group"))
            kept = without_effect(kept, wanted, pattern)
            return self._with(
                prune=step_of("prune", options.get("prune", self.prune), PRUNERS, {}),
                pattern=pattern, refine=step_of("refine", refine, REPAIRS, {**kept, **wanted}),
            )._checked()  # fmt: skip
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}: {error}") from None

    @property
    def statistic(self) -> type[NormStatistic] | type[GramStatistic] | None:
        """What has to be known of each layer's inputs; ``None`` for a data-free recipe."""
        needs = [step.needs for each in self.variants() for step in (each.prune, each.refine)]
        for kind in (GramStatistic, NormStatistic):
            if kind in needs:
                return kind
        return None

    @property
    def asymmetric(self) -> bool:
        """Whether a layer is asked for what the dense model puts out there."""
        return any(getattr(each.refine, "asymmetric", False) for each in self.variants())

    @property
    def follows_dense(self) -> bool:
        """Whether a layer or a block is asked for what the dense model puts out there."""
        return self.asymmetric or bool(self.tune)

    @property
    def needs_data(self) -> bool:
        """Whether the model has to be run on calibration windows."""
        return self.statistic is not None or self.prepare != "none" or bool(self.tune)

    def as_dict(self) -> dict:
        """Plain values, for JSON and YAML: what ``Recipe(**…)`` takes, without what has no effect.

        >>> Recipe(**Recipe("magnitude", rank=4).as_dict()) == Recipe("magnitude", rank=4)
        True
        """
        told: dict[str, Any] = {"prune": str(self.prune), "pattern": str(self.pattern)}
        told |= {"refine": str(self.refine), **self.refine.options(), "prepare": self.prepare}
        told |= {name: getattr(self, name) for name in ("tune", "samples", "seqlen", "seed")}
        return {**told, "skip": list(self.skip), "overrides": self.overrides}
