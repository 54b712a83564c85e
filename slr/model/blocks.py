"""The decoder blocks of a model, and the one walk over them.

Everything that goes through a model block by block (compressing, evaluating, exporting, training
scales) does so by :func:`walk`: a block is filled, handed out, run to make the next block's inputs,
and emptied.  Book: chapter 9.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from torch import nn

__all__ = ["Inputs", "blocks_name", "decoder_blocks", "walk"]


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of a causal language model, in order.

    Raises:
        ValueError: the model has neither ``model.layers`` nor ``model.decoder.layers``.
    """
    blocks = model.get_submodule(blocks_name(model))
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def blocks_name(model: nn.Module) -> str:
    """The name of the list of decoder blocks: ``model.layers``, or ``model.decoder.layers``."""
    for name in ("model.layers", "model.decoder.layers"):
        try:
            blocks = model.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(blocks, nn.ModuleList) and len(blocks):
            return name
    raise ValueError(
        f"{type(model).__name__} has no decoder blocks at model.layers or model.decoder.layers"
    )


class Inputs(Protocol):
    """What walks along: inputs of a block that can become those of the next."""

    def advance(self, index: int, block: nn.Module) -> None:
        """Replace the inputs of block `index` by its outputs."""


def walk(
    model: nn.Module,
    *inputs: Inputs | None,
    fill: Callable[[str, nn.Module], None] | None = None,
    empty: Callable[[nn.Module], None] | None = None,
) -> Iterator[tuple[int, str, nn.Module]]:
    """The decoder blocks in order: number, name and module of each.

    Args:
        model: a causal language model, with weights or (with `fill`) without.
        inputs: of the first block; when a block has been used, and perhaps changed, each is
            replaced by that block's outputs.  ``None`` is passed over.
        fill: reads a block's weights before it is handed out.
        empty: lets them go afterwards.

    Cost: a forward pass of every block but the last over each of the inputs.
    """
    name = blocks_name(model)
    for index, block in enumerate(decoder_blocks(model)):
        if fill is not None:
            fill(f"{name}.{index}", block)
        yield index, f"{name}.{index}", block
        for each in inputs:
            if each is not None:
                each.advance(index, block)
        if empty is not None:
            empty(block)
