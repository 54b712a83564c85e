"""What every compression of a folder begins with: source, windows, key, room on the disk, journal.

Book: the page on the format.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slr.checkpoint.digests import fingerprint, stamps
from slr.checkpoint.finish import complete, while_joined
from slr.checkpoint.folder import context, load_tokenizer, resolve, small_files
from slr.checkpoint.journal import Journal
from slr.checkpoint.named import default_text
from slr.checkpoint.place import check_free, check_parent, target
from slr.checkpoint.sizes import bytes_after, check_space
from slr.checkpoint.source import origin
from slr.matrix.pruners import Like
from slr.methods.blockwise import plan_layers
from slr.methods.system import System
from slr.model import data, distributed, hf
from slr.model.arithmetic import compute_dtype
from slr.model.block import LayerReport
from slr.model.calibrate import on_disk
from slr.model.heldout import KINDS
from slr.model.recipe import Recipe
from slr.model.stream import Stream

__all__ = ["Prospect", "Work", "begin", "calibration_windows", "digest", "look"]

LONGEST = 1024  # tokens in a calibration window if not told
HELD_OUT = 4  # windows that a compression is measured on


@dataclass(frozen=True)
class Prospect:
    """One compression of a folder into another, looked at and not begun.

    Attributes:
        name: of the source, as it was given.
        out: folder to make.
        stream: the source.
        windows: calibration token windows, if the method reads data.
        calibration: what to record of them.
        method: what to do; a recipe has a definite rank.
        plan: recipe of each layer of each block; empty for a system.
        held: held-out windows to measure the result on, if there are any.
    """

    name: str
    out: Path
    stream: Stream
    windows: Tensor | None
    calibration: dict | None
    method: Recipe | System
    plan: list[dict[str, Recipe]]
    held: Tensor | None


@dataclass(frozen=True)
class Work(Prospect):
    """One that has begun.

    Attributes:
        journal: of the folder that is made; open.
        origin: what to record of the source, to know it again.
        masks: stamps of the folders whose masks are taken.
    """

    journal: Journal
    origin: dict
    masks: dict[Path, dict]

    def finish(self, reports: list[LayerReport]) -> None:
        """Write what is left to write, and let the folder appear.

        Raises:
            ValueError: the source, or a folder of masks, was changed meanwhile.
        """
        seen = {self.stream.folder: self.journal.memory["source"]["stamps"], **self.masks}
        for folder, before in seen.items():
            if stamps(folder) != before:
                raise ValueError(
                    f"{folder} was changed while it was read, so {self.journal.out} would be half "
                    "of one model and half of another; start over with resume=False (--fresh)"
                )
        told = hf.notes(self.name, self.method.as_dict(), self.calibration, reports)
        measured = self.journal.memory.get("measured")
        complete(self.stream, self.journal, {**told, "measured": measured, "origin": self.origin})


def look(
    model: str | Path,
    out: str | Path,
    method: Recipe | System,
    *,
    calibration: str | Path | Tensor | None = None,
    device: str = "cpu",
) -> Prospect:
    """Look at everything before anything is written.

    Args:
        model: as for :func:`~slr.checkpoint.folder.resolve`.
        out: folder to make.
        method: a recipe, or a system.
        calibration: text by name or path, or token windows; the default text when ``None``.
        device: where to compute.

    Raises:
        ValueError: anything that does not fit, or a calibration text that nothing reads.
        OSError: no room.
    """
    distributed.start(device)
    out, source = target(out), resolve(model)
    if not out.with_name(f"{out.name}.partial").exists():
        check_free(out)
    check_parent(out)
    stream = Stream(source, device)
    if stream.about is not None:
        raise ValueError("the model is compressed already; give its dense source")
    layers: list[dict[str, Recipe]] = []
    if isinstance(method, Recipe):
        hidden_size = stream.config.hidden_size
        method = method.resolved(hidden_size)
        layers = plan_layers(stream.model, method, hidden_size)
    elif distributed.world() > 1:
        raise ValueError(f"{method.name} works in one process, not in {distributed.world()}")
    windows, text = calibration_windows(source, method, calibration)
    if windows is not None:
        data.check_windows(windows, stream.config)
    small_files(source)
    held = held_out(source, method, calibration)
    size = bytes_after(stream, layers)
    on_the_way = size + _on_the_way(stream, method, windows, held)
    check_space(max(on_the_way, while_joined(size)), out)
    return Prospect(str(model), out, stream, windows, text, method, layers, held)


@contextmanager
def begin(
    model: str | Path, out: str | Path, method: Recipe | System, *, resume: bool = True,
    **options: Any,
) -> Iterator[Work]:  # fmt: skip
    """:func:`look`, and open the journal.

    Args:
        model, out, method, options: as for :func:`look`.
        resume: go on with what a run that was stopped left.

    Raises:
        ValueError, OSError: as :func:`look` and :class:`~slr.checkpoint.journal.Journal`.
    """
    seen = look(model, out, method, **options)
    source = seen.stream.folder
    masks = {folder: stamps(folder) for folder in _given_masks(seen.method)}
    journal = _keyed(seen.out, source, seen.method, seen.calibration, resume)
    with distributed.first(journal):
        made = origin(source, journal.memory["source"]["sha256"])
        told = {field.name: getattr(seen, field.name) for field in fields(seen)}
        yield Work(**told, journal=journal, origin=made, masks=masks)


def _on_the_way(
    stream: Stream, method: Recipe | System, windows: Tensor | None, held: Tensor | None
) -> int:
    """Bytes of the hidden states that are on the disk while a recipe is carried out.

    Those of held-out windows after a block and after the next, and of calibration windows where
    they are too large for memory, of the dense model too if it is followed.
    """
    if not isinstance(method, Recipe):
        return 0
    state = stream.config.hidden_size * compute_dtype(stream.dtype, stream.device).itemsize
    size = 0 if held is None else 2 * len(KINDS) * held.numel() * state
    inputs = 0 if windows is None else on_disk(windows.numel() * state)
    return size + (1 + method.follows_dense) * inputs


def _keyed(
    out: str | Path, source: Path, method: Recipe | System, text: dict | None, resume: bool
) -> Journal:
    """The journal of a compression: all that decides the result is its key."""
    import slr

    known = Journal.remembered(out).get("source") if resume else None
    digests = fingerprint(source, known)
    key = {
        "slr": slr.__version__,
        "format": hf.FORMAT,
        "source": digests,
        "recipe": method.as_dict(),
        "calibration": text,
    }
    masks = [fingerprint(folder) for folder in _given_masks(method)]
    key |= {"masks": masks} if masks else {}
    memory = {"source": {"stamps": stamps(source), "sha256": digests}}
    return Journal(out, key, resume, memory, again="with resume=False (--fresh)")


def _given_masks(method: Recipe | System) -> list[Path]:
    """The folders that are read besides: models whose masks are taken."""
    if not isinstance(method, Recipe):
        return []
    steps = [each.prune for each in method.variants()]
    return [Path(name) for name in sorted({s.folder for s in steps if isinstance(s, Like)})]


def calibration_windows(
    folder: Path | None, method: Recipe | System, text: str | Path | Tensor | None = None
) -> tuple[Tensor | None, dict | None]:
    """Token windows for a method, and what to record of them; neither if it reads no data.

    Args:
        folder: of the model, for its tokenizer and longest context.
        method: with ``samples``, ``seqlen`` and ``seed``.
        text: as for :func:`slr.model.data.calibration`, or token windows (count, seqlen);
            :func:`~slr.checkpoint.named.default_text` when ``None``.

    Raises:
        ValueError: not enough text, windows of another shape, a text that is not read, or one
            that needs a tokenizer that is not there.
    """
    if not method.needs_data:
        if text is not None:
            told = "token windows" if isinstance(text, Tensor) else repr(str(text))
            raise ValueError(f"calibration={told} has no effect: {method!r} reads no data")
        return None, None
    if isinstance(text, Tensor):
        windows, name = _checked(text), "token windows"
    else:
        name = default_text(folder) if text is None else str(text)
        if folder is None:
            raise ValueError(
                f"calibration={name!r} needs the model's tokenizer, but a loaded model does not "
                "say where it is; give token windows, see slr.data.calibration"
            )
        seqlen = context(folder, LONGEST) if method.seqlen is None else method.seqlen
        tokenizer = load_tokenizer(folder)
        windows = data.calibration(name, tokenizer, seqlen, method.samples, method.seed)
    count, seqlen = windows.shape
    return windows, {"text": name, "windows": count, "seqlen": seqlen, "sha256": digest(windows)}


def digest(windows: Tensor) -> str:
    """SHA-256 of token windows.  Cost: a pass."""
    return hashlib.sha256(windows.cpu().numpy().tobytes()).hexdigest()


def held_out(
    folder: Path, method: Recipe | System, text: str | Path | Tensor | None = None
) -> Tensor | None:
    """Held-out windows of the calibration text, or of the default one if none is read.

    Args:
        folder, method, text: as for :func:`calibration_windows`.

    Returns:
        (:data:`HELD_OUT`, seqlen); ``None`` for token windows, a text that is too short, or a model
        without a tokenizer.
    """
    if isinstance(text, Tensor):
        return None
    try:
        tokenizer = load_tokenizer(folder)
        seqlen = context(folder, LONGEST) if method.seqlen is None else method.seqlen
        return data.unseen(
            str(text or default_text(folder)), tokenizer, seqlen, HELD_OUT, method.seed
        )
    except ValueError:
        return None


def _checked(windows: Tensor) -> Tensor:
    if windows.ndim != 2 or windows.shape[1] < 2 or not len(windows):
        raise ValueError(f"windows have shape {tuple(windows.shape)}; they must be (count, seqlen)")
    if windows.is_floating_point() or windows.dtype == torch.bool:
        raise TypeError(f"windows have dtype {windows.dtype}; they must be token numbers (int64)")
    return windows.long()
