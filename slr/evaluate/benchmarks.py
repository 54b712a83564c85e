"""A table of benchmark scores: some models of a perplexity table, asked the tasks of lm-eval.

A :class:`Benchmarks` (``results/specs/NAME-benchmarks.json``) names a
:class:`~slr.evaluate.tables.Spec`, some of its rows and one pattern, so that the models are those
of the perplexity table; :func:`reproduce` compresses each into a folder and asks it task after
task.  A cell is one model and one task, and one JSON file: a run may be stopped at any time and
goes on where it was.

Book: chapter 13.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from slr.checkpoint.atomic import write_text
from slr.checkpoint.compression import compress
from slr.checkpoint.digests import fingerprint, sha256
from slr.checkpoint.folder import about, load, load_tokenizer, resolve
from slr.checkpoint.work import calibration_windows
from slr.evaluate import harness
from slr.evaluate.origin import provenance
from slr.evaluate.tables import DTYPE, NAMES, Cell, Spec, at_least, check_spec, told_by
from slr.model.edges import check_entries, is_mapping, is_text, or_none
from slr.model.recipe import Recipe
from slr.model.stream import Stream
from slr.model.tensors import read_json

__all__ = ["Benchmarks", "Score", "as_text", "grid", "reproduce", "spec_of"]

# What a JSON file has to say.
FIELDS = {
    **{key: ("text", is_text) for key in ("title", "table", "pattern", "source")},
    **{key: NAMES for key in ("rows", "tasks")},
    "dtype": DTYPE,
    "batch_size": ("1 example or more", at_least(1)),
    "limit": ("null, or 1 example or more", or_none(at_least(1))),
    "task_folder": ("null, or a folder", or_none(is_text)),
}
CELL = {"scores": ("a mapping", is_mapping), "what": ("a mapping", is_mapping)}

Score = tuple[float, float | None]  # and its standard error, where lm-eval gives one


@dataclass(frozen=True)
class Benchmarks:
    """A table to fill: a row a model, a column a task.

    Attributes:
        name: of the spec.
        title: of the table.
        table: the perplexity table whose models these are.
        pattern: one of its columns.
        rows: of its rows, as ``"magnitude/svd"``.
        dtype: of the weights on a GPU; a CPU computes in float32.
        tasks: of lm-eval, groups and tags among them.
        batch_size: examples at once.
        limit: at most this many examples of a task; ``None`` takes all.
        task_folder: of task YAML files, instead of the harness's own.
        source: where the protocol comes from.
    """

    name: str
    title: str
    table: Spec
    pattern: str
    rows: Sequence[str]
    dtype: str
    tasks: Sequence[str]
    batch_size: int
    limit: int | None
    task_folder: str | None
    source: str

    @classmethod
    def read(cls, name: str) -> Benchmarks:
        """A spec by name, or from the path of a JSON file.

        Raises:
            ValueError: no such spec, or one that says something unknown.
        """
        name, told = told_by(name)
        try:
            check_spec(told, FIELDS)
            spec = cls(name=name, **{**told, "table": Spec.read(told["table"])})
            list(spec.models())
        except ValueError as error:
            raise ValueError(f"table {name!r}: {error}") from None
        return spec

    @property
    def model(self) -> str:
        """The dense model, by name."""
        return self.table.model

    def models(self, rows: Sequence[str] = ("*",)) -> Iterator[Cell]:
        """The rows, each with its recipe; `rows` are names, with ``*`` for anything.

        Raises:
            ValueError: a row that is not in the table.
        """
        for row in rows:
            if not any(fnmatchcase(name, row) for name in self.rows):
                raise ValueError(f"row {row!r} fits none of {', '.join(self.rows)}")
        for cell in self.table.cells(self.rows, [self.pattern]):
            if any(fnmatchcase(cell.row, row) for row in rows):
                yield cell

    def file(self, row: str, task: str, out: Path) -> Path:
        """Where the JSON of a cell is kept under `out`."""
        return out / row.replace("/", "-") / f"{task}.json"


def spec_of(name: str) -> Spec | Benchmarks:
    """A table of either kind: one that names tasks is of benchmarks.

    Raises:
        ValueError: as :meth:`Benchmarks.read` and :meth:`Spec.read`.

    >>> spec_of("llama-7b-benchmarks").tasks
    ['truthfulqa', 'gsm8k', 'arc_challenge', 'mmlu']
    """
    _, told = told_by(name)
    return Benchmarks.read(name) if is_mapping(told) and "tasks" in told else Spec.read(name)


def grid(spec: Benchmarks, out: str | Path) -> dict[str, dict[str, Score]]:
    """The measured scores that are there: measure -> row -> value and standard error.

    A measure is a task and a metric, as ``"arc_challenge acc_norm"``.  Of a group that has a score
    of its own only this is taken, and not its members': one of MMLU, not 57.
    """
    found: dict[str, dict[str, Score]] = {}
    for task in spec.tasks:
        for row in spec.rows:
            file = spec.file(row, task, Path(out))
            if file.is_file():
                scores = _read(file)["scores"]
                for name in [task] if task in scores else scores:
                    for metric, score in _measures(scores[name]):
                        found.setdefault(f"{name} {metric}", {})[row] = score
    return found


def _measures(scores: dict) -> Iterator[tuple[str, Score]]:
    """Of ``{"acc,none": 0.5, "acc_stderr,none": 0.1}`` the metric and both numbers."""
    for key, value in scores.items():
        metric, _, kept = key.partition(",")
        if isinstance(value, float) and not metric.endswith("_stderr"):
            error = scores.get(f"{metric}_stderr,{kept}")
            label = metric if kept in ("", "none") else f"{metric} ({kept})"
            yield label, (value, error if isinstance(error, float) else None)


def as_text(measured: dict[str, dict[str, Score]], rows: Sequence[str]) -> str:
    """A table of measured scores, each with its standard error where there is one.

    >>> print(as_text({"w acc": {"dense": (0.5, 0.25)}}, ["dense"]))
    score measured here                             dense
    w acc                                   0.500 ± 0.250
    """
    width = max(15, *(len(row) + 2 for row in rows))
    lines = [f"{'score measured here':<38}" + "".join(f"{row:>{width}}" for row in rows)]
    for measure, cells in measured.items():
        line = f"{measure:<38}"
        for row in rows:
            value, error = cells.get(row, (None, None))
            text = "" if value is None else f"{value:.3f}"
            line += f"{text if error is None else f'{text} ± {error:.3f}':>{width}}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def reproduce(
    spec: Benchmarks,
    out: str | Path,
    *,
    model: str | None = None,
    rows: Sequence[str] = ("*",),
    columns: Sequence[str] = (),
    device: str = "cpu",
    fresh: bool = False,
    progress: bool = False,
) -> dict[str, dict[str, Score]]:
    """Measure the cells of a table that are not there yet.

    Args:
        spec: the table.
        out: folder of the cells, ``ROW/TASK.json``, and of the models, ``ROW/model``.
        model: another checkpoint to fill the same table for.
        rows: a part of the table, as :meth:`Benchmarks.models`.
        columns: tasks; all when empty.
        device: where to compute.
        fresh: measure again what is there; a folder that was compressed the same way is kept.
        progress: bars on standard error.

    Returns:
        :func:`grid` of all that is there now.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: an unknown row or task, a model that does not fit, or a cell or a folder that
            is there but was made differently.

    Cost: compressing each row once; its questions; one loaded model in memory.
    Source: the settings of the two specs that come with the package are named in them.
    """
    out = Path(out)
    for name in columns:
        if name not in spec.tasks:
            raise ValueError(f"column {name!r} is none of {', '.join(spec.tasks)}")
    spec = replace(spec, table=replace(spec.table, model=model or spec.model))
    source = resolve(spec.model)
    wanted = [t for t in spec.tasks if t in columns or not columns]
    size = Stream(source).config.hidden_size
    models = [
        replace(cell, recipe=cell.recipe and cell.recipe.resolved(size))
        for cell in spec.models(rows)
    ]
    dtype = getattr(torch, spec.dtype) if device == "cuda" else torch.float32
    same = {
        "model": {"name": spec.model, **fingerprint(source)},
        "dtype": str(dtype).removeprefix("torch."),
        "asked": {"limit": spec.limit, "batch_size": spec.batch_size, **_tasks(spec.task_folder)},
    }
    total = len(models) * len(wanted)
    with tqdm(total=total, desc=spec.name, unit="cell", disable=not progress) as bar:
        for cell in models:
            what = {**same, **_recipe(spec, cell, source)}
            files = {task: spec.file(cell.row, task, out) for task in wanted}
            missing = [task for task, file in files.items() if fresh or not _there(file, what)]
            bar.update(len(wanted) - len(missing))
            if not missing:
                continue
            folder = _folder(spec, cell, source, what, out, device=device, progress=progress)
            loaded = load(folder, dtype=dtype)
            nn.Module.to(loaded, device)  # transformers' own has no types
            for task in missing:
                started = time.perf_counter()
                told = harness.report(
                    loaded, load_tokenizer(folder), [task], limit=spec.limit,
                    batch_size=spec.batch_size, folder=spec.task_folder,
                )  # fmt: skip
                seconds = time.perf_counter() - started
                made = {"row": cell.row, "task": task, "scores": told.pop("results"), **told}
                notes = {"seconds": seconds, "device": device, **provenance()}
                _write(files[task], {**made, "what": what, "about": notes})
                bar.update()
    return grid(spec, out)


def _tasks(folder: str | None) -> dict:
    """What to record of questions that are not the harness's own."""
    if folder is None:
        return {"questions": "of lm-eval"}
    files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
    digest = hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()
    return {"questions": {"files": len(files), "sha256": digest}}


