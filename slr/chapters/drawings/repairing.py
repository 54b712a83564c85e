"""Drawings of part II: how S and B A stand in for W together, and how they are found."""

from __future__ import annotations

import math
from collections.abc import Callable

from slr.chapters.drawings.pen import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LIGHT,
    ORANGE,
    PALE,
    RED,
    Sheet,
    tint,
)  # fmt: skip

__all__ = ["alternating_projections", "holes_are_free", "one_pass", "s_plus_ba", "three_metrics"]

Point = tuple[float, float]


def s_plus_ba() -> str:
    """The front page: a dense matrix, a sparse one, and two thin ones."""
    sheet = Sheet(
        "W is nearly S plus B times A: a dense matrix, a sparse one and two thin ones", 266
    )
    size, count = 14, 12
    # Two of every four, in an order without pattern.
    pairs = [(0, 1), (1, 3), (0, 2), (2, 3), (0, 3), (1, 2)]
    kept = {
        (i, 4 * g + j) for i in range(count) for g in range(3) for j in pairs[(5 * i + 2 * g) % 6]
    }

    def depth(i: int, j: int) -> float:
        return 0.35 + 0.55 * ((7 * i + 11 * j + i * j) % 10) / 9

    places = range(count)
    dense = [[tint(INK, depth(i, j)) for j in places] for i in places]
    sparse = [[tint(BLUE, depth(i, j)) if (i, j) in kept else "#ffffff" for j in places]
              for i in places]  # fmt: skip
    sheet.cells(14, 50, size, dense)
    sheet.text(14 + 6 * size, 34, "*W*", 28, INK, "middle", bold=True)
    sheet.text(208, 146, "≈", 34, GREY, "middle")
    sheet.cells(234, 50, size, sparse)
    sheet.text(234 + 6 * size, 34, "*S*", 28, BLUE, "middle", bold=True)
    sheet.text(424, 146, "+", 34, GREY, "middle")
    sheet.cells(446, 50, size, [[RED] for _ in places])
    sheet.text(453, 34, "*B*", 28, RED, "middle", bold=True)
    sheet.cells(466, 50, size, [[RED] * count])
    sheet.text(466 + 6 * size, 34, "*A*", 28, RED, "middle", bold=True)
    sheet.rect(466, 68, size * count, size * 11 - 4, tint(RED, 0.12), tint(RED, 0.4), 1, "4 4")
    # Large letters: the front page shows it whole on a phone.
    for x, words, color in ((98, "dense", INK), (318, "sparse", BLUE), (543, "low rank", RED)):
        sheet.text(x, 250, words, 24, color, "middle")
    return sheet.svg()


def holes_are_free() -> str:
    """Chapter 5, by hand: off the mask B A must match W; on it S corrects whatever B A puts."""
    sheet = Sheet("The case by hand: where W is kept, the low-rank part is free", 290)
    size, y = 46, 60
    W = [[9, 2, 1], [4, 4, 2], [4, 4, 8]]
    S = [[7, 0, 0], [0, 0, 0], [0, 0, 6]]
    M = [[b * a for a in (2, 2, 1)] for b in (1, 2, 2)]
    assert all(W[i][j] == S[i][j] + M[i][j] for i in range(3) for j in range(3))
    kept = [[bool(value) for value in row] for row in S]

    def words(matrix: list[list[int]]) -> list[list[str]]:
        return [[str(value) for value in row] for row in matrix]

    def fills(on: str, off: str) -> list[list[str]]:
        return [[on if k else off for k in row] for row in kept]

    sheet.cells(20, y, size, fills(tint(BLUE, 0.3), PALE), words(W), 18)
    sheet.text(20 + 1.5 * size, 44, "*W*", 17, INK, "middle", bold=True)
    sheet.text(178, y + 78, "=", 26, GREY, "middle")
    blanks = [[str(v) if v else "" for v in row] for row in S]
    sheet.cells(200, y, size, fills(BLUE, "#ffffff"), blanks, 18)
    sheet.text(200 + 1.5 * size, 44, "*S*", 17, BLUE, "middle", bold=True)
    sheet.text(358, y + 78, "+", 26, GREY, "middle")
    sheet.cells(378, y, size, fills(RED, tint(RED, 0.25)), words(M), 18)
    sheet.text(378 + 1.5 * size, 44, "*B A*", 17, RED, "middle", bold=True)
    sheet.text(537, y + 76, "=", 22, GREY, "middle")
    sheet.cells(552, y + 23, 30, [[RED]] * 3, [["1"], ["2"], ["2"]], 15)
    sheet.cells(585, y + 59, 17, [[RED] * 3], [["2", "2", "1"]], 13)
    sheet.rect(20, 222, 16, 16, PALE, GREY, 1)
    sheet.text(44, 235, "pruned: *S* is zero, so *B A* has to be right here", 15)
    sheet.rect(20, 252, 16, 16, BLUE)
    sheet.text(44, 265, "kept: *B A* may put what it likes, *S* takes the rest: 9 − 2 = 7", 15)
    return sheet.svg()


