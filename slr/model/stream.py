"""A checkpoint read one decoder block at a time.

The model is built without weights; a module's tensors are read when it is needed and let go
afterwards, so that a model of any size passes through the memory of one block.

Book: how to use this book.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slr.layer.linear import SLRLinear
from slr.layer.rounded import factor
from slr.matrix.checks import check_finite
from slr.matrix.rounding import Grid
from slr.model import hf
from slr.model.blocks import Inputs, blocks_name, decoder_blocks, walk
from slr.model.edges import check_config, reading
from slr.model.tensors import TensorFiles, read_json, tied_to

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["ADAPTER", "FAMILIES", "Stream", "knows", "read_config"]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "opt")
ADAPTER = "adapter_config.json"  # PEFT's


def _kind(raw: dict) -> str | None:
    return raw.get("slr", {}).get("dense", raw).get("model_type")


def knows(folder: Path) -> bool:
    """Whether the model of a folder is of one of :data:`FAMILIES`."""
    file = folder / "config.json"
    return _kind(check_config(read_json(file), file)) in FAMILIES


def read_config(folder: Path) -> tuple[PreTrainedConfig, dict | None]:
    """The dense model's configuration, and what a compressed folder says of itself.

    Raises:
        ValueError: not JSON, an unknown model family, a quantised model, or one with an adapter.
    """
    from transformers import AutoConfig

    if (folder / ADAPTER).exists():
        raise ValueError(
            f"folder {folder} holds an adapter ({ADAPTER}) beside the model; merge it into the "
            "weights (PEFT's merge_and_unload), or move it away to take the model without it"
        )
    file = folder / "config.json"
    raw = check_config(read_json(file), file)
    kind = _kind(raw)
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
        dtype: of the weights; when ``None`` the configuration's, else the one most have.

    Attributes:
        model: in evaluation mode; parameters are on the meta device where not filled.
        files: its tensors.

    Raises:
        ValueError: see :func:`read_config` and :class:`~slr.model.tensors.TensorFiles`.
    """

    def __init__(
        self, folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> None:
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

        self.folder, self.device = folder, torch.device(device)
        self.config, self.about = read_config(folder)
        self.files = TensorFiles(folder)
        stored = self.files.dtype
        self.dtype = dtype or getattr(self.config, "dtype", None) or stored
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
        self.tied = self._tied()
        self.files.fit(self.model.state_dict(), self.model.base_model_prefix, self.tied)

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
        wanted: dict[str, str] = {}
        for inner in module.state_dict():
            full = f"{name}.{inner}"
            stored = full if full in self.files.where else tied_to(full, self.tied, self.files)
            assert stored is not None, full  # looked at when the stream was made
            wanted[inner] = stored
        self.put(module, self.files.read(dict.fromkeys(wanted.values())), wanted)

    def put(self, module: nn.Module, tensors: dict[str, Tensor], wanted: dict[str, str]) -> None:
        """Give a module `tensors`, by the names of its own tensors, and check what is packed."""
        for inner, full in wanted.items():
            path, _, leaf = inner.rpartition(".")
            owner = module.get_submodule(path)
            value = tensors[full].to(self.device)
            if value.is_floating_point():
                value = value.to(self.dtype)
                check_finite(f"{self.folder}: tensor {full}", value)
            if leaf in owner._parameters:
                owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
            else:
                owner._buffers[leaf] = value
        for inner_module in module.modules():
            if isinstance(inner_module, SLRLinear):
                inner_module.check_()

    def factor(self, name: str, part: str) -> Tensor:
        """B or A of a compressed layer, in the dtype of the folder.

        Args:
            name: of the layer.
            part: ``"A"`` or ``"B"``.
        """
        assert self.about is not None
        grid, full = self.about["layers"][name].get("factors"), f"{name}.{part}"
        if grid is None:
            return self.files.read([full])[full]
        found = self.files.read([f"{full}_codes", f"{full}_scale"])
        codes, scale = found[f"{full}_codes"], found[f"{full}_scale"]
        return factor(part, codes, scale, Grid.parse(grid)).to(self.dtype)

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
