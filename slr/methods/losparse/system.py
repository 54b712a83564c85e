"""LoSparse as one object: ``slr.compress(model, slr.LoSparse(budget=0.5))``.

Book: chapter 14.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from slr.methods.losparse.fitting import train
from slr.methods.losparse.trained import to_slr
from slr.methods.system import System
from slr.model import hf
from slr.model.block import LayerReport
from slr.model.blocks import check_dense

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LoSparse"]

BATCH = 4  # windows in a step of training


@dataclass(frozen=True)
class LoSparse(System):
    """Train and prune rows (LoSparse, ICML 2023); see :mod:`slr.methods.losparse`.

    Args:
        budget, steps, samples, seqlen, seed: as :class:`~slr.methods.system.System`.

    >>> LoSparse(steps=0)
    Traceback (most recent call last):
    ValueError: steps is 0; it must be at least 1
    """

    name: ClassVar[str] = "losparse"

    def compress(self, model: PreTrainedModel, windows: Tensor, **more: Any) -> list[LayerReport]:
        """Train a loaded model in place, and lay the rows that are left out among the zeros.

        Args:
            model: dense, in float32 for the training to be of use.
            windows: (count, seqlen).

        Memory: beside the training a copy of the dense model, to measure against.
        """
        check_dense(model)
        dense = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(self.seed)
        passes = -(-self.steps * BATCH // len(windows))
        order = [torch.randperm(len(windows), generator=generator) for _ in range(passes)]
        seen = torch.cat(order)[: self.steps * BATCH]
        train(model, windows[seen].to(model.device), remaining=self.budget, batch=BATCH)
        layers = to_slr(model, dense)
        reports = [LayerReport(name=name, seconds=0.0, **told) for name, told in layers.items()]
        hf.adopt(model, hf.notes(None, self.as_dict(), None, reports))
        return reports
