"""What a matrix S + B A takes, to the byte, as our layers hold it.

Book: chapters 2 and 19.
"""

from __future__ import annotations

from slr.matrix.rounding import Grid

__all__ = ["stored_bytes"]


def _planes(count: int, bits: int) -> int:
    """Bytes of so many codes."""
    return count if bits == 8 else bits * -(-count // 8)


def stored_bytes(
    shape: tuple[int, int], kept: int, rank: int = 0, *, grid: Grid | None = None,
    factors: Grid | None = None, width: int = 2,
) -> int:  # fmt: skip
    """What one matrix takes on disk and in memory, to the byte.

    Args:
        shape: (m, n).
        kept: entries of S.
        rank: k of B A.
        grid: of the values of S, where they are codes: then all may be kept without a mask.
        factors: of B and A, where they are codes.
        width: bytes of a number that is no code.

    Cost: none; arithmetic.

    >>> stored_bytes((4, 64), 128), stored_bytes((4, 64), 256, grid=Grid(4, 32))
    (288, 148)
    """
    m, n = shape
    mask = -(-m * n // 8)
    if grid is None:
        values = kept * width + mask
    else:
        groups = m * -(-n // (grid.group or n))
        values = _planes(kept, grid.bits) + 2 * groups + (mask if kept < m * n else 0)
        values += 0 if grid.symmetric else _planes(groups, grid.bits)
    entry = rank * (m + n)
    return values + (entry * width if factors is None else entry + 4 * rank)
