"""Systems that look at a whole model at once, as objects: what CAP and LoSparse have in common.

Book: part IV.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from slr.matrix.checks import check_count
from slr.model.block import LayerReport
from slr.model.checks import check_seed, check_seqlen

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["System"]


@dataclass(frozen=True)
class System(ABC):
    """How to compress a whole model to a budget.

    Args:
        budget: share of the parameters of the decoder blocks' linear layers to keep.
        steps: of training, or masks to try.
        samples: windows of text to learn from, seen again if there are more steps.
        seqlen: tokens in each; the model's longest context, 1024 at most, when ``None``.
        seed: of masks and of the order of the windows.

    Raises:
        ValueError, TypeError: a value out of range, or not a number.
    """

    name: ClassVar[str]
    needs_data: ClassVar[bool] = True

    budget: float = 0.5
    steps: int = 200
    samples: int | None = None
    seqlen: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.budget < 1:
            raise ValueError(f"budget is {self.budget}; it must be above 0 and below 1")
        check_count("steps", self.steps)
        if self.samples is not None:
            check_count("samples", self.samples)
        if self.seqlen is not None:
            check_seqlen(self.seqlen)
        check_seed(self.seed)

    def as_dict(self) -> dict:
        """Plain values, for JSON."""
        return {"method": self.name, "refine": self.name, **asdict(self)}

    @abstractmethod
    def compress(self, model: PreTrainedModel, windows: Tensor, **more: Any) -> list[LayerReport]:
        """Compress a loaded model in place; its windows are (count, seqlen)."""
