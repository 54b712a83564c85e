"""How large a model is, or will be: by its configuration, by its files, by what it says of itself.

Book: chapters 1 and 10.
"""

from __future__ import annotations

import errno
import shutil
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from slr.checkpoint.folder import resolve
from slr.matrix.accounting import stored_bytes
from slr.matrix.patterns import Pattern
from slr.matrix.rounding import as_grid
from slr.model.account import Account, matrix_account
from slr.model.blocks import decoder_blocks
from slr.model.recipe import Recipe
from slr.model.stream import Stream, read_config
from slr.model.tensors import TensorFiles

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = [
    "Summary",
    "bytes_after",
    "check_space",
    "checkpoint_account",
    "megabytes",
    "model_account",
]


def model_account(
    config: PreTrainedConfig | str | Path,
    pattern: str | float | Pattern | None = None,
    rank: int = 0,
    *,
    dtype: torch.dtype = torch.bfloat16,
    storage: str = "dense",
) -> Account:
    """The account of a whole model: linears of its decoder blocks as asked, all else dense.

    Args:
        config: a transformers configuration, ``"tiny"``, or a checkpoint folder.
        pattern, rank, dtype, storage: of the linears of decoder blocks, as for
            :func:`~slr.model.account.matrix_account`.

    Cost: the model is built without weights.  FLOPs leave out attention itself, which grows with
    the context; a token reads one row of the embedding.

    >>> from transformers import LlamaConfig
    >>> round(model_account(LlamaConfig()).parameters)  # the defaults are LLaMA-7B
    6738415616
    """
    from transformers import AutoModelForCausalLM

    if isinstance(config, str | Path):
        config = read_config(resolve(config))[0]
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    inside = {
        id(layer.weight)
        for block in decoder_blocks(skeleton)
        for layer in block.modules()
        if isinstance(layer, torch.nn.Linear)
    }
    embedding = skeleton.get_input_embeddings().weight
    tied = skeleton.get_output_embeddings().weight is embedding
    width = dtype.itemsize
    total = Account()
    for weight in skeleton.parameters():
        count = weight.numel()
        if id(weight) in inside:
            shape = (weight.shape[0], weight.shape[1])
            total += matrix_account(shape, pattern, rank, dtype=dtype, storage=storage)
        elif weight is embedding and not tied:
            row = weight.shape[1] * width
            total += Account(count, count, count * width, 0, row)
        else:
            flops = 2 * count if weight.ndim == 2 else 0
            total += Account(count, count, count * width, flops, count * width)
    return total


def checkpoint_account(folder: str | Path) -> dict[str, float]:
    """Counted from the files of a checkpoint, dense or compressed, one tensor at a time.

    Returns:
        ``{"bytes", "values", "nonzero"}``: bytes of all tensors, their floating-point values, and
        how many of those are not zero.

    Raises:
        ValueError: no checkpoint.

    Cost: reads every file once.

    >>> tiny = checkpoint_account("tiny")
    >>> int(tiny["values"])
    5868800
    """
    found = {"bytes": 0.0, "values": 0.0, "nonzero": 0.0}
    files = TensorFiles(resolve(folder))
    for name in files.where:
        value = files.read([name])[name]
        found["bytes"] += value.nbytes
        if value.is_floating_point():
            found["values"] += value.numel()
            found["nonzero"] += int(value.count_nonzero())
    return found


def bytes_after(stream: Stream, plan: list[dict[str, Recipe]]) -> int:
    """About how large a checkpoint will be when the layers of a plan are compressed.

    Args:
        stream: the source.
        plan: resolved recipe of each layer of each block.
    """
    size = sum(file.stat().st_size for file in stream.files.files)
    for index, layers in enumerate(plan):
        block = stream.block(index)[1]
        for name, recipe in layers.items():
            m, n = block.get_parameter(f"{name}.weight").shape
            size += _after((m, n), recipe, stream.dtype.itemsize) - m * n * stream.dtype.itemsize
    return size


