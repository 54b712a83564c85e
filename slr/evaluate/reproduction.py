"""A published table, one cell at a time: every mask × repair × sparsity of a model's perplexity.

A :class:`Spec` (``results/specs/NAME.json``) says what the table is; :func:`reproduce` fills it.
Each cell is one small JSON file with the number and all that decided it, so that a run may be
stopped at any time, goes on where it was, and never measures a cell twice.  The model is streamed:
a block is read, pruned and repaired, passes on its calibration and evaluation inputs, and is
forgotten, so nothing is written but the number.

Book: chapters 11 and 12.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from slr.checkpoint.allocating import allocated
from slr.checkpoint.atomic import write_text
from slr.checkpoint.digests import fingerprint
from slr.checkpoint.folder import context, load_tokenizer, resolve
from slr.checkpoint.place import check_folder
from slr.checkpoint.work import calibration_windows, digest
from slr.evaluate.likelihood import streamed_losses
from slr.evaluate.origin import provenance
from slr.evaluate.tables import REPAIRS, Cell, Spec, as_text, published, specs
from slr.matrix.accounting import stored_bytes
from slr.matrix.rounding import Grid, as_grid
from slr.methods.blockwise import calibration_inputs, plan_layers, prepare_block
from slr.model import data, distributed
from slr.model.block import LayerReport, compress_block
from slr.model.edges import check_entries, is_mapping, is_number, is_text, or_none
from slr.model.losses import exponential
from slr.model.plain import round_linears
from slr.model.recipe import Recipe
from slr.model.stream import Stream
from slr.model.tensors import read_json

__all__ = [
    "REPAIRS",
    "Cell",
    "Spec",
    "as_text",
    "grid",
    "measure",
    "published",
    "reproduce",
    "specs",
    "suggested_model",
]


ALSO = {"perplexity": ("a number or null", or_none(is_number)), "sha256": ("a digest", is_text)}
CELL = {"perplexity": ALSO["perplexity"], "what": ("a mapping", is_mapping)}


def suggested_model() -> str:
    """A hub model for this machine: LLaMA-7B with 14 GB of GPU memory, else one of 135M."""
    if torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory >= 14e9:
        return "huggyllama/llama-7b"
    return "HuggingFaceTB/SmolLM2-135M"


def grid(spec: Spec, out: str | Path, text: str | None = None) -> dict[str, dict[str, float]]:
    """The measured numbers that are there: row -> column -> perplexity, in table order.

    Args:
        spec: the table.
        out: folder of the cells.
        text: name of another text than the spec's, of those that the cells were measured on.
    """
    found: dict[str, dict[str, float]] = {row: {} for row in spec.rows}
    for cell in spec.cells():
        file = cell.file(Path(out))
        if file.is_file():
            told = read_cell(file)
            if text is not None:
                told = told.get("also", {}).get(text)
                if told is None:
                    continue
            value = told["perplexity"]
            found[cell.row][cell.column] = math.nan if value is None else value
    return {
        row: {c: cells[c] for c in ("dense", *spec.columns) if c in cells}
        for row, cells in found.items()
        if cells
    }


@torch.no_grad()
def measure(
    folder: Path,
    recipe: Recipe | Grid | None,
    windows: Tensor,
    calibration: Tensor | None = None,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: str | None = None,
) -> tuple[Tensor, list[LayerReport]]:
    """Losses of a checkpoint compressed by a recipe, in one pass over its blocks.

    Args:
        folder: of the dense checkpoint.
        recipe: ``None`` leaves it dense; a grid rounds the linear layers of its blocks.
        windows: to evaluate on, int64 (count, seqlen).
        calibration: windows, for a recipe that needs data.
        device: where to compute.
        dtype: of the weights.
        progress: label of a bar over the blocks, on standard error.

    Returns:
        Mean loss of each window in nats, float64 (count,), and one
        :class:`~slr.model.block.LayerReport` for each layer.

    Raises:
        ValueError: as :func:`slr.methods.blockwise.compress_model`.

    Cost: as compressing and evaluating; memory for one block, and the hidden states of all
        windows, on disk when large.
    """
    stream = Stream(folder, device, dtype)
    stream.fill_outside()
    if recipe is None:
        return streamed_losses(stream, windows, progress=progress), []
    if isinstance(recipe, Grid):
        grid = recipe

        def rounded(index: int, name: str, block: nn.Module) -> None:
            round_linears(block, grid)

        return streamed_losses(stream, windows, progress=progress, change=rounded), []
    recipe = recipe.resolved(stream.config.hidden_size)
    plan = plan_layers(stream.model, recipe, stream.config.hidden_size)
    reports: list[LayerReport] = []
    with tempfile.TemporaryDirectory(prefix="slr-") as scratch:
        observed = None
        if recipe.needs_data:
            if calibration is None:
                raise ValueError(f"{recipe!r} needs calibration windows")
            observed = calibration_inputs(stream.model, recipe, calibration, Path(scratch))

        def change(index: int, name: str, block: nn.Module) -> None:
            seed = recipe.seed + len(reports)
            prepare_block(block, index, recipe, observed)
            reports.extend(
                compress_block(
                    name, block, index, plan[index], observed, seed=seed, tune=recipe.tune
                )
            )

        value = streamed_losses(
            stream, windows, progress=progress, calibration=observed, change=change
        )
    return value, reports


def reproduce(
    spec: Spec,
    out: str | Path,
    *,
    model: str | None = None,
    rows: Sequence[str] = ("*",),
    columns: Sequence[str] = (),
    text: str | None = None,
    device: str = "cpu",
    fresh: bool = False,
    progress: bool = False,
) -> dict[str, dict[str, float]]:
    """Measure the cells of a table that are not there yet.

    Under ``torchrun`` the cells are shared out over the processes, each of which works alone.

    Args:
        spec: the table.
        out: folder of the cells, one JSON file each.
        model: another checkpoint to fill the same table for.
        rows, columns: a part of the table, as :meth:`Spec.cells`.
        text: a second text to evaluate on, by name or path; cells that lack it are measured again.
        device: where to compute.
        fresh: measure again what is there.
        progress: bars on standard error.

    Returns:
        :func:`grid` of all that is there now.

    Raises:
        ValueError: an unknown row or column, a model that does not fit, or a cell that is there
            but was measured differently.
    """
    out = Path(out)
    folder = resolve(model or spec.model)
    seqlen = context(folder, most=spec.seqlen)
    short = min(seqlen, spec.recipe.get("seqlen", seqlen))
    spec = replace(spec, model=model or spec.model, recipe={**spec.recipe, "seqlen": short})
    texts = _texts(spec, text, folder, seqlen)
    dtype = getattr(torch, spec.dtype) if device.startswith("cuda") else torch.float32
    same = {
        "model": {"name": spec.model, **fingerprint(folder)},
        "dtype": str(dtype).removeprefix("torch."),
        "text": {"name": spec.text, **_digest(texts[spec.text])},
    }
    drawn: dict[tuple, tuple[Tensor | None, dict | None]] = {}  # calibration windows
    check_folder(out)
    number, processes = distributed.alone()
    cells = list(spec.cells(rows, columns))[number::processes]
    with tqdm(total=len(cells), desc=spec.name, unit="cell", disable=not progress) as bar:
        for cell in cells:
            what: dict[str, Any] = {**same, "recipe": cell.told, "calibration": None}
            calibration = None
            if cell.recipe is not None and cell.recipe.needs_data:
                asked = cell.recipe.samples, cell.recipe.seqlen, cell.recipe.seed
                if asked not in drawn:
                    drawn[asked] = calibration_windows(folder, cell.recipe, spec.calibration)
                calibration, what["calibration"] = drawn[asked]
            if fresh or not _there(cell.file(out), what, texts):
                started = time.perf_counter()
                recipe = cell.recipe
                if recipe is not None and cell.allocate is not None:
                    stream = Stream(folder, device, dtype)
                    recipe = allocated(stream, recipe, cell.allocate, calibration)
                losses, reports = measure(
                    folder, cell.grid or recipe, torch.cat(list(texts.values())), calibration,
                    device=device, dtype=dtype,
                    progress=f"{cell.row} {cell.column}" if progress else None,
                )  # fmt: skip
                seconds = time.perf_counter() - started
                about = {"seconds": seconds, "device": device, **provenance()}
                told: dict[str, Any] = {"row": cell.row, "column": cell.column}
                for key in ("pruned_error", "error") if reports else ():
                    told[key] = sum(getattr(r, key) for r in reports) / len(reports)
                told |= sizes(folder, cell.grid, reports)
                _write(cell.file(out), {**told, "what": what, "about": about}, texts, losses)
            bar.update()
    return grid(spec, out)


def _texts(spec: Spec, text: str | None, folder: Path, seqlen: int) -> dict[str, Tensor]:
    """Windows of the texts to evaluate on: the table's own, and another if it is named."""
    if text in (spec.text, Path(spec.text).name):
        raise ValueError(f"text {text!r} is the table's own; give another, or leave --text out")
    names, tokenizer = [spec.text, *([] if text is None else [text])], load_tokenizer(folder)
    return {n: data.windows(data.load_text(n), tokenizer, seqlen, spec.limit) for n in names}


