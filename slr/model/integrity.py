"""Does what a compressed folder holds fit its description and the model that is made from it?

A model may be loaded as another class than it was saved as: ``AutoModel`` drops the head, a
classifier adds one.  Names then differ by the prefix of the base model, and only what is outside
of it may be missing.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from torch import nn

from slr.layer.linear import SLRLinear
from slr.matrix.checks import check_finite
from slr.model.tensors import check_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["check_files", "check_filled", "named_as_in"]

PACKED = (
    "values", "bitmask", "B", "A", "codes", "scale", "zero", "B_codes", "B_scale", "A_codes",
    "A_scale",
)  # fmt: skip


def _rename(model: PreTrainedModel, name: str, known: Container[str]) -> str | None:
    """The name among `known` of what a folder calls `name`, or ``None``."""
    prefix = f"{model.base_model_prefix}."
    given = (name, name.removeprefix(prefix), prefix + name)
    return next((each for each in given if each in known), None)


def named_as_in(model: PreTrainedModel, layers: dict[str, dict]) -> dict[str, dict]:
    """The layers of a folder by the names that they have in a model; others as they are.

    Args:
        model: of the same architecture, with a head or without.
        layers: by name.
    """
    known = dict(model.named_modules())
    return {_rename(model, name, known) or name: layer for name, layer in layers.items()}


def check_files(model: PreTrainedModel, files: Iterable[str], layers: Container[str]) -> None:
    """Raise ValueError unless safetensors files hold what a model needs, by their headers.

    Args:
        model: with placeholders for the compressed layers.
        files: of the folder; those of another kind are not looked at.
        layers: names of the compressed layers in the model.

    Raises:
        ValueError: a tensor of a compressed layer or of the base model that is missing or has
            another shape or kind of dtype; one of a compressed layer that the description does
            not have.

    Cost: reads the headers.
    """
    shapes, dtypes = {}, {}
    paths = [Path(file) for file in files if str(file).endswith(".safetensors")]
    for path in paths:
        try:
            with safe_open(path, "pt") as handle:
                for name in handle.keys():  # noqa: SIM118
                    part = handle.get_slice(name)
                    shapes[name], dtypes[name] = tuple(part.get_shape()), part.get_dtype()
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or cut short: {error}") from None
    if not paths:
        return
    folder = paths[0].parent
    state = model.state_dict()
    expected = {name: tuple(value.shape) for name, value in state.items()}
    found = {}
    for name, shape in shapes.items():
        mine = _rename(model, name, expected)
        if mine is not None:
            found[mine] = shape
            check_dtype(folder, name, dtypes[name], state[mine])
            continue
        layer, _, part = name.rpartition(".")
        if part in PACKED or _rename(model, layer, layers) is not None:
            raise ValueError(
                f"{folder} holds the tensor {name}, which no layer in config.json accounts for"
            )
    for name in _missing(model, expected, found, layers):
        raise ValueError(f"{folder} lacks the tensor {name}")
    for name, shape in found.items():
        if _inside(model, name, layers) and shape != expected[name]:
            raise ValueError(
                f"{folder}: tensor {name} has shape {shape}, but config.json asks for "
                f"{expected[name]}"
            )


def _inside(model: PreTrainedModel, name: str, layers: Container[str]) -> bool:
    """Is a tensor of a compressed layer, or of the base model?"""
    if model.base_model is model or name.rpartition(".")[0] in layers:
        return True
    return name.startswith(f"{model.base_model_prefix}.")


def _missing(
    model: PreTrainedModel, expected: Iterable[str], found: Container[str], layers: Container[str]
) -> list[str]:
    """What must be in the files and is not; a head only if the model was saved with it."""
    whole = type(model).__name__ in (model.config.architectures or ())
    ignored = model._keys_to_ignore_on_load_missing or ()
    tied = model.all_tied_weights_keys
    groups = {name: {name, tied.get(name, name)} for name in expected}
    groups |= {source: {source, name} for name, source in tied.items()}
    return [
        name
        for name in expected
        if not any(each in found for each in groups[name])
        and (whole or _inside(model, name, layers))
        and not any(re.search(pattern, name) for pattern in ignored)
    ]


def check_filled(model: nn.Module) -> None:
    """Check a compressed model that has been filled, and make its layers ready.

    Args:
        model: tensors on the meta device are passed over.

    Raises:
        ValueError: a tensor with a value that is not finite, or values that do not belong to
            their bitmask; it has the name.

    Cost: one pass.
    """
    for name, tensor in model.named_parameters():
        if not tensor.is_meta:
            check_finite(f"the tensor {name}", tensor.detach())
    for name, layer in model.named_modules():
        if isinstance(layer, SLRLinear) and not layer.is_meta:
            try:
                layer.check_()
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
