"""Perplexity of a causal language model, by the protocol of the pruning literature.

The text is tokenised once and cut into consecutive windows of `seqlen` tokens; in each, every
token but the first is predicted from those before it; perplexity is the exponential of the
mean negative log-likelihood, in nats, of all predictions.  Two numbers can be compared only
if tokenizer, text and seqlen are the same.

Book: chapter 1.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from slr.linear import SLRLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from slr.stream import Stream

__all__ = [
    "check_vocabulary",
    "compare",
    "perplexity",
    "pruned_source",
    "streamed_perplexity",
    "tasks",
]

# What a result is called; else refined.
REPAIRED = {
    "none": "pruned", "svd": "SVD repair", "eora": "EoRA repair", "cap": "CAP",
    "losparse": "LoSparse",
}  # fmt: skip
TOKENS_AT_ONCE = 2048  # bounds the logits, tokens × vocabulary in float32


def perplexity(
    model: PreTrainedModel | str | Path,
    text: str | Tensor,
    *,
    seqlen: int | None = None,
    limit: int | None = None,
    progress: str | None = None,
    stream: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> float:
    """Perplexity of a model on a text.

    Args:
        model: a causal language model, or a folder for :func:`slr.load`.
        text: the text itself (then `model` must be a folder, which has the tokenizer), or token
            windows (count, seqlen) from :func:`slr.data.windows`.
        seqlen: tokens in a window, for a text; by default the model's longest context, 2048 at
            most.
        limit: at most this many windows; ``None`` takes all.
        progress: label of a progress bar on standard error, none if ``None``.
        stream: read the folder one decoder block at a time, for models that do not fit in
            memory.
        device: where to compute, for a folder.
        dtype: to compute in, for a folder.

    Returns:
        exp(mean negative log-likelihood), the loss in float32 and the sum in float64.

    Raises:
        ValueError: the text is shorter than one window, or a token is not in the vocabulary.
        TypeError: a text was given with a model that has no tokenizer, or `stream` with a model
            that is no folder.

    Cost: one forward pass; about 2 FLOPs a parameter and token.
    Source: protocol of GPTQ (Frantar et al. 2023), used by SparseGPT and Wanda.
    """
    from slr import checkpoint, data

    folder = None
    if isinstance(model, str | Path):
        folder = checkpoint.resolve(model)
        if isinstance(text, str):
            tokenizer = checkpoint.load_tokenizer(folder)
            text = data.windows(text, tokenizer, seqlen or checkpoint.context(folder), limit)
    elif stream:
        raise TypeError("stream reads a folder, but a loaded model was given")
    if not isinstance(text, Tensor):
        raise TypeError("text is a str, but only a folder has a tokenizer; use slr.data.windows")
    if text.ndim != 2 or text.shape[1] < 2:
        raise ValueError(f"windows have shape {tuple(text.shape)}; they must be (count, seqlen)")
    text = text if limit is None else text[:limit]
    if folder is not None and stream:
        from slr.stream import Stream

        opened = Stream(folder, device, dtype)
        opened.fill_outside()
        return streamed_perplexity(opened, text, progress=progress)
    loaded: Any = model
    if folder is not None:
        loaded = checkpoint.load(folder, dtype=dtype)
        nn.Module.to(loaded, device)
    return _exponential(_whole(loaded, text, progress), text)


def _exponential(total: float, windows: Tensor) -> float:
    """Perplexity from the summed loss of all predictions."""
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))


def check_vocabulary(text: Tensor, config) -> None:
    """Raise ValueError if a token is not in the vocabulary of a model with this configuration."""
    vocabulary = config.get_text_config().vocab_size
    if int(text.max()) >= vocabulary:
        raise ValueError(
            f"the windows hold token {int(text.max())}, but the model has {vocabulary}; "
            "was the text tokenised for another model?"
        )


def _loss(logits: Tensor, ids: Tensor) -> float:
    """Summed negative log-likelihood of all tokens but the first of each window."""
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
    )
    return float(loss.double())


@torch.inference_mode()
def _whole(model: PreTrainedModel, text: Tensor, progress: str | None) -> float:
    check_vocabulary(text, model.config)
    was_training = model.training
    model.eval()
    total = 0.0
    rows = max(1, TOKENS_AT_ONCE // text.shape[1])
    for ids in tqdm(text.split(rows), desc=progress, disable=progress is None, unit="batch"):
        ids = ids.to(model.device)
        total += _loss(model(input_ids=ids, use_cache=False).logits, ids)
    model.train(was_training)
    return total


@torch.no_grad()
def streamed_perplexity(
    stream: Stream,
    windows: Tensor,
    *,
    progress: str | None = None,
    change: Callable[[int, str, nn.Module], None] | None = None,
) -> float:
    """Perplexity of a streamed checkpoint, one decoder block in memory at a time.

    Args:
        stream: whose modules outside of the blocks are filled.
        windows: token windows (count, seqlen).
        progress: label of a bar over the blocks, none if ``None``.
        change: called with number, name and module of each block, filled, before it is used.
    """
    from slr.calibrate import first_inputs, logits

    check_vocabulary(windows, stream.config)
    rows, total = max(1, TOKENS_AT_ONCE // windows.shape[1]), 0.0
    with tempfile.TemporaryDirectory(prefix="slr-") as scratch:
        inputs = first_inputs(stream.model, windows, rows, Path(scratch))
        blocks = range(len(stream.blocks))
        for index in tqdm(blocks, desc=progress, disable=progress is None, unit="block"):
            name, block = stream.block(index)
            stream.fill(name, block)
            if change is not None:
                change(index, name, block)
            inputs.run(index, block, keep=True)
            stream.empty(block)
        for ids, hidden in zip(windows.split(rows), inputs.hidden.split(rows), strict=True):
            ids = ids.to(stream.device)
            total += _loss(logits(stream.model, ids, hidden.to(stream.device)), ids)
    return _exponential(total, windows)


@torch.no_grad()
def pruned_source(dense: nn.Module, compressed: nn.Module) -> None:
    """Prune `dense` in place with the masks of a model compressed from it, and repair nothing.

    Gives the model that a repair has to beat, from a saved checkpoint and its source alone.
    """
    for name, layer in compressed.named_modules():
        if isinstance(layer, SLRLinear):
            dense.get_parameter(f"{name}.weight").mul_(layer.mask)


def compare(
    folder: str | Path,
    windows: Tensor,
    *,
    source: bool = True,
    stream: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> dict[str, float]:
    """Perplexity of a compressed folder beside its source, dense, and pruned but not repaired.

    Args:
        folder: of a compressed model; of a dense one, its perplexity alone is given.
        windows: token windows (count, seqlen).
        source: whether to look for the source at all.
        stream: one decoder block at a time; then without the pruned model.
        device: where to compute.
        dtype: to compute in.
        progress: show bars on standard error.

    Returns:
        By name: ``"dense"`` and ``"pruned"``, if the source is there, and the repair's.
    """
    from slr import checkpoint

    folder = checkpoint.resolve(folder)
    notes = checkpoint.about(folder)
    name = "dense" if notes is None else REPAIRED.get(notes["recipe"]["refine"], "refined")
    values = {}
    options: dict[str, Any] = {"device": device, "dtype": dtype}

    def measured(model: Any, label: str, **more) -> float:
        return perplexity(model, windows, progress=label if progress else None, **more)

    origin = None
    if notes is not None and source:
        with suppress(ValueError):
            origin = checkpoint.resolve(notes["source"], download=False)
    if stream:
        if origin is not None:
            values["dense"] = measured(origin, "dense", stream=True, **options)
        return {**values, name: measured(folder, name, stream=True, **options)}
    loaded: nn.Module = checkpoint.load(folder, dtype=dtype)
    if notes is not None and origin is not None:
        dense: nn.Module = checkpoint.load(origin, dtype=dtype)
        nn.Module.to(dense, device)
        values["dense"] = measured(dense, "dense")
        if notes["recipe"]["refine"] != "none" and "prune" in notes["recipe"]:
            pruned_source(dense, loaded)
            values["pruned"] = measured(dense, "pruned")
        del dense
    nn.Module.to(loaded, device)
    return {**values, name: measured(loaded, name)}


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
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=seqlen)
    found = lm_eval.simple_evaluate(
        model=wrapped, tasks=names, limit=limit, task_manager=manager, bootstrap_iters=1000
    )
    return {task: dict(scores) for task, scores in found["results"].items()}
