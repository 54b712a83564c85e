"""The page *Try it*: numbers for its three sliders, as JSON that is part of the page.

``book/_static/sliders.js`` draws them.  Where no script runs, the table of the same numbers is
there instead.  Of the controls of a picture the last one moves along a line and those before it
choose which lines are shown; a line is ``{at, name, color, dash, x, y, says}``, with the places of
the controls that choose it, and what is said at each of its points.

Book: chapters 5, 7, 11, 17.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from slr.chapters.plots import COLORS
from slr.chapters.records import recorded, runs
from slr.model.account import matrix_account

if TYPE_CHECKING:
    from IPython.display import HTML

__all__ = ["PICTURES", "bound", "explore", "roofline", "schedules", "sparsity_and_rank"]


def control(label: str, values: list[str], start: int) -> dict[str, Any]:
    """A slider."""
    return {"label": label, "values": values, "start": start}


def percent(share: float) -> str:
    """A tick.

    >>> percent(0.001), percent(10)
    ('0.1%', '1000%')
    """
    return f"{100 * share:g}%"


def axis(
    label: str, ticks: Sequence[float], low: float, high: float, *, log: bool = False,
    words: Callable[[float], str] = "{:g}".format,
) -> dict[str, Any]:  # fmt: skip
    """What a coordinate says."""
    told = [[tick, words(tick)] for tick in ticks]
    return {"label": label, "ticks": told, "low": low, "high": high, "log": log}


def sparsity_and_rank() -> tuple[dict, pd.DataFrame, str]:
    """Perplexity and bytes of the embedded model, by sparsity and rank."""
    record = recorded("tiny/sparsity_rank")
    rows = pd.DataFrame(record["rows"])
    dense = record["dense"]
    rows["bits"] = 16 * rows["bytes"] / dense["bytes"]
    sparsities, ranks = sorted(rows["sparsity"].unique()), sorted(rows["rank"].unique())
    lines = []
    for i, sparsity in enumerate(sparsities):
        cells = rows[rows["sparsity"] == sparsity].sort_values("rank")
        says = [
            f"{sparsity:.0%} pruned, rank {cell.rank}: perplexity {cell.perplexity:.2f} (dense "
            f"{dense['perplexity']:.2f}), {cell.bytes / 1e6:.2f} MB in the layers "
            f"({cell.bytes / dense['bytes']:.0%} of dense)"
            for cell in cells.itertuples()
        ]
        lines.append(
            {
                "at": [i], "color": COLORS["refined"], "x": cells["bits"].tolist(),
                "y": (cells["perplexity"] / dense["perplexity"] - 1).tolist(), "says": says,
            }
        )  # fmt: skip
    data = {
        "controls": [
            control("pruned", [f"{s:.0%}" for s in sparsities], 2),
            control("rank", [str(k) for k in ranks], 2),
        ],
        "x": axis("bits a weight, of 16", [4, 8, 12, 16], 3, rows["bits"].max() + 0.5),
        "y": axis(
            "perplexity above dense", [0.001, 0.01, 0.1, 1, 10], 1e-4, 12, log=True, words=percent
        ),
        "lines": lines,
    }  # fmt: skip
    table = rows.pivot(index="sparsity", columns="rank", values="perplexity").map("{:.2f}".format)
    table.index = [f"{s:.0%}" for s in table.index]
    caption = (
        f"Perplexity by what is pruned (down) and rank (across). Embedded model, Wanda's mask, "
        f"{record['recipe']['iterations']} accelerated iterations, {record['windows']} windows; "
        f"{record['command']}, {record['date']}"
    )
    return data, table, caption


def schedules() -> tuple[dict, pd.DataFrame, str]:
    """The error in each iteration, along the ramp and with momentum, by rank."""
    record = recorded("smollm2/schedules")
    names = {"paper": "the paper's ramp", "accelerated": "accelerated"}
    ranks = sorted({row["rank"] for row in record["rows"]})
    lines: list[dict[str, Any]] = []
    table = {}
    for row in record["rows"]:
        errors = [error / record["norm"] for error in row["errors"]]
        shot = row["one shot"] / record["norm"]
        says = [
            f"{names[row['schedule']]}: error {error:.1%} after {t}, at rank {rank} "
            f"(one SVD: {shot:.1%})"
            for t, (error, rank) in enumerate(zip(errors, row["ranks"], strict=True), 1)
        ]
        ramp = row["schedule"] == "paper"
        lines.append(
            {
                "at": [ranks.index(row["rank"])], "says": says, "y": errors,
                "x": list(range(1, len(errors) + 1)), "dash": "7 4" if ramp else "",
                "color": COLORS["other"] if ramp else COLORS["refined"],
            }
        )  # fmt: skip
        shown = (1, 2, 5, 10, 20, 50)
        table[f"rank {row['rank']}, {names[row['schedule']]}"] = {
            t: f"{errors[t - 1]:.1%}" for t in shown
        }
    steps = len(lines[0]["x"])
    every = [value for line in lines for value in line["y"]]
    low, high = min(every), max(every)
    ticks = [t / 100 for t in range(0, 100, 5) if low <= t / 100 <= high]
    data = {
        "controls": [
            control("rank", [str(k) for k in ranks], ranks.index(18)),
            control("iterations", [str(t) for t in range(1, steps + 1)], 9),
        ],
        "x": axis("iteration", [1, 10, 20, 30, 40, 50], 0, steps + 1),
        "y": axis("relative error", ticks, low - 0.01, high + 0.01, words=percent),
        "lines": lines,
    }
    caption = (
        f"Relative error after so many iterations. {record['matrix']} of SmolLM2-135M, "
        f"{' × '.join(map(str, record['shape']))}, {record['pattern']} by magnitude; "
        f"{record['command']}, {record['date']}"
    )
    return data, pd.DataFrame(table).T, caption


def bound(
    shape: tuple[int, int], tokens: float, rank: int | None, peak: float, bandwidth: float
) -> float:
    """Least seconds that a layer takes in 16 bits, by the roofline of chapter 17.

    Args:
        shape: (m, n).
        tokens: at once.
        rank: of B A beside 2:4, or ``None`` for the dense layer.
        peak: dense operations a second; 2:4 does half of them.
        bandwidth: bytes a second.

    Cost: a few operations.

    >>> dense, ours = (bound((4096, 4096), 1, k, 989e12, 3.35e12) for k in (None, 128))
    >>> f"{dense / ours:.2f}"
    '1.60'
    """
    m, n = shape
    pattern, storage = (None, "dense") if rank is None else ("2:4", "2:4")
    account = matrix_account(shape, pattern, rank or 0, storage=storage)
    moved = account.bytes + 2 * tokens * (m + n)
    return max(moved / bandwidth, account.flops * tokens / peak)


def roofline() -> tuple[dict, pd.DataFrame, str]:
    """The largest speed-up of S + B A over dense, by machine, rank and tokens."""
    record = dict(runs("linear"))["cpu"]
    rate = record["rates"]["bfloat16"]
    machines = {
        "T4, published": (65e12, 320e9),
        "A100 80 GB, published": (312e12, 2039e9),
        "H100 SXM, published": (989e12, 3.35e12),
        f"CPU, {record['threads']} cores, measured": (
            rate["matmul TFLOP/s"] * 1e12, rate["bytes GB/s"] * 1e9,
        ),
    }  # fmt: skip
    shape, ranks = (4096, 4096), (0, 32, 64, 128, 256, 512, 896)
    tokens = [2**i for i in range(14)]
    lines: list[dict[str, Any]] = []
    table = {}
    for i, (machine, rates) in enumerate(machines.items()):
        for j, rank in enumerate(ranks):
            gains = [bound(shape, t, None, *rates) / bound(shape, t, rank, *rates) for t in tokens]
            lines.append(
                {
                    "at": [i, j], "color": COLORS["refined"], "x": tokens, "y": gains,
                    "says": [
                        f"{machine}, rank {rank}, {t} at once: at most {gain:.2f} times as fast"
                        for t, gain in zip(tokens, gains, strict=True)
                    ],
                }
            )  # fmt: skip
            if rank in (0, 128, 896):
                table[f"{machine}, rank {rank}"] = {
                    t: f"{gain:.2f}"
                    for t, gain in zip(tokens, gains, strict=True)
                    if t in (1, 16, 256, 4096)
                }
    data = {
        "controls": [
            control("machine", list(machines), 2),
            control("rank", [str(k) for k in ranks], 3),
            control("tokens at once", [str(t) for t in tokens], 0),
        ],
        "x": axis("tokens at once", [1, 16, 256, 4096], 1, 8192, log=True),
        "y": axis("times as fast, at most", [0.5, 1, 1.5, 2], 0.5, 2.1),
        "lines": lines,
    }
    caption = (
        f"How many times as fast as dense a 2:4 layer with a low-rank part can be at most, by "
        f"tokens at once (across): a bound computed from two rates of the machine, no measurement. "
        f"{shape[0]} × {shape[1]}, 16 bits; the CPU's rates are of {record['date']}"
    )
    return data, pd.DataFrame(table).T, caption


PICTURES = {"sparsity-rank": sparsity_and_rank, "schedules": schedules, "roofline": roofline}


def explore(name: str) -> HTML:
    """A picture with its sliders, and the table of its numbers.

    Args:
        name: one of :data:`PICTURES`.
    """
    from IPython.display import HTML

    data, table, caption = PICTURES[name]()
    told = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    return HTML(
        f'<div class="try" id="try-{name}"><details open><summary>The numbers</summary>'
        f"<p>{html.escape(caption)}.</p>{table.to_html()}</details>"
        f'<script type="application/json">{told}</script></div>'
    )
