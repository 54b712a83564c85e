"""The verb for a model: a loaded one in place, or a checkpoint folder of any size into another.

Every linear layer of every decoder block is pruned and repaired; embeddings, norms and the
output head stay as they are.  A checkpoint is streamed: no more than one block, its calibration
inputs and its result are in memory, and every finished block is safe on disk.

Book: chapters 5 and 10.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from slr.checkpoint.finish import WHOLE
from slr.checkpoint.folder import shard_name
from slr.checkpoint.measuring import go_on, keep, measure, take, watched
from slr.checkpoint.whole import compress_whole
from slr.checkpoint.work import Work, begin, calibration_windows
from slr.methods.blockwise import calibration_inputs, compress_model, prepare_block, progress_bar
from slr.methods.system import System
from slr.model import distributed, hf
from slr.model.block import LayerReport, compress_block
from slr.model.calibrate import BlockInputs
from slr.model.data import check_windows
from slr.model.heldout import HeldOut
from slr.model.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["compress"]


def compress(
    model: str | Path | PreTrainedModel,
    recipe: Recipe | System | None = None,
    *,
    out: str | Path | None = None,
    calibration: str | Path | Tensor | None = None,
    device: str | None = None,
    progress: bool = False,
    resume: bool = True,
    stages: dict[str, float] | None = None,
) -> list[LayerReport]:
    """Compress a model to sparse + low rank.

    Args:
        model: ``"tiny"``, the folder of a Hugging Face checkpoint or its name on the hub, which
            is read one decoder block at a time; or a loaded model, which is changed in place.
        recipe: ``Recipe()`` when ``None``; or :class:`~slr.methods.cap.system.CAP` or
            :class:`~slr.methods.losparse.system.LoSparse`.
        out: folder to make, of a folder or name; it must not exist, or be empty.  Until it is
            complete it is called ``OUT.partial``.
        calibration: ``"general"``, ``"embedded"``, ``"wikitext2"``, ``"c4"``, a text file, or token
            windows (count, seqlen); general text when ``None``, the embedded one for ``"tiny"``.
            Only for a recipe that reads data.
        device: where to compute, for a folder; ``"cpu"`` when ``None``.
        progress: show a bar on standard error.
        resume: go on with what a run that was stopped left; ``False`` starts over.
        stages: if given, filled with this run's seconds by stage and its bytes read and written.

    Returns:
        One :class:`LayerReport` for each layer.

    Raises:
        ValueError: anything in the arguments that does not fit, before anything is written.
        TypeError: an argument of another kind.
        OSError: no space left; what is done is kept.

    Example:
        >>> import slr, torch
        >>> model = slr.load("tiny", dtype=torch.float32)
        >>> reports = slr.compress(model, slr.Recipe(prune="magnitude", refine="none"))
        >>> len(reports), reports[0].error == reports[0].pruned_error
        (42, True)
    """
    recipe = Recipe() if recipe is None else recipe
    if not isinstance(recipe, Recipe | System):
        raise TypeError(
            f"recipe is {recipe!r}; it must be a slr.Recipe, slr.CAP or slr.LoSparse (the folder "
            "to make is out=…)"
        )
    if isinstance(model, nn.Module):
        if out is not None:
            raise ValueError(
                f"out={str(out)!r}, but model is loaded, and compressed in place; leave out away "
                "and save it with model.save_pretrained, or give its folder"
            )
        if device is not None or not resume or stages is not None:
            raise ValueError("device, resume and stages have no effect on a loaded model")
        return _loaded(model, recipe, calibration, progress)
    if out is None:
        raise ValueError(
            f"model {str(model)!r} is read from files, so out= has to name a folder to make; to "
            "compress in memory give slr.load(…)"
        )
    options: dict[str, Any] = {
        "calibration": calibration,
        "device": device or "cpu",
        "resume": resume,
    }
    if isinstance(recipe, System):
        return compress_whole(model, out, recipe, progress=progress, **options)
    return _streamed(model, out, recipe, progress, stages, **options)


def _loaded(
    model: PreTrainedModel, recipe: Recipe | System, calibration: str | Path | Tensor | None,
    progress: bool,
) -> list[LayerReport]:  # fmt: skip
    named = Path(getattr(model, "name_or_path", None) or "?")  # where transformers read it
    folder = named if named.is_dir() else None
    windows, _ = calibration_windows(folder, recipe, calibration)
    if windows is not None:
        check_windows(windows, model.config)
    if isinstance(recipe, Recipe):
        return compress_model(model, recipe, windows, progress=progress)
    assert windows is not None
    return recipe.compress(model, windows)


def _streamed(
    model: str | Path, out: str | Path, recipe: Recipe, progress: bool,
    stages: dict[str, float] | None, **options,
) -> list[LayerReport]:  # fmt: skip
    with begin(model, out, recipe, **options) as work:
        work.stream.fill_outside()
        inputs, held = _inputs(work), watched(work)
        work.stream.empty_outside()
        reports = _blocks(work, inputs, held, progress)
        if distributed.rank() == 0:
            measure(work, held)
            work.finish(reports)
    distributed.barrier()
    if stages is not None:
        stages |= {
            "read_seconds": work.stream.files.seconds,
            "calibrate_seconds": 0.0 if inputs is None else inputs.seconds,
            "layer_seconds": sum(report.seconds for report in reports),
            "write_seconds": work.journal.seconds,
            "bytes_read": work.stream.files.bytes_read,
            "bytes_written": work.journal.bytes_written,
        }
    return reports


def _inputs(work: Work) -> BlockInputs | None:
    """Of the first block, for this process's calibration windows."""
    if work.windows is None:
        return None
    assert isinstance(work.method, Recipe)
    scratch = work.journal.scratch
    return calibration_inputs(work.stream.model, work.method, work.windows, scratch)


