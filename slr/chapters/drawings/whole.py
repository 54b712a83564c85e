"""Drawings of chapters 9 to 15: whole models, comparisons, budgets."""

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

__all__ = [
    "block_by_block",
    "crossings",
    "drift",
    "neurons_leave",
    "one_threshold",
    "only_flips_count",
    "two_budgets",
    "two_orders",
]  # fmt: skip


def block_by_block() -> str:
    """Chapter 10: on disk, in memory, on disk again, and in the journal."""
    sheet = Sheet("A checkpoint passes through memory block by block, and a journal tells", 340)
    lanes = ((70, "checkpoint", GREY), (160, "in memory", INK), (250, "folder", GREEN))
    for y, name, color in lanes:
        sheet.text(16, y + 22, name, 15, color)
    for i in range(6):
        x = 128 + 64 * i
        done, now = i < 2, i == 2
        sheet.text(x + 25, 46, f"{i + 1}", 13, GREY, "middle")
        sheet.rect(
            x, 70, 50, 36, tint(INK, 0.25 if not now else 0.75), GREY if now else "", round_=4
        )
        if now:
            sheet.rect(x, 160, 50, 36, tint(INK, 0.75), INK, 2, round_=4)
            sheet.arrow((x + 25, 108), (x + 25, 156), INK)
            sheet.arrow((x + 25, 198), (x + 25, 246), GREEN)
            sheet.rect(x + 8, 252, 34, 32, "none", GREEN, 1.5, "4 3", 4)
        else:
            sheet.rect(x, 160, 50, 36, "none", LIGHT, 1, "4 3", 4)
        if done:
            sheet.rect(x + 8, 252, 34, 32, GREEN, round_=4)
            sheet.text(x + 25, 273, "✓", 15, "#ffffff", "middle")
        elif not now:
            sheet.rect(x + 8, 252, 34, 32, "none", LIGHT, 1, "4 3", 4)
    x = 128 + 64 * 2
    sheet.arrow((x - 44, 178), (x - 4, 178), ORANGE, 3)
    sheet.text(x - 48, 183, "*h*₂", 15, "#9a6a00", "end")
    sheet.arrow((x + 54, 178), (x + 92, 178), ORANGE, 3)
    sheet.text(x + 96, 183, "*h*₃", 15, "#9a6a00")
    sheet.rect(520, 60, 108, 226, PALE, LIGHT, 1, round_=4)
    sheet.text(574, 84, "journal", 15, INK, "middle", bold=True)
    for i in range(2):
        sheet.text(534, 114 + 26 * i, f"✓ block {i + 1}", 15, GREEN)
    sheet.text(534, 166, "… block 3", 15, GREY)
    sheet.text(574, 236, "killed? Go on", 13, GREY, "middle")
    sheet.text(574, 254, "after the last", 13, GREY, "middle")
    sheet.text(574, 272, "entry.", 13, GREY, "middle")
    sheet.text(
        16,
        318,
        "Only one block is in memory, and the text's states, *h*; each block is read once.",
        15,
    )
    return sheet.svg()


def crossings() -> str:
    """Chapter 11, by hand: a pair that two tables order differently is a crossing of two lines."""
    sheet = Sheet("Two tables as lists, best first; each crossing is a pair they disagree on", 292)
    colors = {"refined": GREEN, "SVD": RED, "pruned": BLUE, "PCP": ORANGE}
    panels = (
        (20, ("refined", "SVD", "pruned"), ("SVD", "refined", "pruned")),
        (340, ("refined", "SVD", "pruned", "PCP"), ("pruned", "refined", "PCP", "SVD")),
    )
    for x, large, small in panels:
        sheet.text(x + 64, 32, "large", 15, GREY, "end")
        sheet.text(x + 210, 32, "small", 15, GREY)
        ends = {}
        for place, name in enumerate(large):
            y = 70 + 44 * place, 70 + 44 * small.index(name)
            ends[name] = y
            sheet.text(x + 64, y[0] + 5, name, 15, INK, "end")
            sheet.text(x + 210, y[1] + 5, name, 15, INK)
            sheet.path([(x + 76, y[0]), (x + 198, y[1])], colors[name], 2.5)
        count = 0
        for i, one in enumerate(large):
            for other in large[i + 1 :]:
                (a, b), (c, d) = ends[one], ends[other]
                if b > d:
                    share = (c - a) / (c - a + b - d)
                    sheet.dot(x + 76 + 122 * share, a + (b - a) * share, 5, INK, "#ffffff")
                    count += 1
        total = len(large) * (len(large) - 1) // 2
        sheet.text(x + 137, 246, f"*D* = {count} of {total}", 16, INK, "middle", bold=True)
    sheet.path([(320, 20), (320, 256)], LIGHT, 1)
    sheet.text(20, 280, "Best first. Half of all pairs cross when an order is drawn at random.", 15)
    return sheet.svg()


