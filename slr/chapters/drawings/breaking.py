"""Drawings of part I and chapter 4: what pruning breaks, and what is left of it."""

from __future__ import annotations

import math

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

__all__ = ["a_kept_weight_moves", "areas", "head_and_tail", "one_operation_a_byte"]


def one_operation_a_byte() -> str:
    """Chapter 1: of what the A100 could do for each byte that arrives, one is done."""
    ready = 312e12 / 2039e9  # operations a byte, published
    sheet = Sheet("What a card can do for each byte that arrives, and what one token asks for", 290)
    sheet.text(90, 30, "memory", 15, GREY, "middle")
    rows, side = 6, 20
    for i in range(rows):
        for j in range(7):
            sheet.rect(20 + j * side, 46 + i * side, side, side, tint(INK, 0.75), "#ffffff", 2)
    sheet.text(90, 192, "all weights, once", 15, INK, "middle")
    sheet.text(90, 211, "for every token", 15, INK, "middle")
    sheet.path([(166, 84), (206, 98), (290, 98), (290, 114), (206, 114), (166, 128)], LIGHT, 1.5,
               fill=PALE)  # fmt: skip
    sheet.arrow((176, 106), (300, 106), INK, 3)
    sheet.text(233, 84, "bytes a second", 13, GREY, "middle")
    columns = 17
    sheet.text(475, 30, "arithmetic", 15, GREY, "middle")
    for i in range(round(ready)):
        x, y = 322 + 18 * (i % columns), 46 + 18 * (i // columns)
        sheet.rect(x, y, 15, 15, RED if i == 0 else PALE, RED if i == 0 else LIGHT, 1)
    sheet.text(475, 232, f"{ready:.0f} operations could be done", 15, INK, "middle")
    sheet.text(475, 251, "while a byte arrives;", 15, INK, "middle")
    sheet.text(475, 270, "a single text asks for one.", 15, RED, "middle", bold=True)
    return sheet.svg()


def areas() -> str:
    """Chapter 2: a matrix as an area of bytes; the mask is a strip, the factors are thin."""
    sheet = Sheet("Bytes as areas: dense, and 2:4 with a mask and factors of rank 128", 330)
    full, share = 208, 128 / 4096
    sheet.rect(30, 60, full, full, tint(INK, 0.75))
    sheet.text(30 + full / 2, 40, "*W*, dense", 16, INK, "middle", bold=True)
    sheet.text(30 + full / 2, 170, "16 bits an entry", 15, "#ffffff", "middle")
    sheet.text(280, 172, "→", 26, GREY, "middle")
    x = 322
    sheet.rect(x, 60, full / 2, full, BLUE)
    sheet.text(x + full / 4, 40, "*S* + *B A*", 16, INK, "middle", bold=True)
    sheet.text(x + full / 4, 160, "values:", 15, "#ffffff", "middle")
    sheet.text(x + full / 4, 179, "half of them", 15, "#ffffff", "middle")
    sheet.rect(x + 112, 60, full / 16, full, tint(BLUE, 0.45))
    sheet.text(x + 134, 140, "mask: one bit", 15, BLUE)
    sheet.text(x + 134, 159, "for each entry", 15, BLUE)
    sheet.rect(x + 264, 60, full * share, full, RED)
    sheet.text(x + 277, 80, "*B*", 15, RED)
    sheet.rect(x, 284, full, full * share, RED)
    sheet.text(x + full + 8, 292, "*A*", 15, RED)
    sheet.text(x + 134, 210, "rank 128", 15, RED)
    sheet.text(x + 134, 229, "of 4096", 15, RED)
    bytes_ = 0.5 + 1 / 16 + 2 * share
    words = f"Every area is to scale: {bytes_:.1%} of the bytes are left."
    sheet.text(30, 318, words, 15)
    return sheet.svg()


def a_kept_weight_moves() -> str:
    """Chapter 3: the by-hand case in the plane of its two loud inputs."""
    sheet = Sheet("A pruned weight's part is taken over until the error is perpendicular", 330)
    scale, left, top = 36, 34, 108

    def place(x: float, y: float) -> tuple[float, float]:
        return left + scale * x, top - scale * y

    start, goal, plain, moved = (place(*p) for p in ((0, 0), (15, -1), (9, -3), (13.8, -4.6)))
    end = place(15.9, -5.3)
    sheet.path([start, end], tint(BLUE, 0.45), 1.5, "6 5")
    sheet.text(end[0] - 2, end[1] + 22, "what *X*₂ alone can give", 13, BLUE, "end")
    sheet.arrow(start, goal, INK, 3)
    sheet.text(goal[0] + 4, goal[1] - 30, "output 2*X*₁ + 3*X*₂", 15, INK, "end", bold=True)
    sheet.arrow(start, plain, BLUE, 3)
    sheet.text(plain[0] - 34, plain[1] + 26, "3*X*₂", 15, BLUE, "end")
    sheet.arrow(plain, moved, GREEN, 3)
    sheet.text(moved[0] - 62, moved[1] + 24, "4.6*X*₂", 15, GREEN, "end")
    sheet.arrow(plain, goal, ORANGE, 2.5, "3 3")
    sheet.text(352, 170, "error² = 40", 15, "#9a6a00", "end")
    sheet.path([moved, goal], RED, 3)
    sheet.text(goal[0] - 34, 236, "14.4", 15, RED, "end")
    u, v = (goal[0] - moved[0]) / 3.79 / scale, (goal[1] - moved[1]) / 3.79 / scale
    x, y = moved
    sheet.path([(x + 14 * u, y + 14 * v), (x + 14 * u + 14 * v, y + 14 * v - 14 * u),
                (x + 14 * v, y - 14 * u)], RED, 1.5)  # fmt: skip
    sheet.dot(*start)
    sheet.text(30, 40, "*X*₁ and *X*₂ point nearly the same way. Weight 2 goes;", 15)
    sheet.text(30, 60, "weight 3 grows to 4.6, until the error is perpendicular.", 15)
    return sheet.svg()


def noise(count: int) -> list[float]:
    """σ² of a square matrix of noise, largest first, mean 1, by the law of Marchenko and Pastur."""
    # For c = 1 the values x = 4 cos² a have density in a proportional to sin² a.
    found, a, steps = [], 0.0, 20000
    mass = 0.0
    for i in range(count):
        while mass < (i + 0.5) / count:
            a += math.pi / 2 / steps
            mass += math.sin(a) ** 2 * 2 / steps
        found.append(4 * math.cos(a) ** 2)
    return found


def head_and_tail() -> str:
    """Chapter 4: what rank k takes of a steep spectrum and of a flat one."""
    sheet = Sheet("A rank takes the head of a spectrum; the tail is the error that stays", 300)
    count, k = 48, 6
    steep = [1 / (1 + i) ** 1.5 for i in range(count)]
    flat = [x * (1.5 if i == 0 else 1.2 if i == 1 else 1) for i, x in enumerate(noise(count))]
    panels = ((24, steep, "a steep spectrum"), (338, flat, "a residual: nearly noise"))
    for x, values, title in panels:
        share = sum(values[:k]) / sum(values)
        sheet.text(x, 34, title, 16, INK, bold=True)
        for i, value in enumerate(values):
            height = max(1.5, 170 * value / values[0])
            fill = RED if i < k else tint(INK, 0.3)
            sheet.rect(x + 5.7 * i, 230 - height, 4.4, height, fill)
        sheet.path([(x - 2, 230), (x + 5.7 * count, 230)], GREY, 1)
        sheet.text(x + 60, 78, f"rank {k} takes {share:.0%}", 15, RED)
        sheet.text(x + 110, 150 if values is steep else 112, f"{1 - share:.0%} stays", 15, GREY)
        sheet.text(x, 250, "σ₁²", 13, GREY)
        sheet.text(x + 5.7 * count, 250, f"σ²  of {count}", 13, GREY, "end")
    sheet.text(24, 283, "The same rank, the same bytes: what it is worth depends on the tail.", 15)
    return sheet.svg()