def _blocks(
    work: Work, inputs: BlockInputs | None, held: HeldOut | None, progress: bool
) -> list[LayerReport]:
    """Compress block after block, or take it from the journal."""
    stream, journal, plan, recipe = work.stream, work.journal, work.plan, work.method
    assert isinstance(recipe, Recipe)
    if WHOLE in journal:
        return [LayerReport(**notes) for notes in journal.entries[WHOLE]["notes"]]
    files = {stream.block(i)[0]: shard_name(i, len(plan) + 1) for i in range(len(plan))}
    reports: list[LayerReport] = []

    def done(name: str) -> list[LayerReport]:
        return [LayerReport(**notes) for notes in journal.entries[files[name]]["notes"]]

    def fill(name: str, block: nn.Module) -> None:
        if files[name] not in journal:
            stream.fill(name, block)
        elif inputs is not None:  # its outputs are wanted
            if inputs.dense is not None:  # which the block went through as it was prepared
                index = list(files).index(name)
                stream.fill(name, block)
                prepare_block(block, index, recipe, inputs)
                inputs.advance_dense(index, block)
            take(stream, name, block, journal.folder / files[name], done(name))

    behind = False  # the held-out windows, of a run that goes on
    with progress_bar(plan, progress) as bar:
        for index, name, block in stream.filled(inputs, fill=fill):
            if files[name] in journal:
                reports += done(name)
                bar.update(len(plan[index]))
                behind = True
                continue
            if held is not None and behind:
                held = go_on(held, journal, index - 1)
            behind = False
            prepare_block(block, index, recipe, inputs)
            seed = recipe.seed + len(reports)
            made = compress_block(
                name, block, index, plan[index], inputs, seed=seed, bar=bar, held=held,
                tune=recipe.tune,
            )  # fmt: skip
            reports += made
            if distributed.rank() == 0:
                tensors = {f"{name}.{k}": v for k, v in hf.state_dict(block).items()}
                keep(held, journal, index)
                journal.add(files[name], tensors, [report._asdict() for report in made])
                keep(held, journal, index, last=True)
    return reports
