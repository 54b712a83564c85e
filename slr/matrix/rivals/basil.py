"""3BASiL: a mask, its weights and the low rank together, by ADMM in three blocks.

In units of the inputs' loudness N = √diag(H), with W ← W N and H̃ = N⁻¹ H N⁻¹, a round is

    S ← [(W - B A) H̃ - V + ρ D] (H̃ + ρ I)⁻¹                        free
    D ← the largest entries of S + V/ρ                            in the pattern
    V ← V + ρ (S - D)                                             their difference, summed up
    B A ← argmin over rank r of ‖(W - S - B A) H̃^½‖               exactly

With a small ρ the mask moves freely; every ten rounds ρ grows by a tenth, a twentieth or a fiftieth
where the mask has moved much, less or little, and where it has settled the work is done.  One
eigendecomposition of H̃ gives the inverse for every ρ, and H̃^½.

This is the method behind ``update_mask="admm"`` (:mod:`slr.matrix.admm`), which takes fewer rounds,
one power step for the low rank, and refines on the mask that it finds.  Book: chapter 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from slr.matrix.assembly import assemble, in_units, posed, working
from slr.matrix.checks import check_count
from slr.matrix.metric import Gram, Metric, definite
from slr.matrix.patterns import Pattern
from slr.matrix.pruners import Statistic, Task
from slr.matrix.pruning import Pruned
from slr.matrix.repair import Repair
from slr.matrix.result import Refined, Step
from slr.matrix.rivals.exact import projected
from slr.matrix.statistics import GramStatistic

__all__ = ["ThreeBASiL"]

DAMPING = 0.005  # of H, in its mean diagonal and in its own
FIRST = 0.1  # ρ
EVERY = 10  # rounds, the mask is looked at
LATE, SETTLED = 100, 3e-4  # from so many rounds on, so few flips are as good as none
GROWTH = ((0.1, 1.1), (0.005, 1.05), (0.0, 1.02))  # of ρ, above a share of flips among the kept


@dataclass(frozen=True)
class ThreeBASiL(Repair):
    """Three-block ADMM for sparse + low rank (Makni et al. 2025).

    It starts from what pruning left: in the paper's code, from Wanda's mask.  Damping is as its
    notes advise.  Its code also divides ρ by five as long as nothing has moved, takes the low-rank
    step by a randomised SVD, and does not refit B A to what it returns, the largest entries of the
    last S.  Here B A is the exact best for them.

    Args:
        iterations: rounds, at most; 2000 in the paper's code, where, as here, the mask settles
            long before that.  The trace has every tenth.

    Cost: a round 4 m n² + 2 m n q + O(q³) FLOPs, q = min(m, n); an eigendecomposition of H once
        and 2 n³ every ten rounds; eight matrices of the size of W and three of H.
    Source: Makni et al. 2025 (3BASiL), without its transformer matching.
    """

    name: ClassVar[str] = "3basil"
    needs: ClassVar[Statistic] = GramStatistic
    changes_mask: ClassVar[bool] = True
    iterations: int = 400

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("iterations", self.iterations)

    @torch.no_grad()
    def __call__(self, task: Task, pruned: Pruned) -> Refined:
        """S, B, A and the mask, from what pruning left."""
        metric, weight = posed(task.weight, pruned.mask, self._definite(), self._metric(task.known))
        return in_units(
            weight, metric, lambda W, M, unit: self._solve(W, M, task.pattern, pruned, unit)
        )

    def _solve(
        self, weight: Tensor, metric: Metric, pattern: Pattern, pruned: Pruned, unit: float
    ) -> Refined:
        assert isinstance(metric, Gram)
        outputs = _Outputs.of(metric, weight.to(working(weight)))
        W = weight.to(outputs.loud) * outputs.loud
        D, seen = pruned.weight.to(W) / unit * outputs.loud, pruned.mask
        V, BA = torch.zeros_like(W), torch.zeros_like(W)
        rho, inverse = FIRST, outputs.inverse(FIRST)
        steps: list[Step] = []
        for turn in range(1, self.iterations + 1):
            R = W - BA
            S = torch.addmm(R, D.sub_(R).mul_(rho).sub_(V), inverse)
            target = V.div_(rho).add_(S)
            support = pattern.chosen(target.abs())
            D = target * support
            V = target.sub_(D).mul_(rho)
            rest = W - S
            B, A, _ = projected(rest, rest @ outputs.root, self._definite())
            BA = B @ A
            if turn % EVERY and turn < self.iterations:
                continue
            mask = pattern.chosen(S.abs())
            kept = S * mask
            steps.append(Step(len(A), outputs.error(W - kept - BA)))
            flips, seen = (support != seen).sum() / support.sum().clamp_min(1), support
            if not flips or (turn >= LATE and flips < SETTLED):
                break
            rho *= next(factor for above, factor in GROWTH if flips > above)
            inverse = outputs.inverse(rho)
        rest = W - kept
        B, A, _ = projected(rest, rest @ outputs.root, self._definite())
        kept, A = kept / outputs.loud, A / outputs.loud
        return assemble(weight, mask, (B, A), steps, metric, lambda rows: kept[rows])


class _Outputs(NamedTuple):
    """The damped H as loudness N (n,) and H̃ = Q diag(values) Qᵀ."""

    loud: Tensor
    values: Tensor
    Q: Tensor
    root: Tensor  # F, H̃ = F Fᵀ
    unit: float  # of H

    @classmethod
    def of(cls, metric: Gram, like: Tensor) -> _Outputs:
        """In the dtype and on the device of `like`; raises ValueError if H is indefinite."""
        H = metric.matrix.to(like.device, torch.float64)
        unit = float(H.diagonal().mean())
        H = H / unit
        H.diagonal().mul_(1 + DAMPING).add_(DAMPING)
        loud = H.diagonal().sqrt()
        values, Q = torch.linalg.eigh(definite(H / loud / loud[:, None])[0])
        root = (Q * values.clamp_min(0).sqrt()).to(like)
        return cls(loud.to(like), values, Q, root, unit)

    def inverse(self, rho: float) -> Tensor:
        """(H̃ + ρ I)⁻¹."""
        return (self.Q / (self.values + rho) @ self.Q.T).to(self.loud)

    def error(self, E: Tensor) -> float:
        """‖E H̃^½‖ in units of H."""
        return float((E @ self.root).square().sum(dtype=torch.float64) * self.unit) ** 0.5
