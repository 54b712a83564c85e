"""A checkpoint read one decoder block at a time.

The model is built without weights; a module's tensors are read when it is needed and let go
afterwards, so that a model of any size passes through the memory of one block.

Book: how to use this book.
"""

from __future__ import annotations

import ctypes
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from slr.layer.linear import SLRLinear
from slr.model import hf
from slr.model.blocks import Inputs, blocks_name, decoder_blocks, walk
from slr.model.edges import check_config, check_dtypes, reading

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["FAMILIES", "Stream", "TensorFiles", "read_config", "read_json"]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "opt")
INDEX = "model.safetensors.index.json"


class TensorFiles:
    """The safetensors files of a folder as one table of tensors.

    Args:
        folder: with ``model.safetensors``, or shards and their index.

    Attributes:
        where: file of each tensor name.
        bytes_read: so far.
        seconds: spent reading, so far.

    Raises:
        ValueError: no such file, a damaged or truncated one, or one that the index misses.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.bytes_read, self.seconds = folder, 0, 0.0
        self.where: dict[str, Path] = {}
        for file, names in self._listing().items():
            if not file.is_file():
                raise ValueError(f"{folder} has no {file.name}, which its index names")
            with _opened(file) as handle:
                there = set(handle.keys())
                check_dtypes(file, handle)
            for name in there if names is None else names:
                if name not in there:
                    raise ValueError(f"{file} lacks the tensor {name}, which the index puts there")
                self.where[name] = file

    def _listing(self) -> dict[Path, list[str] | None]:
        index = self.folder / INDEX
        if not index.is_file():
            files = sorted(self.folder.glob("*.safetensors"))
            files = [f for f in files if f.name == "model.safetensors"] or files
            return dict.fromkeys(files)
        listing: dict[Path, list[str]] = defaultdict(list)
        for name, file in read_json(index).get("weight_map", {}).items():
            listing[self.folder / file].append(name)
        return dict(listing)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, from the header."""
        with _opened(self.where[name]) as handle:
            return tuple(handle.get_slice(name).get_shape())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, from the headers."""
        found = {}
        for file in set(self.where.values()):
            with _opened(file) as handle:
                for name in handle.keys():  # noqa: SIM118
                    found[name] = tuple(handle.get_slice(name).get_shape())
        return {name: found[name] for name in self.where}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Some tensors, copied into memory."""
        started = time.perf_counter()
        by_file: dict[Path, list[str]] = defaultdict(list)
        for name in names:
            by_file[self.where[name]].append(name)
        tensors = {}
        for file, wanted in by_file.items():
            with _opened(file) as handle:
                for name in wanted:
                    tensors[name] = handle.get_tensor(name).clone()
                    self.bytes_read += tensors[name].nbytes
        self.seconds += time.perf_counter() - started
        return tensors

    @property
    def dtype(self) -> torch.dtype:
        """Of the first tensor of floating point."""
        for name, file in self.where.items():
            with _opened(file) as handle:
                value = handle.get_slice(name)[:1] if handle.get_slice(name).get_shape() else None
            if value is not None and value.is_floating_point():
                return value.dtype
        raise ValueError(f"folder {self.folder} holds no floating-point tensor")


def _opened(file: Path):
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut short: {error}") from None


