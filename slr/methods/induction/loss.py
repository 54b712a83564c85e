"""What a block's scales are trained on: the error of its pruned output, and a stable rank.

Scales cancel within a pruned block, so its output under given scales is that of the unscaled block
under the mask of the scaled magnitudes: only the mask has to be computed from the scales, and only
through it do they have a gradient.  For :mod:`slr.methods.induction`, which says what is chosen.
Book: chapter 16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from slr.matrix.checks import check_finite
from slr.matrix.patterns import NM, Pattern
from slr.matrix.statistics import GramStatistic
from slr.methods.induction.families import dense_linears, places, spread
from slr.methods.induction.scales import LARGEST, Scales, log_factors, shifted
from slr.model.calibrate import BlockInputs, observe

__all__ = ["BlockLoss", "SilentError", "soft_mask", "starting_scales"]

POWER_STEPS = 3  # of the power iteration in a training step; ten times more at first


class SilentError(ValueError):
    """Inputs that are all zero, so that there is nothing to scale by."""


@torch.no_grad()
def starting_scales(
    block: nn.Module, inputs: BlockInputs, index: int, power: float, fixed: Sequence[str] = ()
) -> tuple[Scales, dict[str, Tensor]]:
    """The scales ‖X_j‖^power, and the Gram matrix of each of the four inputs that are scaled.

    Args:
        block: dense decoder block.
        inputs: of this block.
        index: its number in the model.
        power: 0 for all scales 1; 1 for scaled inputs that are all equally loud.
        fixed: names of scales that stay 1.

    Raises:
        ValueError: an input that is not finite, or (:class:`SilentError`) all zero.

    Cost: one forward pass of the block over all windows, and its Gram matrices.
    """
    reader = {name: place.readers[0] for name, place in places(block).items()}
    watched = {name: dense_linears(block)[path] for name, path in reader.items()}
    with observe(watched, GramStatistic) as found:
        inputs.run(index, block, keep=False)
    grams = {name: found[name].gram() for name in reader}  # type: ignore[union-attr]
    logs = {}
    for name, gram in grams.items():
        check_finite(f"inputs of {reader[name]}", gram)
        energy = gram.diagonal()
        if name == "value":  # the heads of a group are scaled alike
            attention: Any = block.self_attn
            heads = attention.v_proj.out_features // attention.head_dim
            energy = energy.view(heads, -1, attention.head_dim).mean(1).flatten()
        if not bool(energy.any()):
            raise SilentError(f"inputs of {reader[name]} are all zero; nothing to scale by")
        # A dead channel has no norm; its scale must be something.
        heard = energy.clamp_min(4.0**-LARGEST * float(energy.max()))
        if name not in fixed:
            logs[name] = power / 2 * heard.log2()
    return replace(Scales.ones(block), **logs).centred(), grams


def soft_mask(scores: Tensor, pattern: Pattern, temperature: float) -> Tensor:
    """The mask of a pattern as numbers 0 and 1, with the gradient of a sigmoid.

    Args:
        scores: (m, n), logarithms.
        pattern: its groups each have a threshold, half-way between the least score kept and the
            largest pruned; it has a gradient too, so that what all of a group share has none.
        temperature: of the sigmoid of score less threshold.

    Cost: the pattern's selection and four passes.

    >>> scores = torch.tensor([[3.0, 1.0, 2.0, 0.0]], requires_grad=True)
    >>> mask = soft_mask(scores, NM(2, 4), 1.0)
    >>> mask[0, 1].backward()
    >>> mask.tolist(), [round(x, 3) for x in scores.grad[0].tolist()]
    ([[1.0, 0.0, 1.0, 0.0]], [0.0, 0.118, -0.118, 0.0])
    """
    hard = pattern.chosen(scores.detach())
    if isinstance(pattern, NM):
        width = pattern.m
    else:
        width = scores.shape[1] if pattern.group == "row" else scores.numel()
    if width == 0 or bool(hard.all()):  # nothing is pruned: no threshold
        return hard.to(scores.dtype)
    groups, kept = scores.reshape(-1, width), hard.view(-1, width)
    least = groups.masked_fill(~kept, math.inf).amin(1, keepdim=True)
    most = groups.masked_fill(kept, -math.inf).amax(1, keepdim=True)
    sigmoid = torch.sigmoid((groups - (least + most) / 2) / temperature).view_as(scores)
    return hard + (sigmoid - sigmoid.detach())


class BlockLoss:
    """Both losses of one block as functions of its scales.

    Args:
        block: dense; it gets no gradients and is never changed.
        inputs: of this block.
        index: its number in the model.
        grams: as :func:`starting_scales` gives them.
        pattern: to prune to.
        temperature: see :func:`soft_mask`.
    """

    def __init__(
        self, block: nn.Module, inputs: BlockInputs, index: int, grams: dict[str, Tensor],
        pattern: Pattern, temperature: float,
    ) -> None:  # fmt: skip
        self.block, self.inputs, self.index, self.grams = block, inputs, index, grams
        self.pattern, self.temperature = pattern, temperature
        # A row that is only compared within itself cannot matter to the mask.
        self.rows = getattr(pattern, "group", None) == "matrix"
        self.top: dict[str, Tensor] = {}  # of each scaled input the top singular vector, so far

    def output(self, batch: Tensor, scales: Scales) -> Tensor:
        """Squared error of the pruned block over that of no block at all, for some windows."""
        batch = batch.to(next(self.block.parameters()).device)
        arguments = self.inputs.arguments[len(batch)][self.index]
        with torch.no_grad():
            dense = self.block(batch, **arguments).float()
        found = functional_call(self.block, self._pruned(scales), (batch,), arguments).float()
        return (found - dense).square().sum() / (dense - batch.float()).square().sum()

    def _pruned(self, scales: Scales) -> dict[str, Tensor]:
        """Weights, and shifted biases, of the pruned block."""
        linears, made = dense_linears(self.block), {}
        for name, (row, column) in log_factors(self.block, scales.logs()).items():
            weight = linears[name].weight.detach()
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            scores = wide.abs().clamp_min(torch.finfo(wide.dtype).tiny).log2() + column
            if row is not None and self.rows:
                scores = scores + row[:, None]
            mask = soft_mask(scores, self.pattern, self.temperature)
            made[f"{name}.weight"] = (wide * mask).to(weight.dtype)
        for name, bias in shifted(self.block, scales.shifts()).items():
            made[f"{name}.bias"] = bias.to(weight.dtype)
        return made

    def spectral(self, scales: Scales) -> Tensor:
        """Mean log stable rank of the four scaled inputs; ‖Z‖₂² is never overestimated."""
        each, logs = [], scales.logs()
        for name, gram in self.grams.items():
            log = logs[name] if name != "value" else spread(self.block, logs[name])
            scaled = gram * (-log).exp2() * (-log).exp2()[:, None]
            top = self.top[name] = self._power(scaled, self.top.get(name))
            each.append((scaled.trace() / (top @ scaled @ top)).log())
        return torch.stack(each).mean()

    @staticmethod
    @torch.no_grad()
    def _power(matrix: Tensor, top: Tensor | None) -> Tensor:
        """Nearly the top eigenvector, from an earlier one or from a fixed random vector."""
        steps = POWER_STEPS if top is not None else 10 * POWER_STEPS
        if top is None:
            top = torch.randn(len(matrix), generator=torch.Generator().manual_seed(0)).to(matrix)
        for _ in range(steps):
            top = nn.functional.normalize(matrix @ top, dim=0)
        return top

    @torch.no_grad()
    def whole(self, scales: Scales) -> tuple[float, float]:
        """Both losses over all windows."""
        hidden = self.inputs.hidden
        each = [float(self.output(b, scales)) * len(b) for b in hidden.split(self.inputs.rows)]
        return sum(each) / len(hidden), float(self.spectral(scales))
