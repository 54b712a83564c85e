"""The plain alternative: the dense model, its linear layers rounded to a few bits.

At the same bytes it is what a compressed model has to be held against.  Book: chapter 18.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from slr.matrix.rounding import Grid

__all__ = ["PLAIN", "round_linears", "rounded"]

# By name: those that every engineer knows, at about 0.5 and 0.3 of the bytes of bfloat16.
PLAIN = {f"plain {grid}": grid for grid in (Grid(8), Grid(4, 32))}


def round_linears(module: nn.Module, grid: Grid) -> None:
    """Round the weights of all linear layers of a module, in place."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = grid.nearest(layer.weight.data)


@contextmanager
def rounded(module: nn.Module, grid: Grid) -> Iterator[nn.Module]:
    """While open, the weights of all linear layers of a module are rounded.

    >>> layer = nn.Linear(4, 4)
    >>> before = layer.weight.data
    >>> with rounded(layer, Grid(2)):
    ...     len(layer.weight.unique()) < 16
    True
    >>> layer.weight.data is before or bool((layer.weight.data == before).all())
    True
    """
    own = {layer: layer.weight.data for layer in module.modules() if isinstance(layer, nn.Linear)}
    try:
        round_linears(module, grid)
        yield module
    finally:
        for layer, weight in own.items():
            layer.weight.data = weight
