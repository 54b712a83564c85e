"""SLiM-LoRA: the low-rank part of what pruning took away, weighed by how loud channels are.

With x = √diag(H) and Ŵ what pruning left,

    B A = [(W - Ŵ) diag(x)]_r diag(x)⁻¹,   S = P∘(W - B A)   once.

The last step makes the error zero on the mask, so that it is never above that of the one SVD.
Book: chapter 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from slr.matrix.assembly import assemble, in_units, posed, scales, working
from slr.matrix.metric import Metric
from slr.matrix.pruners import Statistic, Task
from slr.matrix.pruning import Pruned
from slr.matrix.repair import Repair
from slr.matrix.result import Refined, Step
from slr.matrix.rivals.exact import projected
from slr.matrix.statistics import NormStatistic

__all__ = ["SLiM"]


@dataclass(frozen=True)
class SLiM(Repair):
    """One SVD of the scaled loss of pruning, then S = P∘(W - B A) (Mozaffari et al. 2025).

    The paper prunes by Wanda, takes a rank of a tenth of the smaller side, and quantises first,
    which is left out here.  Where a channel is silent its code shifts all scales or scales
    nothing; here such a channel keeps its weights on the mask and has no part in B A.  SparseGPT's
    moved weights count in Ŵ, but the last step takes them back.

    Cost: 2 m n q + O(q³) FLOPs in float64, q = min(m, n).
    Source: Mozaffari, Yazdanbakhsh and Dehnavi 2025, SLiM-LoRA.
    """

    name: ClassVar[str] = "slim"
    needs: ClassVar[Statistic] = NormStatistic

    @torch.no_grad()
    def __call__(self, task: Task, pruned: Pruned) -> Refined:
        """S, B and A on the mask of the pruner."""
        metric, weight = posed(task.weight, pruned.mask, self._definite(), self._metric(task.known))
        return in_units(weight, metric, lambda W, M, unit: self._once(W, M, pruned, unit))

    def _once(self, weight: Tensor, metric: Metric, pruned: Pruned, unit: float) -> Refined:
        W = weight.to(working(weight))
        scale, back = scales(metric, W)
        rest = (W - pruned.weight.to(W) / unit) * scale
        B, A, error = projected(rest, rest, self._definite())
        steps, A = [Step(len(A), error)], A * back
        return assemble(
            weight, pruned.mask, (B, A), steps, metric, lambda rows: W[rows] - B[rows] @ A
        )
