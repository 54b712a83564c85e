"""A sheet to draw on: SVG by hand-written geometry, the same bytes on every machine.

640 units wide; letters of 13 and more, which can be read where the column is narrow.  A sheet is
white in every theme, because its colours are those of the book's figures.  Book: every chapter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.sax.saxutils import escape

from slr.chapters.plots import COLORS

__all__ = ["BLUE", "GREEN", "GREY", "INK", "LIGHT", "ORANGE", "PALE", "RED", "Sheet", "tint"]

BLUE, RED, GREEN = COLORS["sparse"], COLORS["low rank"], COLORS["refined"]
ORANGE, INK = COLORS["other"], "#1a1a1a"
GREY, LIGHT, PALE = "#666666", "#c8c8c8", "#f0f0f0"
FONT = "DejaVu Sans, Verdana, Helvetica, Arial, sans-serif"
WIDTH = 640


def number(value: float) -> str:
    """A coordinate to a hundredth.

    >>> [number(x) for x in (2.0, 1 / 3, -0.001)]
    ['2', '0.33', '0']
    """
    return f"{value:.2f}".rstrip("0").rstrip(".").replace("-0", "0", value > -0.005)


def tint(color: str, share: float) -> str:
    """A colour mixed with white: 1 is the colour itself.

    >>> tint("#000000", 0.5)
    '#808080'
    """
    parts = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(255 - share * (255 - part)):02x}" for part in parts)


class Sheet:
    """What is drawn, in order.

    Args:
        title: what a screen reader says of it.
        height: in the units of the width, 640.
        style: CSS, for what moves.
    """

    def __init__(self, title: str, height: float, style: str = "") -> None:
        self.height = height
        self.parts = [f"<title>{escape(title)}</title>"]
        if style:
            self.parts.append(f"<style>{style}</style>")
        self.rect(0, 0, WIDTH, height, "#ffffff")

    def add(self, tag: str, content: str = "", **attributes: float | str) -> None:
        """One element; `_` in a name stands for `-`, and what is empty is left out."""
        told = [
            f' {key.rstrip("_").replace("_", "-")}="{number(v) if not isinstance(v, str) else v}"'
            for key, v in attributes.items()
            if v != ""
        ]
        end = f">{content}</{tag}>" if content else "/>"
        self.parts.append(f"<{tag}{''.join(told)}{end}")

    def rect(
        self, x: float, y: float, width: float, height: float, fill: str = "none",
        stroke: str = "", line: float = 1.5, dash: str = "", round_: float = 0, name: str = "",
    ) -> None:  # fmt: skip
        """A rectangle from its upper left corner."""
        self.add(
            "rect", x=x, y=y, width=width, height=height, rx=round_ or "", fill=fill,
            stroke=stroke, stroke_width=line if stroke else "", stroke_dasharray=dash, class_=name,
        )  # fmt: skip

    def text(
        self, x: float, y: float, words: str, size: float = 15, color: str = INK,
        at: str = "start", bold: bool = False, name: str = "",
    ) -> None:  # fmt: skip
        """Words on the base line y; what stands between stars is italic."""
        shown = re.sub(r"\*(.+?)\*", r'<tspan font-style="italic">\1</tspan>', escape(words))
        self.add(
            "text", shown, x=x, y=y, font_size=size, fill=color, class_=name,
            text_anchor="" if at == "start" else at, font_weight="bold" if bold else "",
        )  # fmt: skip

    def path(
        self, points: Sequence[tuple[float, float]], color: str = GREY, line: float = 1.5,
        dash: str = "", fill: str = "none", name: str = "",
    ) -> None:  # fmt: skip
        """Straight lines from point to point."""
        where = "L".join(f"{number(x)} {number(y)}" for x, y in points)
        self.add(
            "path", d="M" + where, fill=fill, stroke=color, stroke_width=line,
            stroke_dasharray=dash, stroke_linejoin="round", class_=name,
        )  # fmt: skip

    def arrow(
        self, start: tuple[float, float], end: tuple[float, float], color: str = GREY,
        line: float = 2, dash: str = "",
    ) -> None:  # fmt: skip
        """A line with a head at its end."""
        (x0, y0), (x1, y1) = start, end
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        u, v = (x1 - x0) / length, (y1 - y0) / length
        head = 4 + 2.5 * line
        x, y = x1 - head * u, y1 - head * v
        self.path([start, (x, y)], color, line, dash)
        side = head * 0.45
        tip = [(x1, y1), (x - side * v, y + side * u), (x + side * v, y - side * u)]
        self.path([*tip, tip[0]], color, 0.5, fill=color)

    def dot(
        self, x: float, y: float, radius: float = 4, fill: str = INK, stroke: str = "",
        name: str = "",
    ) -> None:  # fmt: skip
        """A filled circle."""
        self.add(
            "circle", cx=x, cy=y, r=radius, fill=fill, stroke=stroke, class_=name,
            stroke_width=1.5 if stroke else "",
        )  # fmt: skip

    def cells(
        self, x: float, y: float, size: float, fills: Sequence[Sequence[str]],
        words: Sequence[Sequence[str]] | None = None, letters: float = 15,
    ) -> None:  # fmt: skip
        """A matrix as squares, one colour each, with what is written in them."""
        for i, row in enumerate(fills):
            for j, fill in enumerate(row):
                if fill != "#ffffff":
                    self.rect(x + j * size, y + i * size, size, size, fill, "#ffffff", 1.5)
                if words and words[i][j]:
                    dark = fill.lower() in (BLUE.lower(), RED.lower(), GREEN.lower())
                    self.text(
                        x + (j + 0.5) * size, y + (i + 0.5) * size + letters * 0.36, words[i][j],
                        letters, "#ffffff" if dark else INK, "middle",
                    )  # fmt: skip
        height, width = size * len(fills), size * len(fills[0])
        self.rect(x, y, width, height, "none", GREY, 1)

    def svg(self) -> str:
        """All of it."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {number(self.height)}" '
            f'width="{WIDTH}" height="{number(self.height)}" role="img" font-family="{FONT}">'
        )
        return "\n".join([head, *self.parts, "</svg>"]) + "\n"
