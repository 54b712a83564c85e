"""What a published table is: its model and protocol, its rows and columns, its numbers.

A :class:`Spec` is read from ``results/specs/NAME.json``, the published numbers from
``results/published``; :mod:`slr.evaluate.reproduction` measures them.  The tables of
:mod:`slr.evaluate.benchmarks` name one of these, whose models they ask.

Book: chapter 12.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any

from slr.matrix import steps
from slr.matrix.rivals import OATS, HASSLEFree, ThreeBASiL
from slr.matrix.rounding import Grid
from slr.model.allocation import check_way
from slr.model.edges import check_entries, is_mapping, is_text, is_whole, or_none
from slr.model.recipe import Recipe

__all__ = ["REPAIRS", "Cell", "Spec", "as_text", "check_spec", "published", "specs", "told_by"]

# What a row is called, and its options beside `Recipe.refine`, by the name of the repair in a spec
# (that of the repair itself, or of one of its variants); the cheapest first.
REPAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("pruned", {}),
    "svd": ("svd", {}),
    "weights": ("refined", {}),
    "accelerated": ("accelerated", {"refine": "weights", "schedule": "accelerated"}),
    "diagonal": ("diagonal", {}),
    "eora": ("eora", {}),
    "activations": ("refined-activations", {}),
    "activations+mask": (
        "refined-activations-mask", {"refine": "activations", "update_mask": True}
    ),
    "activations+admm": (
        "refined-activations-admm", {"refine": "activations", "update_mask": "admm"}
    ),
    "asymmetric": (
        "asymmetric",
        {"refine": "activations", "update_mask": "admm", "asymmetric": True},
    ),
    "tuned": (
        "tuned",
        {"refine": "activations", "update_mask": "admm", "asymmetric": True, "tune": 4},
    ),
    "slim": ("slim", {}),
    "oats": ("oats", {"iterations": OATS.iterations}),
    "hassle": ("hassle", {"iterations": HASSLEFree.iterations}),
    "3basil": ("3basil", {"iterations": ThreeBASiL.iterations}),
    "pcp": ("pcp", {}),
}  # fmt: skip


def _goes(mask: str, repair: str) -> bool:
    """Whether a repair has a row with these masks: one that chooses its own has a single one."""
    return mask == "wanda" or not getattr(steps.REPAIRS.get(repair), "blind", False)


def _names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_text, value))


def _dtype(value: Any) -> bool:
    return value in ("float32", "bfloat16", "float16")


def at_least(least: int) -> Callable[[Any], bool]:
    """A predicate: a whole number, `least` or more."""
    return lambda value: is_whole(value) and value >= least


# What a JSON file has to say.
DTYPE = ("float32, bfloat16 or float16", _dtype)
NAMES = ("a list of names", _names)
FIELDS = {
    **{key: ("text", is_text) for key in ("title", "model", "text", "calibration")},
    **{
        key: ("a list of names", lambda value: value == [] or _names(value))
        for key in ("masks", "repairs", "columns")
    },
    "entries": ("a mapping", is_mapping),
    "dtype": DTYPE,
    "seqlen": ("2 tokens or more", at_least(2)),
    "limit": ("null, or 1 window or more", or_none(at_least(1))),
    "recipe": ("a mapping", is_mapping),
    "options": ("a mapping", is_mapping),
    "published": ("null, or a file's name", or_none(is_text)),
    "rounded": ("a list of names", lambda value: not value or _names(value)),
}


def check_spec(told: Any, fields: dict, **left_out: Any) -> None:
    """Raise ValueError unless a spec says what it has to, and nothing else.

    Args:
        told: what its file holds.
        fields: as for :func:`slr.model.edges.check_entries`.
        left_out: values of what it need not say.
    """
    for key in told if is_mapping(told) else []:
        if key not in fields:
            raise ValueError(f"{key!r} is unknown; it may say {', '.join(fields)}")
    check_entries("the spec", {**left_out, **told} if is_mapping(told) else told, fields)


@dataclass(frozen=True)
class Cell:
    """One number of a table: its row and column, and the recipe; no recipe is the dense model.

    With a `grid` instead, its weights are rounded, and nothing else is done.  With `allocate`, its
    layers differ, by a way of :data:`slr.model.allocation.WAYS`.
    """

    row: str
    column: str
    recipe: Recipe | None
    grid: Grid | None = None
    allocate: str | None = None

    @property
    def told(self) -> dict | None:
        """What decided its number, as plain data."""
        if self.grid is not None:
            return {"rounded": str(self.grid)}
        if self.recipe is None:
            return None
        return {**self.recipe.as_dict(), **({"allocate": self.allocate} if self.allocate else {})}

    def file(self, out: Path) -> Path:
        """Where its JSON is kept under `out`."""
        column = self.column.replace(":", "-").replace("/", "-rank-")
        return out / re.sub(r"[/ ,:%+]+", "-", self.row) / f"{column}.json"


@dataclass(frozen=True)
class Spec:
    """A table to fill.

    Attributes:
        name: of the spec.
        title: of the table.
        model: ``"tiny"``, a folder, or a name on the Hugging Face hub.
        dtype: of the weights on a GPU; a CPU computes in float32.
        text: to evaluate on, as for :func:`slr.model.data.load_text`.
        seqlen: tokens in a window.
        limit: at most this many windows; ``None`` takes all.
        calibration: as for :func:`slr.checkpoint.compression.compress`.
        recipe: options of every recipe.
        masks, repairs: values of `Recipe.prune`, and of :data:`REPAIRS`.
        columns: patterns, or a pattern and a rank, as ``"2:4/36"``.
        published: file of published numbers, if any.
        options: more options of the recipes of some repairs, by the repair's name.
        rounded: grids for the plain alternative, rows of their own: ``["int8", "int4 by 32"]``.
        entries: rows of one cell each, by name: options of their recipes beside `recipe`, and
            ``"allocate"``, see :func:`slr.allocate`.
    """

    name: str
    title: str
    model: str
    dtype: str
    text: str
    seqlen: int
    limit: int | None
    calibration: str
    recipe: dict[str, Any]
    masks: Sequence[str] = ()
    repairs: Sequence[str] = ()
    columns: Sequence[str] = ()
    published: str | None = None
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    rounded: Sequence[str] = ()
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, name: str) -> Spec:
        """A spec by name, or from the path of a JSON file.

        Raises:
            ValueError: no such spec, or one that says something unknown.
        """
        name, told = told_by(name)
        try:
            absent: dict[str, Any] = {"masks": [], "repairs": [], "columns": [], "entries": {}}
            check_spec(told, FIELDS, published=None, options={}, rounded=[], **absent)
            spec = cls(name=name, **told)
            for repair in spec.repairs:
                if repair not in REPAIRS:
                    known = ", ".join(REPAIRS)
                    raise ValueError(f"repair {repair!r} is unknown; it must be one of {known}")
            list(spec.cells())
        except (TypeError, ValueError) as error:
            raise ValueError(f"table {name!r}: {error}") from None
        return spec

    @property
    def rows(self) -> list[str]:
        """Names of the rows, in the order of the table."""
        repaired = [f"{m}/{REPAIRS[r][0]}" for m in self.masks for r in self.repairs if _goes(m, r)]
        rounded = [f"rounded/{name}" for name in self.rounded]
        return ["dense", *rounded, *self.entries, *repaired]

    def cells(self, rows: Sequence[str] = ("*",), columns: Sequence[str] = ()) -> Iterator[Cell]:
        """The cells of some rows and columns, the cheapest first.

        Args:
            rows: names, with ``*`` for anything: ``["magnitude/*", "dense"]``.
            columns: patterns; all when empty.

        Raises:
            ValueError: a row or column that is not in the table.
        """
        for row in rows:
            if not any(fnmatchcase(name, row) for name in self.rows):
                raise ValueError(f"row {row!r} fits none of {', '.join(self.rows)}")
        for column in columns:
            if column not in self.columns:
                raise ValueError(f"column {column!r} is none of {', '.join(self.columns)}")

        def wanted(name: str) -> bool:
            return any(fnmatchcase(name, row) for row in rows)

        if wanted("dense"):
            yield Cell("dense", "dense", None)
        for name in self.rounded:
            if wanted(f"rounded/{name}"):
                yield Cell(f"rounded/{name}", "dense", None, Grid.parse(name))
        for name, options in self.entries.items():
            if wanted(name):
                common = {**self.recipe, **options}
                by = common.pop("allocate", None)
                recipe = Recipe.fitting(**common)
                if by is not None:
                    check_way(by, recipe)
                yield Cell(name, "dense", recipe, allocate=by)
        for repair in sorted(self.repairs, key=list(REPAIRS).index):
            for mask in (m for m in self.masks if _goes(m, repair)):
                row, options = REPAIRS[repair]
                row = f"{mask}/{row}"
                for column in (
                    c for c in self.columns if wanted(row) and (c in columns or not columns)
                ):
                    pattern, _, rank = column.partition("/")
                    if rank and repair == "none":
                        continue  # has none
                    common = {**self.recipe, "prune": mask, "pattern": pattern, "refine": repair}
                    if rank:
                        common = {**common, "rank": int(rank), "rank_ratio": None}
                    more = {**options, **self.options.get(repair, {})}
                    yield Cell(row, column, Recipe.fitting(**{**common, **more}))


def told_by(name: str) -> tuple[str, Any]:
    """What the JSON of a spec says, by its name or path; with its name.

    Raises:
        ValueError: there is none of that name, or it is no JSON.
    """
    path = Path(name)
    if path.suffix == ".json" and path.is_file():
        text, name = path.read_text(encoding="utf-8"), path.stem
    elif name in specs():
        text = (resources.files("slr.specs") / f"{name}.json").read_text(encoding="utf-8")
    else:
        known = ", ".join(specs())
        raise ValueError(f"table {name!r} is neither one of {known} nor a JSON file")
    try:
        return name, json.loads(text)
    except ValueError as error:
        raise ValueError(f"table {name!r}: {error}") from None


def specs() -> list[str]:
    """Names of the specs that come with the package, those of benchmarks among them."""
    found = resources.files("slr.specs").iterdir()
    return sorted(file.name[:-5] for file in found if file.name.endswith(".json"))


def published(spec: Spec) -> dict[str, dict[str, float]]:
    """The published numbers of a table: row -> column -> perplexity; empty if there are none."""
    if spec.published is None:
        return {}
    file = resources.files("slr.published") / spec.published
    told = json.loads(file.read_text(encoding="utf-8"))
    rows: dict[str, dict[str, float]] = {"dense": {"dense": told["dense"]}}
    for mask in spec.masks:
        for repair, row in told.get(mask, {}).items():
            rows[f"{mask}/{repair}"] = row
    return rows


def as_text(
    measured: dict[str, dict[str, float]],
    known: dict[str, dict[str, float]],
    columns: Sequence[str],
) -> str:
    """A table of measured perplexities, each row above its published one.

    >>> print(as_text({"dense": {"dense": 5.7}}, {"dense": {"dense": 5.68}}, ["2:4"]))
    perplexity measured here             dense       2:4
    dense                                 5.70
      published                           5.68
    """
    names = ["dense", *columns]
    lines = [f"{'perplexity measured here':<32}" + "".join(f"{name:>10}" for name in names)]
    for row, cells in measured.items():
        for label, values in ((row, cells), ("  published", known.get(row, {}))):
            texts = [f"{values[name]:.2f}" if name in values else "" for name in names]
            if any(texts):
                lines.append((f"{label:<32}" + "".join(f"{x:>10}" for x in texts)).rstrip())
    return "\n".join(lines)
