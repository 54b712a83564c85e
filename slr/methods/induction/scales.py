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

**Shifts.**  A maker's output + δ adds W δ to its reader, whose bias can take it back.  It pays
where the reader is pruned: the bias takes back the *dense* W δ, so with δ = -mean of the channel
pruning loses no mean output.  In these blocks one place has both biases: v and o (LLaMA with
``attention_bias``), for attention weights sum to 1.  RMSNorm has no bias, so the q, k, v biases of
Qwen2 have nothing to take back, and its o has none; up + δ adds silu(gate) δ, no constant; of
biases of q and k alone no pruned weight reads anything.

**Families.**  LLaMA, Mistral and Qwen2 are as the table says.  Qwen3 norms each head of q and k,
which undoes a `rotary` scale: it has none.  Others are refused: Gemma 3 stores its norms as w - 1,
so that w over s would be rounded in units of 1; Phi-3 fuses q, k, v and gate, up; OPT has no gate.

:mod:`slr.methods.induction` finds scales under which a block prunes better.

Source: the equivalent transformations of SmoothQuant (Xiao et al. 2023) and of *Sparsity Induction
for Accurate Post-Training Pruning of Large Language Models*, 2026.  Book: chapter 14.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from slr.matrix.checks import check_finite

__all__ = [
    "LARGEST",
    "MODELS",
    "PLACES",
    "ROWS",
    "Scales",
    "absorb",
    "dense_linears",
    "log_factors",
    "shifted",
    "spread",
]

MODELS = ("llama", "mistral", "qwen2", "qwen3")  # whose blocks are as the table says
PLACES = ("attention", "mlp", "hidden", "value", "rotary", "shift")
ROWS = ("hidden", "value", "rotary")  # those that change rows
LARGEST = 10.0  # |log₂ s|, about its mean: beyond it float16 has no room
LINEARS = tuple(f"self_attn.{x}_proj" for x in "qkvo") + tuple(
    f"mlp.{x}_proj" for x in ("gate", "up", "down")
)


@dataclass(frozen=True, eq=False)
class Scales:
    """The free parameters of one decoder block: log₂ of the scales, 0 where nothing moves.

    Args:
        attention: (hidden size,); and so on, see the module's table.
        mlp: (hidden size,).
        hidden: (intermediate size,).
        value: (kv heads · d,).
        rotary: (kv heads · d/2,); ``None`` where q and k are normed.
        shift: (kv heads · d,), added to v before it is scaled; ``None`` without biases of v and o.

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

    @classmethod
    def ones(cls, block: nn.Module) -> Scales:
        """All scales 1, no shift.

        Raises:
            ValueError: no dense block of one of :data:`MODELS`.
        """
        _, k, v, o, gate, up, _ = dense_linears(block).values()

        def zeros(count: int) -> Tensor:
            return k.weight.new_zeros(count, dtype=torch.float32)

        turns = not hasattr(block.self_attn, "k_norm")
        return cls(
            attention=zeros(k.in_features),
            mlp=zeros(gate.in_features),
            hidden=zeros(up.out_features),
            value=zeros(v.out_features),
            rotary=zeros(k.out_features // 2) if turns else None,
            shift=zeros(v.out_features) if v.bias is not None and o.bias is not None else None,
        )

    def powers_of_two(self) -> Scales:
        """Each scale rounded to a power of 2, which moves without rounding in any float dtype."""
        return replace(self, **{name: log.round() for name, log in self.logs().items()})

    def logs(self) -> dict[str, Tensor]:
        """All that there are but the shift, by name."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "shift"}
        return {name: log for name, log in found.items() if log is not None}

    @torch.no_grad()
    def centred(self) -> Scales:
        """A copy, each of mean 0, as a common factor does nothing, and what is extreme clamped."""
        logs = {k: (v - v.mean()).clamp(-LARGEST, LARGEST) for k, v in self.logs().items()}
        return replace(self, shift=None if self.shift is None else self.shift.clone(), **logs)

    def check(self, block: nn.Module) -> None:
        """Raise ValueError unless all fit `block` and are finite."""
        ones = Scales.ones(block)
        for field in fields(self):
            mine, right = getattr(self, field.name), getattr(ones, field.name)
            if mine is None and field.name in ("rotary", "shift"):
                continue
            have, want = (None if x is None else tuple(x.shape) for x in (mine, right))
            if have != want:
                raise ValueError(f"scales.{field.name} has shape {have}; it must be {want}")
            check_finite(f"scales.{field.name}", mine)


def dense_linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The seven linears of a block that the table describes."""
    kind = getattr(getattr(getattr(block, "self_attn", None), "config", None), "model_type", None)
    if kind not in MODELS:
        raise ValueError(
            f"block is a {type(block).__name__} of model type {kind!r}; scales can be moved "
            f"exactly in dense blocks of {', '.join(MODELS)}"
        )
    found = {}
    for name in LINEARS:
        layer = block.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"{name} is a {type(layer).__name__}; induction needs a dense block")
        found[name] = layer
    return found


def spread(block: nn.Module, channels: Tensor) -> Tensor:
    """Values of the kv heads' channels (kv heads · d,) for those of the query heads."""
    attention: Any = block.self_attn
    mine = channels.view(-1, 1, attention.head_dim)
    return mine.expand(-1, attention.num_key_value_groups, -1).reshape(-1)


def log_factors(
    block: nn.Module, logs: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor | None, Tensor]]:
    """Log₂ of the factor of the rows (``None``: 1) and of the columns of each linear."""
    attention: Any = block.self_attn
    q = k = None
    if "rotary" in logs:
        pairs = logs["rotary"].view(-1, 1, attention.head_dim // 2)
        turning = pairs.expand(-1, 2, -1).reshape(-1)
        q, k = spread(block, turning), -turning
    rows = (q, k, -logs["value"], None, None, -logs["hidden"], None)
    into, mlp = logs["attention"], logs["mlp"]
    columns = (into, into, into, spread(block, logs["value"]), mlp, mlp, logs["hidden"])
    return dict(zip(LINEARS, zip(rows, columns, strict=True), strict=True))


def shifted(block: nn.Module, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Biases of v and o once `shift` is added to v, in the dtype of `shift`."""
    linears = dense_linears(block)
    v, o = linears["self_attn.v_proj"], linears["self_attn.o_proj"]
    moved = o.weight.detach().to(shift.dtype) @ spread(block, shift)
    return v.bias.detach() + shift, o.bias.detach() - moved


@torch.no_grad()
def absorb(block: nn.Module, scales: Scales) -> None:
    """Move scales, and the shift, between the layers of a block, in place.

    Args:
        block: dense decoder block of one of :data:`MODELS`, any float dtype.
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
    if scales.shift is not None:
        biases = shifted(block, scales.shift.double())
        for name, bias in zip("vo", biases, strict=True):
            linears[f"self_attn.{name}_proj"].bias.copy_(bias)
    for name, (row, column) in log_factors(block, logs).items():
        layer = linears[name]
        weight = layer.weight.double() * column.exp2()
        if row is not None:
            weight *= row.exp2()[:, None]
            if layer.bias is not None:
                layer.bias.copy_(layer.bias.double() * row.exp2())
        layer.weight.copy_(weight)
    for norm, log in (("input_layernorm", "attention"), ("post_attention_layernorm", "mlp")):
        weight = block.get_submodule(norm).weight  # type: ignore[assignment]
        weight.copy_(weight.double() / logs[log].exp2())
