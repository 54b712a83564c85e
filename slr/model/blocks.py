"""The decoder blocks of a model, and the one walk over them.

Everything that goes through a model block by block (compressing, evaluating, exporting, training
scales) does so by :func:`walk`: a block is filled, handed out, run to make the next block's inputs,
and emptied.  Book: chapter 10.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import nn

from slr.layer.linear import SLRLinear

__all__ = ["Inputs", "blocks_name", "check_dense", "decoder_blocks", "in_mode", "walk"]


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


def check_dense(model: nn.Module) -> None:
    """Raise ValueError if a model is compressed already, or has adapters.

    Args:
        model: loaded, or without weights.
    """
    for name, module in model.named_modules():
        if isinstance(module, SLRLinear):
            raise ValueError("the model is compressed already; give its dense source")
        if "base_layer" in module._modules:  # so PEFT calls what an adapter wraps
            raise ValueError(
                f"the model has an adapter at {name}; compress it first and add adapters "
                "afterwards, or merge them into it before"
            )


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """While open, a model trains or does not; then every module does again what it did before.

    A module that was put in another's place meanwhile takes over what that did.

    >>> net = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    >>> with in_mode(net, False):
    ...     net[0].training
    False
    >>> net[0].training, net[1].training
    (True, False)
    """
    before = {name: m.training for name, m in model.named_modules(remove_duplicate=False)}
    model.train(training)
    try:
        yield
    finally:
        for name, module in model.named_modules(remove_duplicate=False):
            while name not in before:
                name = name.rpartition(".")[0]
            module.training = before[name]


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
