"""Tasks of the lm-evaluation-harness, on any model of this package.

Book: chapter 11.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from slr.model.blocks import in_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["tasks"]


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
        seqlen: longest input in tokens; the model's own when ``None``.
        folder: of task YAML files to take the tasks from, instead of the harness's own.

    Returns:
        ``{task: {metric: value}}``, standard errors included.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: an unknown task.

    Source: Gao et al., lm-evaluation-harness.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    if folder is None:
        manager = TaskManager()
    else:
        manager = TaskManager(include_path=str(folder), include_defaults=False)
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise ValueError(f"task {unknown[0]!r} is unknown to lm-eval")
    with in_mode(model, False):
        wrapped = HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=seqlen
        )
        found = lm_eval.simple_evaluate(
            model=wrapped, tasks=names, limit=limit, task_manager=manager, bootstrap_iters=1000
        )
    return {task: dict(scores) for task, scores in found["results"].items()}
