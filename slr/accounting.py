"""What a matrix or a model costs: parameters, bytes, FLOPs.

"The pruned model is the same size" is the usual complaint: zeros that are stored are not saved.
Everything here is counted for a storage format:

========== ================================================ ============================
format     bytes of an (m, n) matrix of density δ           reads
========== ================================================ ============================
dense      m n w                                            zeros too
bitmask    δ m n w + m n / 8                                any pattern
2:4        m n (w / 2 + 1 / 8), 2 bits for each kept value  2:4 only; what GPUs multiply
csr        δ m n (w + 4) + 4 (m + 1)                        any pattern
========== ================================================ ============================

with w bytes a value, plus w k (m + n) for the low-rank factors.  Book: chapters 1 and 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from slr.patterns import NM, Pattern, parse

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["FORMATS", "Account", "checkpoint_account", "matrix", "model"]

FORMATS = ("dense", "bitmask", "2:4", "csr")


@dataclass(frozen=True)
class Account:
    """Costs of one thing; accounts add up.

    Attributes:
        parameters: entries of the dense thing that this stands for.
        nonzero: numbers that are not zero by construction: kept entries and factors.
        bytes: of storage in the format asked for.
        flops: multiplications and additions a token that the non-zero numbers need.
        decode_bytes: bytes of weights read to decode one token at batch 1.
    """

    parameters: float = 0.0
    nonzero: float = 0.0
    bytes: float = 0.0
    flops: float = 0.0
    decode_bytes: float = 0.0

    def __add__(self, other: Account) -> Account:
        return Account(*(a + b for a, b in zip(self._values(), other._values(), strict=True)))

    def _values(self) -> tuple[float, ...]:
        return (self.parameters, self.nonzero, self.bytes, self.flops, self.decode_bytes)


def matrix(
    shape: tuple[int, int],
    pattern: str | float | Pattern | None = None,
    rank: int = 0,
    *,
    dtype: torch.dtype = torch.bfloat16,
    storage: str = "dense",
) -> Account:
    """The account of one (m, n) matrix as S + B A.

    Args:
        shape: (m, n).
        pattern: of S; ``None`` is dense.  Counted by its density, before rounding to entries.
        rank: k of B A, 0 for none.
        dtype: of the stored values.
        storage: one of :data:`FORMATS`.

    Raises:
        ValueError: unknown format, or ``"2:4"`` for another pattern.

    Cost: none; arithmetic.

    >>> small = matrix((4096, 4096), "2:4", 128, storage="2:4")
    >>> small.bytes / matrix((4096, 4096)).bytes
    0.625
    """
    m, n = shape
    width = dtype.itemsize
    parsed = None if pattern is None else parse(pattern)
    density = 1.0 if parsed is None else parsed.density
    kept = density * m * n
    if storage == "dense":
        stored: float = m * n * width
    elif storage == "bitmask":
        stored = kept * width + m * n / 8
    elif storage == "csr":
        stored = kept * (width + 4) + 4 * (m + 1)
    elif storage == "2:4":
        if parsed != NM(2, 4):
            raise ValueError(f"storage '2:4' holds 2:4 matrices, not {parsed or 'dense'}")
        stored = m * n * (width / 2 + 1 / 8)
    else:
        raise ValueError(f"storage {storage!r} is unknown; it must be one of {', '.join(FORMATS)}")
    factors = rank * (m + n)
    total = stored + factors * width
    return Account(m * n, kept + factors, total, 2 * (kept + factors), total)


def model(
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
        pattern, rank, dtype, storage: as :func:`matrix`, for the linears of decoder blocks.

    Cost: the model is built without weights.  FLOPs leave out attention itself, which grows with
    the context; a token reads one row of the embedding.

    >>> from transformers import LlamaConfig
    >>> round(model(LlamaConfig()).parameters)  # the defaults are LLaMA-7B
    6738415616
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from slr.calibrate import decoder_blocks
    from slr.checkpoint import resolve

    if isinstance(config, str | Path):
        config = AutoConfig.from_pretrained(resolve(config), local_files_only=True)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
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
            total += matrix(shape, pattern, rank, dtype=dtype, storage=storage)
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
    from safetensors import safe_open

    from slr.checkpoint import resolve

    found = {"bytes": 0.0, "values": 0.0, "nonzero": 0.0}
    for file in sorted(resolve(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no dictionary
                value = tensors.get_tensor(name)
                found["bytes"] += value.nbytes
                if value.is_floating_point():
                    found["values"] += value.numel()
                    found["nonzero"] += int(value.count_nonzero())
    return found
