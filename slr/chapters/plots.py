"""House figures: one style, one colour for each thing, wherever it appears.

W is black, S blue, the low-rank part vermilion, S + low rank green; line styles differ too, so
that a figure reads without colour.  Needs matplotlib (the ``book`` extra).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    from slr.evaluate.league import Place

__all__ = ["COLORS", "curves", "grouped_bars", "heat_maps", "league_panels", "use_style"]

# Okabe and Ito 2008, by meaning.
COLORS = {
    "dense": "#000000",
    "sparse": "#0072B2",
    "low rank": "#D55E00",
    "refined": "#009E73",
    "svd": "#CC79A7",
    "other": "#E69F00",
}
STYLES = {
    "dense": "-",
    "sparse": "--",
    "low rank": "-.",
    "refined": "-",
    "svd": "-.",
    "other": ":",
}
HATCHES = {"sparse": "//", "svd": "..", "refined": ""}


def use_style() -> None:
    """Set the house style for every figure that follows; SVG inside a notebook."""
    import matplotlib as mpl

    mpl.rcParams.update(
        {
            "figure.figsize": (6.2, 3.5),
            "figure.constrained_layout.use": True,
            "savefig.bbox": "tight",
            "svg.fonttype": "path",
            "svg.hashsalt": "slr",  # the same figure gives the same file
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#e6e6e6",
            "grid.linewidth": 0.6,
            "lines.linewidth": 1.8,
            "lines.markersize": 4.5,
            "legend.frameon": False,
        }
    )
    try:
        from IPython.core.getipython import get_ipython
        from matplotlib_inline.backend_inline import set_matplotlib_formats
    except ImportError:
        return
    shell = get_ipython()
    if shell is not None:
        from matplotlib.figure import Figure

        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        set_matplotlib_formats("svg", metadata=nothing)
        assert shell.display_formatter is not None
        formatter = shell.display_formatter.formatters["image/svg+xml"]
        draw = formatter.lookup_by_type(Figure)
        formatter.for_type(Figure, lambda figure: _slim(draw(figure)))


def _slim(svg: str) -> str:
    """A figure without what no eye sees: line breaks, and digits beyond a hundredth of a point.

    >>> _slim('<g transform="translate(3.14159 2.0) scale(0.015625)">\\n <path d="M 1 2.999 \\n"/>')
    '<g transform="translate(3.14 2.0) scale(0.015625)"><path d="M 1 3 "/>'
    """

    def short(number: re.Match) -> str:
        return number[0] if number[1] is None else f"{float(number[1]):.2f}".rstrip("0").rstrip(".")

    shorter = re.sub(r"scale\([^)]*\)|(\d+\.\d{3,})", short, svg)
    return re.sub(r"\s+", " ", shorter).replace("> <", "><")


def curves(
    series: Mapping[str, tuple[str, Sequence[float], Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    log: str = "",
    marker: str = "o",
) -> Axes:
    """Lines of one figure.

    Args:
        series: label -> (kind, x, y), `kind` a key of :data:`COLORS`.
        xlabel: with its unit.
        ylabel: with its unit.
        log: which axes are logarithmic, ``""``, ``"x"``, ``"y"`` or ``"xy"``.
        marker: of the points, ``""`` for none.
    """
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogFormatter

    _, axes = plt.subplots()
    for label, (kind, x, y) in series.items():
        axes.plot(x, y, STYLES[kind], color=COLORS[kind], marker=marker, label=label)
    if "x" in log:
        axes.set_xscale("log")
    if "y" in log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.4)))
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend()
    return axes


def grouped_bars(
    rows: Mapping[str, Mapping[str, float]],
    kinds: Mapping[str, str],
    *,
    ylabel: str,
    line: tuple[str, float] | None = None,
    axes: Axes | None = None,
) -> Axes:
    """A group of bars for each row, with its value above each bar.

    Args:
        rows: group label -> {bar label: value}.
        kinds: bar label -> a key of :data:`COLORS`.
        ylabel: with its unit.
        line: a horizontal reference line, (label, value).
        axes: where to draw; a new figure by default.
    """
    from matplotlib import pyplot as plt

    if axes is None:
        _, axes = plt.subplots()
    width = 0.8 / len(kinds)
    for j, (label, kind) in enumerate(kinds.items()):
        at = [i + (j - (len(kinds) - 1) / 2) * width for i in range(len(rows))]
        values = [row[label] for row in rows.values()]
        bars = axes.bar(
            at, values, width * 0.92, label=label, color=COLORS[kind],
            hatch=HATCHES.get(kind, ""), edgecolor="white", linewidth=0,
        )  # fmt: skip
        turn = 90 if len(kinds) > 3 else 0
        axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=1 + turn / 45, rotation=turn)
    if line is not None:
        axes.axhline(line[1], color=COLORS["dense"], linewidth=1.2, label=line[0])
    axes.set_xticks(range(len(rows)), list(rows))
    axes.set_ylabel(ylabel)
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.25)  # room for the legend above the bars
    axes.legend(fontsize=8, ncols=2, loc="upper right")
    return axes


def heat_maps(
    panels: Mapping[str, Tensor], *, signed: bool = False, label: str = "", columns: int = 4
) -> list[Axes]:
    """Matrices side by side on one colour scale: diverging around 0 if signed, else cividis.

    Args:
        panels: title -> matrix (m, n); booleans are drawn black (True) on white.
        signed: whether the sign is of interest.
        label: of the colour bar, with its unit; no bar when empty.
        columns: panels in a row of the figure.
    """
    import torch
    from matplotlib import pyplot as plt

    width = min(columns, len(panels))
    rows = -(-len(panels) // width)
    figure, grid = plt.subplots(rows, width, figsize=(2.1 * width, 2.2 * rows), squeeze=False)
    real = [M for M in panels.values() if M.dtype != torch.bool]
    top = max((float(M.abs().max()) for M in real), default=1.0)
    axes, image = list(grid.flat), None
    for axis, (title, M) in zip(axes, panels.items(), strict=False):
        if M.dtype == torch.bool:
            axis.imshow(M.cpu(), cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
        else:
            colors, low = ("RdBu_r", -top) if signed else ("cividis", 0.0)
            data = M.float().cpu()
            image = axis.imshow(data, cmap=colors, vmin=low, vmax=top, interpolation="nearest")
        axis.set_title(title, fontsize=9)
    for axis in axes:
        axis.grid(visible=False)
        axis.set_xticks([])
        axis.set_yticks([])
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    if label and image is not None:
        figure.colorbar(image, ax=axes, label=label, shrink=0.8)
    return axes[: len(panels)]


# Of rows of the league by how their names begin: what they are called, colour and marker.
FAMILIES = {
    "dense": ("dense", "dense", "o"),
    "plain": ("plain rounding", "other", "o"),
    "GPTQ": ("GPTQ", "sparse", "s"),
    "ours int": ("ours, codes", "refined", "^"),
    "ours": ("ours, with a mask", "low rank", "D"),
    "": ("others' methods", "svd", "v"),
}


def league_panels(found: Sequence[Place], most: float = 8.0) -> Figure:
    """Perplexity against bits a weight, and below it against arithmetic, with both frontiers.

    Args:
        found: rows of :func:`slr.evaluate.league.places`.
        most: times the best perplexity; what is worse is left out.
    """
    from matplotlib import pyplot as plt

    use_style()
    figure, panels = plt.subplots(2, 1, figsize=(6.6, 7.4), sharey=True)
    value = {p: p.perplexity if p.other is None else p.other for p in found}
    value = {p: v for p, v in value.items() if v <= most * min(value.values())}
    labels = []
    for axes, key, label in zip(
        panels, ("bits", "multiplications"),
        ("bits a weight", "multiplications a token, dense = 1"), strict=True,
    ):  # fmt: skip
        best, line, names = float("inf"), [], {}
        for place in sorted(value, key=lambda p: (getattr(p, key), value[p])):
            name, kind, mark = next(v for k, v in FAMILIES.items() if place.name.startswith(k))
            at = (getattr(place, key), value[place])
            axes.plot(*at, mark, color=COLORS[kind], label=name)
            if value[place] < best:
                best = value[place]
                line.append(at)
            if value[place] == best or key == "bits":
                names[place.name] = at
        axes.plot(*zip(*line, strict=True), color=COLORS["dense"], lw=0.8, zorder=0)
        axes.set(xlabel=label, ylabel="perplexity", yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.margins(0.07, 0.1)
        labels.append((axes, names, [(getattr(p, key), v) for p, v in value.items()]))
    handles = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))
    panels[0].legend(handles.values(), handles.keys(), fontsize=8)
    figure.draw_without_rendering()  # what is where
    for each in labels:
        _label(*each)
    return figure


def _label(
    axes: Axes, names: Mapping[str, tuple[float, float]], points: Sequence[tuple[float, float]]
) -> None:
    """Write names beside points, each at the nearest place inside where it covers nothing.

    From one that is not beside its point a thin line leads there.
    """
    from matplotlib.transforms import Bbox

    middles = axes.transData.transform(points)
    taken = [Bbox.from_bounds(x - 3, y - 3, 6, 6) for x, y in middles]
    for name, at in names.items():
        for up in sorted(range(-90, 91, 9), key=abs):
            for side, right in (("left", 6), ("right", -6)):
                text = axes.annotate(
                    name, at, (right, up), textcoords="offset points", ha=side, va="center",
                    fontsize=7,
                )  # fmt: skip
                box = text.get_window_extent()
                inside = axes.bbox.count_contains(box.corners()) == 4
                if inside and not any(box.overlaps(other) for other in taken):
                    break
                text.remove()
            else:
                continue
            taken.append(box)
            if abs(up) > 9:
                line = {"arrowstyle": "-", "lw": 0.4, "shrinkA": 0, "shrinkB": 2}
                axes.annotate("", at, (right, up), textcoords="offset points", arrowprops=line)
            break
