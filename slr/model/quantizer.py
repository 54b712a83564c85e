"""What transformers asks when it loads or saves a compressed model.

This module imports transformers; :func:`slr.model.hf.install` imports it when that is there.
"""

from __future__ import annotations

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from slr.model.format import NAME, describe, place, state_dict
from slr.model.integrity import check_files, check_filled, named_as_in

__all__ = ["SLRConfig", "SLRQuantizer"]


@register_quantization_config(NAME)
class SLRConfig(QuantizationConfigMixin):
    """What a compressed model says of itself.

    Args:
        layers: by name.
        about: the rest, as :func:`slr.model.format.notes` has it.
    """

    def __init__(self, layers: dict[str, dict] | None = None, **about) -> None:
        self.__dict__.update(about)
        self.quant_method = NAME  # type: ignore[assignment]
        self.layers = {} if layers is None else layers


@register_quantizer(NAME)
class SLRQuantizer(HfQuantizer):
    """Puts placeholders into an empty model, checks them when they are filled, describes them."""

    requires_calibration = True  # it is not transformers that compresses
    is_compileable = True  # or generate() would skip the compilation that it is asked for

    quantization_config: SLRConfig

    @property
    def is_trainable(self) -> bool:
        """Every tensor of a layer but its mask can be trained."""
        return True

    def is_serializable(self) -> bool:
        """By ``save_pretrained``."""
        return True

    def _process_model_before_weight_loading(
        self, model, dtype=None, checkpoint_files=None, **kwargs
    ):
        layers = named_as_in(model, self.quantization_config.layers)
        self.quantization_config.layers = layers
        place(model, layers, dtype or model.dtype)
        check_files(model, checkpoint_files or (), layers)

    def _process_model_after_weight_loading(self, model, **kwargs):
        check_filled(model)
        model.is_quantized = False  # or transformers would refuse .half(), .float() and training
        return model

    def get_state_dict_and_metadata(self, model):
        """What is stored; the description is renewed, for ranks may have grown since."""
        told = getattr(model.config, "quantization_config", None)
        if told is not None and not getattr(model, "_hf_peft_config_loaded", False):
            self.quantization_config.layers = describe(model, self.quantization_config.layers)
            model.config.quantization_config = self.quantization_config
        return state_dict(model), {}
