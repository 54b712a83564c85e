"""Learning from the dense model: while LoSparse prunes, or in a second phase after it.

Book: chapter 14.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

__all__ = ["Distillation", "distillation_loss"]


@dataclass(frozen=True)
class Distillation:
    """What to learn from a teacher, beside the task.

    By default as ``train_glue_distil.sh`` of LoSparse's code: hidden states only.

    Args:
        output: weight of :func:`distillation_loss` of the logits.
        hidden: weight of the sum over hidden states (the embeddings' and every block's) of the
            mean squared difference.
        temperature: of the logits.

    Raises:
        ValueError: a weight that is negative, both 0, or a temperature that is not above 0.

    >>> Distillation(hidden=0)
    Traceback (most recent call last):
    ValueError: output and hidden are both 0; there is nothing to learn from the teacher
    """

    output: float = 0.0
    hidden: float = 15.0
    temperature: float = 2.0

    def __post_init__(self) -> None:
        for name in ("output", "hidden"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0")
        if not self.output and not self.hidden:
            raise ValueError(
                "output and hidden are both 0; there is nothing to learn from the teacher"
            )

    def learn(
        self, student: nn.Module, teacher: nn.Module, batch: Mapping[str, Any]
    ) -> tuple[Tensor, Any]:
        """The loss of a batch, and what the student put out.

        Args:
            student, teacher: called as ``model(**batch)``; both give ``logits``, the student its
                ``loss``, and with `hidden` they give ``hidden_states`` when asked for them.
            batch: with labels; every position counts, padding too, as in the published code.

        Raises:
            ValueError: hidden states that differ in number or shape, or logits that differ.

        Cost: a forward pass of both.
        """
        asked = {**batch, "output_hidden_states": True} if self.hidden else batch
        mine = student(**asked)
        with torch.no_grad():
            theirs = teacher(**asked)
        loss = mine.loss
        if self.output:
            found = distillation_loss(mine.logits, theirs.logits, temperature=self.temperature)
            loss = loss + self.output * found
        if self.hidden:
            ours, right = mine.hidden_states, theirs.hidden_states
            if len(ours) != len(right):
                raise ValueError(
                    f"student has {len(ours)} hidden states and teacher {len(right)}; they must "
                    "be as many"
                )
            for x, y in zip(ours, right, strict=True):
                _check_alike(x, y)
                loss = loss + self.hidden * (x.float() - y.float()).square().mean()
        return loss, mine


def _check_alike(student: Tensor, teacher: Tensor) -> None:
    """Raise ValueError unless both have one shape."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"student has shape {tuple(student.shape)} and teacher {tuple(teacher.shape)}; "
            "they must be equal"
        )


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
        _check_alike(mine, his)
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