def _recipe(spec: Benchmarks, cell: Cell, source: Path) -> dict:
    """What decides the model of a row: its recipe and calibration windows."""
    if cell.recipe is None:
        return {"recipe": None, "calibration": None}
    _, text = calibration_windows(source, cell.recipe, _text(spec, cell.recipe))
    return {"recipe": cell.recipe.as_dict(), "calibration": text}


def _text(spec: Benchmarks, recipe: Recipe) -> str | None:
    return spec.table.calibration if recipe.needs_data else None


def _folder(spec: Benchmarks, cell: Cell, source: Path, what: dict, out: Path, **options) -> Path:
    """The checkpoint of a row: the source, or a folder that is compressed unless it is there."""
    if cell.recipe is None:
        return source
    folder = out / cell.row.replace("/", "-") / "model"
    if not folder.exists():
        text = _text(spec, cell.recipe)
        compress(source, cell.recipe, out=folder, calibration=text, **options)
        return folder
    notes = about(folder) or {}
    origin = {"name": spec.model, **notes.get("origin", {}).get("fingerprint", {})}
    made = {"model": origin, **{k: notes.get(k) for k in ("recipe", "calibration")}}
    for name, value in made.items():
        if value != json.loads(json.dumps(what[name])):
            raise ValueError(
                f"{folder} was compressed with another {name}; give another folder with --out, or "
                "remove it"
            )
    return folder


def _there(file: Path, what: dict) -> bool:
    """Whether the cell was measured, and measured the same way."""
    if not file.is_file():
        return False
    before = _read(file)["what"]
    for name, value in json.loads(json.dumps(what)).items():
        if before.get(name) != value:
            raise ValueError(
                f"{file} was measured with another {name}; give another folder with --out, or "
                "measure again with --fresh"
            )
    return True


def _read(file: Path) -> dict:
    """A cell.  Raises ValueError if the file is none."""
    told = read_json(file)
    check_entries(str(file), told, CELL)
    return told


def _write(file: Path, told: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(told, indent=1) + "\n")
