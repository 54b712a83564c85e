"""Drawings of chapters 16 to 19: scales, packing, grids, the frontier."""

from __future__ import annotations

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

__all__ = ["frontier_idea", "grid_and_mask", "packed_row", "scales_move", "selector"]


def scales_move() -> str:
    """Chapter 16, by hand: the same products, other weights, another choice."""
    sheet = Sheet(
        "Scales move from inputs to weights; products stay, and magnitude chooses anew", 300
    )
    W, x, s = (3, 1), (1, 10), (1, 10)
    sides = (
        (20, "before", W, x),
        (340, "after, *s* = (1, 10)", tuple(a * b for a, b in zip(W, s, strict=True)),
         tuple(a // b for a, b in zip(x, s, strict=True))),
    )  # fmt: skip
    for left, name, weights, inputs in sides:
        assert [a * b for a, b in zip(weights, inputs, strict=True)] == [3, 10]
        sheet.text(left, 32, name, 16, INK, bold=True)
        keep = weights.index(max(weights))
        for j in range(2):
            y = 62 + 82 * j
            fill = BLUE if j == keep else tint(BLUE, 0.2)
            sheet.rect(left, y, 11 * weights[j], 34, fill, BLUE, 1.5)
            sheet.text(left + 11 * weights[j] + 6, y + 23, f"{weights[j]}", 17, BLUE)
            sheet.text(left + 158, y + 24, "×", 18, GREY, "middle")
            sheet.rect(left + 172, y + 6, 8 * inputs[j], 22, tint(ORANGE, 0.8))
            sheet.text(left + 178 + 8 * inputs[j], y + 23, f"{inputs[j]}", 17, "#9a6a00")
            sheet.text(left, y + 52, "kept" if j == keep else "pruned", 13,
                       BLUE if j == keep else GREY)  # fmt: skip
        put = weights[keep] * inputs[keep]
        sheet.text(left, 232, f"3 + 10 = 13; magnitude puts out {put}", 15)
    sheet.path([(318, 20), (318, 240)], LIGHT, 1)
    sheet.text(20, 276, "blue: weights", 15, BLUE)
    sheet.text(140, 276, "orange: inputs", 15, "#9a6a00")
    sheet.text(270, 276, "The model computes what it did before.", 15)
    return sheet.svg()


ROW = (1, 2, 0, 0, 0, 3, 0, 4)


def packed_row() -> str:
    """Chapter 17, by hand: a row as values and a bit mask, and as the codes of a GPU."""
    sheet = Sheet("A row of eight in memory: dense; values and a bit mask; values and codes", 330)
    places = [j for j, value in enumerate(ROW) if value]
    size, left = 48, 150

    def strip(y: float, words: list[str], fills: list[str], width: float) -> None:
        x: float = left
        for word, fill in zip(words, fills, strict=True):
            sheet.rect(x, y, width, 38, fill, GREY, 1)
            light = fill in (BLUE, GREEN)
            sheet.text(x + width / 2, y + 25, word, 16, "#ffffff" if light else INK, "middle")
            x += width

    sheet.text(16, 75, "dense", 15, bold=True)
    strip(50, [str(v) for v in ROW], [tint(BLUE, 0.3) if v else PALE for v in ROW], size)
    sheet.text(left + 8 * size + 12, 75, "16 bytes", 15)
    sheet.path([(left + 4 * size, 42), (left + 4 * size, 96)], INK, 2)
    sheet.text(16, 165, "CPU, disk", 15, bold=True)
    strip(140, [str(ROW[j]) for j in places], [BLUE] * 4, size)
    bits = [str(int(bool(v))) for v in ROW]
    x: float = left + 4 * size + 14
    for j, bit in enumerate(bits):
        sheet.rect(x + 17 * j, 140, 17, 38, tint(ORANGE, 0.75 if bit == "1" else 0.15), GREY, 1)
        sheet.text(x + 17 * j + 8.5, 165, bit, 15, INK, "middle")
    sheet.text(left + 8 * size + 12, 165, "8 + 1", 15)
    sheet.text(left + 2 * size, 196, "values", 13, BLUE, "middle")
    sheet.text(x + 68, 196, "a bit for each place", 13, "#9a6a00", "middle")
    sheet.text(16, 249, "GPU, 2:4", 15, bold=True)
    strip(224, [str(ROW[j]) for j in places], [BLUE] * 4, size)
    for i, j in enumerate(places):
        sheet.rect(x + 34 * i, 224, 34, 38, tint(GREEN, 0.35), GREY, 1)
        sheet.text(x + 34 * i + 17, 249, f"{j % 4:02b}", 15, INK, "middle")
    sheet.path([(x + 68, 218), (x + 68, 268)], INK, 2)
    sheet.text(left + 8 * size + 12, 249, "8 + 1", 15)
    sheet.text(x + 68, 280, "where in its four", 13, GREEN, "middle")
    sheet.text(16, 316, "No zero is stored. Both say the same in as many bits.", 15)
    return sheet.svg()


def selector() -> str:
    """Chapter 17: two bits steer which of four inputs a value meets."""
    sheet = Sheet("The selector of a sparse tensor core: two bits pick one of four inputs", 330)
    group, values = (0, 3, 0, 4), (3, 4)
    places = [j for j, value in enumerate(group) if value]
    sheet.text(20, 30, "inputs of a group", 15, "#9a6a00")
    for j in range(4):
        y = 46 + 56 * j
        sheet.rect(20, y, 66, 40, tint(ORANGE, 0.6 if j in places else 0.15), GREY, 1)
        sheet.text(53, y + 26, f"*x*{'₄₅₆₇'[j]}", 16, INK, "middle")
    for i, (place, value) in enumerate(zip(places, values, strict=True)):
        y = 74 + 112 * i
        sheet.path([(220, y - 44), (274, y - 22), (274, y + 22), (220, y + 44), (220, y - 44)],
                   GREEN, 2, fill=tint(GREEN, 0.15))  # fmt: skip
        for j in range(4):
            end = y - 30 + 20 * j
            picked = j == place
            sheet.path([(86, 66 + 56 * j), (130, 66 + 56 * j), (190, end), (220, end)],
                       "#9a6a00" if picked else LIGHT, 3 if picked else 1)  # fmt: skip
        sheet.text(247, y + 6, f"{place:02b}", 15, GREEN, "middle", bold=True)
        sheet.arrow((274, y), (372, y), "#9a6a00", 2.5)
        sheet.text(322, y - 8, f"*x*{'₄₅₆₇'[place]}", 15, "#9a6a00", "middle")
        sheet.dot(392, y, 18, "#ffffff", INK)
        sheet.text(392, y + 6, "×", 18, INK, "middle")
        sheet.rect(374, y - 66 if not i else y + 32, 36, 34, BLUE)
        sheet.text(392, y - 43 if not i else y + 55, f"{value}", 16, "#ffffff", "middle")
        sheet.path(
            [(392, y - 32), (392, y - 18)] if not i else [(392, y + 32), (392, y + 18)], BLUE
        )
        sheet.arrow((410, y), (492, 130 + (-10 if not i else 10)), INK)
    sheet.dot(512, 130, 20, "#ffffff", INK)
    sheet.text(512, 137, "+", 20, INK, "middle")
    sheet.arrow((532, 130), (590, 130), INK)
    sheet.text(600, 136, "*y*", 17)
    sheet.text(430, 40, "two products, not four", 15, INK, bold=True)
    sheet.text(247, 262, "codes", 15, GREEN, "middle")
    sheet.text(430, 246, "values", 15, BLUE)
    sheet.text(20, 314, "The unit does not look for zeros: it is told where not to look.", 15)
    return sheet.svg()


def grid_and_mask() -> str:
    """Chapter 18: eight weights to the nearest of eight values; with a mask, half of them to 0."""
    sheet = Sheet("A group of weights on a grid of eight values, without and with a mask", 320)
    weights = (-0.62, -0.33, -0.11, 0.06, 0.21, 0.47, 0.58, 0.81)
    bits = 3
    step = (max(weights) - min(weights)) / (2**bits - 1)
    zero = round(-min(weights) / step)
    grid = [(c - zero) * step for c in range(2**bits)]
    kept = sorted(range(8), key=lambda i: -abs(weights[i]))[:4]

    def at(value: float) -> float:
        return 330 + 330 * value

    for row, (y, name) in enumerate(
        ((66, "grid alone: eight codes are stored"), (206, "grid and mask: four are stored"))
    ):
        sheet.text(20, y - 36, name, 16, INK, bold=True)
        sheet.path([(at(grid[0]) - 16, y + 46), (at(grid[-1]) + 16, y + 46)], GREY, 1)
        for c, value in enumerate(grid):
            sheet.path([(at(value), y + 36), (at(value), y + 56)], INK if c == zero else GREY,
                       3 if c == zero else 1.5)  # fmt: skip
            sheet.text(at(value), y + 72, f"{c}", 13, INK if c == zero else GREY, "middle")
        for i, weight in enumerate(weights):
            masked = row == 1 and i not in kept
            to = 0.0 if masked else grid[round(weight / step) + zero]
            color = LIGHT if masked else BLUE
            sheet.path([(at(weight), y), (at(to), y + 44)], color, 1.5, "3 3" if masked else "")
            sheet.dot(
                at(weight), y, 6, "#ffffff" if masked else BLUE, color if masked else "#ffffff"
            )
            sheet.dot(at(to), y + 46, 4, INK if masked else GREEN)
    sheet.text(
        20,
        308,
        f"Blue: weights. Green: values, Δ = {step:.2f} apart; code {zero} is the value 0.",
        15,
    )
    return sheet.svg()


def frontier_idea() -> str:
    """Chapter 19: a method rules out all that is larger and worse."""
    sheet = Sheet("Bytes against perplexity: a method rules out whatever is larger and worse", 330)
    left, top, right, bottom = 70, 40, 620, 258
    points = [(0.1, 0.14), (0.22, 0.46), (0.36, 0.62), (0.62, 0.86), (0.92, 0.92)]
    beaten = [(0.5, 0.4), (0.7, 0.66), (0.42, 0.2), (0.84, 0.5)]

    def place(p: tuple[float, float]) -> tuple[float, float]:
        return left + p[0] * (right - left), top + p[1] * (bottom - top)

    for p in points:
        x, y = place(p)
        sheet.rect(x, top, right - x, y - top, tint(RED, 0.06))
    stairs = [(place(points[0])[0], float(top))]
    for p, q in zip(points, [*points[1:], None], strict=True):
        x, y = place(p)
        stairs += [(x, y), (place(q)[0] if q else right, y)]
    sheet.path(stairs, GREEN, 2.5)
    for p in points:
        sheet.dot(*place(p), 8, GREEN, "#ffffff")
    for p in beaten:
        x, y = place(p)
        sheet.path([(x - 6, y - 6), (x + 6, y + 6)], RED, 2.5)
        sheet.path([(x - 6, y + 6), (x + 6, y - 6)], RED, 2.5)
    sheet.arrow((left, bottom + 12), (right, bottom + 12), GREY)
    sheet.arrow((left - 12, bottom), (left - 12, top), GREY)
    sheet.text(right, bottom + 34, "bytes", 15, GREY, "end")
    sheet.add("text", "perplexity", x=0, y=0, font_size=15, fill=GREY,
              transform=f"translate(44 {top + 80}) rotate(-90)", text_anchor="middle")  # fmt: skip
    sheet.text(*(place((0.1, 0.78))), "nothing is here", 15, GREEN, "start", bold=True)
    sheet.text(*(place((0.74, 0.14))), "larger and worse", 15, RED, "middle")
    sheet.text(
        left, 318, "On the green line, less of one means more of the other: choose by need.", 15
    )
    return sheet.svg()
