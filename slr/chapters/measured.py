"""Measured tables, with the intervals of what is claimed from them.

A cell keeps the loss of each window; two cells were measured on the same windows, so that their
ratio is much surer than either perplexity.

Book: chapters 5, 9, 11, 12, 14 to 16, and the page of results.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from slr.chapters.records import folder, recorded
from slr.evaluate.agree import bootstrap
from slr.evaluate.league import places
from slr.evaluate.reproduction import grid
from slr.evaluate.tables import Cell, Spec
from slr.matrix.rounding import Grid
from slr.model.account import matrix_account

__all__ = [
    "front_page", "frontier", "losses", "of_systems", "order", "perplexities", "ratio",
]  # fmt: skip

# Width, inner width and width of keys of the models that are measured, and their rank.
WIDTHS = {"smollm2": (576, 1536, 192, 18), "tiny": (256, 704, 256, 8)}

# Rows of the league as the front page calls them, in its order.
SHOWN = {
    "dense": "dense, bfloat16",
    "plain int8": "int8, rounded",
    "plain int4 by 32": "int4, rounded",
    "GPTQ int4": "int4, GPTQ",
    "ours int4": "int4 and low rank",
    "plain int3 by 32": "int3, rounded",
    "ours int3": "int3 and low rank",
    "ours 50% and int4": "50%, int4 and low rank",
    "ours 2:4 and int8": "2:4, int8 and low rank",
    "Wanda 2:4": "2:4, Wanda",
    "SparseGPT 2:4": "2:4, SparseGPT",
    "paper Wanda 2:4": "2:4, Wanda, Algorithm 1",
    "ours 2:4": "2:4 and low rank, outputs in view",
    "ours 2:4 tuned": "the same, tuned",
}


def front_page(text: str = "wikitext-2-test.txt") -> pd.DataFrame:
    """The league in short: what is stored and multiplied of each model, and what it is worth.

    Args:
        text: name of the second text that perplexities are shown of.

    >>> front_page().loc["dense, bfloat16", "bits"]
    '16.0'
    """
    found = {
        place.name: place
        for place in places(Spec.read("league"), folder("measured/league"), text)
        if place.other is not None
    }
    rows = {
        shown: {
            "": "*" if found[name].frontier else "",
            "MB": f"{found[name].bytes / 1e6:.0f}",
            "bits": f"{found[name].bits:.1f}",
            "products": f"{found[name].multiplications:.0%}",
            "perplexity": f"{found[name].other:.1f}",
        }
        for name, shown in SHOWN.items()
        if name in found
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def perplexities(
    table: str, text: str | None = None, columns: Sequence[str] | None = None
) -> pd.DataFrame:
    """What is measured of a table: a row for each mask and repair, NaN where nothing is yet.

    Args:
        table: name of a spec, as ``"smollm2"``.
        text: name of a second text that its cells were measured on; the spec's own when ``None``.
        columns: of the table; all that hold a number when ``None``.

    >>> perplexities("tiny", columns=["0.5", "2:4"]).columns.tolist()
    ['0.5', '2:4']
    """
    spec = Spec.read(table)
    found = grid(spec, folder(f"measured/{table}"), text)
    shown = pd.DataFrame.from_dict(found, orient="index", columns=["dense", *spec.columns])
    return shown.dropna(axis=1, how="all") if columns is None else shown[list(columns)]


def losses(table: str, row: str, column: str, text: str | None = None) -> Tensor | None:
    """Loss of each window of one cell in nats, float64; ``None`` if it is not there, or infinite.

    Args:
        table, text: as for :func:`perplexities`.
        row, column: of the cell.
    """
    file = Cell(row, column, None).file(folder(f"measured/{table}"))
    if not file.is_file():
        return None
    told = json.loads(file.read_text(encoding="utf-8"))
    told = told if text is None else told.get("also", {}).get(text, {})
    values = told.get("losses")
    return None if values is None else torch.tensor(values, dtype=torch.float64)


def frontier(table: str, text: str | None = None, pattern: str = "2:4") -> pd.DataFrame:
    """What is dense, rounded and pruned to a pattern, by its bits for each weight.

    Args:
        table, text: as for :func:`perplexities`.
        pattern: of the columns that are looked at, with the ranks that they name.

    Returns:
        A row for each cell that is measured; columns ``"mask"`` (``"rounded"`` for what is),
        ``"repair"``, ``"rank"``, ``"bits"`` (of the linear layers on disk, S as values in bfloat16
        and a bit for each place) and ``"perplexity"``.

    >>> frontier("tiny").columns.tolist()
    ['mask', 'repair', 'rank', 'bits', 'perplexity']
    """
    width, wide, keys, usual = WIDTHS[table]
    shapes = [(width, width)] * 2 + [(keys, width)] * 2 + [(wide, width)] * 2 + [(width, wide)]

    def bits(rank: int) -> float:
        each = [matrix_account(shape, pattern, rank, storage="bitmask") for shape in shapes]
        return 8 * sum(one.bytes for one in each) / sum(m * n for m, n in shapes)

    rows = []
    for row, cells in perplexities(table, text).iterrows():
        mask, _, repair = str(row).partition("/")
        for column, value in cells.dropna().items():
            name, _, rank = str(column).partition("/")
            if name == "dense":
                size = Grid.parse(repair).bits_per_weight if repair else 16
                rows.append((mask, repair, 0, size, value))
            elif name == pattern:
                k = 0 if repair == "pruned" else int(rank or usual)
                rows.append((mask, repair, k, bits(k), value))
    return pd.DataFrame(rows, columns=["mask", "repair", "rank", "bits", "perplexity"])


def ratio(lower: Tensor, upper: Tensor) -> tuple[float, float, float]:
    """Perplexity of one cell over that of another on the same windows, and its 95% interval.

    Args:
        lower, upper: :func:`losses` of each.

    Raises:
        ValueError: fewer than two windows, or not the same number.

    >>> print(*(f"{x:.2f}" for x in ratio(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 3.0]))))
    0.37 0.37 0.37
    """
    if len(lower) != len(upper):
        raise ValueError(f"{len(lower)} and {len(upper)} windows were not measured on one text")
    low, high = bootstrap(lower - upper)
    return math.exp(lower.mean() - upper.mean()), math.exp(low), math.exp(high)


def order(
    table: str, pairs: Sequence[tuple[str, str]], columns: Sequence[str], text: str | None = None
) -> pd.DataFrame:
    """Ratios of perplexities with their intervals, for claims "one repair is below another".

    Args:
        table, text: as for :func:`perplexities`.
        pairs: rows without their masks, lower and upper, as ``[("refined", "svd")]``.
        columns: of the table.

    Returns:
        A row for each mask and pair, a column for each column; ``"–"`` where one of the two is not
        measured.  A ratio whose interval holds 1 decides nothing.

    >>> order("tiny", [("svd", "svd")], ["2:4"]).shape
    (3, 1)
    """
    spec, rows = Spec.read(table), {}
    for mask in spec.masks:
        for lower, upper in pairs:
            cells: dict[str, str] = {}
            for column in columns:
                both = [losses(table, f"{mask}/{each}", column, text) for each in (lower, upper)]
                if both[0] is None or both[1] is None:
                    cells[column] = "–"
                else:
                    value, low, high = ratio(both[0], both[1])
                    cells[column] = f"{value:.3f} ({low:.3f} to {high:.3f})"
            rows[f"{mask}: {lower} / {upper}"] = cells
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(columns))


def of_systems(
    *systems: str, text: str = "wikitext-2-test.txt", beside: str = "dense"
) -> pd.DataFrame:
    """What other systems make of the real model (``benchmarks/systems.py``), row by row.

    Args:
        systems: ``"cap"``, ``"losparse"``, ``"induction"``; ``"recipe"`` and ``"rounded"`` are
            refinement and rounding of the blocks that CAP and LoSparse are given.
        text: to show.
        beside: row whose perplexity others are divided by, on the same windows.

    Returns:
        A row for each that is measured, the dense model first, then as the systems are named:
        ``"perplexity"``, what it is over the other, the interval of that, ``"95%"``, and shares of
        ``"parameters"`` and ``"bytes"`` of what was compressed.

    Raises:
        ValueError: no row is called `beside`.

    >>> of_systems("losparse").columns.tolist()
    ['perplexity', 'over dense', '95%', 'parameters', 'bytes']
    """
    shown = ("dense", *systems)
    told = [row for row in recorded("smollm2/systems")["rows"] if row["system"] in shown]
    told.sort(key=lambda row: shown.index(row["system"]))
    found = {(row["system"], row["row"]): row for row in told}
    own = {
        key: torch.tensor(row["losses"][text], dtype=torch.float64) for key, row in found.items()
    }
    other = next((own[key] for key in own if key[1] == beside), None)
    if other is None:
        names = ", ".join(repr(name) for _, name in own)
        raise ValueError(f"beside is {beside!r}; it must be one of {names}")
    rows = {}
    for key, row in found.items():
        value, low, high = ratio(own[key], other)
        rows[key] = {
            "perplexity": row["perplexity"][text], f"over {beside}": value,
            "95%": "" if own[key] is other else f"{low:.2f}\u00a0to\u00a0{high:.2f}",
            "parameters": row["parameters"], "bytes": row["bytes"],
        }  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index")
