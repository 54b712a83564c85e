"""Compress a model: a loaded one in place, or a checkpoint folder of any size into another.

Every linear layer of every decoder block is pruned and repaired; embeddings, norms and the
output head stay as they are.  A checkpoint is streamed: no more than one block, its calibration
inputs and its result are in memory, and every finished block is safe on disk.

Book: chapter 5.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from slr import plugin, ranks
from slr.calibrate import BlockInputs, first_inputs
from slr.layers import LayerReport, compress_block
from slr.linear import SLRLinear
from slr.patterns import parse
from slr.recipe import Recipe
from slr.stream import Stream, blocks_name, decoder_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from slr.journal import Journal
    from slr.methods.induction_options import Induction

__all__ = [
    "about",
    "compress",
    "compress_model",
    "plan_layers",
    "prepare_block",
    "shard_name",
]


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
    prefix, names = blocks_name(model), []
    plan: list[dict[str, Recipe]] = []
    for index, block in enumerate(decoder_blocks(model)):
        plan.append({})
        for inner, linear in block.named_modules():
            if isinstance(linear, SLRLinear):
                raise ValueError("the model is compressed already; give its dense source")
            if not isinstance(linear, nn.Linear):
                continue
            name = f"{prefix}.{index}.{inner}"
            names.append(name)
            mine = recipe.layer(name, hidden_size)
            if mine is None:
                continue
            (m, n), pattern = linear.weight.shape, parse(mine.pattern, mine.group)
            where = f"{name} of shape {(m, n)}"
            if mine.rank is not None and mine.rank > min(m, n):
                raise ValueError(f"rank {mine.rank} is above {min(m, n)}, the most for {where}")
            if n % getattr(pattern, "m", 1):
                raise ValueError(f"pattern {pattern} does not divide the inputs of {where}")
            plan[-1][inner] = mine
    if not any(plan):
        raise ValueError(f"of {len(names)} linear layers, the recipe leaves none to compress")
    for given in (*recipe.skip, *recipe.overrides):
        if not fnmatch.filter(names, given):
            raise ValueError(f"{given!r} in the recipe fits no layer; {names[0]!r} is one")
    if recipe.prepare == "induction":
        from slr.methods.induction_options import check_pattern

        if ranks.world() > 1:
            raise ValueError(f"prepare='induction' works in one process, not in {ranks.world()}")
        for block in decoder_blocks(model):
            check_pattern(block, _induction(recipe))
    return plan


def _induction(recipe: Recipe) -> Induction:
    """Options that suit the pruner; if any layer's compares rows, no row is scaled."""
    from slr.methods.induction_options import Induction

    each = [Induction.before(r.prune, r.pattern, r.group) for r in recipe.variants()]
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
        from slr.methods.induction import induce_block

        induce_block(block, index, inputs, _induction(recipe))