def _after(shape: tuple[int, int], recipe: Recipe, width: int) -> int:
    """Bytes of a layer of a resolved recipe."""
    options, rank = recipe.refine.options(), recipe.rank or 0
    kept = round(recipe.pattern.density * shape[0] * shape[1])
    coded = {name: options.get(name) for name in ("values", "factors")}
    grid, factors = (as_grid(None if v == "float" else v) for v in coded.values())
    return stored_bytes(shape, kept, rank, grid=grid, factors=factors, width=width)


def check_space(need: int, out: str | Path) -> None:
    """Raise OSError unless the disk has room.

    Args:
        need: bytes.
        out: folder to be made, in the parent of which room is needed.
    """
    parent = Path(out).absolute().parent
    while not parent.exists():
        parent = parent.parent
    part = Path(out).with_name(f"{Path(out).name}.partial")
    files = [*part.rglob("*.safetensors"), *part.rglob("*.gguf")]
    done = sum(file.stat().st_size for file in files)
    free = shutil.disk_usage(parent).free
    if need - done > free:
        raise OSError(
            errno.ENOSPC,
            f"{out} will need about {_amount(max(need - done, 1))} more, but {parent} has "
            f"{_amount(free)} free",
        )


def _amount(size: float) -> str:
    """Bytes in words, to three digits.

    >>> _amount(63_244_000), _amount(13.2e9), _amount(900)
    ('63.2 MB', '13.2 GB', '0.9 kB')
    """
    for unit, word in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {word}"
    return f"{size / 1e3:.1f} kB"


def megabytes(folder: Path) -> float:
    """MB (10⁶ bytes) of the safetensors files of a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6


def shown(error: float | None) -> str:
    """A relative error as tables show it; nothing where it is not known.

    >>> shown(0.25), shown(None)
    ('0.2500', '')
    """
    return "" if error is None else f"{error:.4f}"


class Summary(NamedTuple):
    """The layers of a compressed model in numbers.

    Attributes:
        dense: parameters of the layers before.
        kept: now, entries of S and of the factors.
        bits: of a weight, all that is stored of these layers counted.
        kinds: by the last part of the layers' names, and ``"all"``: ``number``, ``ranks``, and the
            means of ``pruned_error``, ``error`` and ``output_error`` (``None`` if unknown).
    """

    dense: int
    kept: int
    bits: float
    kinds: dict[str, dict]

    @classmethod
    def of(cls, layers: dict[str, dict]) -> Summary:
        """Of what a compressed folder says of its layers, by name.

        >>> layer = {"shape": [4, 4], "kept": 8, "rank": 1, "pruned_error": 0.4, "error": 0.2}
        >>> found = Summary.of({"model.layers.0.mlp.up_proj": layer | {"output_error": None}})
        >>> found.kept, found.kinds["up_proj"]["error"]
        (16, 0.2)
        """
        groups = defaultdict(list)
        for name, layer in layers.items():
            groups[name.rpartition(".")[2]].append(layer)
            groups["all"].append(layer)
        groups["all"] = groups.pop("all")
        table = {}
        for kind, members in groups.items():
            row: dict = {"number": len(members), "ranks": sorted({m["rank"] for m in members})}
            for key in ("pruned_error", "error", "output_error"):
                values = [m[key] for m in members if m[key] is not None]
                row[key] = sum(values) / len(values) if values else None
            table[kind] = row
        dense = sum(layer["shape"][0] * layer["shape"][1] for layer in layers.values())
        kept = sum(la["kept"] + la["rank"] * sum(la["shape"]) for la in layers.values())
        stored = sum(
            stored_bytes(
                la["shape"], la["kept"], la["rank"], grid=as_grid(la.get("grid")),
                factors=as_grid(la.get("factors")),
            )
            for la in layers.values()
        )  # fmt: skip
        return cls(dense, kept, 8 * stored / dense, table)
