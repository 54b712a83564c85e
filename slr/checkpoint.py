"""Checkpoint folders: find, load and save them, dense or compressed.

A compressed folder holds ``config.json``, one ``model.safetensors`` and the tokenizer.  Of a
compressed layer it stores

=============== ================= ==========================================
tensor          shape             what
=============== ================= ==========================================
``….values``    (kept,)           S on the mask, row by row, model dtype
``….bitmask``   (⌈m n / 8⌉,)      the mask, one bit an entry, uint8
``….B`` ``….A`` (m, k) (k, n)     the low-rank factors, model dtype
=============== ================= ==========================================

and everything else as it was.  ``config.json`` names the model type ``slr``, which only this
package knows: another loader stops with an error instead of filling in random weights.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from slr.linear import SLRLinear
from slr.patterns import parse

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "about",
    "check_free",
    "context",
    "load",
    "load_tokenizer",
    "pack_mask",
    "resolve",
    "save",
    "unpack_mask",
]

FORMAT = 1


def resolve(model: str | Path) -> Path:
    """The folder that `model` names: the embedded model for ``"tiny"``, else the folder itself.

    Raises:
        ValueError: no such folder, or it is no safetensors checkpoint.
    """
    from slr import tiny

    folder = tiny.path() if str(model) == "tiny" else Path(model)
    if not folder.is_dir():
        raise ValueError(f"model {str(model)!r} is neither 'tiny' nor a folder")
    if not (folder / "config.json").is_file():
        raise ValueError(f"folder {folder} is no checkpoint: it has no config.json")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"folder {folder} has no .safetensors file (pickles are not read)")
    return folder


def check_free(out: str | Path) -> Path:
    """Raise ValueError unless `out` does not exist yet or is an empty folder; return its path."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already; give the name of a new folder")
    return out


def _config(folder: Path) -> dict:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / 'config.json'} is not valid JSON: {error}") from None


def context(folder: Path) -> int:
    """Tokens in an evaluation window by default: the longest context, 2048 at most."""
    return min(2048, int(_config(folder).get("max_position_embeddings", 2048)))


def about(folder: Path) -> dict | None:
    """Source, recipe and layers of a compressed folder; ``None`` for a dense one."""
    return _config(folder).get("slr")


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, dense or compressed.

    Args:
        model: ``"tiny"`` or a folder.

    Raises:
        ValueError: no checkpoint, or it has no ``tokenizer.json``.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = resolve(model)
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"folder {folder} has no tokenizer.json")
    # transformers does not know the model type of a compressed folder's config.json.
    kind = AutoTokenizer if about(folder) is None else PreTrainedTokenizerFast
    return kind.from_pretrained(folder, local_files_only=True)


def load(model: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a checkpoint, dense or compressed, for evaluation.

    Args:
        model: ``"tiny"`` or a folder.
        dtype: of the weights; as stored when ``None``.

    Returns:
        The model in evaluation mode on the CPU; compressed layers are
        :class:`~slr.linear.SLRLinear`.

    Raises:
        ValueError: no checkpoint, a damaged one, or tensors that do not fit the configuration.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    folder = resolve(model)
    notes = about(folder)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        if notes is None:
            return AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype or "auto", local_files_only=True, use_safetensors=True
            ).eval()
        return _load_compressed(folder, notes, dtype).eval()
    except SafetensorError as error:
        raise ValueError(f"folder {folder} has a damaged safetensors file: {error}") from None
    finally:
        if bars:
            logging.enable_progress_bar()


