"""Checkpoint folders: find and load them, dense or compressed.

A compressed folder is a Hugging Face checkpoint: ``config.json`` (as :mod:`slr.model.format` writes
it), one safetensors file for each decoder block and one for the rest, their index, the tokenizer
and a model card.  A compressed layer is stored as ``values``, ``bitmask``
(:mod:`slr.layer.packing`), ``B`` and ``A``; everything else as it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from slr.checkpoint import named
from slr.checkpoint.digests import SUMS, check_sums
from slr.layer.linear import SLRLinear
from slr.matrix.checks import check_finite
from slr.model.edges import check_config, reading
from slr.model.stream import ADAPTER, Stream, knows
from slr.model.tensors import FLOATS, TensorFiles, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "about", "context", "load", "load_tokenizer", "read_raw", "resolve", "shard_name",
    "small_files",
]  # fmt: skip

COPIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "chat_template*", "generation_config.json", "LICENSE*",
)  # fmt: skip


def resolve(model: str | Path, download: bool = True) -> Path:
    """The folder of a checkpoint.

    Args:
        model: a name of :data:`slr.checkpoint.named.NAMES`: ``"tiny"``, the embedded model, or
            ``"smollm2"``; a folder; a GGUF file, which is converted once into a cache; or
            ``OWNER/NAME`` on the Hugging Face hub, which is downloaded to its cache (safetensors
            and small files only).
        download: whether it may be; else only what is in the cache counts.

    Raises:
        ValueError: there is no such thing, or it is no safetensors checkpoint.
    """
    folder = named.place(model) or Path(model)
    _refuse_unfinished(folder)
    if not folder.is_dir():
        if str(model).count("/") != 1 or str(model).startswith((".", "/", "~")):
            names = ", ".join(map(repr, named.NAMES))
            raise ValueError(
                f"model {str(model)!r} is neither {names}, nor a folder, nor a GGUF file, nor a "
                "hub name OWNER/NAME"
            )
        folder = _from_hub(str(model), download)
    if not (folder / "config.json").is_file():
        raise ValueError(f"folder {folder} is no checkpoint: it has no config.json")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"folder {folder} has no .safetensors file (pickles are not read)")
    return folder


def _refuse_unfinished(folder: Path) -> None:
    """Raise ValueError if a run that was stopped has left its work there, and no more."""
    if (folder / "config.json").is_file():
        return
    for work in (folder, Path(f"{folder}.partial")):
        if work.suffix == ".partial" and (work / "journal.json").is_file():
            raise ValueError(
                f"{work} is what a run has left that is not done; give that command again, and it "
                f"goes on and ends with {work.with_suffix('')}"
            )


def _from_hub(name: str, download: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    allow = ["*.safetensors", "*.json", SUMS, "README.md", *COPIED]
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


def small_files(folder: Path) -> list[Path]:
    """The files of a source that its result gets as they are: tokenizer, template, licence.

    Raises:
        ValueError: one that cannot be read, or a link to nothing.
    """
    found = {file for pattern in COPIED for file in folder.glob(pattern) if not file.is_dir()}
    for file in found:
        try:
            file.open("rb").close()
        except OSError as error:
            raise ValueError(
                f"{file} is to be copied, but cannot be read ({error.strerror}); mend it or remove "
                "it"
            ) from None
    return sorted(found)


def read_raw(folder: Path) -> dict:
    """``config.json`` as it is, checked by :func:`slr.model.edges.check_config`."""
    file = folder / "config.json"
    return check_config(read_json(file), file)


def context(folder: Path, most: int = 2048) -> int:
    """Tokens in an evaluation window by default: the longest context, 2048 at most."""
    found = read_raw(folder).get("max_position_embeddings", most)
    if not isinstance(found, int) or found < 2:
        raise ValueError(
            f"{folder / 'config.json'}: 'max_position_embeddings' is {found!r}; it must be a "
            "number of tokens"
        )
    return min(most, found)


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
    with reading(f"the tokenizer of {folder}"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def load(
    model: str | Path,
    dtype: torch.dtype | None = None,
    *,
    cache: bool = False,
    verify: bool = False,
) -> PreTrainedModel:
    """Load a checkpoint, dense or compressed: ``AutoModelForCausalLM.from_pretrained``, checked.

    Args:
        model: as for :func:`resolve`.
        dtype: of the weights; when ``None`` the configuration's, else the one most have.
        cache: whether compressed layers also hold their sparse part unpacked, which is faster for
            few tokens on a CPU and takes the memory of the dense model and more.
        verify: compare every byte with the digests of the folder, see :func:`slr.verify`.

    Returns:
        The model in evaluation mode on the CPU; compressed layers are
        :class:`~slr.layer.linear.SLRLinear`.

    Raises:
        ValueError: no checkpoint, a damaged one, tensors that do not fit the configuration, or
            values that are not finite.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    folder = resolve(model)
    dtype = dtype or _dtype(folder)
    if not (folder / ADAPTER).exists() and knows(folder):
        Stream(folder)  # as compressing and streaming look at it
    if verify:
        check_sums(folder)
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with reading(f"folder {folder}"):
            found: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, local_files_only=True, use_safetensors=True,
                output_loading_info=True, trust_remote_code=False,
            )  # fmt: skip
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    loaded, info = found
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise ValueError(
                f"folder {folder} does not fit its configuration: {kind.replace('_', ' ')}, as "
                f"{min(map(str, info[kind]))}"
            )
    for name, value in loaded.named_parameters() if about(folder) is None else ():
        check_finite(f"{folder}: tensor {name}", value.detach())
    for layer in loaded.modules() if cache else ():
        if isinstance(layer, SLRLinear):
            layer.cache_()
    return loaded.eval()


def _dtype(folder: Path) -> torch.dtype:
    """The configuration's, else the one that most weights have; the files are looked at anyway."""
    stored, raw = TensorFiles(folder).dtype, read_raw(folder)
    given = raw.get("dtype") or raw.get("torch_dtype")
    known = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS.values()}
    if given is not None and given not in known:
        raise ValueError(f"{folder}: dtype {given!r} is unknown; it must be {', '.join(known)}")
    return stored if given is None else known[given]


def shard_name(index: int, total: int) -> str:
    """File of one block: ``model-00001-of-00007.safetensors``.

    >>> shard_name(0, 7)
    'model-00001-of-00007.safetensors'
    """
    return f"model-{index + 1:05d}-of-{total:05d}.safetensors"
