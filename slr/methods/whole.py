"""Checkpoint folders by the methods that look at a whole model at once: CAP and LoSparse.

They make the same folders as :func:`slr.compress`, through the same journal: each layer is
S + B A with its own rank and its own share of entries, so that ``from_pretrained``, ``slr info``,
``slr eval`` and ``slr export`` work on them.  Unlike there, the dense model has to fit in memory:
LoSparse trains it, CAP runs it under hundreds of masks.

Sparsity induction works block by block and is an option of a recipe:
``slr.Recipe(prepare="induction")``.  Book: part IV.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from slr import checkpoint, plugin, ranks
from slr.compress import about, shard_name
from slr.journal import Journal
from slr.layers import LayerReport
from slr.methods import cap, losparse
from slr.methods.losparse_fit import train
from slr.recipe import Recipe
from slr.stream import Stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["METHODS", "compress_whole"]

BATCH = 4  # windows in a step of training
# Of CAP, what was best on the embedded model (chapter 13): candidates from a smaller λ than the
# paper's, and kept entries W - B A.
OPTIONS: dict[str, dict] = {"cap": {"balance_ratio": 0.6, "refit": True}, "losparse": {}}


@dataclass(frozen=True)
class _Work:
    """What a method is given."""

    stream: Stream
    windows: Tensor
    recipe: dict[str, Any]
    journal: Journal
    progress: bool

    def dense(self) -> PreTrainedModel:
        """The dense model in float32, on its device."""
        model = checkpoint.load(self.stream.folder, dtype=torch.float32)
        nn.Module.to(model, self.stream.device)
        return model


def compress_whole(
    model: str | Path,
    out: str | Path,
    method: str,
    *,
    budget: float = 0.5,
    steps: int = 200,
    samples: int = 128,
    seqlen: int | None = None,
    seed: int = 0,
    calibration: str = "embedded",
    device: str = "cpu",
    progress: bool = False,
    resume: bool = True,
) -> list[LayerReport]:
    """Compress a checkpoint into another folder by CAP or LoSparse.

    Args:
        model: ``"tiny"``, the folder of a Hugging Face checkpoint, or its name on the hub.
        out: folder to make; it must not exist, or be empty.
        method: ``"cap"`` or ``"losparse"``.
        budget: share of the parameters of the decoder blocks' linear layers to keep.
        steps: of training, or masks for CAP to try.
        samples: windows of text to learn from, seen again if there are more steps.
        seqlen: tokens in each; the model's longest context, 2048 at most, when ``None``.
        seed: of masks and of the order of the windows.
        calibration: as for :func:`slr.compress`.
        device: where to compute.
        progress: show a bar on standard error.
        resume: go on with what a run that was stopped left: CAP's robust PCA, block by block, is
            kept; a training that was stopped starts again.

    Returns:
        One :class:`~slr.layers.LayerReport` for each layer, with errors against the dense weight.

    Raises:
        ValueError: an unknown method, anything in the arguments that does not fit, more than one
            process, or a training that diverges; nothing is left behind but CAP's candidates.
        OSError: no space left.

    Cost: that of :func:`slr.methods.cap.allocate`, or of the training; memory for two dense
        models in float32, and what training takes.

    Example: ``tests/test_whole.py``.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown; it must be one of {', '.join(METHODS)}")
    if not 0 < budget < 1:
        raise ValueError(f"budget is {budget}; it must be above 0 and below 1")
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    ranks.start(device)
    if ranks.world() > 1:
        raise ValueError(f"method {method!r} works in one process, not in {ranks.world()}")
    source = checkpoint.resolve(model)
    stream = Stream(source, device)
    if stream.about is not None:
        raise ValueError("the model is compressed already; give its dense source")
    text = Recipe(samples=samples, seqlen=seqlen, seed=seed)
    windows, told = checkpoint.calibration_windows(source, text, calibration)
    recipe = {
        "method": method, "refine": method, "budget": budget, "steps": steps, "seed": seed,
        "samples": samples, "seqlen": windows.shape[1], **OPTIONS[method],
    }  # fmt: skip
    name = str(model)
    key = {
        "source": {"name": name, **checkpoint.fingerprint(source)},
        "recipe": recipe,
        "calibration": told,
    }
    checkpoint.check_space(stream, [], out)
    with Journal(out, key, resume) as journal:
        work = _Work(stream, windows, recipe, journal, progress)
        total = len(stream.blocks) + 1
        files = [shard_name(index, total) for index in range(total)]
        if any(file not in journal for file in files):
            _write(work, *METHODS[method](work))
        reports = [
            LayerReport(**notes) for file in files[:-1] for notes in journal.entries[file]["notes"]
        ]
        for file in set(journal.entries) - set(files):
            journal.remove(file)
        checkpoint.complete(stream, journal, about(name, recipe, told, reports))
    return reports


def _write(work: _Work, model: nn.Module, reports: list[LayerReport]) -> None:
    """Enter the tensors of a compressed model, in the dtype of the source, block by block."""
    stream, total = work.stream, len(work.stream.blocks) + 1
    dtype = stream.dtype
    tensors = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in plugin.state_dict(model).items()
    }
    for index in range(total - 1):
        inside = f"{stream.block(index)[0]}."
        part = {name: value for name, value in tensors.items() if name.startswith(inside)}
        notes = [report._asdict() for report in reports if report.name.startswith(inside)]
        work.journal.add(shard_name(index, total), part, notes)
    blocks = f"{stream.blocks_name}."
    rest = {n: tensors[n] for n in stream.files.where if n in tensors and not n.startswith(blocks)}
    work.journal.add(shard_name(total - 1, total), rest)


def _cap(work: _Work) -> tuple[nn.Module, list[LayerReport]]:
    """Candidates block by block, then the policy on the whole model."""
    stream, journal = work.stream, work.journal
    found: dict[str, cap.Candidates] = {}
    blocks = range(len(stream.blocks))
    for index in tqdm(blocks, desc="candidates", unit="block", disable=not work.progress):
        file = f"candidates-{index + 1:05d}.safetensors"
        name, block = stream.block(index)
        if file not in journal:
            stream.fill(name, block)
            made = cap.block_candidates(name, block, balance_ratio=work.recipe["balance_ratio"])
            journal.add(file, cap.pack(dict(made)))
            stream.empty(block)
        found |= cap.unpack(load_file(journal.folder / file, device=str(stream.device)))
    model = work.dense()
    reports = cap.allocate(
        model, work.windows, work.recipe["budget"], found=found, steps=work.recipe["steps"],
        refit=work.recipe["refit"], generator=torch.Generator().manual_seed(work.recipe["seed"]),
    )  # fmt: skip
    return model, reports


def _losparse(work: _Work) -> tuple[nn.Module, list[LayerReport]]:
    """Train, and lay the rows that are left out among the zeros."""
    model, recipe = work.dense(), work.recipe
    generator = torch.Generator().manual_seed(recipe["seed"])
    passes = -(-recipe["steps"] * BATCH // len(work.windows))
    order = [torch.randperm(len(work.windows), generator=generator) for _ in range(passes)]
    seen = torch.cat(order)[: recipe["steps"] * BATCH]
    windows = work.windows[seen].to(work.stream.device)
    train(model, windows, remaining=recipe["budget"], batch=BATCH)
    layers = losparse.to_slr(model, work.dense())
    return model, [LayerReport(name=name, seconds=0.0, **notes) for name, notes in layers.items()]


METHODS: dict[str, Callable[[_Work], tuple[nn.Module, list[LayerReport]]]] = {
    "cap": _cap,
    "losparse": _losparse,
}
