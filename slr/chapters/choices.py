"""Score multiple-choice questions by the log-likelihood of each choice, as lm-eval does.

A model that was never taught to answer can still be asked: which of the choices does it find
most likely after the question?  Nothing is generated.

Book: chapter 13.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slr.model.blocks import in_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["log_likelihoods"]


@torch.inference_mode()
def log_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Mapping],
    *,
    batch_size: int = 16,
) -> Tensor:
    """Log-likelihood of each choice after its context and a space.

    ln p(choice | context), summed over the tokens of the choice.

    Args:
        model: a causal language model with a cache.
        tokenizer: of the model.
        questions: with ``"context"`` and ``"choices"``, the same number of choices in each.
        batch_size: questions at once.

    Returns:
        (questions, choices) float64 on the CPU, in nats.

    Raises:
        ValueError: no questions, or different numbers of choices.

    Cost: one forward pass over each context and each choice; a context is not repeated.
    Source: Gao et al., lm-evaluation-harness (``multiple_choice``).

    >>> import slr
    >>> question = {"context": "def f(self): return", "choices": ["self", "banana"]}
    >>> model = slr.load("tiny", dtype=torch.float32)
    >>> log_likelihoods(model, slr.load_tokenizer("tiny"), [question]).argmax().item()
    0
    """
    counts = sorted({len(question["choices"]) for question in questions})
    if len(counts) != 1:
        raise ValueError(f"numbers of choices are {counts}; there must be one, for all questions")
    rows = []
    for question in questions:
        context = tokenizer(question["context"])["input_ids"]
        whole = (tokenizer(f"{question['context']} {c}")["input_ids"] for c in question["choices"])
        rows.append((context, [ids[len(context) :] for ids in whole]))
    parts = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    with in_mode(model, False):
        return torch.cat([_scores(model, part) for part in parts])


def _scores(model: PreTrainedModel, rows: list[tuple[list[int], list[list[int]]]]) -> Tensor:
    """Contexts, padded on the left, fill the cache; choices, padded on the right, follow."""
    count, longest = len(rows[0][1]), max(len(context) for context, _ in rows)
    lengths = torch.tensor([len(context) for context, _ in rows])
    contexts = torch.tensor([[0] * (longest - len(c)) + c for c, _ in rows])
    seen = (torch.arange(longest) >= (longest - lengths)[:, None]).long()
    tails = [tail for _, choices in rows for tail in choices]
    width = max(map(len, tails))
    ids = torch.tensor([tail + [0] * (width - len(tail)) for tail in tails]).to(model.device)
    real = torch.arange(width) < torch.tensor([len(tail) for tail in tails])[:, None]

    def run(ids: Tensor, mask: Tensor, at: Tensor, **more):
        put = {"input_ids": ids, "attention_mask": mask, "position_ids": at}
        return model(**{k: v.to(model.device) for k, v in put.items()}, use_cache=True, **more)

    found = run(contexts, seen, (seen.cumsum(1) - 1).clamp(min=0), logits_to_keep=1)
    logits = found.logits.repeat_interleave(count, 0)
    if width > 1:
        cache = found.past_key_values
        cache.batch_repeat_interleave(count)
        mask = torch.cat([seen.repeat_interleave(count, 0), real[:, :-1].long()], 1)
        at = lengths.repeat_interleave(count)[:, None] + torch.arange(width - 1)
        more = run(ids[:, :-1], mask, at, past_key_values=cache)
        logits = torch.cat([logits, more.logits], 1)
    found = logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    found = found.double().masked_fill(~real.to(found.device), 0.0)
    return found.sum(1).view(len(rows), count).cpu()
