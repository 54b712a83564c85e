"""What a compression does to held-out text, measured while it goes on.

Several models read the same windows block by block: the dense one, the one that pruning left, the
result, and the plain alternatives, which are only rounded.  At the end their perplexities are
known, at the price of a forward pass each over a few windows, however large the model is.

Book: chapter 10.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slr.model.arithmetic import computing
from slr.model.calibrate import BlockInputs, first_inputs
from slr.model.losses import exponential, window_losses
from slr.model.plain import PLAIN, rounded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["KINDS", "HeldOut"]

KINDS = ("dense", "pruned", "result", *PLAIN)


class HeldOut:
    """Held-out windows on their way through three models.

    Args:
        model: whose modules outside of the blocks are filled.
        windows: int64 (count, seqlen).
        kinds: some of ``"dense"``, ``"pruned"``, ``"result"`` and the names of
            :data:`slr.model.plain.PLAIN`.
        dtype: to run blocks in.

    Memory: the hidden states of all windows, once for each kind.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Tensor,
        *,
        kinds: tuple[str, ...] = KINDS,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.windows = windows
        first = first_inputs(model, windows, to_end=True, dtype=dtype)
        self.inputs = {
            kind: BlockInputs(first.hidden.clone(), first.rows, first.arguments, to_end=True)
            for kind in kinds
        }

    def advance(self, kind: str, index: int, block: nn.Module) -> None:
        """Take the windows of one model through its block `index`."""
        if kind in self.inputs:
            self.inputs[kind].advance(index, block)

    def pruned(self, index: int, block: nn.Module, weights: dict[str, Tensor]) -> None:
        """The same of a dense block with what pruning left in place of the weights, by name."""
        if "pruned" not in self.inputs:
            return
        own = {name: block.get_parameter(f"{name}.weight").data for name in weights}
        for name, weight in weights.items():
            block.get_parameter(f"{name}.weight").data = weight
        try:
            self.advance("pruned", index, block)
        finally:
            for name, weight in own.items():
                block.get_parameter(f"{name}.weight").data = weight

    def plain(self, index: int, block: nn.Module) -> None:
        """The same of the plain alternatives, which round the dense block."""
        for name, grid in PLAIN.items():
            if name in self.inputs:
                with rounded(block, grid):
                    self.advance(name, index, block)

    def state(self) -> dict[str, Tensor]:
        """Where the windows are, by kind, to be kept on disk."""
        return {kind: inputs.hidden for kind, inputs in self.inputs.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a :meth:`state`."""
        for kind, inputs in self.inputs.items():
            inputs.hidden.copy_(state[kind])

    @torch.no_grad()
    def perplexities(self, model: PreTrainedModel) -> dict[str, float]:
        """Perplexity of each kind, once all blocks have been passed.

        Args:
            model: whose modules outside of the blocks are filled.

        Cost: the output head over all windows of each kind.
        """
        device = model.get_input_embeddings().weight.device
        found = {}
        for kind, inputs in self.inputs.items():
            with computing(model, inputs.hidden.dtype):
                each = [
                    window_losses(model, ids.to(device), hidden.to(device))
                    for ids, hidden in zip(
                        self.windows.split(inputs.rows), inputs.hidden.split(inputs.rows),
                        strict=True,
                    )
                ]  # fmt: skip
            found[kind] = exponential(torch.cat(each))
        return found
