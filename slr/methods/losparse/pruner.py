"""The pruner of LoSparse: which rows of S stay, and when the others go.

Explained in :mod:`slr.methods.losparse`.  Book: chapter 14.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn

from slr.matrix.checks import check_count, check_finite
from slr.methods.losparse.linear import LoSparseLinear, account, layers

__all__ = ["Pruner", "cubic", "keep_rows"]


def cubic(step: int, steps: int, final: float, *, warmup: int = 0, cooldown: int = 0) -> float:
    """p_t = p_f + (1 - p_f) (1 - (t - t_i) / (T - t_f - t_i))³, 1 before and p_f after.

    Args:
        step: t, optimiser steps done.
        steps: T, of the whole training.
        final: p_f.
        warmup: t_i, steps before pruning starts.
        cooldown: t_f, last steps, at p_f.

    Raises:
        ValueError: no step is left for pruning, or `final` is not from 0 to 1.

    Cost: none.

    >>> [cubic(t, 10, 0.2, warmup=2, cooldown=4) for t in (2, 4, 6, 10)]
    [1.0, 0.30000000000000004, 0.2, 0.2]
    """
    if warmup < 0 or cooldown < 0 or warmup + cooldown >= steps:
        raise ValueError(
            f"warmup {warmup} + cooldown {cooldown} must be below steps, {steps}, and not negative"
        )
    if not 0 <= final <= 1:
        raise ValueError(f"final is {final}; it must be from 0 to 1")
    done = (step - warmup) / (steps - cooldown - warmup)
    return final + (1 - final) * (1 - min(max(done, 0.0), 1.0)) ** 3


def keep_rows(scores: Sequence[Tensor], widths: Sequence[int], budget: int) -> list[Tensor]:
    """The rows above one threshold over all matrices, as many as `budget` entries allow.

    Args:
        scores: (m_i,) of each matrix; a higher row stays.  Of equals the earlier stays.
        widths: entries in a row of each.
        budget: entries to keep, at most; one more row would exceed it.

    Returns:
        bool (m_i,) of each matrix, True = kept.

    Raises:
        ValueError: a score is not finite, or numbers of scores and widths differ.

    Cost: one sort of all rows.

    >>> keep_rows([torch.tensor([3.0, 1.0]), torch.tensor([2.0])], [4, 8], 12)
    [tensor([ True, False]), tensor([True])]
    """
    if len(scores) != len(widths) or not scores:
        raise ValueError(f"{len(scores)} scores and {len(widths)} widths; they must be as many")
    flat = torch.cat([s.float() for s in scores])
    check_finite("scores", flat)
    pairs = zip(scores, widths, strict=True)
    sizes = torch.cat([torch.full_like(s, w, dtype=torch.int64) for s, w in pairs])
    order = flat.sort(descending=True, stable=True).indices
    kept = torch.empty_like(flat, dtype=torch.bool)
    kept[order] = sizes[order].cumsum(0) <= budget
    return list(kept.split([len(s) for s in scores]))


class Pruner:
    """Prunes rows of S in any training loop: :meth:`observe`, the optimiser's step, :meth:`step`.

    Ī = β₁ Ī + (1 - β₁) |S ∘ ∇S|, and with `beta2` Ū = β₂ Ū + (1 - β₂) |I - Ī|; a row's score is
    the mean over its entries of Ī, or Ī ∘ Ū.  :func:`keep_rows` keeps the fraction p_t of all
    entries of S that :func:`cubic` allows; rows once pruned stay pruned, but with `regrow`.

    Args:
        model: converted; ``"losparse"`` or ``"itp"``.
        remaining: final share of the parameters of the replaced matrices, U, V and S counted.
        steps: optimiser steps of the whole training, T.
        warmup: first steps without pruning, t_i.
        cooldown: last steps at the final share, t_f.
        beta1: β₁.
        beta2: β₂; ``None`` leaves out the uncertainty.
        regrow: ``None``: pruned rows stay pruned.  A number, 10 in the authors' code (deltaT): as
            there, pruned rows are set to zero and go on being trained; every so many steps, and at
            every step of the cool-down, all rows compete anew, by the weights *after* the
            optimiser's step, and those that lose are set to zero.  What has grown since is in the
            forward pass; ``kept`` says that all rows are, until the last step fixes them.
        patience: steps in a row whose gradients may be other than finite.  A loss scaler makes
            such steps, and leaves the weights as they are; without one, such a step ruins them.

    Attributes:
        final: p_f, the share of S that this leaves.
        done: optimiser steps so far, t.
        skipped: steps whose gradients were not finite; they do not count in the sensitivity.

    Raises:
        ValueError: nothing to prune, `remaining` below what U and V take or above 1, a β out of
            range, or no step left for pruning.
        TypeError, ValueError: `regrow` is no number of steps.

    Cost: one number a row; with `beta2` two float32 numbers for each entry of S.

    >>> from slr.methods.losparse.linear import convert
    >>> net = nn.ModuleList([nn.Linear(8, 4)])
    >>> _ = convert(net, mode="itp", include=["0"])
    >>> pruner = Pruner(net, remaining=0.5, steps=1)
    >>> net[0](torch.ones(1, 8)).square().sum().backward()
    >>> pruner.observe()
    >>> pruner.step()  # with the optimiser's step before it
    >>> int(net[0].kept.sum())
    2
    """

    def __init__(
        self, model: nn.Module, *, remaining: float, steps: int, warmup: int = 0,
        cooldown: int = 0, beta1: float = 0.85, beta2: float | None = None,
        regrow: int | None = None, patience: int = 0,
    ) -> None:  # fmt: skip
        self.layers = {k: m for k, m in layers(model).items() if m.kept is not None}
        if not self.layers:
            raise ValueError("there are no rows to prune; the model is 'lowrank' or compact")
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            if beta is not None and not 0 <= beta < 1:
                raise ValueError(f"{name} is {beta}; it must be from 0 to below 1")
        if not 0 < remaining <= 1:
            raise ValueError(f"remaining is {remaining}; it must be above 0 and at most 1")
        if regrow is not None:
            check_count("regrow", regrow)
        cubic(0, steps, 1.0, warmup=warmup, cooldown=cooldown)
        whole = int(account(model).parameters)
        factors = sum(m.U.numel() + m.V.numel() for m in layers(model).values())
        budget = math.floor(Fraction(repr(float(remaining))) * whole) - factors
        if budget < 0:
            raise ValueError(
                f"remaining is {remaining}, but U and V alone take {factors / whole:.4f}; "
                "convert the model with a smaller rank_ratio"
            )
        self.entries = sum(m.S.numel() for m in self.layers.values())
        self.final = min(1.0, budget / self.entries)
        self.steps, self.warmup, self.cooldown = steps, warmup, cooldown
        self.beta1, self.beta2, self.regrow = beta1, beta2, regrow
        self.patience, self._waited, self._observed = patience, 0, False
        self.done, self.skipped = 0, 0
        self.importance: dict[str, Tensor] = {}
        self.uncertainty: dict[str, Tensor] = {}

    @property
    def fraction(self) -> float:
        """p_t of the steps done."""
        return cubic(self.done, self.steps, self.final, warmup=self.warmup, cooldown=self.cooldown)

    @torch.no_grad()
    def observe(self) -> None:
        """Take in the gradients: after ``backward()`` and before the optimiser's step.

        Raises:
            ValueError: no S has a gradient, or they are not finite for longer than `patience`:
                the loss diverges.  The step that would ruin the weights is not taken yet.
        """
        grads = {name: layer.S.grad for name, layer in self.layers.items()}
        sums = [g.sum(dtype=torch.float32) for g in grads.values() if g is not None]
        if not sums:
            raise ValueError("no S has a gradient; call observe() between backward() and step()")
        self._observed = True
        if not bool(torch.stack(sums).isfinite().all()):
            self.skipped, self._waited = self.skipped + 1, self._waited + 1
            if self._waited > self.patience:
                raise ValueError(
                    f"the loss diverges: gradients are not finite at step {self.done + 1} of "
                    f"{self.steps}.  Lower the learning rate; with a loss scaler, which skips such "
                    "steps, give patience=20"
                )
            return
        self._waited = 0
        if self.regrow is None:
            self._sense()

    def _sense(self) -> None:
        """Smooth the sensitivity of the weights as they are, by the gradients that they have."""
        for name, layer in self.layers.items():
            S, grad = layer.S, layer.S.grad
            # Wide first: in half precision the product of two small numbers is zero.
            now = (S.float() * (0 if grad is None else grad.float())).abs()
            if self.beta2 is None:  # the mean over a row commutes with this smoothing
                now = now.mean(1)
            old = self.importance.get(name, torch.zeros_like(now))
            self.importance[name] = mean = self.beta1 * old + (1 - self.beta1) * now
            if self.beta2 is not None:
                old = self.uncertainty.get(name, torch.zeros_like(now))
                spread = (now - mean).abs()
                self.uncertainty[name] = self.beta2 * old + (1 - self.beta2) * spread

    def scores(self) -> dict[str, Tensor]:
        """The score of each row by layer, (m,) float32."""
        if self.beta2 is None:
            return dict(self.importance)
        return {k: (v * self.uncertainty[k]).mean(1) for k, v in self.importance.items()}

    @torch.no_grad()
    def step(self) -> None:
        """Prune, and zero what was pruned: after the optimiser's step.

        Raises:
            ValueError: :meth:`observe` was not called since the last step.
        """
        if not self._observed:
            raise ValueError("observe() was not called since the last step()")
        self._observed = False
        self.done += 1
        if self.regrow is not None and self.done <= self.steps:
            if not self._waited:
                self._sense()
            return self._prune_anew(self.regrow)
        if self.fraction < 1 and self.importance:
            self._prune(round(self.fraction * self.entries))
        for layer in self.layers.values():  # momentum would move pruned rows away from zero
            layer.S.masked_fill_(~_kept(layer).unsqueeze(1), 0)

    def _prune(self, budget: int) -> None:
        rows = {name: _kept(layer) for name, layer in self.layers.items()}
        scores = {k: s.where(rows[k], -1) for k, s in self.scores().items()}  # below any kept row
        for name, stays in self._chosen(scores, budget).items():
            rows[name].logical_and_(stays)  # the module's own buffer

    def _prune_anew(self, every: int) -> None:
        """As the authors' code: set the rows of least score to zero, whatever was before."""
        resting = self.done >= self.steps - self.cooldown
        if self.fraction == 1 or not self.importance or not (resting or self.done % every == 0):
            return
        chosen = self._chosen(self.scores(), round(self.fraction * self.entries))
        for name, stays in chosen.items():
            self.layers[name].S.masked_fill_(~stays.unsqueeze(1), 0)
            if self.done == self.steps:
                _kept(self.layers[name]).copy_(stays)

    def _chosen(self, scores: dict[str, Tensor], budget: int) -> dict[str, Tensor]:
        widths = [self.layers[name].S.shape[1] for name in scores]
        chosen = keep_rows(list(scores.values()), widths, budget)
        return dict(zip(scores, chosen, strict=True))

    def state_dict(self) -> dict[str, Tensor]:
        """What to keep, beside the model, to go on later."""
        state = {"steps": torch.tensor([self.done, self.skipped])}
        state |= {f"importance.{k}": v for k, v in self.importance.items()}
        return state | {f"uncertainty.{k}": v for k, v in self.uncertainty.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from :meth:`state_dict`; the model is loaded apart.

        Raises:
            ValueError: of another model, or of a pruner with another uncertainty.
        """
        kinds = ["importance"] if self.beta2 is None else ["importance", "uncertainty"]
        expected = {f"{kind}.{name}" for kind in kinds for name in self.layers}
        different = (state.keys() - {"steps"}) ^ expected
        if different and state.keys() != {"steps"}:
            raise ValueError(f"this is the state of another pruner: {min(different)!r} differs")
        self.done, self.skipped = state["steps"].tolist()
        self._waited, self._observed = 0, False
        for kind in ("importance", "uncertainty"):
            values = {k.removeprefix(f"{kind}."): v for k, v in state.items() if k.startswith(kind)}
            found = {k: v.to(self.layers[k].S.device, copy=True) for k, v in values.items()}
            setattr(self, kind, found)


def _kept(layer: LoSparseLinear) -> Tensor:
    if layer.kept is None:
        raise ValueError("the model was made compact while it is being pruned; do that at the end")
    return layer.kept