def to_curve(curve: Callable[[float], Point], point: Point) -> Point:
    """The point of a curve, whose parameter is from 0 to 1, that is nearest to another."""
    low, high = 0.0, 1.0
    for _ in range(6):
        step = (high - low) / 200
        best = min((low + i * step for i in range(201)), key=lambda s: math.dist(curve(s), point))
        low, high = max(0.0, best - step), min(1.0, best + step)
    return curve((low + high) / 2)


def walk(curve: Callable[[float], Point], level: float, start: float, rounds: int) -> list[Point]:
    """To and fro between a horizontal line and a curve, each time to the nearest point."""
    found = [(start, level)]
    for _ in range(rounds):
        nearest = to_curve(curve, found[-1])
        found += [nearest, (nearest[0], level)]
    return found


def motion(walks: list[list[Point]], seconds: float) -> str:
    """CSS that moves a dot along each walk, a step at a time; none where motion is not wanted."""
    rules = []
    for i, points in enumerate(walks):
        (x0, y0), share = points[0], 88 / (len(points) - 1)
        moves = [f"{{transform:translate({x - x0:.1f}px,{y - y0:.1f}px)}}" for x, y in points]
        frames = "".join(f"{share * j:.1f}%{move}" for j, move in enumerate(moves))
        rules.append(f"@keyframes walk{i}{{{frames}100%{moves[-1]}}}")
        rules.append(f".walk{i}{{animation:walk{i} {seconds:g}s ease-in-out infinite}}")
    rules.append("@media (prefers-reduced-motion:reduce){.walk0,.walk1{animation:none}}")
    return "".join(rules)


def alternating_projections() -> str:
    """Chapter 6: the angle at which the two sets meet decides how fast the way to and fro ends."""

    def wide(s: float) -> Point:
        return 90 + 140 * s, 50 + 186 * s + 14 * math.sin(math.pi * s)

    def narrow(s: float) -> Point:
        return 344 + 280 * s, 118 + 98 * s + 20 * math.sin(math.pi * s)

    level, walks = 204.0, []
    for curve, start in ((wide, 50.0), (narrow, 356.0)):
        walks.append(walk(curve, level, start, 6))
    sheet = Sheet(
        "Alternating projections between two sets that meet at a wide and at a narrow angle", 300,
        motion(walks, 12),
    )  # fmt: skip
    for i, (curve, points) in enumerate(zip((wide, narrow), walks, strict=True)):
        x = (24, 338)[i]
        sheet.text(x, 32, ("a wide angle: few steps", "a narrow angle: many")[i], 16, bold=True)
        sheet.path([(x, level), (x + 282, level)], BLUE, 3)
        sheet.path([curve(s / 60) for s in range(61)], RED, 3)
        sheet.path(points, tint(INK, 0.55), 1.5, "4 3")
        for px, py in points:
            sheet.dot(px, py, 3, GREY)
        sheet.dot(*points[0], 7, GREEN, "#ffffff", f"walk{i}")
    sheet.text(24, 250, "matrices that agree with *W* off the mask", 15, BLUE)
    sheet.text(24, 272, "matrices of rank *k*", 15, RED)
    sheet.text(338, 272, "each step: to the nearest point", 15, GREY)
    return sheet.svg()


