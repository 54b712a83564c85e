"""A GGUF file becomes an ordinary checkpoint: its tensors dequantised, its tokenizer beside them.

The file is read by transformers and the ``gguf`` package.  What its quantisation took away stays
away: the dense model *is* the dequantised one, and the configuration and the card say so.

Book: chapter 10.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from slr.checkpoint.digests import sha256
from slr.checkpoint.journal import Journal
from slr.checkpoint.place import target
from slr.layer.compiled import cache_folder
from slr.model.edges import reading
from slr.model.stream import FAMILIES

__all__ = ["ORIGIN", "convert", "converted", "is_gguf", "told"]

ORIGIN = "dequantised_from"  # in config.json: what a converted checkpoint was
WEIGHTS = "model.safetensors"
FORMAT = 1  # of what this module writes; another gives the cache another folder
MAGIC = b"GGUF"


def is_gguf(model: str | Path) -> bool:
    """Whether a model is named as a GGUF file, whether or not it is there."""
    return Path(model).suffix.lower() == ".gguf" and not Path(model).is_dir()


def converted(file: str | Path) -> Path:
    """The folder in the cache that a GGUF file is, or will be once converted.

    Raises:
        ValueError: as :func:`check`.

    Cost: reads every byte of the file, for its SHA-256.
    """
    file = check(file)
    stat = file.stat()
    return (
        cache_folder()
        / f"{file.stem}-{_digest(file, stat.st_size, stat.st_mtime_ns)[:12]}-{FORMAT}"
    )


@functools.lru_cache
def _digest(file: Path, size: int, changed: int) -> str:
    """SHA-256 of a file, read once while it does not change."""
    return sha256(file)


def check(file: str | Path) -> Path:
    """The file, if it is one whole GGUF file.

    Raises:
        ValueError: there is none, it is another kind of file, or a part of a split one.
    """
    file = Path(file)
    try:
        with file.open("rb") as stream:
            start = stream.read(len(MAGIC))
    except OSError as error:
        raise ValueError(f"GGUF file {str(file)!r} cannot be read: {error.strerror}") from None
    if start != MAGIC:
        raise ValueError(f"{file} is no GGUF file: it does not begin with {MAGIC.decode()}")
    if "-of-" in file.stem and file.stem.rpartition("-of-")[2].isdecimal():
        raise ValueError(f"{file} is one part of a split GGUF file; merge the parts first")
    return file


@torch.no_grad()
def convert(file: str | Path, out: str | Path, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a GGUF file as a checkpoint folder of 16-bit safetensors.

    Args:
        file: a GGUF file of a model family that slr knows, quantised or not.
        out: folder to make; it appears whole or not at all.
        dtype: of the weights that are written.

    Returns:
        `out`.

    Raises:
        ValueError: no such file, one that transformers cannot read, another family, or `out` taken.
        ImportError: the package ``gguf`` is missing.

    Memory: the whole model in float32, for transformers dequantises all of it at once.
    """
    import slr

    _needs_gguf()
    file, out = check(file), target(out)
    key = {"slr": slr.__version__, "gguf": sha256(file), "dtype": str(dtype), "format": FORMAT}
    with Journal(out, key) as journal:
        with reading(f"GGUF file {file}"):
            model, tokenizer, types = _read(file, dtype)
        kind = model.config.model_type
        if kind not in FAMILIES:
            raise ValueError(
                f"GGUF file {file}: model type {kind!r} is not supported; slr knows "
                f"{', '.join(FAMILIES)}"
            )
        tied = set(getattr(model, "_tied_weights_keys", None) or {})
        keep = tied if model.config.tie_word_embeddings else set()
        journal.add(WEIGHTS, {k: v for k, v in model.state_dict().items() if k not in keep})
        tokenizer.save_pretrained(room := journal.room())
        for small in sorted(room.iterdir()):
            journal.add_copy(small)
            small.unlink()
        config = json.loads(model.config.to_json_string(use_diff=False))
        for name in ("_name_or_path", "quantization_config"):
            config.pop(name, None)
        config["architectures"] = [type(model).__name__]
        config[ORIGIN] = {"file": file.name, "sha256": key["gguf"], "types": types}
        return journal.finish(json.dumps(config, indent=1, allow_nan=False) + "\n")


def _needs_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ImportError("reading GGUF files needs the package gguf: pip install gguf") from None


def _read(file: Path, dtype: torch.dtype) -> tuple[Any, Any, dict[str, int]]:
    """Model, tokenizer, and how many tensors there are of each type of GGUF's."""
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    options: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    more: dict[str, Any] = {"dtype": dtype}
    try:
        from transformers import GgufConfig
    except ImportError:  # earlier versions always dequantise
        pass
    else:
        more["quantization_config"] = GgufConfig(dequantize=True)
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        types = Counter(tensor.tensor_type.name for tensor in GGUFReader(file).tensors)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, trust_remote_code=False, **options)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, trust_remote_code=False, **options, **more
        )
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    return model, tokenizer, dict(sorted(types.items()))


def told(config: dict) -> str | None:
    """What a converted checkpoint's configuration says of where it comes from, as a sentence.

    >>> told({"dequantised_from": {"file": "a.gguf", "types": {"F32": 9, "Q4_1": 56}}})
    'The source is dequantised from a.gguf (F32, Q4_1): what that rounding lost is lost already.'
    """
    origin = config.get(ORIGIN)
    if not isinstance(origin, dict) or not isinstance(origin.get("types"), dict):
        return None
    types = ", ".join(map(str, origin["types"]))
    return (
        f"The source is dequantised from {origin.get('file')} ({types}): what that rounding lost "
        "is lost already."
    )
