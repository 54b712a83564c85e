"""Stage 2 of CAP: which candidates to keep, learned from losses alone.

Every candidate i has a cost c_i in parameters and a Bernoulli retention probability s_i.  A step
draws a mask, is told its loss, and moves against the score-function estimate of the gradient,

    s ← project(s - η (loss - δ)(mask - s) / (s(1 - s) + ε)),

with δ the mean of the last losses and the projection onto Σ c s = budget, 0 ≤ s ≤ 1.  For ε = 0
the estimate is unbiased: E[loss (mask - s) / (s(1 - s))] = ∂E[loss]/∂s; ε bounds it where s is
near 0 or 1.  Nothing here knows of matrices or models, see :mod:`slr.methods.cap`.

The public text leaves the metric of the projection and ε open.  Chosen: a candidate weighs as
many times as it has parameters, min Σ c (s' - s)², so that sharing a probability among
parameters is the same as projecting them one by one; and ε = 0.05.

Book: part IV.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from slr.matrix.checks import check_finite

__all__ = ["Policy", "choose", "learn", "project", "soften"]

DIVERGED = 3.0


def project(values: Tensor, costs: Tensor, budget: float) -> Tensor:
    """The nearest probabilities that spend a budget.

        argmin Σ c (s - v)²   subject to   Σ c s = budget,  0 ≤ s ≤ 1

    is s = clip(v - τ, 0, 1); Σ c s falls with τ, which bisection finds to the last bit.

    Args:
        values: v, (p,).
        costs: c, (p,), in parameters, above 0.
        budget: in parameters, from 0 to Σ c.

    Returns:
        s, (p,), float64.

    Raises:
        ValueError: non-finite values, a cost that is not positive, a budget out of range.

    Cost: some 60 passes over p values.
    Source: chosen, see above; the plain Euclidean projection is clip(v - τ c, 0, 1).

    >>> s = project(torch.tensor([0.9, 0.5, 0.5]), torch.tensor([1, 1, 2]), 2)
    >>> print(s)
    tensor([0.8000, 0.4000, 0.4000], dtype=torch.float64)
    """
    check_finite("values", values)
    v, c = values.double(), costs.double()
    if c.shape != v.shape or not bool((c > 0).all()):
        raise ValueError(f"costs must be positive, one for each of the {len(v)} values")
    if not 0 <= budget <= float(c.sum()):
        raise ValueError(f"budget is {budget}; it must be from 0 to {float(c.sum()):g}, all costs")
    low, high = float(v.min()) - 1, float(v.max())
    while low < (middle := (low + high) / 2) < high:
        if float((c * (v - middle).clamp(0, 1)).sum()) > budget:
            low = middle
        else:
            high = middle
    return (v - high).clamp(0, 1)


def soften(priority: Tensor, costs: Tensor, budget: float, width: float = 0.4) -> Tensor:
    """Probabilities to start from, of an order of the candidates.

    Taken in that order, candidates well within the budget get 1 and those well beyond it 0; in
    between, over a band that costs ``width · budget``, they fall in a straight line.

    Args:
        priority: (p,), larger is kept rather; of equals the former.
        costs: (p,).
        budget: in parameters.
        width: of the band, above 0.

    Returns:
        (p,) float64 with Σ c s = budget.

    Raises:
        ValueError: as :func:`project`, or a width that is not positive.

    Cost: a sort.  Source: chosen; the public text does not say where to start.

    >>> print(soften(torch.tensor([3.0, 2.0, 1.0]), torch.ones(3), 1.5, width=1.0))
    tensor([1.0000, 0.5000, 0.0000], dtype=torch.float64)
    """
    if not width > 0:
        raise ValueError(f"width is {width}; it must be above 0")
    c = costs.double()
    order = priority.argsort(descending=True, stable=True)
    place = torch.empty_like(c)
    place[order] = c[order].cumsum(0) - c[order] / 2
    return project(0.5 + (budget - place) / (width * max(budget, 1)), costs, budget)


def choose(priority: Tensor, costs: Tensor, units: Tensor, budget: int) -> Tensor:
    """How many parameters of each candidate to keep: the first of them within the budget.

    The one that does not fit is kept in part, in whole `units`, and what is left goes to the
    next, so that a budget is spent exactly where there are candidates with units of 1.

    Args:
        priority: (p,), larger first; of equals the former.
        costs: int64 (p,), multiples of `units`.
        units: int64 (p,), smallest part of each: 1 for entries, m + n for singular triplets.
        budget: in parameters, 0 or more.

    Returns:
        int64 (p,), from 0 to the cost, multiples of the unit, with a sum of at most `budget`.

    Raises:
        ValueError: a negative budget.

    Cost: a sort, and a loop over p.

    >>> choose(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([8, 8, 5]), torch.tensor([4, 4, 1]), 15)
    tensor([8, 4, 3])
    """
    if budget < 0:
        raise ValueError(f"budget is {budget}; it must be 0 or more")
    amounts, left = [0] * len(costs), int(budget)
    c, u = costs.tolist(), units.tolist()
    for i in priority.argsort(descending=True, stable=True).tolist():
        amounts[i] = min(c[i], left // u[i] * u[i])
        left -= amounts[i]
        if left == 0:
            break
    return torch.tensor(amounts, dtype=torch.int64)


class Policy:
    """Bernoulli retention probabilities that spend a budget in the mean.

    Args:
        costs: (p,), parameters of each candidate.
        budget: in parameters.
        start: (p,), probabilities before projection; all equal when ``None``.
        rate: η.
        window: losses that δ is the mean of.
        epsilon: ε.

    Attributes:
        probabilities: s, float64 (p,).
        losses: all that :meth:`step` was told.

    Raises:
        ValueError: an option that is not positive; as :func:`project`.

    Source: CAP (Zhou et al., ICLR 2026), stage 2; window 5 and η = 0.05 are the paper's.

    >>> policy = Policy(torch.ones(4), budget=2)
    >>> print(policy.probabilities)
    tensor([0.5000, 0.5000, 0.5000, 0.5000], dtype=torch.float64)
    """

    def __init__(
        self,
        costs: Tensor,
        budget: float,
        start: Tensor | None = None,
        *,
        rate: float = 0.05,
        window: int = 5,
        epsilon: float = 0.05,
    ) -> None:
        if not rate > 0 or window < 1 or not epsilon > 0:
            raise ValueError(
                f"rate {rate}, window {window} and epsilon {epsilon} must all be positive"
            )
        self.costs, self.budget = costs, budget
        self.rate, self.window, self.epsilon = rate, window, epsilon
        values = torch.full(costs.shape, 0.5) if start is None else start
        self.probabilities = project(values, costs, budget)
        self.losses: list[float] = []
        self._mask: Tensor | None = None

    def sample(self, generator: torch.Generator) -> Tensor:
        """Draw the mask that the next :meth:`step` is about: bool (p,)."""
        s = self.probabilities
        self._mask = torch.rand(s.shape, generator=generator, dtype=s.dtype) < s
        return self._mask

    @property
    def baseline(self) -> float | None:
        """δ: the mean of the last losses, before any ``None``."""
        last = self.losses[-self.window :]
        return sum(last) / len(last) if last else None

    def gradient(self, mask: Tensor, loss: float) -> Tensor:
        """The estimate (loss - δ)(mask - s) / (s(1 - s) + ε), (p,); 0 before there is a δ."""
        s, delta = self.probabilities, self.baseline
        advantage = 0.0 if delta is None else loss - delta
        return advantage * (mask.double() - s) / (s * (1 - s) + self.epsilon)

    def step(self, loss: float) -> None:
        """Learn from the loss of the mask drawn last.

        Raises:
            ValueError: no mask was drawn since the last step, or a loss that is not finite;
                nothing has changed then.
        """
        if self._mask is None:
            raise ValueError("step needs the loss of a mask; call sample first")
        if not math.isfinite(loss):
            raise ValueError(f"loss {len(self.losses)} is {loss}; all losses must be finite")
        moved = self.probabilities - self.rate * self.gradient(self._mask, loss)
        self.probabilities = project(moved, self.costs, self.budget)
        self.losses.append(float(loss))
        self._mask = None


def learn(
    policy: Policy,
    loss: Callable[[Tensor, int], float],
    steps: int,
    generator: torch.Generator,
) -> Policy:
    """Take `steps` steps; returns the policy, which is changed in place.

    Args:
        policy: to improve.
        loss: of a mask (bool (p,)) at a step's number, which may choose the data.
        steps: how many masks to try.
        generator: of the masks.

    Raises:
        ValueError: a negative number of steps; losses that diverge, that is, whose last quarter
            is more than `DIVERGED` standard deviations above the first; as :meth:`Policy.step`.

    Cost: one loss a step.

    >>> policy, generator = Policy(torch.ones(2), budget=1), torch.Generator().manual_seed(0)
    >>> found = learn(policy, lambda mask, step: 1.0 - float(mask[1]), 100, generator)
    >>> bool(found.probabilities[1] > 0.9)  # the loss is that of losing the second
    True
    """
    if steps < 0:
        raise ValueError(f"steps is {steps}; it must be 0 or more")
    for number in range(steps):
        policy.step(loss(policy.sample(generator), number))
    quarter = steps // 4
    if quarter > 2:
        first, last = (torch.tensor(policy.losses[-steps:])[part] for part in
                       (slice(quarter), slice(-quarter, None)))  # fmt: skip
        if last.mean() > first.mean() + DIVERGED * first.std():
            raise ValueError(
                f"the loss diverged, from {first.mean():.4g} to {last.mean():.4g} in {steps} "
                f"steps; rate {policy.rate} is too large"
            )
    return policy
