"""Prune and repair block by block, by a recipe: the system that the book is about.

:func:`compress_model` does it to a loaded model; :mod:`slr.checkpoint.compression` takes the same
steps with blocks that are read and written one at a time.  Book: chapters 5, 9 and 10.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from slr.methods.induction.options import Induction, check_pattern
from slr.methods.induction.training import induce_block
from slr.model import distributed, hf
from slr.model.arithmetic import compute_dtype
from slr.model.block import LayerReport, compress_block
from slr.model.blocks import blocks_name, check_dense, decoder_blocks, in_mode, walk
from slr.model.calibrate import BlockInputs, first_inputs
from slr.model.masks import Masks
from slr.model.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["calibration_inputs", "compress_model", "plan_layers", "prepare_block", "progress_bar"]


def plan_layers(model: nn.Module, recipe: Recipe, hidden_size: int) -> list[dict[str, Recipe]]:
    """Recipe of each linear of each block, by its name within the block, all checked.

    Args:
        model: dense; its weights are not looked at.
        recipe: of the model.
        hidden_size: of the model, for a rank that is a fraction of it.

    Raises:
        ValueError: a layer that pattern or rank does not fit, nothing to do, or names in the
            recipe that fit no layer.
    """
    check_dense(model)
    prefix, names, masks = blocks_name(model), [], Masks()
    plan: list[dict[str, Recipe]] = []
    for index, block in enumerate(decoder_blocks(model)):
        plan.append({})
        for inner, linear in block.named_modules():
            if not isinstance(linear, nn.Linear):
                continue
            name = f"{prefix}.{index}.{inner}"
            names.append(name)
            mine = recipe.layer(name, hidden_size)
            if mine is None:
                continue
            (m, n), pattern = linear.weight.shape, mine.pattern
            where = f"{name} of shape {(m, n)}"
            if mine.rank is not None and mine.rank > min(m, n):
                raise ValueError(f"rank {mine.rank} is above {min(m, n)}, the most for {where}")
            if n % getattr(pattern, "m", 1):
                raise ValueError(f"pattern {pattern} does not divide the inputs of {where}")
            plan[-1][inner] = mine.pruned_by(masks.bound(mine.prune, name, (m, n)))
    if not any(plan):
        raise ValueError(f"of {len(names)} linear layers, the recipe leaves none to compress")
    for given in (*recipe.skip, *recipe.overrides):
        if not fnmatch.filter(names, given):
            raise ValueError(f"{given!r} in the recipe fits no layer; {names[0]!r} is one")
    if recipe.prepare == "induction":
        if distributed.world() > 1:
            raise ValueError(
                f"prepare='induction' works in one process, not in {distributed.world()}"
            )
        for block in decoder_blocks(model):
            check_pattern(block, _induction(recipe))
    return plan


def _induction(recipe: Recipe) -> Induction:
    """Options that suit the pruner; if any layer's compares rows, no row is scaled."""
    each = [Induction.before(str(r.prune), r.pattern) for r in recipe.variants()]
    return replace(each[0], fixed=max((options.fixed for options in each), key=len))


def prepare_block(block: nn.Module, index: int, recipe: Recipe, inputs: BlockInputs | None) -> None:
    """What a recipe does to a dense block, in place, before it is pruned.

    Args:
        block: filled.
        index: its number.
        recipe: of the model.
        inputs: of this block, for a recipe that needs data.
    """
    if recipe.prepare == "induction" and inputs is not None:
        induce_block(block, index, inputs, _induction(recipe))


@torch.no_grad()
def compress_model(
    model: PreTrainedModel,
    recipe: Recipe,
    windows: Tensor | None = None,
    *,
    progress: bool = False,
) -> list[LayerReport]:
    """Compress a loaded model in place, in evaluation mode; its own mode is put back.

    Args:
        model: a decoder, in any float dtype, on any one device.
        recipe: what to do.
        windows: calibration token windows (count, seqlen), for a recipe that needs data.
        progress: show a bar over the layers on standard error.

    Returns:
        One :class:`LayerReport` for each layer, in the order of the model.

    Raises:
        ValueError: no such structure, missing calibration windows, or a layer that the pattern
            or rank does not fit (all layers are checked before any is changed).
    """
    hidden_size = model.config.get_text_config().hidden_size
    recipe = recipe.resolved(hidden_size)
    plan = plan_layers(model, recipe, hidden_size)
    inputs = None
    if recipe.needs_data and windows is None:
        raise ValueError(f"{recipe!r} needs calibration windows")
    reports: list[LayerReport] = []
    with in_mode(model, False), progress_bar(plan, progress) as bar:
        if windows is not None and recipe.needs_data:
            inputs = calibration_inputs(model, recipe, windows)
        for index, name, block in walk(model, inputs):
            prepare_block(block, index, recipe, inputs)
            seed = recipe.seed + len(reports)
            reports += compress_block(
                name, block, index, plan[index], inputs, seed=seed, bar=bar, tune=recipe.tune
            )
    hf.adopt(model, hf.notes(None, recipe.as_dict(), None, reports))
    return reports


def calibration_inputs(
    model: PreTrainedModel,
    recipe: Recipe,
    windows: Tensor,
    folder: Path | None = None,
    *,
    changes: bool = True,
) -> BlockInputs:
    """Of the first block, for this process's calibration windows.

    Args:
        model: whose embeddings at least hold weights.
        recipe: that needs data.
        windows: int64 (count, seqlen); all of them.
        folder: where large inputs may be kept on disk.
        changes: whether blocks will be compressed as one walks; if not, no recipe needs the dense
            model's inputs beside these.
    """
    weight = model.get_input_embeddings().weight
    dtype = compute_dtype(weight.dtype, weight.device)  # type: ignore[arg-type]
    if recipe.prepare != "none":  # scales are trained in the dtype of the weights
        dtype = weight.dtype  # type: ignore[assignment]
    inputs = first_inputs(model, distributed.mine(windows), folder=folder, dtype=dtype)
    return inputs.beside(folder) if changes and recipe.follows_dense else inputs


@contextmanager
def progress_bar(plan: list[dict[str, Recipe]], progress: bool) -> Iterator[tqdm]:
    """A bar over the layers of a plan, on standard error."""
    total = sum(map(len, plan))
    hide = not progress or distributed.rank() > 0
    with tqdm(total=total, desc="compress", unit="layer", disable=hide) as bar:
        yield bar
