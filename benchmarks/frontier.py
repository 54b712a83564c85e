"""The picture of the README: perplexity of the real model against its bits a weight.

    python benchmarks/frontier.py [--out results/measured/smollm2]

Prints the table that it draws, from the cells of ``slr reproduce smollm2``; with ``--out`` also
writes ``frontier.svg`` there.  Measures nothing.
"""

import argparse
from pathlib import Path

import pandas as pd

from slr.chapters.measured import frontier

TEXT = "wikitext-2-test.txt"
TITLES = {"magnitude": "magnitude", "wanda": "Wanda"}
SHOWN = {  # of each mask, and where its name goes: above or below the point, in points
    "pruned": ("pruned", 0),
    "svd": ("SVD of the weights", 4),
    "refined": ("Algorithm 1", -3),
    "eora": ("EoRA", 0),
    "refined-activations": ("outputs refined", 3),
    "refined-activations-admm": ("outputs refined, mask by ADMM", -3),
}


def draw(found: pd.DataFrame, file: Path) -> None:
    """The figure."""
    from matplotlib import pyplot as plt

    from slr.chapters.plots import COLORS, use_style

    use_style()
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 4), sharey=True)
    plain = found[found["mask"].isin(["dense", "rounded"])].sort_values("bits")
    for axes, mask in zip(panels, TITLES, strict=True):
        axes.plot(plain["bits"], plain["perplexity"], "-o", color=COLORS["dense"], ms=5, lw=1)
        for row in plain.itertuples():
            name = row.repair.replace(" by 32", "") or "dense"
            up = 8 if row.bits < 4 else -13
            axes.annotate(
                name, (row.bits, row.perplexity), (0, up), textcoords="offset points",
                ha="center", fontsize=8, color=COLORS["dense"],
            )  # fmt: skip
        mine = found[(found["mask"] == mask) & found["rank"].isin([0, 18])]
        for row in mine.itertuples():
            if row.repair not in SHOWN:
                continue
            name, up = SHOWN[row.repair]
            color = COLORS["sparse" if row.repair == "pruned" else "refined"]
            axes.plot(row.bits, row.perplexity, "o", ms=6, color=color)
            axes.annotate(
                name, (row.bits, row.perplexity), (8, up), textcoords="offset points",
                va="center", fontsize=8,
            )  # fmt: skip
        axes.set_yscale("log")
        axes.set(title=f"2:4, {TITLES[mask]} mask", xlabel="bits a weight", xlim=(2.4, 17))
    panels[0].set_yticks([25, 50, 100, 200, 400, 800, 1600])
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].yaxis.set_minor_locator(plt.NullLocator())
    panels[0].set(ylabel="perplexity, WikiText-2", ylim=(19, 2500))
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    """Print, and draw if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    found = frontier("smollm2", TEXT)
    print(found.round(2).to_string(index=False))
    if args.out:
        draw(found, args.out / "frontier.svg")


if __name__ == "__main__":
    main()
