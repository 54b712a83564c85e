"""Where files of other people come in: each fault of theirs is one line that names it.

Book: the page on the format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from slr.model import hf

__all__ = ["check_config", "first_line", "reading"]


def first_line(error: BaseException) -> str:
    """The first line of what an error says, its kind if that says nothing of itself, its cause.

    >>> first_line(KeyError("gold")), first_line(ValueError("no such task\\nTry another."))
    ("KeyError 'gold'", 'no such task')
    """
    lines = str(error).strip().splitlines()
    told = lines[0] if lines else ""
    if not isinstance(error, ValueError | OSError) or not told:
        told = f"{type(error).__name__} {told}".strip()
    return told if error.__cause__ is None else f"{told}: {first_line(error.__cause__)}"


@contextmanager
def reading(what: str) -> Iterator[None]:
    """While open, whatever a library finds wrong with `what` is one ValueError that names it.

    What is the machine's fault goes through: no memory, no package, an error of the system.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, ImportError):
        raise
    except Exception as error:  # whatever a library may raise of a malformed file
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{what} cannot be used ({first_line(error)})") from error


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _or_none(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or kind(value)


def _shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_whole(v) and v for v in value)


DENSE = {"model_type": ("a name", _text), "num_hidden_layers": ("a number of blocks", _whole)}
ABOUT = {
    "dense": ("a mapping", _mapping),
    "source": ("a name or null", _or_none(_text)),
    "recipe": ("a mapping", _mapping),
    "calibration": ("a mapping or null", _or_none(_mapping)),
    "layers": ("a mapping", _mapping),
}
ORIGIN = {
    "folder": ("a path or null", _or_none(_text)), "fingerprint": ("a mapping", _mapping)
}  # fmt: skip
LAYER = {
    "shape": ("two sizes", _shape),
    "pattern": ("a pattern or null", _or_none(_text)),
    "rank": ("a whole number", _whole),
    "kept": ("a whole number", _whole),
    "bias": ("true or false", lambda value: isinstance(value, bool)),
    "pruned_error": ("a number", _number),
    "error": ("a number", _number),
    "output_error": ("a number or null", _or_none(_number)),
}


def _check(where: str, value: Any, entries: dict) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {_short(value)}; it must be a mapping")
    for key, (what, fits) in entries.items():
        if key not in value:
            raise ValueError(f"{where} lacks {key!r}, {what}")
        if not fits(value[key]):
            raise ValueError(f"{where}: {key!r} is {_short(value[key])}; it must be {what}")


def _short(value: Any) -> str:
    told = repr(value)
    return told if len(told) <= 60 else f"{told[:60]}…"


def check_config(raw: Any, file: Path) -> dict:
    """A ``config.json`` whose ``"slr"`` entry, if there is one, says all that is read of it.

    Args:
        raw: what the file holds.
        file: its path, for messages.

    Returns:
        `raw`.

    Raises:
        ValueError: no mapping, another format, or an entry that is missing or of another kind.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"{file} is {_short(raw)}; it must be a mapping")
    if hf.NAME not in raw:
        if raw.get("model_type") == hf.NAME:
            raise ValueError(f"{file} lacks 'slr', what a compressed checkpoint says of itself")
        return raw
    where, about = f"{file}: 'slr'", raw[hf.NAME]
    if isinstance(about, dict) and about.get("format") != hf.FORMAT:
        found = about.get("format")
        raise ValueError(f"{file} has format {found}, but slr reads format {hf.FORMAT}")
    _check(where, about, ABOUT)
    _check(f"{where}.'dense'", about["dense"], DENSE)
    _check(f"{where}.'recipe'", about["recipe"], {"refine": ("a name", _text)})
    if about.get("origin") is not None:
        _check(f"{where}.'origin'", about["origin"], ORIGIN)
    for name, layer in about["layers"].items():
        _check(f"{where}.'layers'.{name!r}", layer, LAYER)
    return raw
