"""HASSLE-free: SparseGPT on what the low rank leaves, the best low rank for what SparseGPT leaves.

Both steps look at the layer's outputs, by H = X Xᵀ.  From B A = 0,

    S ← SparseGPT(W - B A)                             mask and weights anew
    B A ← argmin over rank r of ‖(W - S - B A) H^½‖    exactly

The first S is SparseGPT of W, that is, what ``prune="sparsegpt"`` leaves.  SparseGPT is greedy, so
that the error falls on the whole but not in every iteration.  Book: chapter 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from slr.matrix.assembly import assemble, in_units, posed, working
from slr.matrix.metric import Gram, Metric, definite
from slr.matrix.patterns import Pattern
from slr.matrix.pruners import Statistic, Task
from slr.matrix.pruning import Pruned, inverse_factor, sweep
from slr.matrix.repair import Iterated
from slr.matrix.result import Refined, Step, settled
from slr.matrix.rivals.exact import projected
from slr.matrix.statistics import GramStatistic

__all__ = ["HASSLEFree"]


@dataclass(frozen=True)
class HASSLEFree(Iterated):
    """SparseGPT and the exact low-rank step in turns (Makni et al. 2025).

    The paper's own is with ``prune="sparsegpt"``; another pruner is another start.  Its code runs
    80 iterations and takes the low-rank step by a randomised SVD.  H is damped by a hundredth of
    its mean diagonal, in both steps, as SparseGPT does.

    Args:
        iterations: of both steps; that of the pruner counts as the first.

    Cost: an iteration 4 m n² + 2 m n q + O(q³) FLOPs, q = min(m, n); 2 n³ once.
    Source: Makni et al. 2025, HASSLE-free with SparseGPT.
    """

    name: ClassVar[str] = "hassle"
    needs: ClassVar[Statistic] = GramStatistic
    changes_mask: ClassVar[bool] = True
    iterations: int = 20

    @torch.no_grad()
    def __call__(self, task: Task, pruned: Pruned) -> Refined:
        """S, B, A and the mask, from what pruning left."""
        metric, weight = posed(task.weight, pruned.mask, self._definite(), self._metric(task.known))
        return in_units(
            weight, metric, lambda W, M, unit: self._alternate(W, M, task.pattern, pruned, unit)
        )

    def _alternate(
        self, weight: Tensor, metric: Metric, pattern: Pattern, pruned: Pruned, unit: float
    ) -> Refined:
        assert isinstance(metric, Gram)
        W = weight.to(working(weight))
        loud = float(metric.matrix.diagonal().mean())  # the steps are the same in any unit of H
        gram = metric.matrix.to(W) / loud
        root = definite(Gram(gram, metric.damping).damped(W))[1]
        factor = inverse_factor(W, gram)
        mask, S = pruned.mask, pruned.weight.to(W) / unit
        B, A = W[:, :0], W[:0]
        steps: list[Step] = []
        for turn in range(self.iterations):
            if turn:
                mask, S = sweep(torch.addmm(W, B, A, alpha=-1), pattern, factor)
            rest = W - S
            B, A, error = projected(rest, rest @ root, self._definite())
            steps.append(Step(len(A), error * loud**0.5))
            if settled(steps, self.tolerance):
                break
        return assemble(weight, mask, (B, A), steps, metric, lambda rows: S[rows])
