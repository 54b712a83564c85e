"""LoRA beside a compressed layer: PEFT trains it, and merges it into B and A.

    S x + B (A x) + s B' (A' x)  =  S x + [B, s B'] ([A; A'] x)

so a merge makes the rank larger and loses nothing, and is undone by cutting the rank again.
This module imports PEFT; :func:`slr.model.hf.install` imports it when that is there.
Book: how to use this book.
"""

from __future__ import annotations

import dataclasses
import warnings
from functools import wraps
from typing import Any

import torch
from peft.tuners import tuners_utils
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.model import LoraModel
from torch import Tensor, nn

from slr.layer.linear import SLRLinear
from slr.layer.rounded import RoundedLinear

__all__ = ["SLRLoraLinear"]

STARTS = (True, False, "gaussian", "orthogonal", "eva")  # those that leave the layer as it is


class SLRLoraLinear(Linear):
    """An :class:`~slr.layer.linear.SLRLinear` with LoRA adapters.

    Args:
        base_layer: the compressed layer.
        adapter_name, args, kwargs: as PEFT gives them.

    Raises:
        ValueError: a variant of LoRA, or a start, that changes the layer's matrix; it could not
            be merged into S + B A.
    """

    def __init__(self, base_layer: SLRLinear, adapter_name: str, *args, **kwargs) -> None:
        super().__init__(base_layer, adapter_name, *args, **kwargs)
        self.fan_in_fan_out = False
        self.before: list[tuple[int, Tensor | None]] = []  # rank and bias, of each merge

    def _get_in_out_features(self, module):
        return module.in_features, module.out_features

    def update_layer(self, *args, **kwargs) -> None:
        """Add an adapter."""
        _check(kwargs["config"])
        with warnings.catch_warnings():  # here a layer without a bias gets one when merged
            warnings.filterwarnings("ignore", message="`lora_bias=True` was passed")
            super().update_layer(*args, **kwargs)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Append adapters to B and A, the active ones by default; the rank grows by theirs.

        Raises:
            ValueError: with `safe_merge`, an adapter that is not finite; it is not merged.
        """
        for name in tuners_utils.check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            layer: Any = self.get_base_layer()
            left: Any = self.lora_B[name]
            right: Any = self.lora_A[name]
            scale, bias = self.scaling[name], layer.bias
            B = torch.cat([layer.B, (left.weight * scale).to(layer.B)], 1)
            A = torch.cat([layer.A, right.weight.to(layer.A)], 0)
            if left.bias is not None:
                bias = left.bias * scale + (0 if bias is None else bias)
            if safe_merge and not all(
                bool(torch.isfinite(t).all()) for t in (B, A, bias) if t is not None
            ):
                raise ValueError(f"the adapter {name!r} is not finite, and has not been merged")
            self.before.append((layer.rank, layer.bias))
            _set(layer, B, A, bias)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take all merged adapters out again: B, A and bias have the values they had, bit for bit.

        Factors that were codes stay the numbers which :meth:`merge` has made of them.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        layer: Any = self.get_base_layer()
        rank, bias = self.before[0]
        _set(layer, layer.B[:, :rank].clone(), layer.A[:rank].clone(), bias)
        self.before.clear()
        self.merged_adapters.clear()


def _set(layer: SLRLinear, B: Tensor, A: Tensor, bias: Tensor | None) -> None:
    """Give a layer other factors and another bias; they ask for gradients if B did."""
    if isinstance(layer, RoundedLinear):
        layer.free_factors_()
    wanted = layer.B.requires_grad
    layer.B, layer.A = nn.Parameter(B, wanted), nn.Parameter(A, wanted)
    if bias is not layer.bias:
        layer.bias = None if bias is None else nn.Parameter(bias.to(B), wanted)


def _check(config) -> None:
    """Raise ValueError for what would change the layer's matrix."""
    variants = [f.name for f in dataclasses.fields(config) if f.metadata.get("is_lora_variant")]
    wrong = [name for name in variants if getattr(config, name)]
    if config.init_lora_weights not in STARTS:
        wrong.append(f"init_lora_weights={config.init_lora_weights!r}")
    if wrong:
        raise ValueError(
            f"{wrong[0]} changes the matrix of a layer, which a compressed one has only as "
            "S + B A; use plain LoRA (rslora, dropout and lora_bias are fine)"
        )


def _install() -> None:
    """Make PEFT wrap compressed layers, also for ``target_modules="all-linear"``."""
    create, include = LoraModel._create_new_module, tuners_utils._maybe_include_all_linear_layers
    if hasattr(create, "__wrapped__"):
        return

    @wraps(create)
    def created(lora_config, *args, **kwargs):
        if (lora_config._custom_modules or {}).get(SLRLinear) in (None, Linear):
            kinds = dict.fromkeys((SLRLinear, RoundedLinear), SLRLoraLinear)
            lora_config._register_custom_module(kinds)
        return create(lora_config, *args, **kwargs)

    @wraps(include)
    def included(peft_config, model):
        every = str(getattr(peft_config, "target_modules", None)).lower() == "all-linear"
        peft_config = include(peft_config, model)
        if every:
            peft_config.target_modules |= {
                name
                for name, module in model.named_modules()
                if isinstance(module, SLRLinear) and not name.endswith(".base_layer")
            }
        return peft_config

    LoraModel._create_new_module = staticmethod(created)  # type: ignore[method-assign]
    tuners_utils._maybe_include_all_linear_layers = included


_install()