def drift() -> str:
    """Chapter 9, by hand: the drift after each block, passed on or new."""
    sheet = Sheet("The drift after each block, by hand: what was passed on and what is new", 310)
    dense, small = [1.0], [1.0]
    parts = [(0.0, 0.0)]
    for f, g in ((2, 1.5), (3, 3.1), (5, 5.0)):
        parts.append((f * (small[-1] - dense[-1]), (g - f) * small[-1]))
        dense.append(f * dense[-1])
        small.append(g * small[-1])
    xs = [70, 230, 390, 550]
    sheet.text(16, 50, "dense", 15, INK)
    sheet.text(16, 130, "small", 15, GREEN)
    for i, x in enumerate(xs):
        sheet.text(x, 74, f"{dense[i]:g}", 18, INK, "middle", bold=True)
        sheet.text(x, 154, f"{small[i]:g}", 18, GREEN, "middle", bold=True)
        if i < 3:
            sheet.arrow((x + 34, 68), (xs[i + 1] - 34, 68), INK)
            sheet.arrow((x + 34, 148), (xs[i + 1] - 34, 148), GREEN)
            middle = (x + xs[i + 1]) / 2
            sheet.text(middle, 58, f"× {(2, 3, 5)[i]}", 15, INK, "middle")
            sheet.text(middle, 138, f"× {(1.5, 3.1, 5.0)[i]:g}", 15, GREEN, "middle")
    sheet.text(16, 200, "drift, relative to the dense output:", 15, GREY)
    for i, x in enumerate(xs):
        if not i:
            continue
        passed, new = (100 * part / dense[i] for part in parts[i])
        total = passed + new
        sheet.path([(x - 60, 214), (x - 60, 262)], LIGHT, 1)
        wide = 4.2
        sheet.rect(x - 60, 216, -wide * passed, 18, tint(INK, 0.35))
        if new < 0:
            sheet.rect(x - 60, 236, -wide * new, 18, RED)
        elif new:
            sheet.rect(x - 60 - wide * new, 236, wide * new, 18, GREEN)
        sheet.text(x - 46, 250, f"{total:+.1f} %".replace("-", "−"), 15, INK) if new >= 0 else (
            sheet.text(x - 40, 230, f"{total:+.1f} %".replace("-", "−"), 15, INK)
        )
    sheet.rect(16, 284, 14, 14, tint(INK, 0.35))
    sheet.text(36, 297, "passed on by the dense block", 15)
    sheet.rect(290, 284, 14, 14, RED)
    sheet.text(310, 297, "new, away", 15)
    sheet.rect(420, 284, 14, 14, GREEN)
    sheet.text(440, 297, "new, back", 15)
    return sheet.svg()


