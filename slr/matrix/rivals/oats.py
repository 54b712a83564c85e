"""OATS: outlier-aware sparse + low rank, by alternating two projections of scaled weights.

With D = √diag(H), how loud each input channel is, W̃ = W D and S = 0 to begin with, repeat

    L ← [W̃ - S]_r                      a truncated SVD
    S ← the largest entries of W̃ - L   a hard threshold

and undo the scaling.  Either step is the exact minimiser in one unknown, so that the error
‖(W - S - B A) D‖ never rises.  Without the low rank this is Wanda.  Book: chapter 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from slr.matrix.assembly import assemble, in_units, posed, scales, working
from slr.matrix.metric import Metric
from slr.matrix.patterns import Pattern
from slr.matrix.pruners import Statistic, Task
from slr.matrix.pruning import Pruned
from slr.matrix.repair import Iterated
from slr.matrix.result import Refined, Step, settled
from slr.matrix.rivals.exact import projected
from slr.matrix.statistics import NormStatistic

__all__ = ["OATS"]


@dataclass(frozen=True)
class OATS(Iterated):
    """Alternating truncated SVD and hard threshold of the scaled weights (Zhang and Papyan 2025).

    Pattern and rank are those asked for, as for every other repair, so that results have equal
    bytes.  The paper derives them from a compression ρ and a share κ of the low-rank part: rank
    ⌊κ (1 - ρ) m n / (m + n)⌋ and density (1 - κ)(1 - ρ), by row; with N:M the density is that of
    the pattern, N/M, and stands for (1 - κ)(1 - ρ) in the rank.

    Channels that never carried a signal have no scale to divide by: they keep their weights where
    the mask has them, and no part in B A.

    Args:
        iterations: of the alternation, 80 in the paper.

    Cost: an iteration 2 m n q + O(q³) FLOPs in float64, q = min(m, n), and a few passes.
    Source: Zhang and Papyan 2025, algorithm 2.
    """

    name: ClassVar[str] = "oats"
    needs: ClassVar[Statistic] = NormStatistic
    changes_mask: ClassVar[bool] = True
    blind: ClassVar[bool] = True
    iterations: int = 80

    @torch.no_grad()
    def __call__(self, task: Task, pruned: Pruned) -> Refined:
        """S, B, A and the mask; what pruning left is not looked at."""
        metric, weight = posed(task.weight, pruned.mask, self._definite(), self._metric(task.known))
        return in_units(weight, metric, lambda W, M, _: self._alternate(W, M, task.pattern))

    def _alternate(self, weight: Tensor, metric: Metric, pattern: Pattern) -> Refined:
        W = weight.to(working(weight))
        scale, back = scales(metric, W)
        scaled = W * scale
        S = torch.zeros_like(scaled)
        steps: list[Step] = []
        for _ in range(self.iterations):
            rest = scaled - S
            B, A, _ = projected(rest, rest, self._definite())
            rest = torch.addmm(scaled, B, A, alpha=-1)
            mask = pattern.chosen(rest.abs())
            S = rest * mask
            missed = rest.sub_(S).square().sum(dtype=torch.float64).sqrt()
            steps.append(Step(len(A), float(missed)))
            if settled(steps, self.tolerance):
                break
        A = A * back
        return assemble(weight, mask, (B, A), steps, metric, lambda rows: W[rows] - B[rows] @ A)
