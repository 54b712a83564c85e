"""Other forms of a compressed folder, for programs that do not know ours.

- ``"peft"``: a dense checkpoint whose linears hold S, zeros included, and a LoRA adapter with B and
  A: what PEFT computes with it, S x + B (A x), is what :class:`slr.SLRLinear` computes.  As large
  as the source on disk.  Its README.md says how to load the two.
- ``"dense"``: S + B A multiplied out; a plain checkpoint, as large as the source.
- ``"gguf"``: the same as ``"peft"`` for llama.cpp, see :mod:`slr.checkpoint.gguf_export`.

All are written block by block and appear whole; an export that was stopped goes on, of ``"gguf"``
after the last whole file.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from slr.checkpoint import gguf_export
from slr.checkpoint.digests import check_sums, fingerprint
from slr.checkpoint.exported import BASE, peft_readme
from slr.checkpoint.finish import WHOLE, add_small_files, while_joined
from slr.checkpoint.folder import resolve, shard_name
from slr.checkpoint.journal import Journal
from slr.checkpoint.place import target
from slr.checkpoint.sizes import check_space
from slr.layer.linear import SLRLinear
from slr.matrix.checks import check_choice
from slr.model import hf
from slr.model.stream import Stream
from slr.model.tensors import read_json

__all__ = ["FORMS", "export"]

FORMS = ("peft", "dense", "gguf")


@torch.no_grad()
def export(
    model: str | Path, out: str | Path, to: str, *, outtype: str | None = None,
    verify: bool = False,
) -> Path:  # fmt: skip
    """Write a compressed folder in another form.

    Args:
        model: a compressed folder.
        out: folder to make.  For ``"peft"`` it is the base checkpoint, and ``out/adapter`` the
            adapter; for ``"gguf"`` it holds ``base.gguf`` and ``adapter.gguf``.
        to: one of :data:`FORMS`.
        outtype: for ``"gguf"``, the type of its matrices, see
            :func:`slr.checkpoint.gguf_export.write`.
        verify: first compare every byte with the digests of the folder, see :func:`slr.verify`.

    Returns:
        `out`.

    Raises:
        ValueError: unknown form, a folder that is not compressed, `out` taken; for ``"peft"`` a
            model without low-rank parts; for ``"gguf"`` one that llama.cpp does not compute;
            an `outtype` for another form.
        ImportError: ``"peft"`` or ``"gguf"`` without the package.

    Memory: a block, for ``"peft"`` all factors, for ``"gguf"`` the embedding.
    """
    import slr

    check_choice("to", to, FORMS)
    if outtype is not None and to != "gguf":
        raise ValueError(f"outtype {outtype!r} has no effect with to={to!r}; leave it out")
    out, folder = target(out), resolve(model)
    if verify:
        check_sums(folder)
    stream = Stream(folder)
    if stream.about is None:
        raise ValueError(f"folder {folder} is not compressed, so there is nothing to export")
    layers = stream.about["layers"]
    key = {"slr": slr.__version__, "export": to, "source": fingerprint(folder)}
    if to == "gguf":
        return gguf_export.write(stream, out, outtype, key)
    if to == "peft":
        import peft  # noqa: F401

        if not any(layer["rank"] for layer in layers.values()):
            raise ValueError(f"folder {folder} has no low-rank part; export it --to dense")
    total = len(stream.blocks) + 1
    files = {stream.block(i)[0]: shard_name(i, total) for i in range(total - 1)}
    check_space(_size(stream, to), out)
    with Journal(out, key) as journal:

        def fill(name: str, block: nn.Module) -> None:
            if files[name] not in journal and WHOLE not in journal:
                stream.fill(name, block)

        for _, name, block in stream.filled(fill=fill):
            if files[name] not in journal and WHOLE not in journal:
                journal.add(files[name], _plain(name, block, to))
        rest = shard_name(total - 1, total)
        if rest not in journal and WHOLE not in journal:
            inside = f"{stream.blocks_name}."
            names = [n for n in stream.files.where if not n.startswith(inside)]
            journal.add(rest, stream.files.read(names))
        if to == "peft":
            _adapter(journal, stream)
        add_small_files(journal, folder)
        config = hf.reveal(read_json(folder / "config.json"))
        del config["quantization_config"]
        return journal.finish(json.dumps(config, indent=1, allow_nan=False) + "\n")


def _size(stream: Stream, to: str) -> int:
    """Bytes that an export takes on the disk at most, other than to GGUF."""
    assert stream.about is not None
    layers, width = stream.about["layers"], stream.dtype.itemsize
    base = sum(math.prod(layer["shape"]) for layer in layers.values())
    base += sum(
        math.prod(shape)
        for name, (shape, _) in stream.files.headers().items()
        if name.rpartition(".")[0] not in layers or name.endswith(".bias")
    )
    factors = sum(layer["rank"] * sum(layer["shape"]) for layer in layers.values())
    return while_joined(width * base) + (width * factors if to == "peft" else 0)


def _plain(name: str, block: nn.Module, to: str) -> dict[str, Tensor]:
    """The dense tensors of a block."""
    tensors = {f"{name}.{k}": v for k, v in block.state_dict().items()}
    for inner, layer in block.named_modules():
        if not isinstance(layer, SLRLinear):
            continue
        full = f"{name}.{inner}"
        for part in layer.state_dict():
            if part != "bias":
                del tensors[f"{full}.{part}"]
        S, B, A = layer.weight, layer.B.data, layer.A.data
        whole = S.float().addmm(B.float(), A.float()).to(S.dtype)
        tensors[f"{full}.weight"] = whole if to == "dense" else S
    return tensors


def _adapter(journal: Journal, stream: Stream) -> None:
    """A LoRA adapter of scale 1 in a folder of its own, for the base in the folder above it."""
    from peft import LoraConfig

    assert stream.about is not None
    ranks = {name: la["rank"] for name, la in stream.about["layers"].items() if la["rank"]}
    if "adapter/adapter_model.safetensors" not in journal:
        factors = {
            f"base_model.model.{name}.lora_{part}.weight": stream.factor(name, part)
            for name in ranks
            for part in "AB"
        }
        journal.add("adapter/adapter_model.safetensors", factors)
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != usual}
    config = LoraConfig(
        r=usual, lora_alpha=usual, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
        target_modules=sorted(ranks), rank_pattern=others, alpha_pattern=others,
        inference_mode=True, base_model_name_or_path=BASE,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        text = (Path(folder) / "adapter_config.json").read_text(encoding="utf-8")
    journal.add_text("adapter/adapter_config.json", text)
    journal.add_text("README.md", peft_readme(max(ranks.values())))
