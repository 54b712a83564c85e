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
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from slr.checkpoint.folder import context, load, load_tokenizer, resolve
from slr.matrix.checks import check_count
from slr.model.blocks import in_mode
from slr.model.calibrate import BlockInputs, first_inputs
from slr.model.data import check_windows, windows
from slr.model.heads import logits, tokens_at_once
from slr.model.stream import Stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["TOKENS_AT_ONCE", "perplexity", "streamed_perplexity"]

TOKENS_AT_ONCE = 2048  # in a forward pass; the logits are taken of fewer, see slr.model.heads


def perplexity(
    model: PreTrainedModel | str | Path,
    text: str | Tensor,
    *,
    seqlen: int | None = None,
    limit: int | None = None,
    progress: str | None = None,
    stream: bool = False,
    device: str | None = None,
    dtype: torch.dtype | None = None,
) -> float:
    """Perplexity of a model on a text.

    Args:
        model: a causal language model, or a folder for :func:`slr.load`.
        text: the text itself (then `model` must be a folder, which has the tokenizer), or token
            windows (count, seqlen) from :func:`slr.model.data.windows`.
        seqlen: tokens in a window, for a text; by default the model's longest context, 2048 at
            most.
        limit: at most this many windows; ``None`` takes all.
        progress: label of a progress bar on standard error, none if ``None``.
        stream: read the folder one decoder block at a time, for models that do not fit in
            memory.
        device: where to compute, for a folder; ``"cpu"`` when ``None``.
        dtype: to compute in, for a folder; float32 when ``None``.

    Returns:
        exp(mean negative log-likelihood), the loss in float32 and the sum in float64; where that
        is NaN or beyond a float, NaN or infinity and a warning.

    Raises:
        ValueError: the text is shorter than one window, or windows that the model cannot read
            (:func:`slr.model.data.check_windows`).
        TypeError: a text was given with a model that has no tokenizer, or `stream` with a model
            that is no folder.

    Cost: one forward pass; about 2 FLOPs a parameter and token.
    Source: protocol of GPTQ (Frantar et al. 2023), used by SparseGPT and Wanda.
    """
    folder = None
    if isinstance(model, str | Path):
        folder = resolve(model)
        if isinstance(text, str):
            length = context(folder) if seqlen is None else seqlen
            text, seqlen = windows(text, load_tokenizer(folder), length, limit), None
    elif stream or device is not None or dtype is not None:
        raise TypeError("stream, device and dtype are for a folder, but a loaded model was given")
    device, dtype = device or "cpu", dtype or torch.float32
    if not isinstance(text, Tensor):
        raise TypeError("text is a str, but only a folder has a tokenizer; use slr.data.windows")
    if seqlen is not None:
        raise ValueError(f"seqlen={seqlen} has no effect on token windows; leave it out")
    if limit is not None:
        check_count("limit", limit)
        text = text[:limit]
    if folder is not None and stream:
        opened = Stream(folder, device, dtype)
        opened.fill_outside()
        return streamed_perplexity(opened, text, progress=progress)
    loaded: Any = model
    if folder is not None:
        loaded = load(folder, dtype=dtype)
        nn.Module.to(loaded, device)
    return _exponential(_whole(loaded, text, progress), text)


def _exponential(total: float, windows: Tensor) -> float:
    """Perplexity from the summed loss of all predictions; NaN and infinity bring a warning."""
    mean = total / (windows.shape[0] * (windows.shape[1] - 1))
    try:
        value = math.exp(mean)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        warnings.warn(
            f"the perplexity is {value}: the mean loss is {mean:.4g} nats; the weights may be "
            "broken, or too large for the dtype",
            stacklevel=2,
        )
    return value


def _loss(model: PreTrainedModel, ids: Tensor, outputs: Tensor | None = None) -> float:
    """Summed negative log-likelihood of all tokens but the first of each window."""
    targets = ids[:, 1:].long().flatten().split(tokens_at_once(model))
    total = torch.zeros((), dtype=torch.float64)
    for part, target in zip(logits(model, ids, outputs), targets, strict=True):
        loss = nn.functional.cross_entropy(part.float(), target, reduction="none")
        total += loss.sum(dtype=torch.float64).cpu()
    return float(total)


@torch.inference_mode()
def _whole(model: PreTrainedModel, text: Tensor, progress: str | None) -> float:
    check_windows(text, model.config)
    total = 0.0
    rows = max(1, TOKENS_AT_ONCE // text.shape[1])
    with in_mode(model, False):
        for ids in tqdm(text.split(rows), desc=progress, disable=progress is None, unit="batch"):
            ids = ids.to(model.device)
            total += _loss(model, ids)
    return total


@torch.no_grad()
def streamed_perplexity(
    stream: Stream,
    windows: Tensor,
    *,
    progress: str | None = None,
    calibration: BlockInputs | None = None,
    change: Callable[[int, str, nn.Module], None] | None = None,
) -> float:
    """Perplexity of a streamed checkpoint, one decoder block in memory at a time.

    Args:
        stream: whose modules outside of the blocks are filled.
        windows: token windows (count, seqlen).
        progress: label of a bar over the blocks, none if ``None``.
        calibration: inputs of the first block that `change` looks at; advanced with the blocks.
        change: called with number, name and module of each block, filled, before it is used.

    Returns:
        As :func:`perplexity`.
    """
    check_windows(windows, stream.config)
    rows, total = max(1, TOKENS_AT_ONCE // windows.shape[1]), 0.0
    with tempfile.TemporaryDirectory(prefix="slr-") as scratch:
        inputs = first_inputs(stream.model, windows, rows, Path(scratch), to_end=True)
        walked, total_blocks = stream.filled(calibration, inputs), len(stream.blocks)
        for index, name, block in tqdm(
            walked, progress, total_blocks, disable=progress is None, unit="block"
        ):
            if change is not None:
                change(index, name, block)
        for ids, hidden in zip(windows.split(rows), inputs.hidden.split(rows), strict=True):
            ids = ids.to(stream.device)
            total += _loss(stream.model, ids, hidden.to(stream.device))
    return _exponential(total, windows)
