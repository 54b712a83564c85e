"""One shot: prune, then the best rank-k approximation of what was pruned.  Book: chapter 4."""

from __future__ import annotations

import torch
from torch import Tensor

from slr.matrix.assembly import assemble, in_units, posed, scales, working
from slr.matrix.gram import best_low_rank
from slr.matrix.lowrank import truncated_svd
from slr.matrix.metric import Gram, Metric
from slr.matrix.result import Refined

__all__ = ["svd_repair"]


@torch.no_grad()
def svd_repair(
    weight: Tensor,
    mask: Tensor,
    rank: int,
    metric: Metric | None = None,
    *,
    sparse: Tensor | None = None,
) -> Refined:
    """The one-shot baseline: prune, then the best rank-k approximation of what was pruned.

    Args:
        weight: (…, m, n), any float dtype.
        mask: bool (…, m, n), True = kept.
        rank: from 1 to min(m, n).
        metric: what "best" means; ``Gram(H)`` gives EoRA's repair.
        sparse: what pruning left, if it moved the kept weights (SparseGPT); weight on the mask
            by default.

    Returns:
        :class:`Refined` with `sparse` as given, in the dtype of `weight`.

    Raises:
        ValueError, TypeError: as :func:`refine`.

    Cost: one SVD, O(m n min(m, n)); with ``Gram`` also a Cholesky factor of H.
    Source: the SVD baseline of the paper; Liu et al. 2024 (EoRA).

    >>> W = torch.tensor([[4.0, 1.0], [2.0, 5.0]])
    >>> svd_repair(W, W > 3, 1).error  # off-diagonal [[0, 1], [2, 0]] keeps its 2
    1.0
    """
    metric, weight = posed(weight, mask, rank, metric)
    if sparse is not None and (sparse.shape != weight.shape or bool(sparse[~mask].any())):
        raise ValueError("sparse must have the shape of weight and be zero off the mask")
    kept = weight * mask if sparse is None else sparse.detach()
    return in_units(weight, metric, lambda W, M, unit: _one_shot(W, mask, M, rank, kept / unit))


def _one_shot(weight: Tensor, mask: Tensor, metric: Metric, rank: int, kept: Tensor) -> Refined:
    """The repair of what `kept` leaves."""
    rest = weight.to(working(weight)) - kept
    if isinstance(metric, Gram):
        B, A = best_low_rank(rest, metric, rank)
    else:
        scale, back = scales(metric, rest)
        B, A = truncated_svd(rest * scale, rank).factors()
        A = A * back
    return assemble(weight, mask, (B, A), [], metric, lambda rows: kept[..., rows, :])
