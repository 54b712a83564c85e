"""Where the blocks of each family keep what a scale can move: who makes a channel, who reads it.

A place is one maker and its readers, by their names in the block; what moves between them is told
in :mod:`slr.methods.induction.scales`.  Book: chapter 16.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

__all__ = ["MODELS", "Place", "dense_linears", "places", "spread"]


class Place(NamedTuple):
    """The layer that makes some channels, and the linears that read them."""

    maker: str
    readers: tuple[str, ...]


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LLAMA = {
    "attention": Place("input_layernorm", QKV),
    "value": Place("self_attn.v_proj", ("self_attn.o_proj",)),
    "mlp": Place("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    "hidden": Place("mlp.up_proj", ("mlp.down_proj",)),
}
OPT = {
    "attention": Place("self_attn_layer_norm", QKV),
    "value": Place("self_attn.v_proj", ("self_attn.out_proj",)),
    "mlp": Place("final_layer_norm", ("fc1",)),
    "hidden": Place("fc1", ("fc2",)),
}
MODELS = {"llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA, "opt": OPT}
# OPT comes in kinds; in the others a residual reads the norm too, or a factor does not pass.
EXACT = {
    "do_layer_norm_before": True,
    "layer_norm_elementwise_affine": True,
    "activation_function": "relu",
}


def places(block: nn.Module) -> dict[str, Place]:
    """The places of a block by the name of their scale.

    Args:
        block: decoder block; its weights are not looked at.

    Raises:
        ValueError: no block of one of :data:`MODELS`, or an OPT block in which nothing may move.

    Cost: none.

    >>> import slr
    >>> places(slr.load("tiny").model.layers[0])["hidden"]
    Place(maker='mlp.up_proj', readers=('mlp.down_proj',))
    """
    config: Any = getattr(getattr(block, "self_attn", None), "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in MODELS:
        raise ValueError(
            f"block is a {type(block).__name__} of model type {kind!r}; scales can be moved "
            f"exactly in dense blocks of {', '.join(MODELS)}"
        )
    for option, right in EXACT.items() if kind == "opt" else ():
        if getattr(config, option) != right:
            raise ValueError(
                f"block is of an OPT with {option}={getattr(config, option)!r}; scales can be "
                f"moved exactly with {option}={right!r}"
            )
    return MODELS[kind]


def dense_linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a block, each of which reads one place.

    Raises:
        ValueError: as :func:`places`, or a linear that is compressed already.

    Cost: none.

    >>> import slr
    >>> len(dense_linears(slr.load("tiny").model.layers[0]))
    7
    """
    found = {}
    for place in places(block).values():
        for name in place.readers:
            layer = block.get_submodule(name)
            if not isinstance(layer, nn.Linear):
                kind = type(layer).__name__
                raise ValueError(f"{name} is a {kind}; induction needs a dense block")
            found[name] = layer
    return found


def spread(block: nn.Module, channels: Tensor) -> Tensor:
    """Values of the kv heads' channels (kv heads · d,) for those of the query heads."""
    attention: Any = block.self_attn
    mine = channels.view(-1, 1, attention.head_dim)
    return mine.expand(-1, getattr(attention, "num_key_value_groups", 1), -1).reshape(-1)
