"""A short training loop for what :mod:`slr.methods.losparse` converts, and the dense model alike.

For trainings of minutes, without files; longer ones take ``transformers.Trainer`` and
:func:`slr.methods.losparse.callback`.  Book: chapter 14.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from slr.methods.losparse.distil import Distillation
from slr.methods.losparse.linear import convert, layers
from slr.methods.losparse.pruner import Pruner
from slr.model.blocks import in_mode

__all__ = ["fit", "teach", "train"]

DIVERGED = 10  # times the first loss
LOGITS = Distillation(output=1.0, hidden=0.0, temperature=1.0)


def fit(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    *,
    lr: float,
    pruner: Pruner | None = None,
    teacher: nn.Module | None = None,
    distillation: Distillation = LOGITS,
    dtype: torch.dtype | None = None,
) -> list[float]:
    """Train on each batch once, and prune.

    AdamW without decay; the rate rises over the first tenth of the steps and falls as a cosine
    to nothing; gradients are clipped at norm 1.

    Args:
        model: called as ``model(**batch)``, must give a ``loss``; changed in place.
        batches: as many as there are steps.
        lr: peak learning rate.
        pruner: of the model; its `steps` are the number of batches or fewer.
        teacher: a model that is learned from, too.
        distillation: what of it; by default its logits.
        dtype: of autocast; ``None`` computes in the model's dtype.

    Returns:
        The loss of each step.

    Raises:
        ValueError: a pruner of more steps than batches, no batch, or a loss that diverges: not
            finite, or ten times the first.  The weights, and which rows are kept, are then what
            they were before.

    Cost: the training, and a copy of the model to come back to.

    >>> from types import SimpleNamespace
    >>> class Line(nn.Linear):
    ...     def forward(self, x):
    ...         return SimpleNamespace(loss=super().forward(x).square().mean())
    >>> losses = fit(Line(4, 4), 20 * [{"x": torch.eye(4)}], lr=0.05)
    >>> losses[-1] < losses[0]
    True
    """
    if not batches:
        raise ValueError("batches is empty; give one at least")
    if pruner is not None and pruner.steps > len(batches):
        raise ValueError(
            f"there are {len(batches)} batches, fewer than the pruner's {pruner.steps} steps; it "
            "would not reach its final share"
        )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    done = None if pruner is None else pruner.state_dict()
    losses: list[float] = []
    try:
        with in_mode(model, True):
            for loss in _steps(model, batches, lr, pruner, teacher, distillation, dtype):
                losses.append(loss)
    except (ValueError, RuntimeError) as error:
        model.load_state_dict(before)
        if pruner is not None and done is not None:
            pruner.load_state_dict(done)
        if isinstance(error, RuntimeError) and "non-finite" not in str(error):
            raise
        raise ValueError(f"{error}.  The model is as it was; try a lr below {lr}") from None
    return losses


def _steps(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], lr: float, pruner: Pruner | None,
    teacher: nn.Module | None, distillation: Distillation, dtype: torch.dtype | None,
) -> Iterator[float]:  # fmt: skip
    """Train; the loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    device, first = next(model.parameters()).device, math.inf
    for step, batch in enumerate(batches, 1):
        share = step / len(batches)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(10 * share, (1 + math.cos(math.pi * share)) / 2)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            if teacher is None:
                loss = model(**batch).loss
            else:
                loss, _ = distillation.learn(model, teacher, batch)
        value = loss.item()
        first = value if step == 1 else first
        if not value <= DIVERGED * abs(first):
            raise ValueError(f"the loss diverges: {first:.3g} at first, {value:.3g} at step {step}")
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        if pruner is not None:
            pruner.observe()
        optimizer.step()
        if pruner is not None:
            pruner.step()
        optimizer.zero_grad()
        yield value


