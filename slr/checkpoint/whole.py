"""Checkpoint folders by the systems that look at a whole model at once: CAP and LoSparse.

They make the same folders as a recipe does, through the same journal: each layer is S + B A with
its own rank and its own share of entries, so that ``from_pretrained``, ``slr info``, ``slr eval``
and ``slr export`` work on them.  Unlike there, the dense model has to fit in memory: LoSparse
trains it, CAP runs it under hundreds of masks.

Sparsity induction works block by block and is an option of a recipe:
``slr.Recipe(prepare="induction")``.  Book: part IV.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

from slr.checkpoint.finish import WHOLE
from slr.checkpoint.folder import load, shard_name
from slr.checkpoint.work import Work, begin
from slr.methods.cap.pool import block_candidates, pack, unpack
from slr.methods.cap.robust_pca import Candidates
from slr.methods.cap.system import CAP
from slr.methods.system import System
from slr.model import hf
from slr.model.block import LayerReport

__all__ = ["compress_whole"]


def compress_whole(
    model: str | Path, out: str | Path, system: System, *, progress: bool = False, **options: Any
) -> list[LayerReport]:
    """Compress a checkpoint into another folder by CAP or LoSparse.

    Args:
        model: ``"tiny"``, the folder of a Hugging Face checkpoint, or its name on the hub.
        out: folder to make; it must not exist, or be empty.
        system: what to do.
        progress: show a bar on standard error.
        options: calibration, device and resume, as for :func:`slr.compress`.  Of a run that was
            stopped, CAP's robust PCA is kept, block by block; a training starts again.

    Returns:
        One :class:`~slr.model.block.LayerReport` for each layer, with errors against the dense
        weight.

    Raises:
        ValueError: anything in the arguments that does not fit, more than one process, or a
            training that diverges; nothing is left behind but CAP's candidates.
        OSError: no space left.

    Cost: that of the system; memory for two dense models in float32, and what training takes.

    Example: ``tests/test_whole.py``.
    """
    with begin(model, out, system, **options) as work:
        total = len(work.stream.blocks) + 1
        files = [shard_name(index, total) for index in range(total)]
        journal = work.journal
        if WHOLE not in journal and any(file not in journal for file in files):
            more = _candidates(work, progress) if isinstance(system, CAP) else {}
            dense = load(work.stream.folder, dtype=torch.float32)
            nn.Module.to(dense, work.stream.device)
            assert work.windows is not None
            _write(work, files, dense, system.compress(dense, work.windows, **more))
        kept = [WHOLE] if WHOLE in journal else files[:-1]
        reports = [LayerReport(**told) for f in kept for told in journal.entries[f]["notes"]]
        for file in set(journal.entries) - {*files, WHOLE}:
            journal.remove(file)
        work.finish(reports)
    return reports


def _write(work: Work, files: list[str], model: nn.Module, reports: list[LayerReport]) -> None:
    """Enter the tensors of a compressed model, in the dtype of the source, block by block."""
    stream, dtype = work.stream, work.stream.dtype
    tensors = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in hf.state_dict(model).items()
    }
    for index, file in enumerate(files[:-1]):
        inside = f"{stream.block(index)[0]}."
        part = {name: value for name, value in tensors.items() if name.startswith(inside)}
        notes = [report._asdict() for report in reports if report.name.startswith(inside)]
        work.journal.add(file, part, notes)
    blocks = f"{stream.blocks_name}."
    rest = {n: tensors[n] for n in stream.files.where if n in tensors and not n.startswith(blocks)}
    work.journal.add(files[-1], rest)


def _candidates(work: Work, progress: bool) -> dict[str, dict[str, Candidates]]:
    """CAP's candidates, block by block, from the journal where they are there."""
    stream, journal, cap = work.stream, work.journal, work.method
    assert isinstance(cap, CAP)
    found: dict[str, Candidates] = {}
    names = [f"candidates-{index + 1:05d}.safetensors" for index in range(len(stream.blocks))]

    def fill(name: str, block: nn.Module) -> None:
        if names[int(name.rpartition(".")[2])] not in journal:
            stream.fill(name, block)

    walked = stream.filled(fill=fill)
    for index, name, block in tqdm(
        walked, "candidates", len(names), unit="block", disable=not progress
    ):
        if names[index] not in journal:
            made = block_candidates(name, block, balance_ratio=cap.balance_ratio)
            journal.add(names[index], pack(dict(made)))
        tensors = load_file(journal.folder / names[index], device=str(stream.device))
        found |= unpack(tensors)
    return {"found": found}
