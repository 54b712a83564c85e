"""A compressed folder beside its source: dense, only rounded, only pruned, and as it is.

Book: chapter 10.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from slr.checkpoint.folder import about, load, resolve
from slr.checkpoint.source import may_read, source_of
from slr.checkpoint.work import calibration_windows
from slr.evaluate.likelihood import perplexity
from slr.evaluate.reproduction import measure
from slr.layer.linear import SLRLinear
from slr.matrix.pruners import Like
from slr.methods.blockwise import compress_model
from slr.model.blocks import decoder_blocks
from slr.model.choices import CALLED
from slr.model.losses import exponential
from slr.model.plain import PLAIN, rounded
from slr.model.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Comparison", "compare", "comparison_of", "prune_again"]

REPAIRED = {"none": "pruned", **CALLED}


@torch.no_grad()
def prune_again(dense: PreTrainedModel, compressed: nn.Module, notes: dict, source: Path) -> bool:
    """Make of a dense model, in place, what pruning alone makes of it: what a repair has to beat.

    A pruner that moves no weight has left the dense ones on the masks of the result.  Otherwise
    (SparseGPT, a mask chosen anew, a block that was rescaled first) the pruning is done again, on
    the same calibration windows.

    Args:
        dense: the source, loaded in its own dtype.
        compressed: the result, loaded.
        notes: what its folder says of itself.
        source: folder of the source, for its tokenizer.

    Returns:
        Whether it could be done: not if the calibration text is not here, or not what it was, or
        if the masks were another folder's.
    """
    recipe = Recipe.from_dict(notes["recipe"])
    if recipe.keeps_weights:
        for name, layer in compressed.named_modules():
            if isinstance(layer, SLRLinear):
                dense.get_parameter(f"{name}.weight").mul_(layer.mask)
        return True
    if any(isinstance(each.prune, Like) for each in recipe.variants()):
        return False  # its folder is only a path in a file that may come from anybody
    alone, windows = recipe.pruned_only(), None
    if alone.needs_data:
        told = notes["calibration"]
        try:
            windows, now = calibration_windows(source, recipe, told["text"])
        except (ValueError, RuntimeError):
            return False
        if now is None or now["sha256"] != told["sha256"]:
            return False
    compress_model(dense, alone, windows)
    return True


class Comparison(NamedTuple):
    """Perplexities by name, the folder's own last; `why` there is no source among them, if so."""

    values: dict[str, float]
    why: str = ""


def compare(folder: str | Path, windows: Tensor, **options: Any) -> dict[str, float]:
    """Perplexity of a compressed folder beside its source, dense, and pruned but not repaired.

    Args:
        folder: of a compressed model; of a dense one, its perplexity alone is given.
        windows: token windows (count, seqlen).
        options: as for :func:`comparison_of`.

    Returns:
        By name: ``"dense"``, the plain alternatives (:data:`slr.model.plain.PLAIN`) and
        ``"pruned"``, if the source (and, where pruning has to be done again, its calibration text)
        is there, and the repair's.

    Raises:
        ValueError: as :func:`comparison_of`.
    """
    return comparison_of(folder, windows, **options).values


def comparison_of(
    folder: str | Path,
    windows: Tensor,
    *,
    source: bool | str | Path | None = None,
    stream: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> Comparison:
    """:func:`compare`, and why there is no source in it.

    Args:
        folder: of a compressed model, or a dense one.
        windows: token windows (count, seqlen).
        source: where it is, or whether to look for the recorded one; see
            :func:`slr.checkpoint.source.source_of`.
        stream: one decoder block at a time; then without the pruned model.
        device: where to compute.
        dtype: to compute in.
        progress: show bars on standard error.

    Raises:
        ValueError: windows that the model cannot read, or a source that is not what the folder
            was made from, or of no use.
    """
    folder = resolve(folder)
    notes = about(folder)
    name = "dense" if notes is None else REPAIRED.get(notes["recipe"]["refine"], "refined")
    values: dict[str, float] = {}
    options: dict[str, Any] = {"device": device, "dtype": dtype}

    def measured(model: Any, label: str, **more: Any) -> float:
        return perplexity(model, windows, progress=label if progress else None, **more)

    origin, why = None, ""
    if notes is not None:
        origin, why = source_of(folder, notes, source)
    elif source is not None and not isinstance(source, bool):
        raise ValueError(f"source={str(source)!r} has no effect: {folder} is not compressed")
    if origin is not None and about(origin) is not None:
        raise ValueError(f"source {origin} is compressed itself; give the dense model")
    if stream:
        if origin is not None:
            values["dense"] = measured(origin, "dense", stream=True, **options)
            for plain, grid in PLAIN.items():
                losses = measure(
                    origin, grid, windows, progress=plain if progress else None, **options
                )[0]
                values[plain] = exponential(losses)
        return Comparison({**values, name: measured(folder, name, stream=True, **options)}, why)
    loaded: nn.Module = load(folder, dtype=dtype)
    if notes is not None and origin is not None:
        model = nn.Module.to(load(origin, dtype=dtype), device)
        values["dense"] = measured(model, "dense")
        for plain, grid in PLAIN.items():
            with rounded(decoder_blocks(model), grid):
                values[plain] = measured(model, plain)
        del model
        if notes["recipe"]["refine"] != "none" and _prunes(notes["recipe"]):
            pruned = load(origin)
            if may_read(folder, notes) and prune_again(pruned, loaded, notes, origin):
                values["pruned"] = measured(nn.Module.to(pruned, device, dtype), "pruned")
            del pruned
    nn.Module.to(loaded, device)
    return Comparison({**values, name: measured(loaded, name)}, why)


def _prunes(told: dict) -> bool:
    """Whether a recipe has a pruner, and a layer of which not all is kept."""
    if "prune" not in told:
        return False
    return any(each.pattern.density < 1 for each in Recipe.from_dict(told).variants())
