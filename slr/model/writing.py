"""Text that a model writes itself, to tune its compressed form on: as much as one likes.

A short calibration text is soon learned by heart.  What the dense model writes has just the
distribution that the smaller one should have, whatever the dense one was trained on, and needs no
more text than a few words to begin with.

Book: chapter 19.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["written"]

BEGIN = 32  # tokens of a text, at most, that are gone on from
TOGETHER = 64  # windows that are written at a time, if their keys and values take less than
CACHE = 1 << 31  # bytes: reading the weights for each token is what a few windows wait for


@torch.no_grad()
def written(model: PreTrainedModel, windows: Tensor, count: int, *, seed: int = 0) -> Tensor:
    """Windows in which the model goes on from the beginnings of others.

    Each next token is drawn from the model's distribution as it is (temperature 1), and none of
    them ends the text.

    Args:
        model: in the mode and dtype to write in.
        windows: int64 (at least 1, seqlen); a text that is asked for more than once is begun from
            another place in it each time.
        count: how many to write, at least 1.
        seed: of the draws.

    Returns:
        int64 (count, seqlen), on the CPU.

    Cost: a forward pass of one token at a time, for `TOGETHER` windows at once, or for as many as
        have room in a cache of `CACHE` bytes.
    Source: as LLM-QAT (Liu et al. 2024), which begins from random tokens.
    """
    seqlen = windows.shape[1]
    begin = min(BEGIN, seqlen // 2)
    starts = []
    for number in range(count):
        turn, row = divmod(number, len(windows))
        at = turn * begin % max(1, seqlen - begin)
        starts.append(windows[row, at : at + begin])
    made = []
    with torch.random.fork_rng(_devices(model)):
        torch.manual_seed(seed)
        for ids in torch.stack(starts).to(model.device).split(_together(model, seqlen)):
            generate: Any = model.generate  # which nn.Module's types do not know
            made.append(
                generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0,
                    top_k=0, top_p=1.0, repetition_penalty=1.0, num_beams=1, use_cache=True,
                    min_new_tokens=seqlen - begin, max_new_tokens=seqlen - begin,
                ).cpu()
            )  # fmt: skip
    return torch.cat(made)


def _together(model: PreTrainedModel, seqlen: int) -> int:
    """How many windows to write at a time."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    each = 2 * config.num_hidden_layers * kept * width * model.dtype.itemsize * seqlen
    return max(1, min(TOGETHER, CACHE // each))


def _devices(model: PreTrainedModel) -> list[torch.device]:
    """Those whose generators have to be put back, besides the CPU's."""
    return [] if model.device.type == "cpu" else [model.device]