def sizes(folder: Path, grid: Grid | None, reports: Sequence[LayerReport]) -> dict[str, int]:
    """What a model takes that was measured: ``bytes`` on disk, and ``weights`` and ``in_layers``.

    Args:
        folder: of the dense checkpoint.
        grid: that the linear layers of its blocks are rounded to; or
        reports: of its layers, compressed; none of either is the dense model.

    Returns:
        ``bytes`` of all tensors, ``in_layers`` those of the linear layers of the blocks,
        ``weights``, how many entries these have when dense, and ``products``, how many
        multiplications a token takes in them.
    """
    stream = Stream(folder)
    width, shapes = stream.dtype.itemsize, []
    for block in stream.blocks:
        shapes += [tuple(m.weight.shape) for m in block.modules() if isinstance(m, nn.Linear)]
    weights = sum(m * n for m, n in shapes)
    products = weights
    if grid is not None:
        inside = sum(stored_bytes((m, n), m * n, grid=grid) for m, n in shapes)
    else:
        inside = width * (weights - sum(r.shape[0] * r.shape[1] for r in reports))
    for r in reports:
        coded = {"grid": as_grid(r.grid), "factors": as_grid(r.factors)}
        inside += stored_bytes(r.shape, r.kept, r.rank, width=width, **coded)
        products += r.kept + r.rank * sum(r.shape) - r.shape[0] * r.shape[1]
    state = stream.model.state_dict()  # what is tied is stored once
    whole = sum(state[name].numel() * width for name in state if name in stream.files.where)
    size = whole - width * weights + inside
    return {"bytes": size, "in_layers": inside, "weights": weights, "products": products}


