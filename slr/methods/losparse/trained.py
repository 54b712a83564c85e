"""A model that LoSparse has trained, or trains: made compact, stored, turned into SLRLinear.

Book: chapter 14.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from slr.layer.linear import SLRLinear
from slr.matrix.metric import relative
from slr.methods.losparse.linear import LoSparseLinear, account, layers
from slr.methods.losparse.pruner import Pruner
from slr.model.account import Account

if TYPE_CHECKING:
    from transformers import TrainerCallback

__all__ = ["callback", "compact", "load", "save", "to_slr"]

STATE = "losparse_pruner.safetensors"  # beside the model in a Trainer's checkpoint


def compact(model: nn.Module) -> Account:
    """Drop the pruned rows of every S, in place, at the end of training; returns the account.

    S becomes a smaller dense matrix, with the numbers of its rows beside it.  Outputs are the
    same but for rounding (a smaller product may add up in another order).  Optimisers that were
    made before hold the old S.

    Raises:
        ValueError: no layer is converted.

    Cost: a copy of what is kept.

    >>> from slr.methods.losparse.linear import convert
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
    """Make each converted layer an :class:`slr.SLRLinear` (S, B = U, A = V), in place.

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

    >>> from slr.methods.losparse.linear import convert
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
        size, pruned, error = (float(E.norm()) for E in (W, W - S, W - layer.dense()))
        small = SLRLinear(S, layer.U.data, layer.V.data, bias, mask=mask)
        model.set_submodule(name, small.train(layer.training))
        made[name] = {
            "shape": list(layer.shape), "rank": layer.rank, "kept": int(mask.sum()),
            "bias": bias is not None, "pattern": None, "output_error": None,
            "pruned_error": relative(pruned, size), "error": relative(error, size),
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
    >>> from slr.methods.losparse.linear import convert
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

    >>> from slr.methods.losparse.linear import convert
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
