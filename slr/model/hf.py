"""The transformers and PEFT plugins: compressed models load, save and are tuned like any other.

``import slr`` is all that a user does.  Neither package is imported before it is used:
:func:`install` waits for them, and then

- every configuration class reads and writes the ``config.json`` of :mod:`slr.model.format`, so
  that ``AutoModel…``, ``LlamaForCausalLM`` and pipelines load a compressed folder;
- :mod:`slr.model.quantizer` is known to transformers, which asks it for the layers;
- PEFT wraps :class:`~slr.layer.linear.SLRLinear` by :mod:`slr.model.lora`.
"""

from __future__ import annotations

import functools
import importlib
import json
from types import ModuleType
from typing import TYPE_CHECKING, Any

from slr.model.format import (
    FORMAT,
    NAME,
    disguise,
    notes,
    place,
    reveal,
    state_dict,
)
from slr.model.importing import when_imported

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["FORMAT", "adopt", "disguise", "install", "notes", "place", "reveal", "state_dict"]


def adopt(model: PreTrainedModel, about: dict) -> PreTrainedModel:
    """Make ``save_pretrained`` of a model with :class:`SLRLinear` layers write this format.

    Args:
        model: compressed in memory.
        about: as for :func:`disguise`.
    """
    from slr.model.quantizer import SLRConfig, SLRQuantizer

    quantizer: Any = SLRQuantizer(SLRConfig(format=FORMAT, **about))
    model.hf_quantizer = quantizer
    model.config.quantization_config = quantizer.quantization_config
    return model


def _read_and_write(module: ModuleType) -> None:
    """Let the configuration classes of transformers read and write the format."""
    base = module.PreTrainedConfig
    read, write = base.get_config_dict.__func__, base.to_json_string
    if getattr(read, NAME, False):
        return

    @functools.wraps(read)
    def get_config_dict(cls, *args, **kwargs):
        config, rest = read(cls, *args, **kwargs)
        return (reveal(config) if config.get("model_type") == NAME else config), rest

    @functools.wraps(write)
    def to_json_string(self, use_diff: bool = True) -> str:
        text, about = write(self, use_diff), getattr(self, "quantization_config", None)
        about = about if about is None or isinstance(about, dict) else about.to_dict()
        if about is None or about.get("quant_method") != NAME:
            return text
        config = json.loads(text)
        config.pop("quantization_config", None)
        config.setdefault("num_hidden_layers", self.num_hidden_layers)
        about = {k: v for k, v in about.items() if k not in ("quant_method", "format")}
        return json.dumps(disguise(config, about), indent=2, sort_keys=True, allow_nan=False) + "\n"

    setattr(get_config_dict, NAME, True)
    base.get_config_dict, base.to_json_string = classmethod(get_config_dict), to_json_string


def install() -> None:
    """Register the plugins, now or when transformers and PEFT are imported."""
    when_imported("transformers.configuration_utils", _read_and_write)
    for theirs, ours in (
        ("transformers.quantizers.auto", "slr.model.quantizer"),
        ("peft.tuners.lora.model", "slr.model.lora"),
    ):
        when_imported(theirs, functools.partial(_import, ours))


def _import(name: str, _module: ModuleType) -> None:
    importlib.import_module(name)
