"""How long a compression will take, how much memory and disk, before it begins.

Disk is counted.  Time is tried out: one block runs on a few windows, and one layer of each shape
is compressed with few iterations, from which the rest follows.

Book: chapter 10.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import psutil
import torch
from torch import nn

from slr.checkpoint.measuring import whole_for_sample
from slr.checkpoint.sizes import bytes_after
from slr.checkpoint.work import Prospect
from slr.matrix.pruners import Known
from slr.matrix.steps import Iterated, ThreeBASiL
from slr.model.arithmetic import compute_dtype
from slr.model.block import compress_layer, measure
from slr.model.calibrate import BlockInputs, first_inputs, observe
from slr.model.heldout import KINDS
from slr.model.recipe import Recipe
from slr.model.streams import look, stages

__all__ = ["Estimate", "estimate"]

FEW = (2, 6)  # iterations that are tried out
SEARCH = (10, 15)  # the same where some are of ADMM, which computes a few inverses whatever it does


class Estimate(NamedTuple):
    """Of one compression, in this process.

    Attributes:
        seconds: of wall time.
        memory: bytes, resident at most, the process itself included.
        disk: bytes of the folder's tensors.
    """

    seconds: float
    memory: int
    disk: int


@torch.no_grad()
def estimate(work: Prospect) -> Estimate:
    """Try out a block of a compression that is about to begin.

    Args:
        work: one that was looked at, of a recipe.

    Cost: some hundredths of the compression.
    """
    stream, recipe = work.stream, work.method
    assert isinstance(recipe, Recipe)
    dtype = compute_dtype(stream.dtype, stream.device)
    stream.fill_outside()
    some = work.windows if work.windows is not None else work.held
    inputs = None
    if some is not None:
        rows = first_inputs(stream.model, some[:1], dtype=dtype).rows
        inputs = first_inputs(stream.model, some[:rows], dtype=dtype)
    stream.empty_outside()
    name, block = stream.block(0)
    started = time.perf_counter()
    stream.fill(name, block)
    reading = time.perf_counter() - started
    observing, running, known = _run(work, block, inputs)
    layers = _layers(work, block, known)
    blocks, held = len(stream.blocks), 0 if work.held is None else len(work.held)
    count = 0 if work.windows is None else len(work.windows)
    once = 1 if inputs is None else len(inputs.hidden)
    chains = 0 if work.held is None else len(KINDS)
    head = running * _head(work)
    # A step of tuning is a run forwards and two backwards.
    passes = count * (observing + running * (1 + 3 * recipe.tune))
    passes += chains * held * (running + head / blocks)
    seconds = blocks * (2 * reading + layers + passes / once)
    stream.empty(block)
    hidden = 0
    if some is not None:
        windows = count * (1 + recipe.follows_dense) + (chains + 1) * held
        hidden = windows * some.shape[1] * stream.config.hidden_size
    peak = hidden * dtype.itemsize + _largest(work)
    if recipe.tune:  # the weights, their gradients and what Adam knows
        peak += 20 * sum(p.numel() for p in block.parameters())
    if work.held is not None:  # at the end, when there are neither statistics nor gradients
        peak = max(peak, whole_for_sample(stream))
    memory = psutil.Process().memory_info().rss + peak
    return Estimate(seconds, memory, bytes_after(stream, work.plan))


def _run(
    work: Prospect, block: nn.Module, inputs: BlockInputs | None
) -> tuple[float, float, dict[str, Known]]:
    """Seconds of a block on a batch, observed and not, and what is learnt of its layers' inputs."""
    recipe = work.method
    assert isinstance(recipe, Recipe)
    if inputs is None:
        return 0.0, 0.0, {}
    inputs.run(0, block, keep=False)  # the first run is slower
    started = inputs.seconds
    inputs.run(0, block, keep=False)
    running = inputs.seconds - started
    if work.windows is None or recipe.statistic is None:
        return 0.0, running, {}
    started = inputs.seconds
    known = _learn(block, recipe, inputs)
    return inputs.seconds - started, running, known


def _learn(block: nn.Module, recipe: Recipe, inputs: BlockInputs) -> dict[str, Known]:
    """What is known of the inputs of the block's layers, learnt as the recipe will learn it."""
    kind, known = recipe.statistic, dict[str, Known]()
    assert kind is not None
    if recipe.asymmetric:
        twin = copy.deepcopy(block)
        found = stages(twin, 0, inputs.beside())
        for stage in found:
            known |= look(stage, block, twin, 0, inputs, last=stage is found[-1])
        return known
    linears = {k: m for k, m in block.named_modules() if isinstance(m, nn.Linear)}
    with observe(linears, kind) as statistics:
        inputs.run(0, block, keep=False)
    return {layer: Known.of(statistic) for layer, statistic in statistics.items()}


def _layers(work: Prospect, block: nn.Module, known: dict[str, Known]) -> float:
    """Seconds of all layers of a block, from one of each shape and recipe."""
    plan = work.plan[0] or next(layers for layers in work.plan if layers)
    modules = dict(block.named_modules())
    kinds = Counter((tuple(modules[name].weight.shape), repr(r)) for name, r in plan.items())
    total, seen = 0.0, set()
    for name, recipe in plan.items():
        weight = modules[name].weight.data
        kind = (tuple(weight.shape), repr(recipe))
        if kind in seen:
            continue
        seen.add(kind)
        total += kinds[kind] * _layer(weight, recipe, known.get(name))
    return total


def _layer(weight: torch.Tensor, recipe: Recipe, known: Known | None) -> float:
    step = recipe.refine
    counts = SEARCH if getattr(step, "update_mask", False) == "admm" else FEW
    if not isinstance(step, Iterated | ThreeBASiL) or step.iterations <= counts[1]:
        return _timed(weight, recipe, known)
    few = []
    for count in counts:
        short = replace(step, iterations=count)
        once = Recipe(recipe.prune, recipe.pattern, refine=short, seed=recipe.seed)
        few.append(_timed(weight, once, known))
    slope = max(0.0, few[1] - few[0]) / (counts[1] - counts[0])
    return few[1] + slope * (step.iterations - counts[1])


def _timed(weight: torch.Tensor, recipe: Recipe, known: Known | None) -> float:
    started = time.perf_counter()
    made = compress_layer(weight, recipe, known=known)
    measure(weight, made, known)
    return time.perf_counter() - started


def _head(work: Prospect) -> float:
    """Cost of the output head, in blocks."""
    config = work.stream.config.get_text_config()
    head = config.vocab_size * config.hidden_size
    return head / max(1, sum(p.numel() for p in work.stream.blocks[0].parameters()))


def _largest(work: Prospect) -> int:
    """Bytes of a few float32 copies of the largest layer and its second moments."""
    shapes = [m.weight.shape for m in work.stream.blocks[0].modules() if isinstance(m, nn.Linear)]
    return max(4 * (6 * m * n + 5 * n * n) for m, n in shapes)
