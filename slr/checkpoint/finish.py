"""The last step: index, tokenizer, model card, configuration; then the folder appears."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from slr.checkpoint.cards import card
from slr.checkpoint.conversion import told
from slr.checkpoint.folder import read_raw, shard_name, small_files
from slr.checkpoint.journal import Journal
from slr.model import hf
from slr.model.stream import Stream
from slr.model.tensors import INDEX

__all__ = ["WHOLE", "add_small_files", "complete", "while_joined"]

WHOLE = "model.safetensors"  # the one file of a model of at most
SMALL = 1e9  # bytes


def add_small_files(journal: Journal, source: Path) -> int:
    """Write the index of a journal's tensor files, if they stay several, and copy the tokenizer.

    Args:
        journal: in which all tensor files are entered.
        source: folder to copy from.

    Returns:
        Bytes of the tensor files.
    """
    _one_file(journal)
    files = sorted(file for file in journal.entries if "/" not in file)
    where = {name: file for file in files for name in journal.entries[file]["tensors"]}
    size = sum((journal.folder / file).stat().st_size for file in files)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
    if files != [WHOLE]:
        journal.add_text(INDEX, json.dumps(index, indent=1, allow_nan=False) + "\n")
    for file in small_files(source):
        journal.add_copy(file)
    return size


def _one_file(journal: Journal) -> None:
    """Put the tensor files of a small model together, with the notes of all."""
    parts = sorted(file for file in journal.entries if "/" not in file and file != WHOLE)
    size = sum((journal.folder / file).stat().st_size for file in parts)
    if WHOLE not in journal and size <= SMALL:
        notes = [note for file in parts for note in journal.entries[file]["notes"] or []]
        tensors: dict[str, Tensor] = {}
        for file in parts:
            tensors |= load_file(journal.folder / file)
        journal.add(WHOLE, tensors, notes)
    for file in parts if WHOLE in journal else ():
        journal.remove(file)


def while_joined(size: float) -> int:
    """Bytes on the disk while tensor files of `size` bytes become one, if they do.

    >>> while_joined(3_000_000), while_joined(3_000_000_000)
    (6000000, 3000000000)
    """
    return int(2 * size if size <= SMALL else size)


def complete(stream: Stream, journal: Journal, notes: dict) -> None:
    """Write what is in no decoder block, and all small files, and let the folder appear."""
    total = len(stream.blocks) + 1
    rest = shard_name(total - 1, total)
    inside = f"{stream.blocks_name}."
    expected = stream.model.state_dict()
    names = [n for n in stream.files.where if not n.startswith(inside) and n in expected]
    if rest not in journal and WHOLE not in journal:
        read = stream.files.read(names)
        journal.add(
            rest, {n: v.to(stream.dtype) if v.is_floating_point() else v for n, v in read.items()}
        )
    size = add_small_files(journal, stream.folder)
    before = sum(file.stat().st_size for file in stream.files.files)
    dense = read_raw(stream.folder)
    journal.add_text("README.md", card(notes, before, size, told(dense)))
    raw = {**dense, "num_hidden_layers": stream.config.num_hidden_layers}
    journal.finish(json.dumps(hf.disguise(raw, notes), indent=1, allow_nan=False) + "\n")