def _digest(windows: Tensor) -> dict:
    count, seqlen = windows.shape
    return {"windows": count, "seqlen": seqlen, "sha256": digest(windows)}


def _there(file: Path, what: dict, texts: dict[str, Tensor]) -> bool:
    """Whether the cell was measured, and measured the same way, on all of the texts."""
    if not file.is_file():
        return False
    told = read_cell(file)
    before, now = told["what"], json.loads(json.dumps(what))
    earlier = before.get("recipe") or {}
    if "prune" in earlier:  # files of earlier versions tell options without effect too
        by = {k: earlier.pop(k) for k in ("allocate",) if k in earlier}
        before["recipe"] = {**json.loads(json.dumps(Recipe.from_dict(earlier).as_dict())), **by}
    for name in now:
        if before.get(name) != now[name]:
            raise ValueError(
                f"{file} was measured with another {name}; give another folder with --out, or "
                "measure again with --fresh"
            )
    known = told.get("also", {})
    return all(
        known.get(Path(n).name, {}).get("sha256") == digest(w) for n, w in list(texts.items())[1:]
    )


def read_cell(file: Path) -> dict:
    """A cell.  Raises ValueError if the file is none."""
    told = read_json(file)
    check_entries(str(file), told, CELL)
    for name, other in told.get("also", {}).items():
        check_entries(f"{file}: 'also'.{name!r}", other, ALSO)
    return told


def _write(file: Path, told: dict, texts: dict[str, Tensor], losses: Tensor) -> None:
    """Write a cell: its perplexity and the loss of each window, on each text.

    A number that is not finite is written as null, for that is all that JSON has.
    """
    parts = losses.split([len(windows) for windows in texts.values()])
    found = {
        Path(name).name: {**_measured(part), **_digest(windows)}
        for (name, windows), part in zip(texts.items(), parts, strict=True)
    }
    own = found.pop(Path(next(iter(texts))).name)
    before: dict = read_cell(file) if file.is_file() else {"what": None}
    if json.loads(json.dumps(told["what"])) == before["what"]:  # else the caller starts over
        found = {**before.get("also", {}), **found}
    told |= {"perplexity": own["perplexity"], "losses": own["losses"], "also": found}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(told, indent=1, allow_nan=False) + "\n")


def _measured(losses: Tensor) -> dict:
    value = exponential(losses)
    if not math.isfinite(value):
        return {"perplexity": None, "losses": None}
    return {"perplexity": value, "losses": [round(loss, 6) for loss in losses.tolist()]}
