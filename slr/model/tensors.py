"""Which files and tensors of a folder are the model: the same that transformers would take.

``model.safetensors`` if it is there, else the shards that ``model.safetensors.index.json`` names;
nothing else in the folder counts.  Book: the page on the format.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

__all__ = ["INDEX", "TensorFiles", "check_dtype", "read_json", "tied_to"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Of safetensors' names: the types of weights that slr reads, and that of packed masks.
FLOATS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
PACKED = {torch.uint8: "U8", torch.int16: "I16"}  # bits and codes; scales
WRAPPED = ("module.", "_orig_mod.", "base_model.model.")  # what DDP, torch.compile and PEFT add
INERT = r"rotary_emb\.inv_freq$|(^|\.)position_ids$"  # buffers that old checkpoints hold


def read_json(file: Path) -> dict:
    """A JSON object from a file.

    Raises:
        ValueError: it is none, or cannot be read.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__}; it must be a JSON object")
    return found


class TensorFiles:
    """The safetensors files of a model as one table of tensors.

    Args:
        folder: with ``model.safetensors``, or shards and their index.

    Attributes:
        where: file of each tensor name, in order of the names.
        bytes_read: so far.
        seconds: spent reading, so far.

    Raises:
        ValueError: no such file, a damaged or truncated one, an index that names a file elsewhere
            or that is not there, or a tensor that its file lacks.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.bytes_read, self.seconds = folder, 0, 0.0
        self.where: dict[str, Path] = {}
        self._stored: dict[str, str] = {}  # names in the files, where they are others
        for file, names in self._listing().items():
            with self._opened(file) as handle:
                there = set(handle.keys())
            for name in there if names is None else names:
                if name not in there:
                    raise ValueError(f"{file} lacks the tensor {name}, which the index puts there")
                self.where[name] = file
        self.where = dict(sorted(self.where.items()))

    def _listing(self) -> dict[Path, list[str] | None]:
        """The files, and which of their tensors count; all if ``None``."""
        single, index = self.folder / SINGLE, self.folder / INDEX
        if single.is_file():
            return {single: None}
        if not index.is_file():
            others = sorted(file.name for file in self.folder.glob("*.safetensors"))
            held = f"it holds {', '.join(others[:3])}, which" if others else "pickles"
            raise ValueError(
                f"folder {self.folder} has neither {SINGLE} nor {INDEX} ({held} are not read)"
            )
        table = read_json(index).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise ValueError(f"{index} has no weight_map, from tensor names to files")
        listing: dict[Path, list[str] | None] = {}
        for name, file in sorted(table.items()):
            if not isinstance(file, str) or Path(file).name != file or "\\" in file:
                raise ValueError(f"{index} puts {name} into {file!r}, which is no file beside it")
            if (path := self.folder / file) not in listing and not path.is_file():
                raise ValueError(f"{self.folder} has no {file}, which its index names")
            names = listing.setdefault(path, [])
            assert names is not None
            names.append(name)
        return listing

    @contextmanager
    def _opened(self, file: Path) -> Iterator[Any]:
        try:
            with safe_open(file, "pt") as handle:
                yield handle
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or cut short: {error}") from None
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error.strerror or error}") from None

    @property
    def files(self) -> list[Path]:
        """The files, in order."""
        return sorted(set(self.where.values()))

    def headers(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and safetensors' name of the dtype of every tensor, from the headers."""
        found = {}
        for file in self.files:
            with self._opened(file) as handle:
                for name in [name for name, at in self.where.items() if at == file]:
                    part = handle.get_slice(self._stored.get(name, name))
                    found[name] = (tuple(part.get_shape()), part.get_dtype())
        return {name: found[name] for name in self.where}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Some tensors, copied into memory."""
        started = time.perf_counter()
        by_file: dict[Path, list[str]] = defaultdict(list)
        for name in names:
            by_file[self.where[name]].append(name)
        tensors = {}
        for file, wanted in by_file.items():
            with self._opened(file) as handle:
                for name in wanted:
                    tensors[name] = handle.get_tensor(self._stored.get(name, name)).clone()
                    self.bytes_read += tensors[name].nbytes
        self.seconds += time.perf_counter() - started
        return tensors

    @property
    def dtype(self) -> torch.dtype:
        """The one that most weights have; of equally frequent ones the widest.

        Raises:
            ValueError: a tensor of a dtype that slr does not read.
        """
        count: Counter[str] = Counter()
        for name, (shape, dtype) in self.headers().items():
            if dtype not in FLOATS and dtype.startswith("F"):
                raise ValueError(
                    f"{self.folder}: tensor {name} has dtype {dtype}; slr reads weights of 16, 32 "
                    "or 64 bits, and not the scales of smaller ones: convert the checkpoint first"
                )
            count[dtype] += torch.Size(shape).numel()
        known = [dtype for dtype in FLOATS if dtype in count]
        if not known:
            raise ValueError(f"folder {self.folder} holds no floating-point tensor")
        return FLOATS[max(known, key=lambda dtype: count[dtype])]

    def fit(self, expected: Mapping[str, Tensor], prefix: str, tied: Mapping[str, str]) -> None:
        """Check that the tensors are those of a model, and call them as it does.

        As transformers does, the names of a base model get the prefix of a causal one.

        Args:
            expected: the model's tensors, on the meta device.
            prefix: of the base model's in them, as ``"model"``.
            tied: names that share the tensor of another.

        Raises:
            ValueError: tensors that are missing, that the model has no place for (a head, an
                adapter), or of another shape or kind of dtype.
        """
        for stored in list(self.where):
            name = stored.removeprefix(f"{prefix}.")
            name = name if name in expected else f"{prefix}.{stored}"
            if name == stored or name not in expected:
                continue
            if name in self.where:
                raise ValueError(f"{self.folder} holds both {stored} and {name}; remove one")
            self.where[name], self._stored[name] = self.where.pop(stored), stored
        self.where = dict(sorted(self.where.items()))
        for name in self.where:
            if name not in expected and not re.search(INERT, name):
                raise ValueError(f"{self.folder} holds the tensor {_why(name)}")
        missing = [n for n in expected if n not in self.where and tied_to(n, tied, self) is None]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(f"{self.folder} lacks the tensor {missing[0]}{more}")
        for name, (shape, dtype) in self.headers().items():
            wanted = expected.get(name)
            if wanted is None:
                continue
            if tuple(wanted.shape) != shape:
                raise ValueError(
                    f"{self.folder}: tensor {name} has shape {shape}, "
                    f"but config.json asks for {tuple(wanted.shape)}"
                )
            check_dtype(self.folder, name, dtype, wanted)


def check_dtype(folder: Path, name: str, dtype: str, wanted: Tensor) -> None:
    """Raise ValueError if safetensors' `dtype` of a tensor is not of the kind that is wanted."""
    allowed = tuple(FLOATS) if wanted.is_floating_point() else (PACKED[wanted.dtype],)
    if dtype not in allowed:
        kinds = "F32, F16 or BF16" if wanted.is_floating_point() else allowed[0]
        raise ValueError(f"{folder}: tensor {name} has dtype {dtype}; it must be {kinds}")


def _why(name: str) -> str:
    """A tensor that has no place in a causal language model, and what to do about it."""
    for added in WRAPPED:
        if name.startswith(added):
            return f"{name}; take the prefix {added!r} from all names"
    if "lora_" in name:
        return f"{name}; merge the adapter into the model first"
    return (
        f"{name}, for which a causal language model of its config.json has no place; it would be "
        "lost, so remove it from the files first if it is not wanted"
    )


def tied_to(name: str, tied: Mapping[str, str], files: TensorFiles) -> str | None:
    """The stored tensor that one which is not stored shares, if any.

    Args:
        name: of a tensor of the model.
        tied: names that share the tensor of another.
        files: with what is stored.
    """
    other = tied.get(name) or next((n for n, source in tied.items() if source == name), None)
    return other if other in files.where else None