def one_pass() -> str:
    """Chapter 7: a few rows at a time are filled in, multiplied twice, and forgotten."""
    sheet = Sheet("One pass over row blocks: the filled-in matrix is never stored", 310)
    y, size, rows = 70, 24, 7
    sheet.text(20 + 84, 30, "*W* and mask", 16, INK, "middle", bold=True)
    sheet.text(20 + 84, 50, "read once", 13, GREY, "middle")
    for i in range(rows):
        now = i == 2
        fill = tint(INK, 0.6) if now else tint(INK, 0.12)
        sheet.rect(20, y + i * size, 168, size, fill, "#ffffff", 2)
    mid = y + 2.5 * size
    sheet.arrow((192, mid), (226, mid), INK)
    for j in range(12):
        fill = RED if (5 * j) % 12 in (0, 1, 3, 4, 8, 9) else tint(INK, 0.6)
        sheet.rect(232 + 11 * j, mid - size / 2, 11, size, fill, "#ffffff", 1)
    sheet.text(298, 30, "filled in", 16, INK, "middle", bold=True)
    sheet.text(298, 50, "on the mask by *B A*", 13, RED, "middle")
    sheet.text(298, mid + 34, "a few rows of *L*,", 15, INK, "middle")
    sheet.text(298, mid + 53, "then forgotten", 15, INK, "middle")
    sheet.arrow((370, mid), (404, mid), INK)
    sheet.text(438, 30, "*Y* = *L V*", 16, GREEN, "middle", bold=True)
    for i in range(rows):
        fill = GREEN if i == 2 else tint(GREEN, 0.5) if i < 2 else PALE
        sheet.rect(410, y + i * size, 56, size, fill, "#ffffff", 2)
    sheet.text(438, y + rows * size + 22, "row by row", 13, GREY, "middle")
    sheet.arrow((470, mid), (516, mid), INK)
    sheet.text(568, 30, "*Z* = *Lᵀ Y*", 16, BLUE, "middle", bold=True)
    sheet.rect(524, y, 88, rows * size, tint(BLUE, 0.5), BLUE)
    sheet.text(568, y + 90, "adds up", 15, INK, "middle")
    words = "The small SVD of *Y* and *Z* gives the next *B* and *A*. Memory: *W*, thin factors,"
    sheet.text(20, 284, words, 15)
    sheet.text(20, 303, "and one block of rows.", 15)
    return sheet.svg()


def three_metrics() -> str:
    """Chapter 8, by hand: the nearest point on the axis, by three ways to measure an error."""
    sheet = Sheet(
        "Circle, upright ellipse, tilted ellipse: where each touches what is allowed", 300
    )
    panels = (
        ("identity", (1.0, 0.0, 1.0), GREY),
        ("diagonal", (1.0, 0.0, 0.5), ORANGE),
        ("Gram", (1.0, 0.5, 0.5), GREEN),
    )
    for i, (name, (a, b, c), color) in enumerate(panels):
        x0, y0 = 24 + 208 * i, 208

        def place(x: float, y: float, x0: float = x0, y0: float = y0) -> Point:
            return x0 + 52 * x, y0 - 52 * y

        best = 2 + b / a  # on the axis y = 0, seen from w = (2, 1)
        least = a * (best - 2) ** 2 - 2 * b * (best - 2) + c
        ring = []
        for s in range(73):
            u, v = math.cos(math.pi * s / 36), math.sin(math.pi * s / 36)
            reach = math.sqrt(least / (a * u * u + 2 * b * u * v + c * v * v))
            ring.append(place(2 + reach * u, 1 + reach * v))
        sheet.text(x0, 32, name, 16, INK, bold=True)
        sheet.path(ring, color, 2.5, fill=tint(color, 0.12))
        sheet.path([place(0, 0), place(3.5, 0)], BLUE, 3)
        sheet.dot(*place(2, 1), 5, INK)
        sheet.text(place(2, 1)[0] + 8, place(2, 1)[1] - 6, "*w*", 15)
        sheet.path([place(2, 1), place(best, 0)], INK, 1.5, "4 3")
        sheet.dot(*place(best, 0), 6, BLUE, "#ffffff")
        sheet.text(*place(best, -0.42), f"*s* = {best:g}", 15, BLUE, "middle")
        for t in (0, 1):
            sheet.path([place(t, -0.06), place(t, 0.06)], BLUE, 1.5)
    sheet.text(
        24, 262, "Blue: what the mask allows, (*s*, 0). A ring holds the points of equal", 15
    )
    sheet.text(
        24, 282, "error around *w* = (2, 1); the best *s* is where the smallest one touches.", 15
    )
    sheet.path([(218, 20), (218, 236)], LIGHT, 1)
    sheet.path([(426, 20), (426, 236)], LIGHT, 1)
    return sheet.svg()
