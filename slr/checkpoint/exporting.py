"""Other forms of a compressed folder, for programs that do not know ours.

- ``"peft"``: a dense checkpoint whose linears hold S, zeros included, and a LoRA adapter with B and
  A: what PEFT computes with it, S x + B (A x), is what :class:`slr.SLRLinear` computes.  As large
  as the source on disk.
- ``"dense"``: S + B A multiplied out; a plain checkpoint, as large as the source.

Both are written block by block and appear whole.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from slr.checkpoint.finish import add_small_files
from slr.checkpoint.folder import resolve, shard_name
from slr.checkpoint.journal import Journal
from slr.layer.linear import SLRLinear
from slr.model import hf
from slr.model.stream import Stream, read_json

__all__ = ["FORMS", "export"]

FORMS = ("peft", "dense")


@torch.no_grad()
def export(model: str | Path, out: str | Path, to: str) -> Path:
    """Write a compressed folder in another form.

    Args:
        model: a compressed folder.
        out: folder to make.  For ``"peft"`` it is the base checkpoint, and ``out/adapter`` the
            adapter.
        to: one of :data:`FORMS`.

    Returns:
        `out`.

    Raises:
        ValueError: unknown form, a folder that is not compressed, `out` taken; for ``"peft"`` a
            model without low-rank parts.
        ImportError: ``"peft"`` without the package.

    Memory: a block, and for ``"peft"`` all factors.
    """
    if to not in FORMS:
        raise ValueError(f"to {to!r} is unknown; it must be one of {', '.join(FORMS)}")
    folder = resolve(model)
    stream = Stream(folder)
    if stream.about is None:
        raise ValueError(f"folder {folder} is not compressed, so there is nothing to export")
    layers = stream.about["layers"]
    if to == "peft":
        import peft  # noqa: F401

        if not any(layer["rank"] for layer in layers.values()):
            raise ValueError(f"folder {folder} has no low-rank part; export it --to dense")
    total = len(stream.blocks) + 1
    factors: dict[str, Tensor] = {}
    with Journal(out, {"export": to, "model": str(model)}, resume=False) as journal:
        for index, name, block in stream.filled():
            journal.add(shard_name(index, total), _plain(name, block, to, factors))
        inside = f"{stream.blocks_name}."
        rest = [n for n in stream.files.where if not n.startswith(inside)]
        journal.add(shard_name(total - 1, total), stream.files.read(rest))
        add_small_files(journal, folder)
        if to == "peft":
            _adapter(journal.folder / "adapter", layers, factors, str(out))
        config = hf.reveal(read_json(folder / "config.json"))
        del config["quantization_config"]
        return journal.finish(json.dumps(config, indent=1, allow_nan=False) + "\n")


def _plain(name: str, block: nn.Module, to: str, factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The dense tensors of a block; its factors are put aside for an adapter."""
    tensors = {f"{name}.{k}": v for k, v in block.state_dict().items()}
    for inner, layer in block.named_modules():
        if not isinstance(layer, SLRLinear):
            continue
        full = f"{name}.{inner}"
        for part in ("values", "bitmask", "B", "A"):
            del tensors[f"{full}.{part}"]
        S, B, A = layer.weight, layer.B.data, layer.A.data
        if to == "dense":
            tensors[f"{full}.weight"] = S.float().addmm(B.float(), A.float()).to(S.dtype)
            continue
        tensors[f"{full}.weight"] = S
        if layer.rank:
            factors[f"base_model.model.{full}.lora_A.weight"] = A.contiguous()
            factors[f"base_model.model.{full}.lora_B.weight"] = B.contiguous()
    return tensors


def _adapter(folder: Path, layers: dict[str, dict], factors: dict[str, Tensor], base: str) -> None:
    """A LoRA adapter of scale 1."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    ranks = {name: layer["rank"] for name, layer in layers.items() if layer["rank"]}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != usual}
    config = LoraConfig(
        r=usual, lora_alpha=usual, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
        target_modules=sorted(ranks), rank_pattern=others, alpha_pattern=others,
        inference_mode=True, base_model_name_or_path=base,
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    save_file(factors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))