def two_orders() -> str:
    """Chapter 10, by hand: through the same squares by rows or by columns."""
    sheet = Sheet("Two windows through three blocks: by windows, or by blocks", 292)
    states = ((2, 6, 30), (8, 24, 120))
    panels = (
        (20, "window by window", [(i, j) for i in (0, 1) for j in (0, 1, 2)], 6),
        (340, "block by block", [(i, j) for j in (0, 1, 2) for i in (0, 1)], 3),
    )
    for x, name, order, reads in panels:
        sheet.text(x, 32, name, 16, INK, bold=True)
        places = {(i, j): (x + 70 + 74 * j, 84 + 74 * i) for i in (0, 1) for j in (0, 1, 2)}
        for j, factor in enumerate((2, 3, 5)):
            sheet.text(x + 98 + 74 * j, 70, f"× {factor}", 15, GREY, "middle")
        for i, first in enumerate((1, 4)):
            sheet.text(x + 30, 118 + 74 * i, f"{first}", 18, INK, "middle", bold=True)
        for step, (place, then) in enumerate(zip(order, [*order[1:], order[-1]], strict=True), 1):
            (a, b), (c, d) = places[place], places[then]
            read = step == 1 or order[step - 2][1] != place[1]
            sheet.rect(a, b, 56, 56, tint(ORANGE, 0.45) if read else PALE, GREY, 1, round_=4)
            sheet.text(
                a + 28, b + 38, f"{states[place[0]][place[1]]}", 18, INK, "middle", bold=True
            )
            sheet.text(a + 6, b + 16, f"{step}", 13, GREY)
            if (a == c) != (b == d):  # to a neighbour
                start, end = ((a + 57, b + 28), (c - 1, d + 28)) if d == b else (
                    ((a + 28, b + 57), (c + 28, d - 1))
                )  # fmt: skip
                sheet.arrow(start, end, INK, 1.5)
        sheet.text(x + 172, 244, f"{reads} blocks are read", 15, "#9a6a00", "middle")
    sheet.path([(320, 20), (320, 256)], LIGHT, 1)
    words = "Small numbers: in which order. Shaded: a block is read that is not in memory."
    sheet.text(20, 280, words, 15)
    return sheet.svg()


def two_budgets() -> str:
    """Chapter 12, by hand: 45% pruned, or 55% pruned and rank 128, of a square matrix."""
    sheet = Sheet("What a square matrix holds: pruned by 45%, or by 55% with rank 128", 280)
    rank = 2 * 128 / 4096
    bars = (
        ("pruned by 45%", [(0.55, BLUE, "kept: 55%")]),
        ("pruned by 55%,", [(0.45, BLUE, "kept: 45%"), (rank, RED, "")]),
    )
    left, full = 180, 420
    for i, (name, parts) in enumerate(bars):
        y = 66 + 84 * i
        sheet.text(16, y + (29 if not i else 20), name, 15)
        if i:
            sheet.text(16, y + 39, "and rank 128", 15)
        sheet.rect(left, y, full, 46, PALE, LIGHT, 1)
        x: float = left
        for share, color, words in parts:
            sheet.rect(x, y, full * share, 46, color)
            sheet.text(x + full * share / 2, y + 29, words, 15, "#ffffff", "middle")
            x += full * share
    x = left + full * (0.45 + rank)
    sheet.text(x + 44, 178, f"*B* and *A*: {rank:.2%}", 15, RED)
    sheet.path([(x, 200), (x, 224)], GREY, 1, "3 3")
    sheet.path([(left + full * 0.55, 52), (left + full * 0.55, 224)], GREY, 1, "3 3")
    fewer = 1 - (0.45 + rank) / 0.55
    sheet.text(left + full * 0.55 + 10, 222, f"{fewer:.1%} fewer numbers", 15, INK, bold=True)
    sheet.text(left + full, 40, "all entries", 13, GREY, "end")
    sheet.text(
        16, 264, "Is the shorter bar as good? Only then is the low-rank part worth its numbers.", 15
    )
    return sheet.svg()