def read_json(file: Path) -> dict:
    """A JSON file that holds a mapping.  Raises ValueError if it is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} is no mapping; it must be one, from names to values")
    return found


def read_config(folder: Path) -> tuple[PreTrainedConfig, dict | None]:
    """The dense model's configuration, and what a compressed folder says of itself.

    Raises:
        ValueError: not JSON, an unknown model family, or a quantised model.
    """
    from transformers import AutoConfig

    file = folder / "config.json"
    raw = check_config(read_json(file), file)
    kind = raw.get("slr", {}).get("dense", raw).get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"model type {kind!r} is not supported; slr knows {', '.join(FAMILIES)}")
    with reading(str(file)):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    about = getattr(config, "quantization_config", None)
    return config, about


class Stream:
    """A checkpoint folder, dense or compressed, whose modules are filled and emptied by name.

    Args:
        folder: of the checkpoint.
        device: where tensors go.
        dtype: of the weights; as stored when ``None``.

    Attributes:
        model: in evaluation mode; parameters are on the meta device where not filled.
        files: its tensors.

    Raises:
        ValueError: see :func:`read_config` and :class:`TensorFiles`; or tensors that are missing
            or of another shape than the configuration says.
    """

    def __init__(
        self, folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> None:
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

        self.folder, self.device = folder, torch.device(device)
        self.config, self.about = read_config(folder)
        self.files = TensorFiles(folder)
        self.dtype = dtype or self.files.dtype
        with init_empty_weights(include_buffers=False), reading(str(folder / "config.json")):
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(
                self.config, dtype=self.dtype, trust_remote_code=False
            ).eval()
        if self.about is not None:
            hf.place(self.model, self.about["layers"], self.dtype)
        for module in self.model.modules():  # rotary tables and the like, which no file holds
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device.type != "meta":
                    module._buffers[name] = buffer.to(self.device)
        self.blocks_name = blocks_name(self.model)
        self.blocks = decoder_blocks(self.model)
        self._check()

    def _check(self) -> None:
        expected = {name: tuple(value.shape) for name, value in self.model.state_dict().items()}
        shapes = self.files.shapes()
        tied = self._tied()
        missing = [n for n in expected if n not in shapes and tied.get(n) not in shapes]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(f"{self.folder} lacks the tensor {missing[0]}{more}")
        for name, shape in expected.items():
            if name in shapes and shapes[name] != shape:
                raise ValueError(
                    f"{self.folder}: tensor {name} has shape {shapes[name]}, "
                    f"but config.json asks for {shape}"
                )

    def _tied(self) -> dict[str, str]:
        """Names that share the tensor of another name."""
        if not getattr(self.config, "tie_word_embeddings", False):
            return {}
        return dict(getattr(self.model, "_tied_weights_keys", None) or {})

    def block(self, index: int) -> tuple[str, nn.Module]:
        """Name and module of one decoder block."""
        return f"{self.blocks_name}.{index}", self.blocks[index]

    def filled(
        self, *inputs: Inputs | None, fill: Callable[[str, nn.Module], None] | None = None
    ) -> Iterator[tuple[int, str, nn.Module]]:
        """The blocks in order, each with its weights while it is used; see :func:`walk`.

        Args:
            inputs: to advance from block to block.
            fill: instead of :meth:`fill`.
        """
        return walk(self.model, *inputs, fill=fill or self.fill, empty=self.empty)

    def outside(self) -> dict[str, nn.Module]:
        """The modules with tensors that are in no decoder block, by name."""
        inside = f"{self.blocks_name}."
        found = {}
        for name, module in self.model.named_modules():
            direct = list(module.parameters(recurse=False)) + list(module.buffers(recurse=False))
            if direct and not name.startswith(inside):
                found[name] = module
        return found

    def fill_outside(self) -> None:
        """Fill all modules with tensors that are in no decoder block."""
        for name, module in self.outside().items():
            self.fill(name, module)

    def empty_outside(self) -> None:
        """Let go of them."""
        for module in self.outside().values():
            self.empty(module)

    def fill(self, name: str, module: nn.Module) -> None:
        """Read the tensors of a module from the files."""
        tied = self._tied()
        wanted = {}
        for inner in module.state_dict():
            full = f"{name}.{inner}"
            wanted[inner] = full if full in self.files.where else tied[full]
        self.put(module, self.files.read(set(wanted.values())), wanted)

    def put(self, module: nn.Module, tensors: dict[str, Tensor], wanted: dict[str, str]) -> None:
        """Give a module `tensors`, by the names of its own tensors, and check what is packed."""
        for inner, full in wanted.items():
            path, _, leaf = inner.rpartition(".")
            owner = module.get_submodule(path)
            value = tensors[full].to(self.device)
            value = value.to(self.dtype) if value.is_floating_point() else value
            if leaf in owner._parameters:
                owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
            else:
                owner._buffers[leaf] = value
        for inner_module in module.modules():
            if isinstance(inner_module, SLRLinear):
                inner_module.check_()

    def empty(self, module: nn.Module) -> None:
        """Let go of a module's parameters, and of the memory that they took."""
        for owner in module.modules():
            if isinstance(owner, SLRLinear):
                owner.to("meta")
                continue
            for name, value in owner._parameters.items():
                if value is not None:
                    owner._parameters[name] = nn.Parameter(value.data.to("meta"), False)
        _trim()


def _trim() -> None:
    """Return freed memory to the system.

    glibc keeps freed pieces below 32 MB, as most weights of a small model are, and leaves holes
    between them: a run would grow by some of them in every block.
    """
    with suppress(OSError, AttributeError, TypeError):  # another C library, or none
        ctypes.CDLL(None).malloc_trim(0)
