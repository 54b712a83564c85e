"""CAP as one object: ``slr.compress(model, slr.CAP(budget=0.5))``.

Book: chapter 15.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from slr.methods.cap.allocation import allocate
from slr.methods.cap.pool import propose
from slr.methods.cap.robust_pca import Candidates
from slr.methods.system import System
from slr.model.block import LayerReport
from slr.model.blocks import check_dense

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CAP"]


@dataclass(frozen=True)
class CAP(System):
    """Global rank and sparsity by a learned policy (CAP, ICLR 2026); see :mod:`slr.methods.cap`.

    Args:
        budget, steps, samples, seqlen, seed: as :class:`~slr.methods.system.System`.
        balance_ratio: λ of robust PCA in units of the paper's; what was best on the embedded model.
        refit: kept entries are W - B A (beyond the paper; better there too).

    >>> CAP(budget=2)
    Traceback (most recent call last):
    ValueError: budget is 2; it must be above 0 and below 1
    """

    name: ClassVar[str] = "cap"

    balance_ratio: float = 0.6
    refit: bool = True

    def compress(
        self,
        model: PreTrainedModel,
        windows: Tensor,
        found: Mapping[str, Candidates] | None = None,
        **more: Any,
    ) -> list[LayerReport]:
        """Compress a loaded model in place.

        Args:
            model: dense.
            windows: (count, seqlen).
            found: candidates that were made before.
        """
        check_dense(model)
        if found is None:
            found = dict(propose(model, balance_ratio=self.balance_ratio))
        generator = torch.Generator().manual_seed(self.seed)
        return allocate(
            model, windows, self.budget, found=found, steps=self.steps, refit=self.refit,
            generator=generator,
        )  # fmt: skip
