"""Equivalent scalings of a decoder block: what may move between its layers, and moving it.

Between a layer that makes a channel and the layers that read it a positive scale s can be moved:
the readers' columns times s, the maker's rows over s.  A LLaMA block has five such places:

========= ================================== ============================ =================
scale     maker, divided                     readers, multiplied          values
========= ================================== ============================ =================
attention input_layernorm                    q, k, v                      hidden size
mlp       post_attention_layernorm           gate, up                     hidden size
hidden    up (rows, bias)                    down                         intermediate size
value     v (rows, bias)                     o, every head of the group   kv heads · d
rotary    k (rows, bias)                     q (rows, bias), likewise     kv heads · d/2
========= ================================== ============================ =================

Under RoPE channels i and i + d/2 of a head turn together, so they share one `rotary` scale; the
query heads of a group share those of their key and value head.  Nothing else is free: SiLU does
not scale, so the rows of gate do not.

An OPT block has the same five, its makers with biases, which are divided like rows:

========= ================================== ============================ =================
attention self_attn_layer_norm               q, k, v                      hidden size
mlp       final_layer_norm                   fc1                          hidden size
hidden    fc1 (rows, bias)                   fc2                          intermediate size
value     v (rows, bias)                     out                          hidden size
rotary    k (rows, bias)                     q (rows, bias)               hidden size
========= ================================== ============================ =================

ReLU(x / s) = ReLU(x) / s for s > 0, so that `hidden` passes it; and nothing turns, so that each
channel of q and k has a scale of its own.

**Shifts.**  A maker's output + δ adds W δ to its reader, whose bias can take it back.  It pays
where the reader is pruned: the bias takes back the *dense* W δ, so with δ = -mean of the channel
pruning loses no mean output.  It takes a bias of the maker and of every reader.  OPT has them in
three places: both norms, and v and out, for attention weights sum to 1.  LLaMA (with
``attention_bias``) has them in the last, between v and o: RMSNorm has no bias, so the q, k, v
biases of Qwen2 have nothing to take back, and its o has none.  `hidden` has no shift: up + δ adds
silu(gate) δ, no constant, and ReLU(x + δ) is not ReLU(x) + δ.  A bias of k adds the same to all of
a query's scores, which softmax does not see, but no pruned weight reads it.

**Families.**  LLaMA, Mistral and Qwen2 are as the first table says.  Qwen3 norms each head of q and
k, which undoes a `rotary` scale: it has none.  OPT is as the second says, but for those whose norms
come after the residual sum (the 350M), where the residual reads what a norm puts out.  Others are
refused: Gemma 3 stores its norms as w - 1, so that w over s would be rounded in units of 1; Phi-3
fuses q, k, v and gate, up.  What is where: :mod:`slr.methods.induction.families`.

:mod:`slr.methods.induction` finds scales under which a block prunes better.

Source: the equivalent transformations of SmoothQuant (Xiao et al. 2023) and, with shifts, of
OmniQuant (Shao et al. 2024), and of *Sparsity Induction for Accurate Post-Training Pruning of Large
Language Models*, 2026.  Book: chapter 16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from slr.matrix.checks import check_finite
from slr.methods.induction.families import dense_linears, places, spread

__all__ = [
    "LARGEST", "PLACES", "ROWS", "SHIFTS", "Scales", "absorb", "dense_linears", "log_factors",
    "shifted",
]  # fmt: skip

SHIFTS = {"shift": "value", "attention_shift": "attention", "mlp_shift": "mlp"}  # and their places
PLACES = ("attention", "mlp", "hidden", "value", "rotary", *SHIFTS)
ROWS = ("hidden", "value", "rotary")  # those that change rows
LARGEST = 10.0  # |log₂ s|, about its mean: beyond it float16 has no room


@dataclass(frozen=True, eq=False)
class Scales:
    """The free parameters of one decoder block: log₂ of the scales, 0 where nothing moves.

    Args:
        attention: (hidden size,); and so on, see the module's table.
        mlp: (hidden size,).
        hidden: (intermediate size,).
        value: (kv heads · d,).
        rotary: (kv heads · d/2,), in OPT (hidden size,); ``None`` where q and k are normed.
        shift: (kv heads · d,), added to v before it is scaled; ``None`` without biases of v and o.
        attention_shift: (hidden size,), added likewise to what the norm before q, k and v puts
            out; ``None`` without biases.
        mlp_shift: (hidden size,), to what the norm before the MLP puts out.

    >>> import slr
    >>> scales = Scales.ones(slr.load("tiny").model.layers[0])
    >>> scales.hidden.shape, scales.rotary.shape, scales.shift
    (torch.Size([704]), torch.Size([128]), None)
    """

    attention: Tensor
    mlp: Tensor
    hidden: Tensor
    value: Tensor
    rotary: Tensor | None = None
    shift: Tensor | None = None
    attention_shift: Tensor | None = None
    mlp_shift: Tensor | None = None

    @classmethod
    def ones(cls, block: nn.Module) -> Scales:
        """All scales 1, no shift.

        Raises:
            ValueError: no dense block of a family that :mod:`slr.methods.induction.families` has.
        """
        found, linears = places(block), dense_linears(block)
        k = linears["self_attn.k_proj"]
        sizes = {name: linears[place.readers[0]].in_features for name, place in found.items()}
        sizes["value"] = linears["self_attn.v_proj"].out_features  # before heads share it

        def zeros(count: int) -> Tensor:
            return k.weight.new_zeros(count, dtype=torch.float32)

        def biased(place: str) -> bool:
            layers = (found[place].maker, *found[place].readers)
            return all(getattr(block.get_submodule(x), "bias", None) is not None for x in layers)

        attention: Any = block.self_attn
        turning = 2 if attention.config.model_type != "opt" else 1  # channels that turn together
        normed = hasattr(attention, "k_norm")
        made = {name: zeros(size) for name, size in sizes.items()}
        if not normed:
            made["rotary"] = zeros(k.out_features // turning)
        return cls(**made, **{name: zeros(sizes[at]) for name, at in SHIFTS.items() if biased(at)})

    def powers_of_two(self) -> Scales:
        """Each scale rounded to a power of 2, which moves without rounding in any float dtype."""
        return replace(self, **{name: log.round() for name, log in self.logs().items()})

    def logs(self) -> dict[str, Tensor]:
        """All that there are but the shifts, by name."""
        return {k: v for k, v in self._all().items() if k not in SHIFTS}

    def shifts(self) -> dict[str, Tensor]:
        """The shifts that there are, by name."""
        return {k: v for k, v in self._all().items() if k in SHIFTS}

    def _all(self) -> dict[str, Tensor]:
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if value is not None}

    @torch.no_grad()
    def centred(self) -> Scales:
        """A copy, each of mean 0, as a common factor does nothing, and what is extreme clamped."""
        logs = {k: (v - v.mean()).clamp(-LARGEST, LARGEST) for k, v in self.logs().items()}
        return replace(self, **logs, **{k: v.clone() for k, v in self.shifts().items()})

    def check(self, block: nn.Module) -> None:
        """Raise ValueError unless all fit `block` and are finite."""
        ones = Scales.ones(block)
        for field in fields(self):
            mine, right = getattr(self, field.name), getattr(ones, field.name)
            if mine is None and field.name in ("rotary", *SHIFTS):
                continue
            have, want = (None if x is None else tuple(x.shape) for x in (mine, right))
            if have != want:
                raise ValueError(f"scales.{field.name} has shape {have}; it must be {want}")
            check_finite(f"scales.{field.name}", mine)


def log_factors(
    block: nn.Module, logs: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor | None, Tensor]]:
    """Log₂ of the factor of the rows (``None``: 1) and of the columns of each linear."""
    rows, columns = dict[str, Tensor](), dict[str, Tensor]()
    for name, (maker, readers) in places(block).items():
        rows[maker] = -logs[name]
        columns |= dict.fromkeys(readers, _read(block, name, logs[name]))
    if "rotary" in logs:
        attention: Any = block.self_attn
        together = attention.k_proj.out_features // len(logs["rotary"])
        planes = logs["rotary"].view(-1, 1, attention.head_dim // together)
        turning = planes.expand(-1, together, -1).reshape(-1)
        rows["self_attn.q_proj"], rows["self_attn.k_proj"] = spread(block, turning), -turning
    return {name: (rows.get(name), columns[name]) for name in dense_linears(block)}


def _read(block: nn.Module, place: str, channels: Tensor) -> Tensor:
    """What belongs to the channels of a place, for those that its readers see."""
    return spread(block, channels) if place == "value" else channels


def shifted(block: nn.Module, shifts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Biases of the layers that shifts touch, by layer, before they are scaled.

    Each shift is added to its maker's, and W times it is taken from its readers'; in the dtype of
    the shifts.
    """
    made: dict[str, Tensor] = {}

    def bias(name: str) -> Tensor:
        layer: Any = block.get_submodule(name)
        return made.get(name, layer.bias.detach())

    for name, shift in shifts.items():
        maker, readers = places(block)[SHIFTS[name]]
        made[maker] = bias(maker) + shift
        for reader in readers:
            weight = dense_linears(block)[reader].weight.detach().to(shift.dtype)
            made[reader] = bias(reader) - weight @ _read(block, SHIFTS[name], shift)
    return made