@torch.no_grad()
def compress_model(
    model: PreTrainedModel,
    recipe: Recipe,
    windows: Tensor | None = None,
    *,
    progress: bool = False,
) -> list[LayerReport]:
    """Compress a loaded model in place.

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
    if recipe.needs_data and windows is None:
        raise ValueError(
            f"prune={recipe.prune!r} with refine={recipe.refine!r} and prepare={recipe.prepare!r} "
            "needs calibration windows"
        )
    inputs = None
    if recipe.needs_data and windows is not None:
        inputs = first_inputs(model, ranks.mine(windows))
    prefix = blocks_name(model)
    reports: list[LayerReport] = []
    with _bar(plan, progress) as bar:
        for index, block in enumerate(decoder_blocks(model)):
            seed = recipe.seed + len(reports)
            prepare_block(block, index, recipe, inputs)
            reports += compress_block(
                f"{prefix}.{index}", block, index, plan[index], inputs, seed=seed, bar=bar
            )
            if inputs is not None and index + 1 < len(plan):
                inputs.run(index, block, keep=True)
    plugin.adopt(model, about(None, recipe.as_dict(), None, reports))
    return reports


@contextmanager
def _bar(plan: list[dict[str, Recipe]], progress: bool) -> Iterator[tqdm]:
    total = sum(map(len, plan))
    hide = not progress or ranks.rank() > 0
    with tqdm(total=total, desc="compress", unit="layer", disable=hide) as bar:
        yield bar


def about(
    source: str | None, recipe: dict, calibration: dict | None, reports: list[LayerReport]
) -> dict:
    """What a compressed folder says of itself."""
    return {
        "source": source,
        "recipe": recipe,
        "calibration": calibration,
        "layers": {report.name: report.stored() for report in reports},
    }


def compress(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    calibration: str = "embedded",
    device: str = "cpu",
    progress: bool = False,
    resume: bool = True,
    stages: dict[str, float] | None = None,
) -> list[LayerReport]:
    """Compress a checkpoint into another folder, one decoder block at a time.

    Args:
        model: ``"tiny"``, the folder of a Hugging Face checkpoint, or its name on the hub.
        out: folder to make; it must not exist, or be empty.  Until it is complete it is called
            ``OUT.partial``.
        recipe: defaults to ``Recipe()``.
        calibration: ``"embedded"``, ``"wikitext2"``, ``"c4"`` or a text file, read only if the
            recipe needs data.
        device: where to compute.
        progress: show a bar on standard error.
        resume: go on with what a run that was stopped left; ``False`` starts over.
        stages: if given, filled with this run's seconds by stage and its bytes read and written.

    Returns:
        One :class:`LayerReport` for each layer.

    Raises:
        ValueError: anything in the arguments that does not fit, before anything is written.
        OSError: no space left; what is done is kept.
    """
    from slr import checkpoint
    from slr.journal import Journal

    ranks.start(device)
    source = checkpoint.resolve(model)
    stream = Stream(source, device)
    hidden_size = stream.config.hidden_size
    recipe = (recipe or Recipe()).resolved(hidden_size)
    plan = plan_layers(stream.model, recipe, hidden_size)
    windows, text = None, None
    if recipe.needs_data:
        windows, text = checkpoint.calibration_windows(source, recipe, calibration)
    key = {
        "source": {"name": str(model), **checkpoint.fingerprint(source)},
        "recipe": recipe.as_dict(),
        "calibration": text,
    }
    checkpoint.check_space(stream, plan, out)
    with ranks.first(Journal(out, key, resume)) as journal:
        inputs = None
        if windows is not None:
            stream.fill_outside()
            inputs = first_inputs(stream.model, ranks.mine(windows), folder=journal.folder)
            for module in stream.outside().values():
                stream.empty(module)
        reports = _blocks(stream, plan, recipe, inputs, journal, progress)
        if ranks.rank() == 0:
            notes = about(str(model), recipe.as_dict(), text, reports)
            checkpoint.complete(stream, journal, notes)
    ranks.barrier()
    if stages is not None:
        stages |= {
            "read_seconds": stream.files.seconds,
            "calibrate_seconds": 0.0 if inputs is None else inputs.seconds,
            "layer_seconds": sum(report.seconds for report in reports),
            "write_seconds": journal.seconds,
            "bytes_read": stream.files.bytes_read,
            "bytes_written": journal.bytes_written,
        }
    return reports


def _blocks(
    stream: Stream,
    plan: list[dict[str, Recipe]],
    recipe: Recipe,
    inputs: BlockInputs | None,
    journal: Journal,
    progress: bool,
) -> list[LayerReport]:
    """Compress block after block, or take it from the journal."""
    reports: list[LayerReport] = []
    with _bar(plan, progress) as bar:
        for index in range(len(plan)):
            name, block = stream.block(index)
            file = shard_name(index, len(plan) + 1)
            last = index + 1 == len(plan)
            if file in journal:
                before = [LayerReport(**notes) for notes in journal.entries[file]["notes"]]
                reports += before
                bar.update(len(plan[index]))
                if inputs is None or last:
                    continue
                _take(stream, name, block, journal, file, before)
            else:
                stream.fill(name, block)
                seed = recipe.seed + len(reports)
                prepare_block(block, index, recipe, inputs)
                made = compress_block(name, block, index, plan[index], inputs, seed=seed, bar=bar)
                reports += made
                if ranks.rank() == 0:
                    tensors = plugin.state_dict(block)
                    notes = [report._asdict() for report in made]
                    journal.add(file, {f"{name}.{k}": v for k, v in tensors.items()}, notes)
            if inputs is not None and not last:
                inputs.run(index, block, keep=True)
            stream.empty(block)
    return reports


def _take(
    stream: Stream, name: str, block: nn.Module, journal: Journal, file: str,
    reports: list[LayerReport],
) -> None:  # fmt: skip
    """Fill a block from a finished file."""
    layers = {r.name.removeprefix(f"{name}."): r.stored() for r in reports}
    plugin.place(block, layers, stream.dtype)
    tensors = load_file(journal.folder / file)
    stream.put(block, tensors, {full.removeprefix(f"{name}."): full for full in tensors})


def shard_name(index: int, total: int) -> str:
    """File of one block: ``model-00001-of-00007.safetensors``.

    >>> shard_name(0, 7)
    'model-00001-of-00007.safetensors'
    """
    return f"model-{index + 1:05d}-of-{total:05d}.safetensors"
