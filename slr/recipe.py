"""A recipe: everything that decides how a model is compressed, besides the model and its text.

Book: chapter 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase

from slr.patterns import parse
from slr.prune import METHODS
from slr.refine import SCHEDULES
from slr.statistics import GramStatistic, NormStatistic

__all__ = ["REPAIRS", "Recipe", "parse_override"]

REPAIRS = ("weights", "diagonal", "activations", "svd", "eora", "pcp", "none")
PREPARATIONS = ("none", "induction")
# Not to be overridden for a layer.
WHOLE = ("prepare", "samples", "seqlen", "seed", "skip", "overrides")
CHOICES = {
    "prune": METHODS, "prepare": PREPARATIONS, "refine": REPAIRS, "schedule": SCHEDULES,
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How to compress.

    Args:
        prune: pruning method, see :data:`slr.prune.METHODS`.
        pattern: ``"2:4"``, or a fraction to prune such as ``"0.5"``.
        group: ``"row"`` or ``"matrix"``, for a fraction.
        refine: repair: Algorithm 1 on the ``"weights"`` (the paper, data-free), on weights
            scaled by activation norms (``"diagonal"``) or on the layer's outputs
            (``"activations"``); one shot, ``"svd"`` of the weights or ``"eora"`` of the
            outputs; ``"pcp"``, principal component pursuit; or ``"none"``.
        rank: rank of the low-rank part, the same for every layer; or
        rank_ratio: rank as a fraction of the hidden size, 1/32 by default (128 for 4096).
        iterations: of the refinement.
        schedule: of the refinement, ``"paper"``, ``"constant"`` or ``"accelerated"``.
        tolerance: stop refining when an iteration lowers the error by less than this share of
            it; not for the paper's schedule, whose ramp has to be run to its end.
        update_mask: with ``refine="activations"``: choose the mask anew while refining.
        prepare: ``"induction"`` first rescales each block so that it prunes better
            (:mod:`slr.methods.induction`), or ``"none"``.
        samples: calibration windows, for methods that look at data.
        seqlen: tokens in each; the model's longest context, 2048 at most, when ``None``.
        seed: for random masks and the solver's start.
        skip: names of layers to leave dense, with ``*`` for anything:
            ``["*.down_proj", "model.layers.0.*"]``.
        overrides: other options for some layers, by such names; of several that fit, the later
            counts: ``{"*.o_proj": {"rank": 64, "pattern": "0.4"}}``.

    >>> Recipe(prune="wanda", pattern="2:4").resolved(hidden_size=4096).rank
    128
    >>> Recipe(pattern="3:2")
    Traceback (most recent call last):
    ValueError: pattern 3:2 would keep 3 of every 2; n:m needs 0 < n < m, as in 2:4
    >>> recipe = Recipe(skip=["*.o_proj"], overrides={"*.q_proj": {"pattern": "0.4"}})
    >>> recipe.layer("model.layers.0.self_attn.q_proj", 4096).pattern
    '0.4'
    >>> recipe.layer("model.layers.0.self_attn.o_proj", 4096) is None
    True
    """

    prune: str = "wanda"
    pattern: str = "2:4"
    group: str = "row"
    refine: str = "weights"
    rank: int | None = None
    rank_ratio: float | None = None
    iterations: int = 50
    schedule: str = "paper"
    update_mask: bool = False
    prepare: str = "none"
    tolerance: float = 0.0
    samples: int = 128
    seqlen: int | None = None
    seed: int = 0
    skip: Sequence[str] = ()
    overrides: Mapping[str, Mapping] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pattern", str(self.pattern))
        parse(self.pattern, self.group)
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(
                    f"{name} {value!r} is unknown; it must be one of {', '.join(known)}"
                )
        if self.rank is not None and self.rank_ratio is not None:
            raise ValueError("rank and rank_ratio are both given; give one")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank is {self.rank}; it must be at least 1 (or refine='none')")
        if self.rank_ratio is not None and not 0 < self.rank_ratio <= 1:
            raise ValueError(f"rank_ratio is {self.rank_ratio}; it must be above 0 and at most 1")
        for name in ("iterations", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance is {self.tolerance}; it must be from 0 to below 1")
        if self.update_mask and self.refine != "activations":
            raise ValueError("update_mask needs refine='activations'")
        if isinstance(self.skip, str):
            raise TypeError(f"skip is {self.skip!r}; it must be a list of names")
        object.__setattr__(self, "skip", tuple(self.skip))
        known_options = {f.name for f in fields(self)} - set(WHOLE)
        for name, options in self.overrides.items():
            wrong = sorted(set(options) - known_options)
            if wrong:
                raise ValueError(f"overrides[{name!r}]: option {wrong[0]!r} is not one of a layer")
            self._with(options)

    def resolved(self, hidden_size: int) -> Recipe:
        """The same recipe with a definite `rank` for a model of this hidden size."""
        if self.refine == "none":
            return replace(self, rank=None, rank_ratio=None)
        if self.rank is not None:
            return self
        ratio = 1 / 32 if self.rank_ratio is None else self.rank_ratio
        return replace(self, rank=max(1, int(ratio * hidden_size)), rank_ratio=None)

    def layer(self, name: str, hidden_size: int) -> Recipe | None:
        """The recipe of one layer by its full name, resolved; ``None`` if it stays dense."""
        if any(fnmatchcase(name, pattern) for pattern in self.skip):
            return None
        mine = self
        for pattern, options in self.overrides.items():
            if fnmatchcase(name, pattern):
                mine = mine._with(options)
        return replace(mine, skip=(), overrides={}).resolved(hidden_size)

    def _with(self, options: Mapping) -> Recipe:
        if "rank" in options:
            options = {"rank_ratio": None, **options}
        elif "rank_ratio" in options:
            options = {"rank": None, **options}
        return replace(self, skip=(), overrides={}, **options)

    def variants(self) -> list[Recipe]:
        """The recipe, and what each override makes of it."""
        return [self, *(self._with(options) for options in self.overrides.values())]

    @property
    def statistic(self) -> type[NormStatistic] | type[GramStatistic] | None:
        """What has to be known of each layer's inputs; ``None`` for a data-free recipe."""
        each = self.variants()
        if any(r.prune == "sparsegpt" or r.refine in ("activations", "eora") for r in each):
            return GramStatistic
        if any(r.prune == "wanda" or r.refine == "diagonal" for r in each):
            return NormStatistic
        return None

    @property
    def needs_data(self) -> bool:
        """Whether the model has to be run on calibration windows."""
        return self.statistic is not None or self.prepare != "none"

    def as_dict(self) -> dict:
        """Plain values, for JSON."""
        return {**asdict(self), "skip": list(self.skip)}


def parse_override(text: str) -> tuple[str, dict]:
    """A name and its options from their short form.

    Raises:
        ValueError: it is not of that form.

    >>> parse_override("*.o_proj:rank=64,pattern=2:4")
    ('*.o_proj', {'rank': 64, 'pattern': '2:4'})
    """
    name, _, options = text.partition(":")
    found: dict = {}
    for option in filter(None, options.split(",")):
        key, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"override {text!r} is not NAME:option=value,option=value")
        kind = {"rank": int, "iterations": int, "rank_ratio": float, "tolerance": float}.get(
            key.strip(), str
        )
        found[key.strip()] = kind(value)
    if not name or not found:
        raise ValueError(f"override {text!r} is not NAME:option=value,option=value")
    return name, found
