"""How far a compressed model is from the dense one, token by token, and how sure that is.

Perplexity and accuracy compare a model with a text; this compares two models with each other.

Book: chapter 13.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from slr.evaluate.likelihood import TOKENS_AT_ONCE
from slr.model.blocks import in_mode
from slr.model.data import check_windows
from slr.model.heads import logits, tokens_at_once

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Agreement", "agreement", "bootstrap"]


class Agreement(NamedTuple):
    """Means over the predictions of each window; all (windows,) float64 on the CPU."""

    kl: Tensor  # KL(reference ‖ model), nats per token; 0 where both are equal
    same_choice: Tensor  # share of positions where both find the same token most likely
    loss: Tensor  # negative log-likelihood of the text under the model, nats per token
    reference_loss: Tensor  # under the reference


@torch.inference_mode()
def agreement(model: PreTrainedModel, reference: PreTrainedModel, windows: Tensor) -> Agreement:
    """Compare the predictions of two models in every position of a window but the last.

    KL = Σ p ln(p/q), p the reference's distribution of the next token and q the model's.

    Args:
        model: compressed.
        reference: dense, with the same vocabulary.
        windows: int64 (count, seqlen) from :func:`slr.model.data.windows`.

    Returns:
        An :class:`Agreement`, window by window, so that intervals can be computed.

    Raises:
        ValueError: windows of another shape, an unknown token, or different vocabularies.

    Cost: one forward pass of each model.  Source: Kullback and Leibler 1951.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=1, **sizes))
    >>> same = agreement(model, model, torch.arange(20).view(2, 10))
    >>> print(same.kl, same.same_choice)
    tensor([0., 0.], dtype=torch.float64) tensor([1., 1.], dtype=torch.float64)
    """
    sizes = [m.config.get_text_config().vocab_size for m in (model, reference)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"the vocabularies have {sizes[0]} and {sizes[1]} tokens; not comparable")
    for each in (model, reference):
        check_windows(windows, each.config)
    parts = []
    with in_mode(model, False), in_mode(reference, False):
        for ids in windows.split(max(1, TOKENS_AT_ONCE // windows.shape[1])):
            values = torch.cat(list(_compared(model, reference, ids)), 1)
            parts.append(values.view(4, len(ids), -1).mean(2).cpu())
    return Agreement(*torch.cat(parts, 1))


def _compared(model: PreTrainedModel, reference: PreTrainedModel, ids: Tensor) -> Iterator[Tensor]:
    """The four values of each prediction, (4, tokens) float64, a few tokens at a time."""
    each = [logits(m, ids.to(m.device)) for m in (model, reference)]
    targets = ids[:, 1:].long().flatten().split(tokens_at_once(model))
    for *pair, target in zip(*each, targets, strict=True):
        log_q, log_p = (part.to(model.device).float().log_softmax(-1) for part in pair)
        at = target[:, None].to(log_q.device)
        values = (
            (log_p.exp() * (log_p - log_q)).sum(-1),
            log_p.argmax(-1) == log_q.argmax(-1),
            -log_q.gather(-1, at)[:, 0],
            -log_p.gather(-1, at)[:, 0],
        )
        yield torch.stack([value.double() for value in values])


def bootstrap(
    values: Tensor,
    statistic: Callable[[Tensor], Tensor] = lambda samples: samples.mean(1),
    *,
    resamples: int = 1000,
    level: float = 0.95,
    generator: torch.Generator | None = None,
) -> tuple[float, float]:
    """Percentile interval of a statistic; for two models, of their differences (*paired*).

    Args:
        values: (n,) or (n, …), one for each independent unit: a question, a window.
        statistic: of many samples at once, (resamples, n, …) to (resamples,); the mean.
        resamples: number of samples drawn.
        level: probability that the interval is to cover, between 0 and 1.
        generator: of the draws; a new one with seed 0 by default.

    Returns:
        (low, high), quantiles of the statistic over the resamples.

    Raises:
        ValueError: fewer than two values, or not finite; a bad level, resamples or statistic.

    Cost: resamples × n numbers.  Source: Efron 1979; Efron and Tibshirani 1993, chapter 13.

    >>> low, high = bootstrap(torch.tensor([0.0, 1.0] * 50))
    >>> print(f"{low:.1f} to {high:.1f}")
    0.4 to 0.6
    """
    if values.ndim < 1 or len(values) < 2 or not bool(values.isfinite().all()):
        raise ValueError(f"values {tuple(values.shape)} must be two or more finite numbers")
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level {level} must be between 0 and 1, resamples {resamples} positive")
    n, device = len(values), values.device
    generator = generator or torch.Generator(device).manual_seed(0)
    drawn = torch.randint(n, (resamples, n), generator=generator, device=device)
    found = statistic(values.double()[drawn])
    if found.shape != (resamples,):
        raise ValueError(f"the statistic has shape {tuple(found.shape)}, not ({resamples},)")
    low, high = found.quantile(found.new_tensor([(1 - level) / 2, (1 + level) / 2])).tolist()
    return low, high
