"""What arrives at a layer of a model.

Book: chapters 8 and 9.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["inputs"]


@torch.no_grad()
def inputs(model: nn.Module, name: str, windows: Tensor) -> Tensor:
    """The inputs of one layer on a text, as columns.

    Args:
        model: a decoder, without its head in ``model.model``.
        name: of the layer, or of another module that reads one tensor.
        windows: of tokens, int64 (count, seqlen).

    Returns:
        X (n, count × seqlen).

    >>> import slr
    >>> model = slr.load("tiny", dtype=torch.float32)
    >>> inputs(model, "model.layers.3.mlp.down_proj", torch.tensor([[3, 5, 8]])).shape
    torch.Size([704, 3])
    """
    found: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, arguments: found.append(arguments[0].flatten(0, 1))
    )
    try:
        for batch in windows.split(8):
            model.get_submodule("model")(batch)
    finally:
        handle.remove()
    return torch.cat(found).T
