"""Logits of a few tokens at a time: those of a window and a large vocabulary would take gigabytes.

The decoder runs once; then the model's own forward pass is called with some of its outputs in the
decoder's place, so that whatever a family does to its logits (a cap, a scale) is done.

Book: chapter 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from slr.model.blocks import decoder_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LOGITS_AT_ONCE", "final_states", "headed", "instead", "logits", "tokens_at_once"]

LOGITS_AT_ONCE = 1 << 23  # 32 MiB in float32; a few tensors of this size live at a time


@contextmanager
def instead(modules: nn.ModuleList | list, forward: Callable[[int], Callable]) -> Iterator[None]:
    """While open, ``forward(i)`` runs in place of module i."""
    before = [module.__dict__.get("forward") for module in modules]
    try:
        for i, module in enumerate(modules):
            module.forward = forward(i)
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            module.__dict__.pop("forward", None)
            if own is not None:
                module.forward = own


def tokens_at_once(model: PreTrainedModel) -> int:
    """Tokens whose logits are about :data:`LOGITS_AT_ONCE` numbers."""
    return max(1, LOGITS_AT_ONCE // model.config.get_text_config().vocab_size)


def logits(model: PreTrainedModel, ids: Tensor, outputs: Tensor | None = None) -> Iterator[Tensor]:
    """Logits in every position but the last of each window, :func:`tokens_at_once` at a time.

    Args:
        model: a causal language model.
        ids: int64 (rows, seqlen), on its device.
        outputs: of the last decoder block for `ids`, (rows, seqlen, hidden), if they are known;
            then the blocks themselves need no weights.

    Yields:
        (tokens, vocabulary), as ``model(ids).logits[:, :-1].flatten(0, 1)`` would be split.

    Cost: one forward pass, or final norm and head.  A model without ``get_decoder`` gives all
        logits at once.
    """
    if not hasattr(model, "get_decoder"):
        found = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        yield from found.split(tokens_at_once(model))
        return

    def known(i: int) -> Callable:
        return lambda states, *args, **kwargs: outputs if i == 0 else states

    with instead(decoder_blocks(model) if outputs is not None else [], known):
        states, kind = final_states(model, ids)
    yield from headed(model, ids, states[:, :-1].flatten(0, 1), kind)


def final_states(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, type]:
    """What the decoder hands to the head, (rows, seqlen, hidden), and how it wraps it.

    Args:
        model: with ``get_decoder``.
        ids: int64 (rows, seqlen), on its device.
    """
    decoder: Any = model.get_decoder()
    found = decoder(input_ids=ids, use_cache=False)
    return found.last_hidden_state, type(found)


def headed(model: PreTrainedModel, ids: Tensor, states: Tensor, kind: type) -> Iterator[Tensor]:
    """Logits (tokens, vocabulary) of final states (all tokens, hidden), a few at a time.

    Args:
        model: with ``get_decoder``.
        ids: any token ids, on its device.
        states, kind: as :func:`final_states` gives them, flattened.
    """
    decoder: Any = model.get_decoder()
    for part in states.split(tokens_at_once(model)):
        with instead([decoder], _giving(kind(last_hidden_state=part[None]))):
            made = model(input_ids=ids[:1, :1], use_cache=False).logits[0]
        yield made  # the decoder is itself again: whoever reads may run it


def _giving(value: Any) -> Callable[[int], Callable]:
    return lambda i: lambda *args, **kwargs: value