def train(
    model: nn.Module,
    windows: Tensor,
    *,
    remaining: float,
    mode: str = "losparse",
    share: float = 0.5,
    batch: int = 4,
    lr: float = 5e-4,
    warmup: float = 0.05,
    cooldown: float = 0.65,
    beta2: float | None = None,
    regrow: int | None = None,
    skip: Sequence[str] = (),
    teacher: nn.Module | None = None,
    dtype: torch.dtype | None = None,
) -> list[float]:
    """All of LoSparse, or of a baseline, on a causal language model: convert, fit, make compact.

    Args:
        model: of ``nn.Linear`` layers in blocks; changed in place.
        windows: token ids (windows, length); each is seen once.
        remaining: share of the parameters of the replaced matrices to end with.
        mode: one of :data:`~slr.methods.losparse.MODES`.
        share: of these parameters, what goes to U and V; the rest are rows of S.  For
            ``"losparse"`` only.
        batch: windows in a step.
        lr, teacher, dtype: as for :func:`fit`.
        warmup, cooldown: shares of the steps, before pruning begins and after it ends.  In a short
            training it is better to prune early, and to have time to settle.
        beta2, regrow: as for :class:`~slr.methods.losparse.Pruner`.
        skip: names of layers that stay dense, as for :func:`~slr.methods.losparse.convert`.

    Returns:
        The loss of each step.

    Raises:
        ValueError: what :func:`~slr.methods.losparse.convert`, the pruner and :func:`fit` say;
            the model is then as it was before.

    Cost: the training.  Example: chapter 14.
    """
    dense = {k: m for k, m in model.named_modules() if type(m) is nn.Linear}
    part = {"losparse": share, "itp": 0.0}.get(mode, 1.0)
    names = convert(model, mode=mode, rank_ratio=part * remaining, skip=skip)
    try:
        pruner, steps = None, -(-len(windows) // batch)
        if mode != "lowrank":
            pruner = Pruner(
                model, remaining=remaining, steps=steps, beta2=beta2, regrow=regrow,
                warmup=int(warmup * steps), cooldown=int(cooldown * steps),
            )  # fmt: skip
        losses = fit(
            model, _batches(windows, batch), lr=lr, pruner=pruner, teacher=teacher, dtype=dtype
        )
    except ValueError:
        for name in names:
            model.set_submodule(name, dense[name])
        raise
    for layer in layers(model).values():
        layer.compact_()
    return losses


def teach(
    student: nn.Module,
    teacher: nn.Module,
    windows: Tensor,
    *,
    distillation: Distillation | None = None,
    batch: int = 4,
    lr: float = 5e-4,
    dtype: torch.dtype | None = None,
) -> list[float]:
    """Phase two on a causal language model: a pruned student learns from a dense teacher.

    Phase one is :func:`train`, whose result may come from a file
    (:func:`~slr.methods.losparse.load`).  Nothing is pruned any more; S has its kept rows only.

    Args:
        student: compact; changed in place.
        teacher: dense, or any model with hidden states of the same shapes; left as it is.
        windows: token ids (windows, length); each is seen once.
        distillation: what to learn; the published weights by default.
        batch: windows in a step.
        lr, dtype: as for :func:`fit`.

    Returns:
        The loss of each step.

    Raises:
        ValueError: a student that is not converted or not compact, a teacher that does not fit it,
            or a diverging loss; the student is then as it was.

    Cost: the training, with a forward pass of the teacher in each step.
    Source: LoSparse's ``run_glue_distil.py``.  Example: ``tests/test_losparse_fit.py``.
    """
    for name, layer in layers(student).items():
        if layer.kept is not None:
            raise ValueError(f"{name} still has its pruned rows; call losparse.compact(student)")
    with in_mode(teacher, False):
        return fit(
            student, _batches(windows, batch), lr=lr, dtype=dtype, teacher=teacher,
            distillation=distillation or Distillation(),
        )  # fmt: skip


def _batches(windows: Tensor, size: int) -> list[dict[str, Any]]:
    return [{"input_ids": ids, "labels": ids, "use_cache": False} for ids in windows.split(size)]
