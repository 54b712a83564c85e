"""Tune a whole compressed model: what it keeps learns to predict what the dense model predicts.

Blocks were compressed, and perhaps tuned, one after another, each for its own outputs.  Here the
factors and norms of all blocks learn together, by Adam, to give every token the dense model's
distribution over the next; S stays as it is.  (Kept weights are so many that they learn a short
text by heart: with them the divergence on it falls faster, and on other text less.)  The dense
model may write more text (:mod:`slr.model.writing`).  Some windows are held out, and what serves
them best is kept.

Book: chapter 19.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from slr.model import distributed
from slr.model.arithmetic import compute_dtype, computing
from slr.model.blocks import decoder_blocks, in_mode
from slr.model.data import check_windows
from slr.model.heads import final_states, headed
from slr.model.tuning import HELD, descending, trainable
from slr.model.writing import written

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["distil"]

RATE = 3e-4  # of Adam: blockwise thrice as much is right, but here errors of all blocks add up


def distil(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    windows: Tensor,
    passes: int,
    *,
    rate: float = RATE,
    more: int = 0,
    progress: bool = False,
) -> list[float]:
    """Tune a compressed model in place, to the predictions of the dense one.

    Args:
        model: compressed, loaded; S, embeddings, head and dense layers stay as they are.
        teacher: the dense model, on the same device.
        windows: int64 (count, seqlen), two or more; the last eighth is held out.  Under
            ``torchrun`` each process takes its share.
        passes: over the others, one window a step.
        rate: of Adam; it falls to a tenth by a cosine.
        more: windows that the teacher writes, to learn from besides; see
            :mod:`slr.model.writing`.
        progress: show a bar on standard error.

    Returns:
        The mean Kullback-Leibler divergence from the teacher on the held-out windows, in nats a
        token, before and after each pass; what is left in the model is the best of them.

    Raises:
        ValueError, TypeError: as :func:`slr.model.data.check_windows`, or fewer than two windows.

    Cost: a pass is two forward passes of the model, for nothing of the size of S is learned, and
        one of the teacher.  Memory: five float32 copies of the factors, one and a half of S, and
        what a backward pass of one window needs.

    Source: knowledge distillation (Hinton et al. 2015) at temperature 1.
    """
    check_windows(windows, model.config)
    mine = distributed.mine(windows)
    count = distributed.least(len(mine))
    if count < 2:
        raise ValueError(f"there are {count} windows; tuning needs two or more, one to hold out")
    held = max(1, count // HELD)
    narrow = compute_dtype(model.dtype, model.device)
    with _ready(model, teacher, narrow), trainable(decoder_blocks(model), narrow) as parameters:
        optimiser = torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.95))
        text = _with_more(mine[: count - held], teacher, more)
        steps = passes * len(text)
        rates = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: descending(step, steps))
        trace = [_mean(model, teacher, mine[count - held : count], narrow)]
        best = [p.detach().clone() for p in parameters]
        generator = torch.Generator().manual_seed(0)
        hide = not progress or distributed.rank() > 0
        with tqdm(total=steps, desc="tune", unit="window", disable=hide) as bar:
            for _ in range(passes):
                for window in torch.randperm(len(text), generator=generator).tolist():
                    optimiser.zero_grad()
                    _divergence(model, teacher, text[window], narrow, learn=True)
                    distributed.average([p.grad for p in parameters if p.grad is not None])
                    optimiser.step()
                    rates.step()
                    bar.update()
                trace.append(_mean(model, teacher, mine[count - held : count], narrow))
                bar.set_postfix(divergence=f"{trace[-1]:.4f}")
                if trace[-1] == min(trace):
                    best = [p.detach().clone() for p in parameters]
        for parameter, value in zip(parameters, best, strict=True):
            parameter.data = value
    return trace


def _with_more(windows: Tensor, teacher: PreTrainedModel, more: int) -> Tensor:
    """The windows, and this process's share of those that the teacher writes."""
    share = -(-more // distributed.world())
    if not share:
        return windows
    return torch.cat([windows, written(teacher, windows, share, seed=distributed.rank())])


@contextmanager
def _ready(model: nn.Module, teacher: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """While open, neither drops out or asks for gradients but where it is tuned."""
    asked = {p: p.requires_grad for each in (model, teacher) for p in each.parameters()}
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        with in_mode(model, False), in_mode(teacher, False), computing(teacher, dtype):
            yield
    finally:
        for parameter, was in asked.items():
            parameter.requires_grad_(was)


def _divergence(
    model: Any, teacher: Any, ids: Tensor, narrow: torch.dtype, learn: bool = False
) -> Tensor:
    """KL(q ‖ p), q the teacher's and p the model's, the mean over a window (seqlen,).

    Logits live for a few tokens at a time: with `learn` the gradient of each part, p - q, goes to
    the final states at once, and from there, in the end, to the model.
    """
    device = next(model.parameters()).device
    ids = ids.to(device)[None]
    total = torch.zeros((), dtype=torch.float32, device=device)
    with torch.no_grad():
        states, kind = final_states(teacher, ids)
        teaches = headed(teacher, ids, states[0], kind)
    with (
        torch.set_grad_enabled(learn),
        torch.autocast(device.type, narrow, enabled=narrow.itemsize < 4),
    ):
        states, kind = final_states(model, ids)
        leaf = states.detach().requires_grad_(learn)
        for logits, wanted in zip(headed(model, ids, leaf[0], kind), teaches, strict=True):
            with torch.no_grad():
                log_p = logits.log_softmax(-1, dtype=torch.float32)
                log_q = wanted.log_softmax(-1, dtype=torch.float32)
                q = log_q.exp()
                total += log_q.sub_(log_p).mul_(q).sum()
                gradient = log_p.exp_().sub_(q).div_(ids.numel())
            if learn:
                logits.backward(gradient.to(logits.dtype))
    if learn:
        states.backward(leaf.grad)
    return total / ids.numel()


@torch.no_grad()
def _mean(model: nn.Module, teacher: nn.Module, windows: Tensor, narrow: torch.dtype) -> float:
    """The mean over some windows, of all processes."""
    values = [_divergence(model, teacher, ids, narrow) for ids in windows]
    mean = torch.stack(values).mean()
    distributed.average([mean])
    return float(mean)
