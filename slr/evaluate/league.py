"""The league: every method at the bytes that it takes.

Rows of a table (:class:`slr.evaluate.tables.Spec`) whose cells say what they weigh.  A row is on
the *frontier* if no other is as small or smaller and better.  Book: chapter 19.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from slr.evaluate.reproduction import read_cell
from slr.evaluate.tables import Cell, Spec

__all__ = ["Place", "as_table", "places", "seeded", "spread"]

ROUNDED = "rounded/"


class Place(NamedTuple):
    """One row of the league.

    Attributes:
        name: of the row.
        bits: of a weight of the blocks' linear layers, all that is stored of them counted.
        bytes: of the whole model on disk.
        multiplications: share of the dense model's, in those layers.
        perplexity: on the table's text, and `other` on a second one, ``None`` if not measured.
        seconds: that the cell took: compressing and evaluating.
        frontier: whether nothing that is as small is better, by `other` if it is there.
        seeds: what decides, `other` or `perplexity`, for each seed that is measured, this one's
            first.
    """

    name: str
    bits: float
    bytes: int
    multiplications: float
    perplexity: float
    other: float | None
    seconds: float
    frontier: bool = False
    seeds: tuple[float, ...] = ()


def seeded(spec: Spec, out: str | Path, seed: int) -> tuple[Spec, Path]:
    """The same table with other calibration windows, and the folder of its cells.

    Args:
        spec: the table.
        out: folder of the cells of its own seed.
        seed: that the windows are drawn by.
    """
    if seed == spec.recipe.get("seed", 0):
        return spec, Path(out)
    return replace(spec, recipe={**spec.recipe, "seed": seed}), Path(out) / f"seed-{seed}"


def places(spec: Spec, out: str | Path, text: str | None = None) -> list[Place]:
    """The rows that are measured, the smallest first.

    Args:
        spec: the table.
        out: folder of its cells.
        text: name of a second text.

    Cells that do not say what they weigh, as those of earlier versions, are left out.
    """
    found = []
    for cell in spec.cells():
        there = [read_cell(file) for file in _files(cell, Path(out))]
        told = next(iter(there), None)
        if told is None or "in_layers" not in told or told["perplexity"] is None:
            continue
        other = told.get("also", {}).get(text or "", {}).get("perplexity")
        share = told["products"] / told["weights"]
        name = cell.row.replace(ROUNDED, "plain ")
        bits = 8 * told["in_layers"] / told["weights"]
        found.append(
            Place(
                name, bits, told["bytes"], share, told["perplexity"], other,
                told["about"]["seconds"], seeds=_seeds(there, text),
            )
        )  # fmt: skip
    return _starred(found)


def _files(cell: Cell, out: Path) -> list[Path]:
    """Of a cell, for each seed that it is measured for, the table's own first."""
    files = (cell.file(folder) for folder in (out, *sorted(out.glob("seed-*"))))
    return [file for file in files if file.is_file()]


def _seeds(there: list[dict], text: str | None) -> tuple[float, ...]:
    """The numbers of a cell for each seed, on the text if it is given."""
    told = (each if text is None else each.get("also", {}).get(text, {}) for each in there)
    values = (each.get("perplexity") for each in told)
    return tuple(value for value in values if value is not None)


def _starred(found: list[Place]) -> list[Place]:
    """In order, of equal size the best first, and the frontier marked.

    Where a second text is told of, rows that were not measured on it do not compete.
    """
    second = any(place.other is not None for place in found)
    value: dict[Place, float] = {}
    for place in found:
        told = place.other if second else place.perplexity
        value[place] = float("inf") if told is None else told
    best, shown = float("inf"), []
    for place in sorted(found, key=lambda p: (p.bits, value[p])):
        shown.append(place._replace(frontier=value[place] < best))
        best = min(best, value[place])
    return shown


def as_table(found: Sequence[Place], text: str | None = None) -> str:
    """The league in columns; a star marks the frontier.

    >>> print(as_table([Place("plain int8", 8.0, 10**6, 1.0, 20.0, None, 3.0, True)]))
       row         bits   MB  arithmetic  perplexity  seconds
    *  plain int8  8.00  1.0       1.000       20.00        3
    """
    several = any(len(place.seeds) > 1 for place in found)
    rows = [
        ["", "row", "bits", "MB", "arithmetic", "perplexity", *([f"on {text}"] if text else []),
         *(["over seeds"] if several else []), "seconds"]
    ]  # fmt: skip
    for place in found:
        other = "" if place.other is None else f"{place.other:.2f}"
        rows.append([
            "*" if place.frontier else "", place.name, f"{place.bits:.2f}",
            f"{place.bytes / 1e6:.1f}", f"{place.multiplications:.3f}", f"{place.perplexity:.2f}",
            *([other] if text else []), *([spread(place.seeds)] if several else []),
            f"{place.seconds:.0f}",
        ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        texts = [x.ljust(w) if i < 2 else x.rjust(w) for i, (x, w) in
                 enumerate(zip(row, widths, strict=True))]  # fmt: skip
        lines.append("  ".join(texts))
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Mean, standard deviation and number of some values; nothing of less than two.

    >>> spread([20.0, 21.0, 22.0])
    '21.00 ± 1.00 of 3'
    """
    if len(values) < 2:
        return ""
    return f"{fmean(values):.2f} ± {stdev(values):.2f} of {len(values)}"