@torch.no_grad()
def absorb(block: nn.Module, scales: Scales) -> None:
    """Move scales, and shifts, between the layers of a block, in place.

    Args:
        block: dense decoder block of a family that
            :mod:`slr.methods.induction.families` has, any float dtype.
        scales: for it.

    Its outputs stay the same in exact arithmetic; each changed parameter is rounded once to its
    dtype (not at all for powers of two without a shift).

    Raises:
        ValueError: another kind of block, or scales that do not fit; nothing is changed.

    Cost: one pass over the weights, in float64.

    >>> import slr
    >>> block = slr.load("tiny").model.layers[0]
    >>> before = block.mlp.down_proj.weight.clone()
    >>> absorb(block, replace(Scales.ones(block), hidden=torch.ones(704)))
    >>> bool((block.mlp.down_proj.weight == 2 * before).all())
    True
    """
    scales.check(block)
    linears = dense_linears(block)
    logs = {name: value.double() for name, value in scales.logs().items()}
    biases = shifted(block, {name: shift.double() for name, shift in scales.shifts().items()})
    for name, (row, column) in log_factors(block, logs).items():
        weight = linears[name].weight.double() * column.exp2()
        _write(linears[name], weight, None if row is None else row.exp2(), biases.get(name))
    for place in ("attention", "mlp"):
        maker = places(block)[place].maker
        norm: Any = block.get_submodule(maker)
        _write(norm, norm.weight.double(), (-logs[place]).exp2(), biases.get(maker))


def _write(layer: Any, weight: Tensor, rows: Tensor | None, bias: Tensor | None) -> None:
    """Put weight and bias, by default its own, times the factors of the rows into a layer."""
    if bias is None and getattr(layer, "bias", None) is not None:
        bias = layer.bias.double()
    if rows is not None:
        weight = weight * (rows if weight.dim() == 1 else rows[:, None])
        bias = None if bias is None else bias * rows
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)
