"""A GGUF file written tensor by tensor by the ``gguf`` package, in a memory of one tensor.

Book: the page on the format.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Entry", "write_file"]

ROWS = 4096  # of a tensor that are converted at a time
LARGEST = {"F16": 65504.0, "Q8_0": 127 * 65504.0, "Q4_0": 8 * 65504.0}  # their scales are float16


class Entry(NamedTuple):
    """One tensor of a GGUF file: its name there, shape as of torch, and name of its type."""

    name: str
    shape: tuple[int, ...]
    kind: str

    @property
    def nbytes(self) -> int:
        """Bytes in the file, without padding."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[self.kind]]
        return torch.Size(self.shape).numel() // block * size


def write_file(
    file: Path, entries: list[Entry], values: Iterable[Tensor], describe: Callable[[Any], None]
) -> None:
    """Write the metadata of a file, then one tensor after the other.

    Args:
        file: to write; its architecture is ``llama``.
        entries: of its tensors, in order.
        values: the tensors, in the same order; each is asked for when the one before is written.
        describe: adds metadata to a ``gguf.GGUFWriter``.

    Raises:
        ValueError: a value that its type cannot hold.
        OSError: no space.
    """
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(file, "llama")
    try:
        describe(writer)
        for name, shape, kind in entries:
            size = Entry(name, shape, kind).nbytes
            known = GGMLQuantizationType[kind]
            writer.add_tensor_info(name, shape, np.dtype(np.float32), size, known)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry, value in zip(entries, values, strict=True):
            writer.write_tensor_data(_encoded(entry, value))
    except OSError as error:
        if error.errno is None:  # numpy's, of which it says only how much was not written
            raise OSError(errno.ENOSPC, f"no space left: {error}") from None
        raise
    finally:
        writer.close()


def _encoded(entry: Entry, value: Tensor) -> np.ndarray:
    """A tensor in the type of its entry.

    Raises:
        ValueError: it does not fit.
    """
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    assert tuple(value.shape) == entry.shape, entry.name
    value = value.detach().cpu()
    peak = float(value.abs().max()) if value.numel() else 0.0
    if peak > LARGEST.get(entry.kind, float("inf")):
        raise ValueError(
            f"tensor {entry.name} holds {peak:.3g}, too large for {entry.kind}; give --outtype "
            "bf16 or f32"
        )
    kind = GGMLQuantizationType[entry.kind]
    return np.concatenate([quantize(rows.float().numpy(), kind) for rows in value.split(ROWS)])
