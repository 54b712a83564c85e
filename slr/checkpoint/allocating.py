"""A recipe whose layers differ, from a look at a whole dense model.

Book: chapter 19.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slr.checkpoint.folder import resolve
from slr.checkpoint.work import calibration_windows
from slr.methods.blockwise import calibration_inputs, plan_layers
from slr.model import distributed
from slr.model.allocation import check_way, spread_over
from slr.model.blocks import in_mode, walk
from slr.model.recipe import Recipe
from slr.model.stream import Stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["allocate", "allocated"]


def allocate(
    model: str | Path | PreTrainedModel,
    recipe: Recipe | None = None,
    by: str = "owl",
    *,
    calibration: str | Path | Tensor | None = None,
    device: str | None = None,
) -> Recipe:
    """A recipe that keeps as much in all, and not the same in each layer.

    Args:
        model: as for :func:`slr.compress`; it is only read.
        recipe: ``Recipe()`` when ``None``.
        by: ``"owl"``: prune less where a block has more outliers, entries whose ``|W| · ‖X‖`` is
            far above its mean (for a fraction, as ``pattern="0.5"``); ``"energy"``: rank where it
            lowers the relative errors of all layers' outputs most for what it takes.
        calibration: as for :func:`slr.compress`; only for a recipe that reads data.
        device: where to compute, for a folder; ``"cpu"`` when ``None``.

    Returns:
        The recipe with an override for each block or layer, before its own.

    Raises:
        ValueError: anything that does not fit: a pattern that fixes the sparsity, a recipe without
            rank, and all that :func:`slr.compress` refuses.

    Cost: a run of the dense model over the calibration text; with ``"energy"`` the eigenvalues of a
        matrix of min(m, n) for each layer besides.
    Source: Yin et al. 2024 (OWL, arXiv:2310.05175).

    Example:
        >>> import slr
        >>> recipe = slr.Recipe("magnitude", refine="weights", rank=8)
        >>> found = slr.allocate("tiny", recipe, "energy")
        >>> len(found.overrides), found.overrides["model.layers.0.self_attn.q_proj"]
        (42, {'rank': 18})
    """
    recipe = Recipe() if recipe is None else recipe
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe is {recipe!r}; it must be a slr.Recipe")
    check_way(by, recipe)
    if isinstance(model, nn.Module):
        named = Path(getattr(model, "name_or_path", None) or "?")
        windows, _ = calibration_windows(named if named.is_dir() else None, recipe, calibration)
        with in_mode(model, False):
            return allocated(model, recipe, by, windows)
    folder = resolve(model)
    distributed.start(device or "cpu")
    windows, _ = calibration_windows(folder, recipe, calibration)
    return allocated(Stream(folder, device or "cpu"), recipe, by, windows)


@torch.no_grad()
def allocated(
    source: Stream | PreTrainedModel, recipe: Recipe, by: str, windows: Tensor | None
) -> Recipe:
    """:func:`allocate` with the model opened and the windows drawn.

    Args:
        source: a checkpoint, or a loaded model in evaluation mode.
        recipe, by: as for :func:`allocate`; checked.
        windows: calibration windows (count, seqlen), if the recipe reads data.
    """
    model = source.model if isinstance(source, Stream) else source
    hidden_size = model.config.get_text_config().hidden_size
    recipe = recipe.resolved(hidden_size)
    plan = plan_layers(model, recipe, hidden_size)
    with tempfile.TemporaryDirectory(prefix="slr-") as scratch:
        if isinstance(source, Stream):
            source.fill_outside()
        inputs = None
        if windows is not None:
            inputs = calibration_inputs(model, recipe, windows, Path(scratch), changes=False)
        if isinstance(source, Stream):
            source.empty_outside()
        blocks = source.filled() if isinstance(source, Stream) else walk(model)
        return spread_over(blocks, plan, recipe, by, inputs)