def _load_compressed(folder: Path, notes: dict, dtype: torch.dtype | None) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    if notes.get("format") != FORMAT:
        raise ValueError(f"folder {folder} has format {notes.get('format')}; this reads {FORMAT}")
    plain = {k: v for k, v in _config(folder).items() if k not in ("slr", "model_type")}
    config = AutoConfig.for_model(notes["model_type"], **plain)
    tensors = load_file(folder / "model.safetensors")
    stored = tensors[next(iter(tensors))].dtype
    dtype = dtype or getattr(torch, str(plain.get("dtype", stored)).removeprefix("torch."))
    loaded = AutoModelForCausalLM.from_config(config, dtype=dtype)

    recipe = notes["recipe"]
    pattern = parse(recipe["pattern"], recipe["group"])
    for layer in notes["layers"]:
        name, shape = layer["name"], tuple(layer["shape"])
        try:
            values, bits = tensors.pop(f"{name}.values"), tensors.pop(f"{name}.bitmask")
            B, A = tensors.pop(f"{name}.B"), tensors.pop(f"{name}.A")
        except KeyError as error:
            raise ValueError(f"folder {folder} lacks the tensor {error}") from None
        mask = unpack_mask(bits, shape)
        weight = torch.zeros(shape, dtype=dtype)
        weight[mask] = values.to(dtype)
        bias = tensors.pop(f"{name}.bias", None)
        bias = None if bias is None else bias.to(dtype)
        new = SLRLinear(weight, B.to(dtype), A.to(dtype), bias, mask=mask, pattern=pattern)
        loaded.set_submodule(name, new)

    parts = ("weight", "B", "A", "bias")
    done = {f"{layer['name']}.{part}" for layer in notes["layers"] for part in parts}
    result = loaded.load_state_dict({k: v.to(dtype) for k, v in tensors.items()}, strict=False)
    missing = set(result.missing_keys) - done - _tied(loaded)
    if missing or result.unexpected_keys:
        wrong = sorted(missing) or sorted(result.unexpected_keys)
        raise ValueError(f"folder {folder} does not fit its configuration: {wrong[0]}, …")
    loaded.tie_weights()
    return loaded


def _tied(model: PreTrainedModel) -> set[str]:
    """State-dict names that are the same tensor as another one and so are not stored."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return set()
    return {"lm_head.weight"}


def save(
    model: PreTrainedModel,
    out: str | Path,
    *,
    about: dict,
    tokenizer_from: Path,
) -> Path:
    """Write a compressed model as a folder, whole or not at all.

    Args:
        model: on the CPU, with :class:`~slr.linear.SLRLinear` layers.
        out: a folder that does not exist or is empty.
        about: ``source``, ``recipe`` and ``layers`` as :func:`slr.compress.compress` makes them.
        tokenizer_from: folder whose tokenizer files are copied.

    Raises:
        ValueError: `out` is taken.
    """
    out = check_free(out)
    tensors: dict[str, Tensor] = {
        name: value for name, value in model.state_dict().items() if name not in _tied(model)
    }
    for name, module in model.named_modules():
        if isinstance(module, SLRLinear):
            tensors[f"{name}.values"] = tensors.pop(f"{name}.weight")[module.mask]
            tensors[f"{name}.bitmask"] = pack_mask(module.mask)
    config = json.loads(model.config.to_json_string(use_diff=False))
    config["slr"] = {"format": FORMAT, "model_type": config["model_type"], **about}
    config["model_type"] = "slr"

    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        save_file(
            {k: v.contiguous() for k, v in tensors.items()},
            part / "model.safetensors",
            metadata={"format": "pt"},
        )
        (part / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        for file in tokenizer_from.iterdir():
            if file.name.startswith(("tokenizer", "special_tokens")) or file.suffix == ".model":
                shutil.copy(file, part)
        if (tokenizer_from / "generation_config.json").is_file():
            shutil.copy(tokenizer_from / "generation_config.json", part)
        for file in part.iterdir():
            file.chmod(0o644)
        part.chmod(0o755)
        os.replace(part, out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return out


def pack_mask(mask: Tensor) -> Tensor:
    """A boolean tensor as bits, lowest bit first: uint8 (⌈count / 8⌉,).

    >>> pack_mask(torch.tensor([True, False, True])).tolist()
    [5]
    """
    flat = mask.flatten().to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    place = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    return (flat * place).sum(1, dtype=torch.uint8)


def unpack_mask(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of :func:`pack_mask`.

    >>> unpack_mask(torch.tensor([5], dtype=torch.uint8), (3,)).tolist()
    [True, False, True]
    """
    place = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    flat = (bits[:, None] & place).bool().flatten()
    return flat[: torch.Size(shape).numel()].view(shape)
