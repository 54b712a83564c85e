"""The last step: index, tokenizer, model card, configuration; then the folder appears."""

from __future__ import annotations

import json
from pathlib import Path

from slr.checkpoint.cards import card
from slr.checkpoint.folder import read_raw, shard_name, small_files
from slr.checkpoint.journal import Journal
from slr.model import hf
from slr.model.stream import Stream
from slr.model.tensors import INDEX

__all__ = ["add_small_files", "complete"]


def add_small_files(journal: Journal, source: Path) -> int:
    """Write the index of a journal's tensor files, and copy the tokenizer and the like.

    Args:
        journal: in which all tensor files are entered.
        source: folder to copy from.

    Returns:
        Bytes of the tensor files.
    """
    files = sorted(file for file in journal.entries if "/" not in file)
    where = {name: file for file in files for name in journal.entries[file]["tensors"]}
    size = sum((journal.folder / file).stat().st_size for file in files)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
    journal.add_text(INDEX, json.dumps(index, indent=1, allow_nan=False) + "\n")
    for file in small_files(source):
        journal.add_copy(file)
    return size


def complete(stream: Stream, journal: Journal, notes: dict) -> None:
    """Write what is in no decoder block, and all small files, and let the folder appear."""
    total = len(stream.blocks) + 1
    rest = shard_name(total - 1, total)
    inside = f"{stream.blocks_name}."
    expected = stream.model.state_dict()
    names = [n for n in stream.files.where if not n.startswith(inside) and n in expected]
    if rest not in journal:
        read = stream.files.read(names)
        journal.add(
            rest, {n: v.to(stream.dtype) if v.is_floating_point() else v for n, v in read.items()}
        )
    size = add_small_files(journal, stream.folder)
    before = sum(file.stat().st_size for file in stream.files.files)
    journal.add_text("README.md", card(notes, before, size))
    raw = {**read_raw(stream.folder), "num_hidden_layers": stream.config.num_hidden_layers}
    journal.finish(json.dumps(hf.disguise(raw, notes), indent=1, allow_nan=False) + "\n")
