"""What the calibration text does to each linear layer: statistics of its inputs.

A decoder is walked one block at a time.  The inputs of a block are held for all calibration
windows; the block runs once to collect statistics, is compressed by the caller, and runs again
to make the inputs of the next, so that every block is calibrated on what the compressed
blocks before it really put out.

Book: chapter 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slr.statistics import GramStatistic, NormStatistic

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["BlockInputs", "decoder_blocks", "first_inputs", "observe"]


class BlockInputs:
    """The inputs of one decoder block for every calibration window, and how to run the block.

    Attributes:
        hidden: one (rows, seqlen, hidden) tensor for each batch of windows.
        arguments: what else the model passes to its blocks (mask, positions, rotary table).
    """

    def __init__(self, hidden: list[Tensor], arguments: list[dict]) -> None:
        self.hidden, self.arguments = hidden, arguments

    @torch.no_grad()
    def run(self, block: nn.Module, keep: bool) -> None:
        """Run the block on all windows; with `keep` its outputs replace the inputs."""
        for i, (h, arguments) in enumerate(zip(self.hidden, self.arguments, strict=True)):
            out = block(h, **arguments)
            if keep:
                self.hidden[i] = out[0] if isinstance(out, tuple) else out


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder blocks of a LLaMA-like model, in order.

    Raises:
        ValueError: the model has no ``model.layers``.
    """
    blocks = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise ValueError(
            f"{type(model).__name__} has no model.layers; "
            "only decoders of the LLaMA family are supported"
        )
    return blocks


class _StopForward(Exception):  # noqa: N818
    """Raised to leave a forward pass once the first block was reached."""


@torch.no_grad()
def first_inputs(model: PreTrainedModel, windows: Tensor, rows: int = 8) -> BlockInputs:
    """Inputs of the first decoder block for token windows (count, seqlen), `rows` at a time."""
    hidden: list[Tensor] = []
    arguments: list[dict] = []

    def catch(module: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden.append(args[0] if args else kwargs["hidden_states"])
        others = {k: v for k, v in kwargs.items() if k != "hidden_states"}
        arguments.append({**others, "past_key_values": None, "use_cache": False})
        raise _StopForward

    handle = decoder_blocks(model)[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for ids in windows.split(rows):
            try:
                model(input_ids=ids.to(model.device), use_cache=False)
            except _StopForward:
                continue
    finally:
        handle.remove()
    return BlockInputs(hidden, arguments)


@contextmanager
def observe(
    linears: Mapping[str, nn.Linear], kind: type[NormStatistic] | type[GramStatistic]
) -> Iterator[dict[str, NormStatistic | GramStatistic]]:
    """While open, collect a statistic of the inputs of each of the named linear layers."""
    device = next(iter(linears.values())).weight.device
    found = {name: kind(linear.in_features, device) for name, linear in linears.items()}

    def watch(statistic):
        return lambda module, args: statistic.update(args[0])

    handles = [lin.register_forward_pre_hook(watch(found[n])) for n, lin in linears.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
