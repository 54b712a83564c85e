"""Learning from the dense model while LoSparse prunes.

Book: chapter 12.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import kl_div

__all__ = ["distillation_loss"]


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    hidden: Sequence[tuple[Tensor, Tensor]] = (),
    hidden_weight: float = 1.0,
) -> Tensor:
    """T² KL(teacher ‖ student) + weight · Σ over layers of MSE(hidden states), to add to a loss.

    Args:
        student: logits (…, classes).
        teacher: logits of the same shape; no gradient goes there.
        temperature: T, of both softmaxes.
        mask: (…), True at positions that count; all when ``None``.
        hidden: pairs (student, teacher) of hidden states (…, width), one for each layer.
        hidden_weight: of the sum over layers.

    Returns:
        A scalar, float32 at least: means over the positions that count.

    Raises:
        ValueError: shapes differ, a temperature that is not positive, or no position counts.

    Cost: one pass over the logits.
    Source: Hinton et al. 2015; with hidden states as LoSparse's ``run_glue_distil.py``.

    >>> logits = torch.tensor([[2.0, 0.0]])
    >>> distillation_loss(logits, logits).item()
    0.0
    """
    for mine, his in ((student, teacher), *hidden):
        if mine.shape != his.shape:
            raise ValueError(
                f"student has shape {tuple(mine.shape)} and teacher {tuple(his.shape)}; "
                "they must be equal"
            )
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    at = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)
    at = at if mask is None else mask.bool()
    if at.shape != student.shape[:-1] or not bool(at.any()):
        raise ValueError(
            f"mask has shape {tuple(at.shape)} and {int(at.sum())} positions that count; "
            f"it must be {tuple(student.shape[:-1])}, one at least"
        )

    def wide(x: Tensor) -> Tensor:
        return x[at] if x.dtype == torch.float64 else x[at].float()

    targets = (wide(teacher.detach()) / temperature).log_softmax(-1)
    logs = (wide(student) / temperature).log_softmax(-1)
    loss = kl_div(logs, targets, reduction="batchmean", log_target=True) * temperature**2
    for mine, his in hidden:
        loss = loss + hidden_weight * (wide(mine) - wide(his.detach())).square().mean()
    return loss
