"""Tune a compressed block: its kept weights, factors and norms, to the dense block's outputs.

Of weights that are codes, the scales are tuned.

Each layer was compressed on its own, for its own outputs.  Here the whole block learns, by Adam on
the calibration windows, to put out what the dense model does behind the same block; the mask stays.
Some windows are held out, and what serves them best is kept, so that no block leaves worse than it
came.

Book: chapter 9.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from slr.layer.linear import SLRLinear
from slr.layer.rounded import RoundedLinear, layer_of
from slr.matrix.result import Coded, Refined
from slr.matrix.rounding import Levels, Rounded
from slr.model import distributed
from slr.model.calibrate import BlockInputs

__all__ = ["HELD", "descending", "trainable", "tune_block"]

RATE = 1e-3  # of Adam, for values of the size that weights of language models have
DECAY = (0.9, 0.95)
WARM = 8  # steps until the rate is reached; from there it falls to a tenth by a cosine
HELD = 8  # one window of so many is held out


class _Part(nn.Module, ABC):
    """A compressed layer whose parts are trained, in float32.

    Used as one dense matrix, whose gradient all parts get theirs from; or, where only B and A
    learn, part by part with a fixed S, which saves the product that this gradient takes.
    """

    B: Tensor
    A: Tensor
    bias: Tensor | None
    fixed: Tensor | None = None  # S in the dtype that is computed in

    @abstractmethod
    def kept(self) -> Tensor:
        """S (m, n), float32."""

    @torch.no_grad()
    def fix(self, dtype: torch.dtype) -> None:
        """Take S as it is from now on."""
        self.fixed = self.kept().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.fixed is None:
            return linear(x, torch.addmm(self.kept(), self.B, self.A), self.bias)
        return linear(x, self.fixed, self.bias) + linear(linear(x, self.A), self.B)


class _Tuned(_Part):
    """An :class:`SLRLinear`."""

    mask: Tensor

    def __init__(self, layer: SLRLinear) -> None:
        super().__init__()
        self.pattern = layer.pattern
        self.register_buffer("mask", layer.mask.clone())
        self.S = nn.Parameter(layer.weight.detach().clone().float())
        self.B = nn.Parameter(layer.B.detach().clone().float())
        self.A = nn.Parameter(layer.A.detach().clone().float())
        self.bias = (
            None if layer.bias is None else nn.Parameter(layer.bias.detach().clone().float())
        )

    def kept(self) -> Tensor:
        return self.S * self.mask

    def layer(self, dtype: torch.dtype) -> SLRLinear:
        """What was learnt, packed."""
        S, B, A = (part.data.to(dtype) for part in (self.S, self.B, self.A))
        bias = None if self.bias is None else self.bias.data.to(dtype)
        return layer_of(Refined(S, B, A, (), self.mask), bias, pattern=self.pattern)


class _TunedCodes(_Part):
    """A :class:`RoundedLinear`, of which scales and factors are trained; codes stay.

    Without gradients, as where windows are held out, it computes what :meth:`layer` would.
    """

    levels: Tensor
    mask: Tensor

    def __init__(self, layer: RoundedLinear) -> None:
        super().__init__()
        self.was = [layer]  # no submodule
        self.pattern, self.factors, self.rounded = layer.pattern, layer.factors, layer.rounded()
        _, zero = self.rounded.levels.spread(layer.grid, layer.in_features)
        self.register_buffer("mask", layer.mask.clone())
        self.register_buffer("levels", (self.rounded.codes.float() - zero) * self.mask)
        self.scale = nn.Parameter(self.rounded.levels.scale.clone())
        self.B = nn.Parameter(layer.B.detach().clone().float())
        self.A = nn.Parameter(layer.A.detach().clone().float())
        self.bias = (
            None if layer.bias is None else nn.Parameter(layer.bias.detach().clone().float())
        )

    def kept(self) -> Tensor:
        n = self.levels.shape[1]
        width = self.rounded.grid.group or n
        return self.levels * self.scale.repeat_interleave(width, 1)[:, :n]

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x)
        coded = self.coded()
        S = coded.sparse.values() * self.mask if self.fixed is None else self.fixed
        B = self.B if coded.B is None else coded.B.values().T
        A = self.A if coded.A is None else coded.A.values()
        return linear(x, S, self.bias) + linear(linear(x, A), B)

    def coded(self) -> Coded:
        """What was learnt, as it is stored."""
        scale = self.scale.data.clamp_min(torch.finfo(torch.bfloat16).tiny).bfloat16().float()
        S = self.rounded._replace(levels=Levels(scale, self.rounded.levels.zero))
        if self.factors is None or not len(self.A):
            return Coded(S)
        return Coded(S, *(self._codes(name) for name in "BA"))

    def _codes(self, name: str) -> Rounded:
        """Of A, or of B the transpose; those that it came with if it has not moved."""
        now, was = getattr(self, name).data, self.was[0]
        if torch.equal(now, getattr(was, name).to(now)):
            return was.coded_factor(name)
        assert self.factors is not None
        return self.factors.rounded(now.T.contiguous() if name == "B" else now)

    def layer(self, dtype: torch.dtype) -> SLRLinear:
        """What was learnt, packed."""
        coded, B, A = self.coded(), self.B.data, self.A.data
        bias = None if self.bias is None else self.bias.data.to(dtype)
        values = (coded.sparse.values() * self.mask).to(dtype)
        refined = Refined(values, B.to(dtype), A.to(dtype), (), self.mask, coded)
        return layer_of(refined, bias, pattern=self.pattern)


KEPT: dict[type, str] = {_Tuned: "S", _TunedCodes: "scale"}  # what is trained of S


def tune_block(block: nn.Module, index: int, inputs: BlockInputs, passes: int) -> list[float]:
    """Tune a block in place.

    Args:
        block: with its compressed layers; dense ones in it stay as they are.
        index: its number.
        inputs: of the block, and in :attr:`BlockInputs.dense` the *outputs* of the dense one.
        passes: over the calibration windows that are not held out, one window a step.

    Returns:
        The mean relative error of the outputs on the held-out windows before, and after each pass;
        what is left in the block is the best of them.

    Cost: a pass is three forward passes of the block over the windows, in float32 or, where blocks
        are run in 16 bits, under autocast.  Memory: five float32 copies of the block's weights,
        and what a backward pass of one window needs.

    Source: transformer matching of 3BASiL (Makni et al. 2025); ours are that the dense model's own
        outputs are the target, the error relative to each token's size, and the stop.
    """
    assert inputs.dense is not None
    count = distributed.least(len(inputs.hidden))
    held = max(1, count // HELD) if count > 1 else 0
    with trainable(block) as parameters, torch.enable_grad():
        optimiser = torch.optim.Adam(parameters, lr=RATE, betas=DECAY)
        steps = passes * (count - held)
        rates = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: descending(step, steps))
        watched = range(count - held, count) if held else range(count)
        trace = [_error(block, index, inputs, watched)]
        best = [p.detach().clone() for p in parameters]
        generator = torch.Generator().manual_seed(index)
        for _ in range(passes):
            for window in torch.randperm(count - held, generator=generator).tolist():
                optimiser.zero_grad()
                _loss(block, index, inputs, window).backward()
                distributed.average([p.grad for p in parameters if p.grad is not None])
                optimiser.step()
                rates.step()
            trace.append(_error(block, index, inputs, watched))
            if trace[-1] == min(trace):
                best = [p.detach().clone() for p in parameters]
        for parameter, value in zip(parameters, best, strict=True):
            parameter.data = value
    return trace


def descending(step: int, steps: int) -> float:
    """Share of the rate at a step: a few to warm up, then a cosine to a tenth.

    Cost: none.

    >>> descending(8, 8) == 0.1
    True
    """
    warm = min(1.0, (step + 1) / WARM)
    return warm * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / max(1, steps))))


@contextmanager
def trainable(block: nn.Module, fixed: torch.dtype | None = None) -> Iterator[list[nn.Parameter]]:
    """While open, the compressed layers and all that is no linear layer have float32 parameters.

    Args:
        block: one, or a list of modules of them.
        fixed: dtype to hold S in if only B, A and what is no linear layer are trained; ``None``
            trains kept weights, or the scales of codes, too.
    """
    layers = {name: m for name, m in block.named_modules() if isinstance(m, SLRLinear)}
    were: dict[nn.Parameter, tuple[torch.dtype, bool]] = {}
    kinds = {name: layer.dtype for name, layer in layers.items()}
    flags = {name: _flags(layer) for name, layer in layers.items()}
    for name, layer in layers.items():
        kind = _TunedCodes if isinstance(layer, RoundedLinear) else _Tuned
        block.set_submodule(name, kind(layer))  # type: ignore[arg-type]
    for module in block.modules():
        for parameter in module.parameters(recurse=False):
            were[parameter] = parameter.dtype, parameter.requires_grad
            parameter.data = parameter.data.float()
            parameter.requires_grad_(
                not isinstance(module, nn.Linear)
                and (
                    fixed is None
                    or parameter is not getattr(module, KEPT.get(type(module), ""), None)
                )
            )
    if fixed is not None:
        for name in layers:
            part = block.get_submodule(name)
            assert isinstance(part, _Part)
            part.fix(fixed)
    try:
        yield [p for p in were if p.requires_grad]
    finally:
        for parameter, (dtype, trained) in were.items():
            parameter.grad = None
            parameter.requires_grad_(trained)
            parameter.data = parameter.data.to(dtype)
        for name, dtype in kinds.items():
            tuned = block.get_submodule(name)
            assert isinstance(tuned, _Tuned | _TunedCodes)
            layer = tuned.layer(dtype)
            for own, trained in flags[name].items():
                layer.get_parameter(own).requires_grad_(trained)
            block.set_submodule(name, layer)


def _flags(layer: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in layer.named_parameters()}


def _loss(block: nn.Module, index: int, inputs: BlockInputs, window: int) -> Tensor:
    """The mean over tokens of the squared error of the outputs, relative to each token's size.

    What reads the outputs divides by their size, and that of a few tokens is a thousandfold.
    """
    assert inputs.dense is not None
    device = next(block.parameters()).device
    rows = slice(window, window + 1)
    states, wanted = inputs.hidden[rows].to(device).float(), inputs.dense[rows].to(device).float()
    narrow = inputs.hidden.dtype
    with torch.autocast(device.type, narrow, enabled=narrow.itemsize < 4):
        out = block(states, **inputs.arguments[1][index])
    return (
        (out.float() - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-30)
    ).mean()


@torch.no_grad()
def _error(block: nn.Module, index: int, inputs: BlockInputs, windows: range) -> float:
    """The mean loss over some windows, of all processes."""
    losses = [_loss(block, index, inputs, window) for window in windows]
    mean = torch.stack(losses).mean()
    distributed.average([mean])
    return float(mean)
