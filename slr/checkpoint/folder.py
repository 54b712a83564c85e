"""Checkpoint folders: find and load them, dense or compressed.

A compressed folder is a Hugging Face checkpoint: ``config.json`` (as :mod:`slr.model.format` writes
it), one safetensors file for each decoder block and one for the rest, their index, the tokenizer
and a model card.  A compressed layer is stored as ``values``, ``bitmask``
(:mod:`slr.layer.packing`), ``B`` and ``A``; everything else as it was.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from slr import tiny
from slr.layer.linear import SLRLinear
from slr.model.stream import TensorFiles, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "COPIED", "about", "context", "fingerprint", "load", "load_tokenizer", "read_raw", "resolve",
    "shard_name",
]  # fmt: skip

COPIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "chat_template*", "generation_config.json", "LICENSE*",
)  # fmt: skip
SAMPLES, SAMPLE = 16, 1 << 16  # places of a file that its fingerprint reads, bytes at each


def resolve(model: str | Path, download: bool = True) -> Path:
    """The folder of a checkpoint.

    Args:
        model: ``"tiny"`` for the embedded model, a folder, or ``OWNER/NAME`` on the Hugging
            Face hub, which is downloaded to its cache (safetensors and small files only).
        download: whether it may be; else only what is in the cache counts.

    Raises:
        ValueError: there is no such thing, or it is no safetensors checkpoint.
    """
    folder = tiny.path() if str(model) == "tiny" else Path(model)
    if not folder.is_dir():
        if str(model).count("/") != 1 or str(model).startswith((".", "/", "~")):
            raise ValueError(
                f"model {str(model)!r} is neither 'tiny', nor a folder, nor a hub name OWNER/NAME"
            )
        folder = _from_hub(str(model), download)
    if not (folder / "config.json").is_file():
        raise ValueError(f"folder {folder} is no checkpoint: it has no config.json")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"folder {folder} has no .safetensors file (pickles are not read)")
    return folder


def _from_hub(name: str, download: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    allow = ["*.safetensors", "*.json", *COPIED]
    try:
        found = snapshot_download(
            name, allow_patterns=allow, ignore_patterns=["consolidated*", "original/*"],
            local_files_only=not download,
        )  # fmt: skip
        return Path(found)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model {name!r} is no folder here, and the hub did not give it ({first}); it needs "
            "the network once, `hf auth login` if the model is gated, or the path of a folder"
        ) from None


def read_raw(folder: Path) -> dict:
    """``config.json`` as it is."""
    return read_json(folder / "config.json")


def context(folder: Path, most: int = 2048) -> int:
    """Tokens in an evaluation window by default: the longest context, 2048 at most."""
    return min(most, int(read_raw(folder).get("max_position_embeddings", most)))


def about(folder: Path) -> dict | None:
    """Source, recipe and layers of a compressed folder; ``None`` for a dense one."""
    return read_raw(folder).get("slr")


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, dense or compressed.

    Args:
        model: as for :func:`resolve`.

    Raises:
        ValueError: no checkpoint, or it has no tokenizer.
    """
    from transformers import AutoTokenizer

    folder = resolve(model)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")) and (
        not (folder / "vocab.json").is_file()
    ):
        raise ValueError(f"folder {folder} has no tokenizer (tokenizer.json)")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def load(
    model: str | Path, dtype: torch.dtype | None = None, *, cache: bool = False
) -> PreTrainedModel:
    """Load a checkpoint, dense or compressed: ``AutoModelForCausalLM.from_pretrained``, checked.

    Args:
        model: as for :func:`resolve`.
        dtype: of the weights; as stored when ``None``.
        cache: whether compressed layers also hold their sparse part unpacked, which is faster for
            few tokens on a CPU and takes the memory of the dense model and more.

    Returns:
        The model in evaluation mode on the CPU; compressed layers are
        :class:`~slr.layer.linear.SLRLinear`.

    Raises:
        ValueError: no checkpoint, a damaged one, or tensors that do not fit the configuration.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    folder = resolve(model)
    _check_files(folder)
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        found: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or "auto", local_files_only=True, use_safetensors=True,
            output_loading_info=True,
        )  # fmt: skip
    except SafetensorError as error:
        raise ValueError(f"folder {folder} has a damaged safetensors file: {error}") from None
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    loaded, info = found
    wrong = sorted(map(str, info["missing_keys"] or info["mismatched_keys"]))
    if wrong:
        raise ValueError(f"folder {folder} does not fit its configuration: {wrong[0]}, …")
    for layer in loaded.modules() if cache else ():
        if isinstance(layer, SLRLinear):
            layer.cache_()
    return loaded.eval()


def _check_files(folder: Path) -> None:
    """Raise ValueError unless the files can be read and hold what a compressed folder lists."""
    notes, files = about(folder), TensorFiles(folder)
    for name in {} if notes is None else notes["layers"]:
        for part in ("values", "bitmask", "B", "A"):
            if f"{name}.{part}" not in files.where:
                raise ValueError(f"folder {folder} lacks the tensor {name}.{part}")


def fingerprint(folder: Path) -> dict:
    """Digests that tell one source from another: the configuration, and samples of each file.

    Cost: reads 1 MiB of each safetensors file.
    """
    found = {}
    for file in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        size = file.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with file.open("rb") as stream:
            for i in range(SAMPLES):
                stream.seek(max(0, size - SAMPLE) * i // (SAMPLES - 1))
                digest.update(stream.read(SAMPLE))
        found[file.name] = digest.hexdigest()
    return found


def shard_name(index: int, total: int) -> str:
    """File of one block: ``model-00001-of-00007.safetensors``.

    >>> shard_name(0, 7)
    'model-00001-of-00007.safetensors'
    """
    return f"model-{index + 1:05d}-of-{total:05d}.safetensors"