def only_flips_count() -> str:
    """Chapter 13: forty questions, two models; where both agree nothing is learned."""
    sheet = Sheet(
        "Forty questions to two models: only where they differ does one learn anything", 270
    )
    count, size = 40, 14
    wrong = {3, 7, 8, 14, 19, 21, 26, 30, 33, 34, 38}  # of the dense model
    lost, won = {5, 16, 23, 29}, {8, 33}
    for row, (name, color) in enumerate((("dense", INK), ("small", GREEN))):
        y = 64 + 34 * row
        sheet.text(16, y + 13, name, 15, color)
        for i in range(count):
            right = i not in wrong if not row else (i not in wrong and i not in lost) or i in won
            flips = i in lost | won
            x = 72 + size * i
            shade = color if flips else tint(color, 0.3)
            sheet.rect(x, y, size - 3, 20, shade if right else "#ffffff", shade, 1.5)
    for i in sorted(lost | won):
        middle = 72 + size * i + (size - 3) / 2
        color = RED if i in lost else BLUE
        sheet.rect(middle - 8.5, 56, 17, 70, "none", color, 2, round_=3)
        sheet.text(middle, 146, "−" if i in lost else "+", 17, color, "middle", bold=True)
    sheet.text(72, 42, "filled: right; empty: wrong", 13, GREY)
    net = len(won) - len(lost)
    both = len(won) + len(lost)
    sheet.text(
        16,
        180,
        f"{count - both} questions on which both do the same cancel, hard ones and easy.",
        15,
    )
    words = f"{len(lost)} were lost and {len(won)} won: a difference of {abs(net)} in {count},"
    sheet.text(16, 204, words, 15)
    sheet.text(
        16, 224, f"give or take √{both} ≈ {both**0.5:.1f} questions. That is no evidence yet.", 15
    )
    sheet.text(16, 252, "Compare pair by pair: never two accuracies with two intervals.", 15, GREY)
    return sheet.svg()


def neurons_leave() -> str:
    """Chapter 14: rows of S go while U V stays for all neurons."""
    sheet = Sheet("Rows of S leave during training; the low-rank part stays for every neuron", 290)
    rows, size = 12, 15
    order = [3, 10, 6, 0, 8, 5, 11, 2, 7, 4]
    stages = ((20, 0, "start"), (230, 6, "on the way"), (440, 10, "in the end"))
    for x, gone, name in stages:
        sheet.text(x, 32, name, 16, INK, bold=True)
        sheet.text(x + 14, 56, "*U*", 15, RED, "middle")
        sheet.rect(x, 64, 28, rows * size, RED)
        sheet.rect(x + 34, 64, 130, 10, RED)
        sheet.text(x + 170, 75, "*V*", 15, RED)
        for i in range(rows):
            left = i in order[:gone]
            y = 84 + i * (size - 1.6)
            fill, edge = ("#ffffff", LIGHT) if left else (BLUE, "#ffffff")
            sheet.rect(x + 34, y, 130, size - 4, fill, edge, 1, "3 3" if left else "")
        sheet.text(x + 170, 170, "*S*", 15, BLUE)
    sheet.arrow((206, 160), (226, 160), GREY)
    sheet.arrow((416, 160), (436, 160), GREY)
    sheet.text(
        20, 272, "A neuron whose row of *S* has left still speaks: it has its row of *U*.", 15
    )
    return sheet.svg()


def one_threshold() -> str:
    """Chapter 15: one line through the candidates of all matrices leaves each its own number."""
    sheet = Sheet(
        "One threshold for the candidates of all matrices, so each keeps its own number", 300
    )
    line, base = 0.42, 226
    panels = (
        ("query", 0.95, 1.6), ("value", 0.7, 0.55), ("gate", 0.52, 0.5), ("down", 0.88, 0.75),
    )  # fmt: skip
    for p, (name, top, slope) in enumerate(panels):
        x = 24 + 152 * p
        values = [top * 2.718281828 ** (-slope * i / 4) for i in range(12)]
        kept = sum(value > line for value in values)
        for i, value in enumerate(values):
            fill = RED if value > line else tint(INK, 0.2)
            sheet.rect(x + 10.5 * i, base - 180 * value, 8, 180 * value, fill)
        sheet.path([(x - 4, base), (x + 130, base)], GREY, 1)
        sheet.text(x + 62, base + 22, name, 15, INK, "middle")
        sheet.text(x + 128, 60, f"{kept} stay", 15, RED, "end")
    y = base - 180 * line
    sheet.path([(12, y), (628, y)], INK, 2, "7 4")
    sheet.text(628, y - 7, "one threshold", 13, INK, "end")
    sheet.text(24, 32, "score of each candidate, per parameter", 13, GREY)
    sheet.text(24, 286, "The budget fixes the line; no matrix has a rank that was given to it.", 15)
    return sheet.svg()
