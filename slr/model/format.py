"""The ``config.json`` of a compressed folder, and the layers that it describes.

It is that of the dense model but for three entries:

- ``"model_type": "slr"``, which only this package makes known, so that elsewhere
  ``AutoModelForCausalLM`` stops with an error;
- ``"num_hidden_layers"`` holds a sentence, so that no model class can be built from it by any
  other way and filled with random weights;
- ``"slr"`` has the true values of both, the recipe and the layers.

Book: the checkpoint format.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from slr.layer.linear import SLRLinear
from slr.layer.rounded import RoundedLinear

__all__ = ["FORMAT", "NAME", "About", "describe", "disguise", "grids", "notes", "place", "reveal",
           "state_dict"]  # fmt: skip

FORMAT = 2
NAME = "slr"
HIDDEN = ("model_type", "num_hidden_layers")
SENTENCE = "this checkpoint is compressed: `import slr` before loading it (pip install slr)"
FACTS = ("shape", "rank", "kept", "bias", "pattern")  # of a layer, as its module has them
GRIDS = ("grid", "factors")  # of one with codes


class About(dict):
    """A dict of this package, which unpickling a configuration in another process imports."""


def disguise(config: dict, about: dict) -> dict:
    """The ``config.json`` of a compressed folder from that of its dense model.

    Args:
        config: plain values.
        about: ``source``, ``recipe``, ``layers``: what ``"slr"`` holds beside the true values.
    """
    true = {key: config[key] for key in HIDDEN}
    return {
        **config, "model_type": NAME, "num_hidden_layers": SENTENCE,
        NAME: {"format": FORMAT, "dense": true, **about},
    }  # fmt: skip


def reveal(config: dict) -> dict:
    """The inverse of :func:`disguise`, with ``"slr"`` as a ``quantization_config``.

    Raises:
        ValueError: written in another format.
    """
    about = dict(config[NAME])
    if about.get("format") != FORMAT:
        raise ValueError(
            f"this checkpoint has format {about.get('format')}, but slr reads format {FORMAT}"
        )
    true = about.pop("dense")
    rest = {k: v for k, v in config.items() if k not in (NAME, *HIDDEN)}
    return {**rest, **true, "quantization_config": About(quant_method=NAME, **about)}


def notes(
    source: str | None, recipe: dict, calibration: dict | None, reports: Iterable[Any]
) -> dict:
    """What a compressed model says of itself: where it is from, how it was made, its layers.

    Args:
        source: name of the dense model, if it has one.
        recipe: plain values.
        calibration: of the text, plain values.
        reports: one of each layer, with ``name`` and ``stored()``.
    """
    layers = {report.name: report.stored() for report in reports}
    return {"source": source, "recipe": recipe, "calibration": calibration, "layers": layers}


def describe(model: nn.Module, before: dict[str, dict]) -> dict[str, dict]:
    """What is to be said of the compressed layers of a model as they are now, by name.

    Args:
        model: with :class:`~slr.layer.linear.SLRLinear` layers.
        before: what was said of them.  Errors stay: they are those of the compression, whatever
            was trained or merged since.

    Raises:
        ValueError: a layer is inside an adapter, so that no folder could say where it is.
    """
    found = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, SLRLinear):
            continue
        if name.endswith(".base_layer"):
            raise ValueError(
                f"{name.removesuffix('.base_layer')} has an adapter; save what "
                "merge_and_unload() or unload() returns, or the adapter alone"
            )
        pattern = None if layer.pattern is None else str(layer.pattern)
        shape = [layer.out_features, layer.in_features]
        facts = (shape, layer.rank, layer.kept, layer.bias is not None, pattern)
        unknown = dict.fromkeys(("pruned_error", "error", "output_error"))
        told = {k: v for k, v in before.get(name, {}).items() if k not in GRIDS}
        found[name] = {**unknown, **told, **dict(zip(FACTS, facts, strict=True)), **grids(layer)}
    return found


def grids(layer: SLRLinear) -> dict[str, str]:
    """The grids of a layer with codes, by name; none for others."""
    if not isinstance(layer, RoundedLinear):
        return {}
    found = {"grid": layer.grid, "factors": layer.factors}
    return {name: str(grid) for name, grid in found.items() if grid is not None}


def place(model: nn.Module, layers: dict[str, dict], dtype: torch.dtype) -> None:
    """Put placeholders where a model has its dense layers.

    Args:
        model: with `nn.Linear` on the meta device.
        layers: by name, with ``shape``, ``rank``, ``kept``, ``bias`` and ``pattern``, and perhaps
            ``grid`` and ``factors``.

    Raises:
        ValueError: the model has no linear layer of such a name and shape.
    """
    modules = dict(model.named_modules())
    for name, layer in layers.items():
        (m, n), dense = layer["shape"], modules.get(name)
        if not isinstance(dense, nn.Linear) or dense.weight.shape != (m, n):
            raise ValueError(
                f"config.json describes the layer {name} of shape {(m, n)}, but "
                f"{type(model).__name__} has there {dense}"
            )
        wanted = {name: layer[name] for name in ("pattern", *GRIDS) if name in layer}
        make = RoundedLinear.room if "grid" in layer else SLRLinear.placeholder
        room = make((m, n), layer["rank"], layer["kept"], layer["bias"], dtype, **wanted)
        model.set_submodule(name, room)


def state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that are stored of a compressed model or block, by name."""
    return dict(model.state_dict())  # a layer holds what is stored
