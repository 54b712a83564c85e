"""The transformers plugin: ``from_pretrained`` and ``save_pretrained`` of compressed models.

``import slr`` is all that a user does.  A compressed folder's ``config.json`` is that of the dense
model but for three entries:

- ``"model_type": "slr"``, which only this package makes known, so that elsewhere
  ``AutoModelForCausalLM`` stops with an error;
- ``"num_hidden_layers"`` holds a sentence, so that no model class can be built from it by any
  other way and filled with random weights;
- ``"slr"`` has the true values of both (one level deep, for transformers looks for a fitting
  ``model_type`` among the entries), the recipe and the layers.

transformers is not imported before it is used: :func:`install` waits for it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import sys
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from slr.layer.linear import SLRLinear

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["FORMAT", "adopt", "disguise", "install", "notes", "place", "reveal", "state_dict"]

FORMAT = 2
NAME = "slr"
HIDDEN = ("model_type", "num_hidden_layers")
SENTENCE = "this checkpoint is compressed: `import slr` before loading it (pip install slr)"
AUTO = "transformers.models.auto.configuration_auto"


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
    return {**rest, **true, "quantization_config": {"quant_method": NAME, **about}}


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


def place(model: nn.Module, layers: dict[str, dict], dtype: torch.dtype) -> None:
    """Put placeholders where a model has its dense layers.

    Args:
        model: with `nn.Linear` on the meta device.
        layers: by name, with ``shape``, ``rank``, ``kept``, ``bias`` and ``pattern``.
    """
    for name, layer in layers.items():
        model.set_submodule(
            name,
            SLRLinear.placeholder(
                tuple(layer["shape"]), layer["rank"], layer["kept"], layer["bias"], dtype,
                pattern=layer["pattern"],
            ),
        )  # fmt: skip


def state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that are stored of a compressed model or block, by name."""
    return dict(model.state_dict())  # a layer holds what is stored


def adopt(model: PreTrainedModel, about: dict) -> PreTrainedModel:
    """Make ``save_pretrained`` of a model with :class:`SLRLinear` layers write this format.

    Args:
        model: compressed in memory.
        about: as for :func:`disguise`.
    """
    config_class, quantizer_class = _plugin()
    quantizer = quantizer_class(config_class(format=FORMAT, **about))
    model.hf_quantizer = quantizer
    model.config.quantization_config = quantizer.quantization_config
    base: Any = type(model.config)
    model.config.__class__ = _disguised(base)
    return model


@cache
def _disguised(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """A config class that differs from `base` only in the JSON that it writes."""

    def to_json_string(self, use_diff: bool = True) -> str:
        config = json.loads(base.to_json_string(self, use_diff))
        about = config.pop("quantization_config", None)
        if about is None:  # decompressed since
            return base.to_json_string(self, use_diff)
        about = {k: v for k, v in about.items() if k not in ("quant_method", "format")}
        config.setdefault("num_hidden_layers", self.num_hidden_layers)
        return json.dumps(disguise(config, about), indent=2, sort_keys=True) + "\n"

    # transformers finds the model of a config by the name of its class.
    members = {"to_json_string": to_json_string, "__module__": __name__}
    return type(base.__name__, (base,), members)


@cache
def _plugin() -> tuple[Any, Any]:
    """The quantization config and quantizer classes, registered."""
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @register_quantization_config(NAME)
    class SLRConfig(QuantizationConfigMixin):
        def __init__(self, **about) -> None:
            about.pop("quant_method", None)
            self.quant_method = NAME  # type: ignore[assignment]
            self.layers: dict[str, dict] = {}
            self.__dict__.update(about)

    @register_quantizer(NAME)
    class SLRQuantizer(HfQuantizer):
        requires_calibration = True
        is_trainable = False

        def is_serializable(self) -> bool:
            return True

        def _process_model_before_weight_loading(self, model, dtype=None, **kwargs):
            place(
                model,
                self.quantization_config.layers,  # type: ignore[attr-defined]
                dtype or model.dtype,
            )

        def _process_model_after_weight_loading(self, model, **kwargs):
            for module in model.modules():
                if isinstance(module, SLRLinear):
                    module.check_()
            base: Any = type(model.config)
            model.config.__class__ = _disguised(base)
            return model

        def get_state_dict_and_metadata(self, model):
            return state_dict(model), {}

    return SLRConfig, SLRQuantizer


def _register(auto) -> None:
    """Make the model type known to transformers."""
    from transformers import PreTrainedConfig

    class Compressed(PreTrainedConfig):
        model_type = NAME

        @classmethod
        def from_dict(cls, config_dict: dict, **kwargs):
            _plugin()
            config = reveal(config_dict)
            base = auto.CONFIG_MAPPING[config["model_type"]]
            return base.from_dict(config, **kwargs)

    auto.AutoConfig.register(NAME, Compressed, exist_ok=True)


class _Loader(importlib.abc.Loader):
    def __init__(self, loader) -> None:
        self.loader = loader

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module) -> None:
        self.loader.exec_module(module)
        _register(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Registers the plugin as soon as transformers' table of models is imported."""

    def find_spec(self, fullname, path, target=None):
        if fullname != AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def install() -> None:
    """Register the plugin, now or when transformers is imported."""
    if AUTO in sys.modules:
        _register(sys.modules[AUTO])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
