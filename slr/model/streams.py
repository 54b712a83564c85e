"""Two streams through a block: what the dense model puts out where the compressed one is to.

A layer behind compressed ones gets inputs X that are not the dense model's.  Asked for W X, as in
the usual calibration, it hands their error on; asked for what the dense model puts out there, it
makes up for what of it goes with X.  For that both models read the calibration text, block by
block.  A layer whose outputs are added to the residual stream can make up for the error of that
stream as well, which is most of it.  The layers of a block come in stages, those that read the same
tensor together, so that each sees what the ones before it, compressed, put out.

Book: chapter 9.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from slr.matrix.pruners import Known
from slr.matrix.statistics import CrossStatistic, GramStatistic
from slr.model import distributed
from slr.model.arithmetic import computing
from slr.model.calibrate import BlockInputs, Reached

__all__ = ["Stage", "look", "stages"]

# Layers whose outputs may go straight to the residual stream; whether they do is tried out.
ADDED = ("o_proj", "out_proj", "down_proj", "fc2")
SAME = 0.02  # of a sum in bfloat16


class Stage(NamedTuple):
    """Linear layers of a block that read the same tensor.

    Attributes:
        names: within the block, in the order of execution.
        added: whether their outputs are added to the residual stream.
        before: the layers of the block whose outputs were added to it before.
    """

    names: tuple[str, ...]
    added: bool
    before: tuple[str, ...]


@contextmanager
def _hooked(
    block: nn.Module, names: Iterable[str], seen: Callable[[str, Tensor], None], outputs: bool
) -> Iterator[None]:
    """While open, `seen` is told of each input or output of the named layers."""
    with ExitStack() as stack:
        for name in names:
            layer = block.get_submodule(name)
            if outputs:
                handle = layer.register_forward_hook(
                    lambda module, args, out, name=name: seen(name, out)
                )
            else:
                handle = layer.register_forward_pre_hook(
                    lambda module, args, name=name: seen(name, args[0])
                )
            stack.callback(handle.remove)
        yield


@torch.no_grad()
def stages(block: nn.Module, index: int, inputs: BlockInputs) -> list[Stage]:
    """The linear layers of a dense block in the order of execution, found by running it once.

    Args:
        block: with its weights.
        index: its number.
        inputs: of this block; one window is used.
    """
    linears = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    read: list[tuple[str, Tensor]] = []
    put: dict[str, Tensor] = {}
    first = inputs.hidden[:1].to(next(block.parameters()).device)
    with (
        computing(block, first.dtype),
        _hooked(block, linears, lambda name, x: read.append((name, x)), outputs=False),
        _hooked(block, linears, put.__setitem__, outputs=True),
    ):
        out = block(first, **inputs.arguments[1][index])
    added = [name for name, _ in read if name.rpartition(".")[2] in ADDED]
    sums = first.float() + sum(put[name].float().reshape(first.shape) for name in added)
    if not torch.allclose(sums, out.float(), rtol=SAME, atol=SAME * float(first.float().std())):
        added = []  # a norm stands between, as in Gemma
    groups: list[tuple[Tensor, list[str]]] = []
    for name, x in read:
        if groups and groups[-1][0] is x:
            groups[-1][1].append(name)
        else:
            groups.append((x, [name]))
    found: list[Stage] = []
    before: list[str] = []
    for _, names in groups:
        found.append(Stage(tuple(names), names[0] in added, tuple(before)))
        before += [name for name in names if name in added]
    return found


@torch.no_grad()
def look(
    stage: Stage, block: nn.Module, dense: nn.Module, index: int, inputs: BlockInputs, last: bool
) -> dict[str, Known]:
    """What is known of the inputs of a stage's layers, and of what they should put out.

    Args:
        stage: of the block.
        block: with the layers of earlier stages compressed.
        dense: the same block as it was.
        index: its number.
        inputs: of both, see :attr:`BlockInputs.dense`.
        last: replace the dense model's inputs by its outputs on the way.

    Returns:
        By name of the layer; over all processes.

    Cost: a run of both blocks, up to the stage (of the dense one to the end if it is the last), and
        4 n² or, where outputs are added to the stream, 2 n² + 4 m n FLOPs a token.
    """
    assert inputs.dense is not None
    name, device = stage.names[0], next(dense.parameters()).device
    weight = dense.get_parameter(f"{name}.weight")
    m, n = weight.shape
    gram = GramStatistic(n, device)
    cross = CrossStatistic(m if stage.added else n, n, device)
    with (
        inputs.timed(),
        computing(block, inputs.hidden.dtype),
        computing(dense, inputs.dense.dtype),
    ):
        for batch, twin in zip(
            inputs.hidden.split(inputs.rows), inputs.dense.split(inputs.rows), strict=True
        ):
            arguments = inputs.arguments[len(batch)][index]
            here, there = batch.to(device), twin.to(device)
            x, sum_here, _ = _until(stage, block, here, arguments, stop=True)
            wanted, sum_there, out = _until(stage, dense, there, arguments, stop=not last)
            lacking = wanted.float() - x.float()
            if stage.added:  # OPT lays its windows end to end
                lacking = linear(lacking, weight.float()).reshape(sum_here.shape)
                lacking += sum_there - sum_here
            gram.update(x)
            cross.update(lacking, x)
            if out is not None:
                twin.copy_(out)
    distributed.all_reduce(gram)
    distributed.all_reduce(cross)
    moments, known = cross.moments(), Known.of(gram)
    found = {}
    for each in stage.names:
        own = dense.get_parameter(f"{each}.weight").float()
        lacking = moments if stage.added else own @ moments
        found[each] = replace(known, lacking=lacking)
    return found


def _until(
    stage: Stage, block: nn.Module, states: Tensor, arguments: dict, stop: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inputs of a stage, the residual stream there in float32, and the block's outputs.

    Without outputs if the run is to `stop` at the stage.
    """
    read: list[Tensor] = []
    stream = states.float()

    def reached(name: str, x: Tensor) -> None:
        read.append(x)
        if stop:
            raise Reached

    def more(name: str, out: Tensor) -> None:
        nonlocal stream
        if not read:  # only what was added before the stage
            stream = stream + out.float().reshape(stream.shape)

    out = None
    with (
        _hooked(block, stage.names[:1], reached, outputs=False),
        _hooked(block, stage.before, more, outputs=True),
        suppress(Reached),
    ):
        out = block(states, **arguments)
    return read[0], stream, out
