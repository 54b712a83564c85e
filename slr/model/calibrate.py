"""What the calibration text does to each linear layer: statistics of its inputs.

A decoder is walked one block at a time.  The inputs of a block are held for all calibration
windows; the block runs once to collect statistics, is compressed by the caller, and runs again
to make the inputs of the next, so that every block is calibrated on what the compressed
blocks before it really put out.

Book: chapter 3.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slr.matrix.statistics import GramStatistic, NormStatistic
from slr.model.arithmetic import computing
from slr.model.blocks import decoder_blocks
from slr.model.data import check_windows
from slr.model.heads import instead

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "BlockInputs", "Reached", "decoder_blocks", "first_inputs", "observe", "on_disk",
    "rows_at_once",
]  # fmt: skip

CACHE = ("cache", "past_key_values")  # what transformers calls it from 5.24 on, and before
IN_MEMORY = 1 << 30  # bytes of block inputs above which they are kept on disk
ACTIVATIONS = {"cpu": 1 << 28, "cuda": 1 << 31}  # bytes that a block may need beside its inputs


class BlockInputs:
    """The inputs of one decoder block for every calibration window, and how to run the block.

    Attributes:
        hidden: (windows, seqlen, hidden), in memory, or mapped from a file when large; blocks run
            in its dtype.
        rows: windows that run at once.
        arguments: what else the model passes to each block (mask, positions, rotary table), by
            the number of windows in a batch, 1 among them; the windows have no padding, so it is
            the same.
        to_end: whether the outputs of the last block are wanted.
        dense: the same of the dense model, where a recipe asks what that puts out.
        seconds: spent running blocks, so far.
    """

    dense: Tensor | None = None

    def __init__(
        self, hidden: Tensor, rows: int, arguments: dict[int, list[dict]], to_end: bool = False
    ) -> None:
        self.hidden, self.rows, self.arguments, self.to_end = hidden, rows, arguments, to_end
        self.seconds = 0.0

    def beside(self, folder: Path | None = None) -> BlockInputs:
        """The same with a second stream, the dense model's; `folder` as for `first_inputs`."""
        self.dense = _room(self.hidden.shape, self.hidden.dtype, folder).copy_(self.hidden)
        return self

    def advance(self, index: int, block: nn.Module) -> None:
        """Replace the inputs of block `index` by its outputs, if they are of use to anybody."""
        if self.to_end or index + 1 < len(next(iter(self.arguments.values()))):
            self.run(index, block, keep=True)

    def advance_dense(self, index: int, block: nn.Module) -> None:
        """The same of the dense model's, by its block; nothing if there are none."""
        if self.dense is not None:
            self._run(self.dense, index, block, keep=True)

    def run(self, index: int, block: nn.Module, keep: bool) -> None:
        """Run block `index` on all windows; with `keep` its outputs replace the inputs."""
        self._run(self.hidden, index, block, keep)

    @torch.no_grad()
    def _run(self, hidden: Tensor, index: int, block: nn.Module, keep: bool) -> None:
        device = next(block.parameters()).device
        with self.timed(), computing(block, hidden.dtype):
            for batch in hidden.split(self.rows):
                out = block(batch.to(device), **self.arguments[len(batch)][index])
                if keep:
                    batch.copy_(out)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """While open, blocks run: the time counts as such."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started


def rows_at_once(config, seqlen: int, device: torch.device, dtype: torch.dtype) -> int:
    """Windows that a block runs on at once, for about :data:`ACTIVATIONS` bytes."""
    wide = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", 0)
    token = 4 * (wide + 2 * config.hidden_size) * max(4, dtype.itemsize)
    return max(1, min(8, ACTIVATIONS.get(device.type, 1 << 28) // (token * seqlen)))


class Reached(Exception):  # noqa: N818
    """Raised to leave a forward pass once it has come to where something is looked at."""


def on_disk(size: int) -> int:
    """Bytes that block inputs of `size` bytes take on the disk, where there is a folder for them.

    >>> on_disk(5_000_000), on_disk(5_000_000_000)
    (0, 5000000000)
    """
    return size if size > IN_MEMORY else 0


def _room(shape: tuple[int, ...], dtype: torch.dtype, folder: Path | None) -> Tensor:
    """An uninitialised tensor on the CPU; in a file without a name when it is large."""
    count = torch.Size(shape).numel()
    if folder is None or not on_disk(count * dtype.itemsize):
        return torch.empty(shape, dtype=dtype)
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp") as file:
        return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(shape)


@torch.no_grad()
def first_inputs(
    model: PreTrainedModel,
    windows: Tensor,
    rows: int | None = None,
    folder: Path | None = None,
    to_end: bool = False,
    dtype: torch.dtype | None = None,
) -> BlockInputs:
    """Inputs of the first decoder block for token windows (count, seqlen).

    Args:
        model: whose embeddings at least hold weights.
        windows: int64 (count, seqlen).
        rows: windows at once; chosen to memory when ``None``.
        folder: where large inputs may be kept on disk.
        to_end: whether the outputs of the last block are wanted.
        dtype: to run blocks in, see :mod:`slr.model.arithmetic`; the weights' when ``None``.

    Raises:
        ValueError, TypeError: as :func:`slr.model.data.check_windows`.
    """
    check_windows(windows, model.config)
    blocks = decoder_blocks(model)
    config = model.config.get_text_config()
    embedding = model.get_input_embeddings()
    weight: Tensor = embedding.weight  # type: ignore[assignment]
    device, dtype = weight.device, dtype or weight.dtype
    count, seqlen = windows.shape
    rows = rows or rows_at_once(config, seqlen, device, dtype)
    hidden = _room((count, seqlen, config.hidden_size), dtype, folder)
    arguments: dict[int, list[dict]] = {}
    done = 0

    def record(i: int) -> Callable:
        def forward(states: Tensor, *args, **kwargs) -> Tensor:
            size = len(states)
            if i == 0:
                hidden[done : done + size] = states
                arguments.setdefault(size, [])
            if len(arguments[size]) == i:
                none = {name: None for name in CACHE if name in kwargs}
                arguments[size].append({**kwargs, **none, "use_cache": False})
            if i + 1 == len(blocks):
                raise Reached
            return states

        return forward

    widen = embedding.register_forward_hook(lambda module, args, out: out.to(dtype))
    passed = {id(module) for block in blocks for module in block.modules()}
    passed.add(id(model.get_output_embeddings()))
    try:
        with ExitStack() as stack:
            stack.enter_context(instead(blocks, record))
            for module in model.modules():  # OPT may project its embeddings
                if isinstance(module, nn.Linear) and id(module) not in passed:
                    stack.enter_context(computing(module, dtype))
            for first, ids in enumerate((windows[:1], *windows.split(rows))):
                with suppress(Reached):
                    model(input_ids=ids.to(device), use_cache=False)
                done += len(ids) if first else 0
    finally:
        widen.remove()
    return BlockInputs(hidden, rows, arguments, to_end)


@contextmanager
def observe(
    linears: Mapping[str, nn.Linear], kind: type[NormStatistic] | type[GramStatistic]
) -> Iterator[dict[str, NormStatistic | GramStatistic]]:
    """While open, collect a statistic of the inputs of each of the named linear layers.

    Layers that are given the same tensor (query, key and value; gate and up) share one.

    Raises:
        ValueError: there are no layers.
    """
    if not linears:
        raise ValueError("linears is empty; give the layers to look at, by name")
    device = next(iter(linears.values())).weight.device
    found: dict[str, NormStatistic | GramStatistic] = {}
    leaders: dict[str, str] = {}  # whose statistic a layer shares, having the same input
    seen: list[tuple[Tensor, str]] = []

    def watch(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            x = args[0]
            if name not in leaders:
                leaders[name] = next((other for y, other in seen if y is x), name)
                seen.append((x, leaders[name]))
                if leaders[name] == name:
                    found[name] = kind(linears[name].in_features, device)
                found[name] = found[leaders[name]]
                if len(leaders) == len(linears):
                    seen.clear()
            if leaders[name] == name:
                found[name].update(x)

        return hook

    handles = [lin.register_forward_pre_hook(watch(n)) for n, lin in linears.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
