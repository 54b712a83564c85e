"""Train the scales of a block, or of all blocks one after the other, and absorb them.

Book: chapter 16.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from slr.matrix.patterns import parse
from slr.methods.induction.loss import BlockLoss, SilentError, starting_scales
from slr.methods.induction.options import Induction, check_pattern
from slr.methods.induction.scales import SHIFTS, Scales, absorb
from slr.model import distributed
from slr.model.blocks import decoder_blocks, in_mode, walk
from slr.model.calibrate import BlockInputs, first_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Trained", "induce", "induce_block", "train_scales"]


class Trained(NamedTuple):
    """Scales, and by epoch, the start first: (output loss, mean log stable rank), unrounded."""

    scales: Scales
    trace: tuple[tuple[float, float], ...]


@torch.enable_grad()
def train_scales(
    block: nn.Module, inputs: BlockInputs, index: int = 0, options: Induction | None = None
) -> Trained:
    """Scales under which a block, pruned by magnitude, comes closest to itself.

    Args:
        block: dense decoder block of one of :data:`slr.methods.induction.families.MODELS`, left as
            it is.
        inputs: of this block, as :func:`slr.model.calibrate.first_inputs` gives them, or as
            compressed blocks before it have made them; the block is compared with itself on them.
        index: its number in the model.
        options: ``Induction()`` by default.

    Returns:
        Scales of geometric mean 1, and the losses by epoch; the scales are those of the epoch in
        which the sum of both losses, weighed, was least.  If the losses diverge, a warning says
        so and all scales are 1.

    Raises:
        ValueError: another kind of block, a pattern that does not fit it, or unusable inputs.

    Cost: an epoch is about five forward passes of the block over all windows, and one
        selection of the mask a step; memory for the scores of its weights in float32, thrice.

    >>> import slr
    >>> model = slr.load("tiny", dtype=torch.float32)
    >>> inputs = first_inputs(model, torch.arange(128).view(2, 64))
    >>> found = train_scales(model.model.layers[0], inputs, options=Induction(epochs=1))
    >>> len(found.trace), found.scales.mlp.shape
    (2, torch.Size([256]))
    """
    options = options or Induction()
    pattern = parse(options.pattern)
    scales, grams = starting_scales(block, inputs, index, options.start, options.fixed)
    losses = BlockLoss(block, inputs, index, grams, pattern, options.temperature)
    best, trace = scales.centred(), [losses.whole(scales)]
    try:
        for now in _epochs(losses, scales, options):
            trace.append(losses.whole(now))
            if options.weighed(trace[-1]) == min(map(options.weighed, trace)):
                best = now
    except FloatingPointError as error:
        warnings.warn(
            f"block {index}: {error} in epoch {len(trace)} of induction, whose rate is "
            f"{options.rate:g}; try a smaller one.  The block keeps its scales",
            stacklevel=2,
        )
        best = Scales.ones(block)
    return Trained(best.powers_of_two() if options.powers_of_two else best, tuple(trace))


def _epochs(losses: BlockLoss, scales: Scales, options: Induction) -> Iterator[Scales]:
    """Train `scales` in place; yields a copy after each epoch.

    Raises:
        FloatingPointError: a loss, or its gradient, that is not finite.
    """
    moving = [log for name, log in scales.logs().items() if name not in options.fixed]
    groups: list[dict[str, Any]] = [{"params": moving, "lr": options.rate}]
    for name, shift in scales.shifts().items():
        if name not in options.fixed:  # has the unit of what it is added to
            unit = float(losses.grams[SHIFTS[name]].diagonal().mean().sqrt())
            groups.append({"params": [shift], "lr": options.rate * unit})
            moving = [*moving, shift]
    for parameter in moving:
        parameter.requires_grad_()
    batches = losses.inputs.hidden.split(losses.inputs.rows)
    steps = max(1, options.epochs * len(batches))
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(options.epochs):
        for batch in batches:
            loss = torch.zeros((), device=moving[0].device)
            if options.output:
                loss = loss + options.output * losses.output(batch, scales)
            if options.spectral:
                loss = loss + options.spectral * losses.spectral(scales)
            # Not backward(): the block's own parameters are to get no gradient.
            slopes = torch.autograd.grad(loss, moving, allow_unused=True)
            if not all(bool(x.isfinite().all()) for x in (loss, *slopes) if x is not None):
                raise FloatingPointError(f"the loss became {loss.item():g}")
            for parameter, slope in zip(moving, slopes, strict=True):
                parameter.grad = slope
            optimizer.step()
            schedule.step()
        yield scales.centred()


def induce_block(
    block: nn.Module, index: int, inputs: BlockInputs, options: Induction | None = None
) -> Trained:
    """Train the scales of one block and absorb them, in place: a step before pruning it.

    Args:
        block: filled dense decoder block of one of :data:`slr.methods.induction.families.MODELS`.
        index: its number in the model.
        inputs: of this block, whatever made them; they are left as they are.
        options: ``Induction()`` by default.

    Returns:
        What :func:`train_scales` returns.  Norm weights and biases of the block have changed too.
        A block with inputs that are all zero keeps its scales, and a warning says so.

    Raises:
        ValueError: as :func:`train_scales`, or more than one process; the block is as it was.

    Cost: that of :func:`train_scales`.

    >>> import slr
    >>> model = slr.load("tiny", dtype=torch.float32)
    >>> inputs, block = first_inputs(model, torch.arange(64).view(1, 64)), model.model.layers[0]
    >>> before = block.input_layernorm.weight.clone()
    >>> found = induce_block(block, 0, inputs, Induction(epochs=0))
    >>> bool(torch.equal(block.input_layernorm.weight, before))
    False
    """
    if distributed.world() > 1:
        raise ValueError(f"induction trains in one process, not in {distributed.world()}")
    try:
        found = train_scales(block, inputs, index, options)
    except SilentError as error:
        warnings.warn(f"block {index}: {error}, and the block keeps its scales", stacklevel=2)
        return Trained(Scales.ones(block), ())
    absorb(block, found.scales)
    return found


def induce(
    model: PreTrainedModel,
    windows: Tensor,
    options: Induction | None = None,
    *,
    rows: int | None = None,
    progress: bool = False,
) -> list[Trained]:
    """Train and absorb scales block by block; the model stays dense and equivalent.

    Args:
        model: loaded dense model of one of :data:`slr.methods.induction.families.MODELS`, changed
            in place.
        windows: calibration token windows (count, seqlen).
        options: ``Induction()`` by default.
        rows: windows in a training step; chosen to memory when ``None``.
        progress: show a bar over the blocks on standard error.

    Returns:
        One :class:`Trained` for each block.  Prune the model by magnitude next, or repair it on
        its weights: see the module for what else can gain.

    Raises:
        ValueError: a block that is not dense or of another kind (all are checked before any is
            changed), or a pattern that does not fit.

    Cost: that of :func:`train_scales` for each block and one more forward pass.

    >>> import slr
    >>> model = slr.load("tiny", dtype=torch.float32)
    >>> ids = torch.arange(64).view(1, 64)
    >>> before = model(ids).logits
    >>> found = induce(model, ids, Induction(epochs=0))
    >>> len(found), bool(torch.allclose(model(ids).logits, before, atol=1e-3))
    (6, True)
    """
    blocks = decoder_blocks(model)
    options = options or Induction()
    for block in blocks:
        check_pattern(block, options)
    with in_mode(model, False):
        inputs = first_inputs(model, windows, rows)
        walked = tqdm(
            walk(model, inputs), "induce", len(blocks), disable=not progress, unit="block"
        )
        return [induce_block(block, index, inputs, options) for index, _, block in walked]
