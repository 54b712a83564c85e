"""LoSparse: U V + S, with whole rows of S pruned while the model is fine-tuned.

Each weight W (m, n) becomes U V + S: the low-rank part holds what neurons share, S what is one
neuron's own.  U and V are trained and never pruned; of S, the rows (output neurons) whose
smoothed sensitivity is lowest are removed on a cubic schedule, over all matrices at once.

    convert(model, rank_ratio=0.1)              # U V + S, by SVD: the same function as before
    optimizer = ...                             # after that, for the parameters are new
    pruner = Pruner(model, remaining=0.2, steps=1000, warmup=100, cooldown=300)
    for batch in batches:
        model(**batch).loss.backward()
        pruner.observe()                        # before the step: |S ∘ ∇S|
        optimizer.step()
        pruner.step()                           # after it: prune, and zero what was pruned
        optimizer.zero_grad()
    compact(model)                              # pruned rows leave
    save(model, "model.safetensors")            # or to_slr(model): this package's checkpoints

or ``Trainer(..., callbacks=[callback(pruner)])``, or :func:`train` for all of it on a causal
language model.  Two baselines take the same path: ``"itp"``, iterative structured pruning of
S = W, and ``"lowrank"``, U V alone.

What the public text leaves open, or its code does otherwise, and what is done here:

- A neuron is a **row** of W (out, in); the paper writes W the other way round.  Its score is the
  mean over its entries of Ī, or of Ī·Ū with the uncertainty term.
- The fraction p_t counts entries of S, as in the code: rows of any width compete by score alone.
- Pruned rows stay pruned.  In the paper's formula a row could return, though the sensitivity of
  a zero row is zero.  The code zeroes rows and lets the optimiser's momentum move them again.
- Sensitivity is taken with the weights of its gradient; the code multiplies by those after the
  step.  The threshold is renewed at every step; the code averages I over windows of ``deltaT``.
- How the remaining ratio is shared between U V and S: ``rank_ratio`` is given.  Published scripts
  use 5% + 15% (MNLI) and 35% + 5% (XSum).
- The remaining ratio counts U, V and S over the replaced matrices; biases and row indices do not
  count (they do in bytes).

Gradients must be whole on each process: DDP is fine, sharded training (FSDP, ZeRO-3) is not.

Source: Li et al. 2023, "LoSparse" (ICML); uncertainty: Zhang et al. 2022, "PLATON".
Book: chapter 12.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from slr.accounting import Account
from slr.linear import SLRLinear
from slr.methods.losparse_distil import distillation_loss
from slr.methods.losparse_fit import fit, train
from slr.methods.losparse_linear import (
    MODES,
    LoSparseLinear,
    account,
    convert,
    layers,
    remaining_ratio,
)
from slr.methods.losparse_pruner import Pruner, cubic, keep_rows

if TYPE_CHECKING:
    from transformers import TrainerCallback

__all__ = [
    "MODES",
    "LoSparseLinear",
    "Pruner",
    "account",
    "callback",
    "compact",
    "convert",
    "cubic",
    "distillation_loss",
    "fit",
    "keep_rows",
    "layers",
    "load",
    "remaining_ratio",
    "save",
    "to_slr",
    "train",
]

STATE = "losparse_pruner.safetensors"  # beside the model in a Trainer's checkpoint


def compact(model: nn.Module) -> Account:
    """Drop the pruned rows of every S, in place, at the end of training; returns the account.

    S becomes a smaller dense matrix, with the numbers of its rows beside it.  Outputs are the
    same but for rounding (a smaller product may add up in another order).  Optimisers that were
    made before hold the old S.

    Raises:
        ValueError: no layer is converted.

    Cost: a copy of what is kept.

    >>> net = nn.ModuleList([nn.Linear(4, 4)])
    >>> _ = convert(net, mode="itp", include=["0"])
    >>> net[0].kept[1:] = False
    >>> compact(net).nonzero, net[0].rows.tolist()
    (4.0, [0])
    """
    for layer in layers(model).values():
        layer.compact_()
    return account(model)


@torch.no_grad()
def to_slr(model: nn.Module, source: nn.Module) -> dict[str, dict]:
    """Make each converted layer an :class:`~slr.linear.SLRLinear` (S, B = U, A = V), in place.

    So a trained model is stored, loaded and listed like any other of this package.

    Args:
        model: converted and trained, compact or not.
        source: the dense model it was made from, to measure against.

    Returns:
        What a checkpoint says of each layer: ``shape, rank, kept, bias``; ``pattern`` is ``None``;
        ``error`` and ``pruned_error`` are ‖W - S - U V‖ and ‖W - S‖ over ‖W‖, W of the source (so
        they hold what training changed, too).

    Raises:
        ValueError: no layer is converted, or `source` has no such linear layer.

    Cost: S is laid out in full again, one layer at a time.

    >>> net, dense = nn.ModuleList([nn.Linear(4, 4)]), nn.ModuleList([nn.Linear(4, 4)])
    >>> _ = convert(net, rank_ratio=0.5, include=["0"])
    >>> net[0].kept[1:] = False
    >>> to_slr(net, dense)["0"]["kept"], net[0].rank
    (4, 1)
    """
    found = layers(model)
    dense = {k: m for k, m in source.named_modules() if isinstance(m, nn.Linear)}
    for name, layer in found.items():
        if name not in dense or dense[name].weight.shape != layer.shape:
            raise ValueError(f"source has no nn.Linear {name!r} of shape {layer.shape}")
    made = {}
    for name, layer in found.items():
        S, kept = layer.sparse()
        W = dense[name].weight.to(S)
        bias = None if layer.bias is None else layer.bias.data
        mask = kept.unsqueeze(1).expand_as(S).contiguous()
        small = SLRLinear(S, layer.U.data, layer.V.data, bias, mask=mask)
        model.set_submodule(name, small.train(layer.training))
        made[name] = {
            "shape": list(layer.shape), "rank": layer.rank, "kept": int(mask.sum()),
            "bias": bias is not None, "pattern": None, "output_error": None,
            "pruned_error": float((W - S).norm() / W.norm()),
            "error": float((W - layer.dense()).norm() / W.norm()),
        }  # fmt: skip
    return made


def save(model: nn.Module, file: str | Path) -> None:
    """Write all tensors of a converted model, compact or not, as one safetensors file.

    Args:
        model: with its layers converted.
        file: to write.

    Raises:
        ValueError: no layer is converted.

    >>> import tempfile
    >>> net = nn.ModuleList([nn.Linear(4, 4)])
    >>> _ = convert(net, mode="itp", include=["0"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(net, f"{folder}/a.safetensors")
    ...     again = load(nn.ModuleList([nn.Linear(4, 4)]), f"{folder}/a.safetensors")
    >>> torch.equal(again[0].S, net[0].S)
    True
    """
    layers(model)
    save_model(model, str(file))


def load(model: nn.Module, file: str | Path) -> nn.Module:
    """Fill a dense model of the same architecture with what :func:`save` wrote, bit for bit.

    Args:
        model: as before :func:`convert`, for instance from its configuration; changed in place.
        file: safetensors.

    Returns:
        The model.

    Raises:
        ValueError: a damaged file, or tensors that are missing, too many, or of another shape or
            dtype.

    Cost: reads the file twice.  Example: :func:`save`.
    """
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut short: {error}") from None
    dtypes = {name: value.dtype for name, value in model.state_dict().items()}
    placed = {}
    for name, dense in model.named_modules():
        parts = ("U", "V", "S", "bias", "kept", "rows")
        found = {part: tensors.get(f"{name}.{part}") for part in parts}
        U, V, S = (found.pop(part) for part in ("U", "V", "S"))
        if type(dense) is not nn.Linear or U is None or V is None or S is None:
            continue
        if (U.shape[0], V.shape[1]) != dense.weight.shape:
            raise ValueError(
                f"{file}: {name} has shape {(U.shape[0], V.shape[1])}, "
                f"but in the model {tuple(dense.weight.shape)}"
            )
        dtypes[f"{name}.U"] = dense.weight.dtype
        layer = LoSparseLinear(U, V, S, found.pop("bias"), **found)
        placed[name] = layer.to(dense.weight.device).train(dense.training)
    for name, value in tensors.items():
        if value.dtype != dtypes.get(name, value.dtype):
            raise ValueError(f"{file}: {name} is {value.dtype}, but in the model {dtypes[name]}")
    for name, layer in placed.items():
        model.set_submodule(name, layer)
    try:
        load_model(model, file)
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit the model: {error}") from None
    return model


def callback(pruner: Pruner) -> TrainerCallback:
    """A ``transformers.Trainer`` callback that prunes, and goes on when training is resumed.

    Checkpoints get the state of the pruner beside the model.

    Args:
        pruner: of the model that is trained; its `steps` are those of the training, or fewer.

    Raises (when training begins):
        ValueError: the training is shorter than `steps`, or resumes from a checkpoint without
            the state of a pruner; later, gradients that are not finite.

    Cost: that of the pruner.

    >>> net = nn.ModuleList([nn.Linear(8, 4)])
    >>> _ = convert(net, mode="itp", include=["0"])
    >>> type(callback(Pruner(net, remaining=0.5, steps=1))).__name__
    'LoSparseCallback'
    """
    from transformers import TrainerCallback

    def file(args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE

    class LoSparseCallback(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            if state.max_steps < pruner.steps:
                raise ValueError(
                    f"the training has {state.max_steps} steps, fewer than the pruner's "
                    f"{pruner.steps}; it would not reach its final share"
                )
            if args.fp16:  # with a loss scaler, which skips steps
                pruner.patience = max(pruner.patience, 20)
            if state.global_step:
                if not file(args, state).is_file():
                    raise ValueError(f"there is no {file(args, state)} to go on from")
                pruner.load_state_dict(load_file(file(args, state)))

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            pruner.observe()

        def on_optimizer_step(self, args, state, control, **kwargs):
            pruner.step()

        def on_save(self, args, state, control, **kwargs):
            if state.is_world_process_zero:
                save_file(pruner.state_dict(), file(args, state))

    return LoSparseCallback()
