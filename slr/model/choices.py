"""What the names and options of a recipe become.

Book: chapter 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

from slr.matrix.patterns import Pattern, Unstructured, parse
from slr.matrix.pruners import Pruner, step_of
from slr.matrix.rounding import Grid
from slr.matrix.steps import REPAIRS, NoRepair, Repair

__all__ = [
    "CALLED", "STEPS", "check_names", "check_steps", "plain", "plainly", "regrouped", "repair_of",
    "without_effect",
]  # fmt: skip

STEPS = ("prune", "pattern", "refine")
CALLED = {  # what the result of a repair is called; else refined
    "svd": "SVD repair", "eora": "EoRA repair", "pcp": "PCP", "gptq": "GPTQ", "oats": "OATS",
    "slim": "SLiM-LoRA", "hassle": "HASSLE-free", "3basil": "3BASiL", "cap": "CAP",
    "losparse": "LoSparse",
}  # fmt: skip


def check_names(skip: Any, overrides: Any) -> None:
    """Raise TypeError unless these are a list of names, and options by name."""
    if not isinstance(skip, list | tuple) or not all(isinstance(name, str) for name in skip):
        raise TypeError(f"skip is {skip!r}; it must be a list of names")
    if not isinstance(overrides, Mapping) or not all(
        isinstance(name, str) and isinstance(wanted, Mapping) for name, wanted in overrides.items()
    ):
        raise TypeError(f"overrides is {overrides!r}; it must map names to options")


def repair_of(
    pruner: Pruner, pattern: Pattern, refine: str | Repair | NoRepair | None, options: dict
) -> Any:
    """The repair that is asked for, or the best for what is read anyway."""
    if refine is None and pruner.needs is not None:
        best = {"update_mask": "admm"} if pattern.density < 1 else {}
        refine, options = "activations", {**best, "asymmetric": True, **options}
    elif refine is None:
        best = {} if "values" in options else {"schedule": "accelerated"}
        refine, options = "weights", {**best, **options}
    return step_of("refine", refine, REPAIRS, options)


def check_steps(pruner: Pruner, pattern: Pattern, refine: Repair | NoRepair) -> None:
    """Raise ValueError if a step has nothing to do, or no effect on what another does.

    That is where nothing is kept or all is, or where the repair does not look at what is.
    """
    if refine.blind and str(pruner) != "wanda":
        raise ValueError(
            f"prune={str(pruner)!r} has no effect with refine={str(refine)!r}, which "
            "chooses a mask of its own; give 'wanda', the default"
        )
    if pattern.density == 1:
        if getattr(refine, "values", None) is None:
            raise ValueError(
                f"pattern {pattern} keeps every weight, so that nothing gets smaller; give values "
                "too, as 'int4 by 64', or another pattern"
            )
        if refine.changes_mask:
            raise ValueError(
                f"update_mask has no effect with pattern {pattern}, which keeps every weight; "
                "leave it out"
            )
    if pattern.density:
        return
    if not refine.alone:
        names = " or ".join(repr(name) for name, step in REPAIRS.items() if step.alone)
        raise ValueError(
            f"pattern {pattern} keeps nothing, and refine={str(refine)!r} has nothing to work on; "
            f"give {names}"
        )
    if str(pruner) != "magnitude":
        raise ValueError(
            f"prune={str(pruner)!r} has no effect with pattern {pattern}, which keeps nothing; "
            "give 'magnitude'"
        )


def plain(options: Mapping) -> dict:
    """The options of an override without objects: their names and what they hold."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, Pruner | Repair | NoRepair):
            found |= {k: v for k, v in value.options().items() if v is not None}
        found[name] = str(value) if name in STEPS or isinstance(value, Grid) else plainly(value)
    return found


def plainly(value: Any) -> Any:
    """A number of numpy as one of Python, which JSON can hold; all else as it is.

    >>> plainly(True), plainly("2:4")
    (True, '2:4')
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if hasattr(value, "__index__") else float(value)


def without_effect(options: Mapping, wanted: Mapping, pattern: Pattern) -> dict:
    """The options that a layer takes over, without those that its override makes void.

    Args:
        options: of the repair that all layers have.
        wanted: of the override.
        pattern: of the layer.

    >>> without_effect({"schedule": "accelerated", "rank": 2}, {"values": "int8"}, parse("2:4"))
    {'rank': 2}
    """
    void = {"rank", "rank_ratio"} if {"rank", "rank_ratio"} & set(wanted) else set()
    if wanted.get("values") is not None:
        void |= {"schedule", "tolerance"}
    elif "values" in wanted:
        void |= {"factors"}
    if pattern.density == 1:
        void |= {"update_mask"}
    return {name: value for name, value in options.items() if name not in void}


def regrouped(pattern: Any, group: str | None) -> Pattern:
    """A pattern, of another group if one is given."""
    if group is not None and isinstance(pattern, Unstructured):
        pattern = pattern.sparsity
    return parse(pattern, group)
