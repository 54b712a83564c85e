"""Drawings of the book: one idea each, made by code.

:func:`show` puts one into a chapter, where it is kept as the cell's output; a relative path to a
file would be broken on Colab and in the student's edition.  Book: every chapter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from slr.chapters.drawings import breaking, repairing, running, whole
from slr.matrix.checks import check_choice

if TYPE_CHECKING:
    from IPython.display import SVG

__all__ = ["DRAWINGS", "drawn", "show"]

DRAWINGS: dict[str, Callable[[], str]] = {
    function.__name__.replace("_", "-"): function
    for module in (breaking, repairing, whole, running)
    for function in (getattr(module, name) for name in module.__all__)
}


def drawn(name: str) -> str:
    """The SVG of a drawing.

    Args:
        name: of it, as ``"areas"``.

    Raises:
        ValueError: there is no such drawing.

    >>> drawn("areas")[:4]
    '<svg'
    """
    check_choice("drawing", name, DRAWINGS)
    return DRAWINGS[name]()


def show(name: str) -> SVG:
    """A drawing as the output of a cell.

    Args:
        name: of it, as ``"areas"``.
    """
    from IPython.display import SVG

    return SVG(drawn(name))
