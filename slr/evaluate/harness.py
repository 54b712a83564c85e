"""Tasks of the lm-evaluation-harness, on any model of this package.

Book: chapter 13.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from slr.matrix.checks import check_count
from slr.model.blocks import in_mode
from slr.model.checks import check_seqlen
from slr.model.data import check_positions
from slr.model.edges import reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["report", "rows", "tasks"]

# What lm-eval says of each task beside its scores: shots, version of the task, questions asked.
TOLD = ("n-shot", "versions", "n-samples")


def tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: list[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    seqlen: int | None = None,
    folder: str | Path | None = None,
) -> dict:
    """Scores on tasks of the lm-evaluation-harness.

    Args:
        model: dense, compressed, or with a PEFT adapter.
        tokenizer: of the model.
        names: of tasks.
        limit: at most this many examples of each.
        batch_size: examples at once.
        seqlen: longest input in tokens, the end of a longer one is read; all positions of the
            model when ``None``.
        folder: of task YAML files to take the tasks from, instead of the harness's own.  A task
            can name Python code to run: read those of others first.

    Returns:
        ``{task: {metric: value}}``, standard errors included.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: an unknown task, one that is malformed or whose data are, more tokens than the
            model has positions, or a `limit` below 1.

    Source: Gao et al., lm-evaluation-harness.
    """
    options: dict[str, Any] = {"limit": limit, "batch_size": batch_size, "seqlen": seqlen}
    return report(model, tokenizer, names, folder=folder, **options)["results"]


def report(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: list[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    seqlen: int | None = None,
    folder: str | Path | None = None,
) -> dict[str, dict]:
    """Scores as :func:`tasks` gives them, and what lm-eval says of how it asked.

    Args and errors are those of :func:`tasks`.

    Returns:
        ``{"results": …}`` and, also by task, ``"n-shot"``, ``"versions"`` of the tasks and
        ``"n-samples"``.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    if limit is not None:
        check_count("limit", limit)
    if seqlen is not None:
        check_seqlen(seqlen)
        check_positions(seqlen, model.config)
    if folder is None:
        manager = TaskManager()
    else:
        if not Path(folder).is_dir():
            raise ValueError(f"task folder {str(folder)!r} is no folder")
        manager = TaskManager(include_path=str(folder), include_defaults=False)
    for name in names:
        if not manager.match_tasks([name]):
            if folder is not None:
                _check_files(Path(folder))
            raise ValueError(f"task {name!r} is unknown to lm-eval{_instead(manager, folder)}")
    wrapped = HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=seqlen,
        trust_remote_code=False,
    )  # fmt: skip
    with _quiet("datasets"), reading(f"task {', '.join(names)}"), in_mode(model, False):
        found = lm_eval.simple_evaluate(
            model=wrapped, tasks=names, limit=limit, task_manager=manager, bootstrap_iters=1000
        )
    results = {task: dict(scores) for task, scores in found["results"].items()}
    return {"results": results, **{key: dict(found.get(key, {})) for key in TOLD}}


def rows(found: dict) -> list[tuple[str, str]]:
    """What :func:`tasks` found as a table: task and metric, and value.

    >>> rows({"w": {"alias": "w", "acc,none": 0.5}})
    [('w acc', '0.5000')]
    """
    return [
        (f"{task} {metric.removesuffix(',none')}", f"{value:.4f}")
        for task, scores in found.items()
        for metric, value in scores.items()
        if isinstance(value, float)
    ]


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """While open, a library's log says nothing: it prints tracebacks of what it raises as well."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


def _check_files(folder: Path) -> None:
    """Raise ValueError for a file that the harness passes over, for it is no YAML of a task."""
    for file in sorted(folder.glob("**/*.yaml")):
        try:
            found = yaml.compose(file.read_text(encoding="utf-8"))  # runs no code
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is not YAML: {error}") from None
        if not isinstance(found, yaml.MappingNode):
            raise ValueError(f"{file} holds no task; it must be a mapping")


def _instead(manager: Any, folder: str | Path | None) -> str:
    if folder is None:
        return ""
    return f"; {folder} has {', '.join(sorted(manager.all_tasks)) or 'none'}"
