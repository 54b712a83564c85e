"""``slr tune``: a compressed folder into another, tuned as a whole against its dense source.

Book: chapter 19.
"""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slr.checkpoint.cards import card
from slr.checkpoint.conversion import told
from slr.checkpoint.digests import fingerprint
from slr.checkpoint.finish import WHOLE, add_small_files
from slr.checkpoint.folder import about, load, load_tokenizer, read_raw, resolve
from slr.checkpoint.journal import Journal
from slr.checkpoint.measuring import PROMPT, words
from slr.checkpoint.place import check_free, target
from slr.checkpoint.sizes import check_space
from slr.checkpoint.source import may_read, source_of
from slr.checkpoint.work import calibration_windows, digest, held_out
from slr.model import distributed, hf
from slr.model.arithmetic import compute_dtype, computing
from slr.model.blocks import in_mode
from slr.model.distillation import RATE, distil
from slr.model.format import describe
from slr.model.losses import exponential, window_losses
from slr.model.recipe import Recipe

__all__ = ["tune"]


def tune(
    model: str | Path,
    out: str | Path,
    *,
    passes: int = 4,
    rate: float = RATE,
    more: int = 0,
    calibration: str | Path | Tensor | None = None,
    source: str | Path | None = None,
    device: str | None = None,
    progress: bool = False,
) -> list[float]:
    """Tune a compressed model to predict what its dense source predicts.

    Args:
        model: folder that :func:`slr.compress` made with a recipe.
        out: folder to make.
        passes: over the text.
        rate: of Adam.
        more: windows that the dense model writes, to learn from besides.
        calibration: a text, as for :func:`slr.compress`; the one that the folder was calibrated on
            when ``None``, as many windows.
        source: where the dense model is now; the recorded place when ``None``.
        device: where to compute; ``"cpu"`` when ``None``.
        progress: show a bar on standard error.

    Returns:
        The divergence on held-out windows before and after each pass, in nats a token; what is
        written is the best of them.

    Raises:
        ValueError: no compressed folder, no source, no text, or passes, a rate or windows that mean
            nothing; nothing is written.

    Cost: as :func:`slr.model.distillation.distil`; memory for both models.  A run that is killed
        begins again.

    Example: ``tests/test_distillation.py``.
    """
    folder = resolve(model)
    notes = about(folder)
    if notes is None:
        raise ValueError(f"{folder} is not compressed; make it smaller first, by slr compress")
    if "prune" not in notes["recipe"]:
        raise ValueError(f"{folder} was not made by a recipe; CAP and LoSparse tune by themselves")
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < 1:
        raise ValueError(f"passes is {passes!r}; it must be an integer of 1 or more")
    if not 0 < rate < 1:
        raise ValueError(f"rate is {rate}; it must be above 0 and below 1")
    if isinstance(more, bool) or not isinstance(more, int) or more < 0:
        raise ValueError(f"more is {more!r}; it must be an integer of 0 or more")
    check_free(target(out))
    dense, why = source_of(folder, notes, source)
    if dense is None:
        raise ValueError(f"{folder} has to be tuned against its dense source: {why}")
    recipe = Recipe.from_dict(notes["recipe"])
    # A recipe that read no data has no windows of its own: the default ones are taken.
    asked = recipe if recipe.needs_data else Recipe()
    text = _text(folder, notes) if calibration is None else calibration
    windows, read = calibration_windows(dense, asked, text)
    assert windows is not None
    where, size = device or "cpu", sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    distributed.start(where)
    check_space(size, out)
    how = {"text": read, "passes": passes, "rate": rate, "more": more}
    key = {"tuned": fingerprint(folder), **how}
    teacher = nn.Module.to(load(dense), where)
    student = nn.Module.to(load(folder), where)
    with distributed.first(Journal(out, key)) as journal:
        trace = distil(student, teacher, windows, passes, rate=rate, more=more, progress=progress)
        values = [value if math.isfinite(value) else None for value in trace]
        measured = _measured(notes, student, dense, asked) if may_read(folder, notes) else None
        notes = {
            **notes,
            "source": notes["source"] or str(source),
            "tuned": {**how, "divergence": values},
            "measured": measured,
        }
        notes["layers"] = describe(student, notes["layers"])
        if distributed.rank() == 0:
            _write(journal, student, folder, dense, notes)
    return trace


def _text(folder: Path, notes: dict) -> str | None:
    """The text that a folder was calibrated on, if it may choose it."""
    if notes["calibration"] is None:
        return None
    text = notes["calibration"]["text"]
    if not may_read(folder, notes):
        raise ValueError(
            f"{folder} was downloaded, and says that it was calibrated on {text!r}; name the "
            "text to tune it on, by --calibration"
        )
    return text


def _measured(notes: dict, student: Any, dense: Path, recipe: Recipe) -> dict | None:
    """What was measured of the folder, with the tuned model's numbers and words."""
    measured = notes.get("measured")
    windows = None if measured is None else held_out(dense, recipe, measured["text"])
    if measured is None or windows is None:
        return None
    if measured.get("sha256", digest(windows)) != digest(windows):
        warnings.warn(
            f"text {measured['text']!r} has changed, so that the tuned model's perplexity would be "
            "of other windows than the dense model's: it is not measured",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    device, sample = student.device, measured["sample"]
    run_in = compute_dtype(student.dtype, device)
    with torch.no_grad(), in_mode(student, False), computing(student, run_in):
        losses = [window_losses(student, ids[None].to(device)) for ids in windows]
        if sample is not None:
            prompt = windows[len(windows) // 2][:PROMPT][None].to(device)
            sample = {**sample, "result": words(student, load_tokenizer(dense), prompt)}
    value = exponential(torch.cat(losses))
    known = {**measured["perplexity"], "result": round(value, 4) if math.isfinite(value) else None}
    return {**measured, "perplexity": known, "sample": sample}


def _write(journal: Journal, model: Any, folder: Path, dense: Path, notes: dict) -> None:
    """Tensors, small files, card and configuration; then the folder appears."""
    tied = getattr(model, "all_tied_weights_keys", {})
    tensors = {n: t.cpu() for n, t in hf.state_dict(model).items() if n not in tied}
    journal.add(WHOLE, tensors)
    size = add_small_files(journal, folder)
    before = sum(file.stat().st_size for file in dense.glob("*.safetensors"))
    raw = read_raw(dense)
    journal.add_text("README.md", card(notes, before, size, told(raw)))
    config = {**raw, "num_hidden_layers": model.config.num_hidden_layers}
    journal.finish(json.dumps(hf.disguise(config, notes), indent=1, allow_nan=False) + "\n")
