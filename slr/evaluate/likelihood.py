"""Perplexity of a causal language model, by the protocol of the pruning literature.

The text is tokenised once and cut into consecutive windows of `seqlen` tokens; in each, every
token but the first is predicted from those before it; perplexity is the exponential of the
mean negative log-likelihood, in nats, of all predictions.  Two numbers can be compared only
if tokenizer, text and seqlen are the same.

Book: chapter 1.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from slr.checkpoint.folder import context, load, load_tokenizer, resolve
from slr.matrix.checks import check_count
from slr.model import data, distributed
from slr.model.blocks import in_mode
from slr.model.calibrate import BlockInputs, first_inputs
from slr.model.data import check_windows
from slr.model.losses import TOKENS_AT_ONCE, exponential, window_losses
from slr.model.stream import Stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["losses", "perplexity", "streamed_losses"]


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
    return exponential(
        losses(
            model, text, seqlen=seqlen, limit=limit, progress=progress, stream=stream,
            device=device, dtype=dtype,
        )
    )  # fmt: skip


def losses(
    model: PreTrainedModel | str | Path,
    text: str | Tensor,
    *,
    seqlen: int | None = None,
    limit: int | None = None,
    progress: str | None = None,
    stream: bool = False,
    device: str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Mean loss of each window, in nats, float64 (windows,): what a perplexity is made of.

    Losses on the same windows can be compared, see :func:`slr.evaluate.agree.bootstrap`.
    Arguments and errors are those of :func:`perplexity`.  Under ``torchrun`` the windows are shared
    out over the processes, and each gets the losses of all.
    """
    folder = None
    if isinstance(model, str | Path):
        folder = resolve(model)
        if isinstance(text, str):
            length = context(folder) if seqlen is None else seqlen
            text = data.windows(text, load_tokenizer(folder), length, limit)
            seqlen = None
    elif stream or device is not None or dtype is not None:
        raise TypeError("stream, device and dtype are for a folder, but a loaded model was given")
    device, dtype = device or "cpu", dtype or torch.float32
    if not isinstance(text, Tensor):
        raise TypeError("text is a str, but only a folder has a tokenizer; use slr.data.windows")
    if seqlen is not None:
        raise ValueError(f"seqlen={seqlen} has no effect on token windows; leave it out")
    if limit is not None:
        check_count("limit", limit)
        text = data.spread(text, limit)
    if folder is not None and stream:
        opened = Stream(folder, device, dtype)
        opened.fill_outside()
        return streamed_losses(opened, text, progress=progress)
    loaded: Any = model
    if folder is not None:
        distributed.start(device)
        loaded = load(folder, dtype=dtype)
        nn.Module.to(loaded, device)
    check_windows(text, loaded.config)
    return distributed.shared(text, lambda mine: _whole(loaded, mine, progress))


@torch.inference_mode()
def _whole(model: PreTrainedModel, text: Tensor, progress: str | None) -> Tensor:
    rows = max(1, TOKENS_AT_ONCE // text.shape[1])
    with in_mode(model, False):
        return torch.cat(
            [
                window_losses(model, ids.to(model.device))
                for ids in tqdm(text.split(rows), progress, disable=progress is None, unit="batch")
            ]
        )


@torch.no_grad()
def streamed_losses(
    stream: Stream,
    windows: Tensor,
    *,
    progress: str | None = None,
    calibration: BlockInputs | None = None,
    change: Callable[[int, str, nn.Module], None] | None = None,
) -> Tensor:
    """Mean loss of each window by a streamed checkpoint, one decoder block in memory at a time.

    Args:
        stream: whose modules outside of the blocks are filled.
        windows: token windows (count, seqlen).
        progress: label of a bar over the blocks, none if ``None``.
        calibration: inputs of the first block that `change` looks at; advanced with the blocks.
        change: called with number, name and module of each block, filled, before it is used.

    Returns:
        As :func:`losses`.
    """
    check_windows(windows, stream.config)
    rows, found = max(1, TOKENS_AT_ONCE // windows.shape[1]), []
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
            found.append(window_losses(stream.model, ids, hidden.to(stream.device)))
    return torch.cat(found)
