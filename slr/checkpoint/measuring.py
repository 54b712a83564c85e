"""What a finished compression says of itself: perplexity on held-out text, and a few words.

Held-out windows pass through the dense, the pruned and the compressed model block by block, beside
the compression (:mod:`slr.model.heldout`); where they are is kept in the journal, so that a run
that was stopped goes on with them too.

Book: chapter 10.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from slr.checkpoint.folder import load_tokenizer, shard_name
from slr.checkpoint.journal import Journal
from slr.checkpoint.named import default_text
from slr.checkpoint.work import Work, digest
from slr.matrix.steps import NoRepair
from slr.model import distributed, hf
from slr.model.arithmetic import compute_dtype
from slr.model.block import LayerReport
from slr.model.heldout import KINDS, HeldOut
from slr.model.recipe import Recipe
from slr.model.stream import Stream

__all__ = ["PROMPT", "go_on", "keep", "measure", "take", "watched", "whole_for_sample", "words"]

PROMPT, WORDS = 24, 16  # tokens of the sample
SMALL = 4e9  # bytes of a model that is loaded whole for the sample


def watched(work: Work) -> HeldOut | None:
    """The held-out windows at the first block, if there are any and they are not through yet.

    Under ``torchrun`` rank 0 alone has them, and without what pruning left, which each matrix's
    owner knows.
    """
    if work.held is None or distributed.rank() > 0 or "measured" in work.journal.memory:
        return None
    recipe, stream = work.method, work.stream
    assert isinstance(recipe, Recipe)
    alone = all(isinstance(r.refine, NoRepair) for r in recipe.variants())
    kinds = tuple(k for k in KINDS if k != "pruned" or not (alone or distributed.world() > 1))
    return HeldOut(
        stream.model, work.held, kinds=kinds, dtype=compute_dtype(stream.dtype, stream.device)
    )


def _file(index: int) -> str:
    return f"held-out-{index + 1:05d}.safetensors"


def keep(held: HeldOut | None, journal: Journal, index: int, last: bool = False) -> None:
    """Write where the windows are after block `index`; with `last`, forget where they were before.

    A block is entered between the two, so that there is always a state to go on from.
    """
    if held is None:
        return
    if not last:
        journal.add(_file(index), held.state())
    elif index and _file(index - 1) in journal:
        journal.remove(_file(index - 1))


def go_on(held: HeldOut, journal: Journal, index: int) -> HeldOut | None:
    """Take the windows to where they were after block `index`; ``None`` if that is lost."""
    if _file(index) not in journal:
        return None
    held.restore(load_file(journal.folder / _file(index)))
    return held


@torch.no_grad()
def measure(work: Work, held: HeldOut | None) -> None:
    """Perplexities and a sample, into the journal's memory; what only they needed is removed."""
    journal, stream = work.journal, work.stream
    if held is not None and go_on(held, journal, len(stream.blocks) - 1) is not None:
        stream.fill_outside()
        values = held.perplexities(stream.model)
        stream.empty_outside()
        journal.remember(measured=told(work, values, _sample(work)))
    for name in [name for name in journal.entries if name.startswith("held-out-")]:
        journal.remove(name)


def told(work: Work, perplexity: dict[str, float], sample: dict | None) -> dict:
    """What a folder says of how good it is: plain values, ``None`` for what is not finite."""
    assert work.held is not None
    count, seqlen = work.held.shape
    text = (
        default_text(work.stream.folder) if work.calibration is None else work.calibration["text"]
    )
    return {
        "text": text, "windows": count, "seqlen": seqlen, "sha256": digest(work.held),
        "perplexity": {
            kind: round(value, 4) if math.isfinite(value) else None
            for kind, value in perplexity.items()
        },
        "sample": sample,
    }  # fmt: skip


def whole_for_sample(stream: Stream) -> int:
    """Bytes of the model where it is loaded whole for the sample; 0 for one that is too large."""
    dtype = compute_dtype(stream.dtype, stream.device)
    size = sum(p.numel() for p in stream.model.parameters()) * dtype.itemsize
    return size if size <= SMALL else 0


def _sample(work: Work) -> dict | None:
    """How the dense and the compressed model go on from a few words; ``None`` for large models."""
    source = work.stream
    dtype = compute_dtype(source.dtype, source.device)
    if not whole_for_sample(source):
        return None
    stream = Stream(source.folder, source.device, dtype)
    stream.fill_outside()
    total = len(stream.blocks) + 1
    for index in range(total - 1):
        stream.fill(*stream.block(index))
    assert work.held is not None
    prompt = work.held[len(work.held) // 2][:PROMPT][None].to(source.device)
    tokenizer = load_tokenizer(source.folder)
    dense = words(stream.model, tokenizer, prompt)
    for index in range(total - 1):
        name, block = stream.block(index)
        file = shard_name(index, total)
        reports = [LayerReport(**notes) for notes in work.journal.entries[file]["notes"]]
        take(stream, name, block, work.journal.folder / file, reports)
    result = words(stream.model, tokenizer, prompt)
    return {"prompt": tokenizer.decode(prompt[0]), "dense": dense, "result": result}


def words(model: Any, tokenizer: Any, prompt: Tensor) -> str:
    """The likeliest continuation of a prompt (1, tokens)."""
    ids = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=WORDS, do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return tokenizer.decode(ids[0, prompt.shape[1] :])


def take(
    stream: Stream, name: str, block: nn.Module, file: Path, reports: list[LayerReport]
) -> None:
    """Fill a block from a finished file."""
    layers = {r.name.removeprefix(f"{name}."): r.stored() for r in reports}
    hf.place(block, layers, stream.dtype)
    tensors = load_file(file)
    stream.put(block, tensors, {full.removeprefix(f"{name}."): full for full in tensors})
