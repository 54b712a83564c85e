"""Perplexity of a causal language model, by the protocol of the pruning literature.

The text is tokenised once and cut into consecutive windows of `seqlen` tokens; in each, every
token but the first is predicted from those before it; perplexity is the exponential of the
mean negative log-likelihood, in nats, of all predictions.  Two numbers can be compared only
if tokenizer, text and seqlen are the same.

Book: chapter 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["perplexity"]

TOKENS_AT_ONCE = 2048  # bounds the logits, tokens × vocabulary in float32


def perplexity(
    model: PreTrainedModel | str | Path,
    text: str | Tensor,
    *,
    seqlen: int | None = None,
    limit: int | None = None,
    progress: str | None = None,
) -> float:
    """Perplexity of a model on a text.

    Args:
        model: a causal language model, or a folder for :func:`slr.load` (read in float32).
        text: the text itself (then `model` must be a folder, which has the tokenizer), or token
            windows (count, seqlen) from :func:`slr.data.windows`.
        seqlen: tokens in a window, for a text; by default the model's longest context, 2048 at
            most.
        limit: at most this many windows; ``None`` takes all.
        progress: label of a progress bar on standard error, none if ``None``.

    Returns:
        exp(mean negative log-likelihood), the loss in float32 and the sum in float64.

    Raises:
        ValueError: the text is shorter than one window, or a token is not in the vocabulary.
        TypeError: a text was given with a model that has no tokenizer.

    Cost: one forward pass; about 2 FLOPs a parameter and token.
    Source: protocol of GPTQ (Frantar et al. 2023), used by SparseGPT and Wanda.
    """
    from slr import checkpoint, data

    if isinstance(model, str | Path):
        folder = checkpoint.resolve(model)
        if isinstance(text, str):
            tokenizer = checkpoint.load_tokenizer(folder)
            text = data.windows(text, tokenizer, seqlen or checkpoint.context(folder), limit)
        model = checkpoint.load(folder, dtype=torch.float32)
    if not isinstance(text, Tensor):
        raise TypeError("text is a str, but only a folder has a tokenizer; use slr.data.windows")
    if text.ndim != 2 or text.shape[1] < 2:
        raise ValueError(f"windows have shape {tuple(text.shape)}; they must be (count, seqlen)")
    vocabulary = model.config.get_text_config().vocab_size
    if int(text.max()) >= vocabulary:
        raise ValueError(
            f"the windows hold token {int(text.max())}, but the model has {vocabulary}; "
            "was the text tokenised for another model?"
        )
    text = text if limit is None else text[:limit]

    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    rows = max(1, TOKENS_AT_ONCE // text.shape[1])
    bar = tqdm(text.split(rows), desc=progress, disable=progress is None, unit="batch")
    with torch.inference_mode():
        for ids in bar:
            ids = ids.to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
            )
            total += loss.double().cpu()
    model.train(was_training)
    count = text.shape[0] * (text.shape[1] - 1)
    return float(torch.exp(total / count))
