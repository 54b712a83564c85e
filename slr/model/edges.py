"""Where files of other people come in: each fault of theirs is one line that names it.

Book: the page on the format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from slr.matrix.patterns import parse
from slr.matrix.rounding import Grid
from slr.model import hf

__all__ = [
    "check_config", "check_entries", "first_line", "is_mapping", "is_number", "is_text",
    "is_whole", "or_none", "reading",
]  # fmt: skip


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


def is_whole(value: Any) -> bool:
    """Whether JSON gave a whole number, 0 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_number(value: Any) -> bool:
    """Whether JSON gave a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_text(value: Any) -> bool:
    """Whether JSON gave text."""
    return isinstance(value, str)


def is_mapping(value: Any) -> bool:
    """Whether JSON gave a mapping."""
    return isinstance(value, dict)


def or_none(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """`kind`, or null."""
    return lambda value: value is None or kind(value)


def _all(value: Any, kind: Callable[[Any], bool]) -> bool:
    return is_mapping(value) and all(map(kind, value.values()))


def _shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(is_whole(v) and v for v in value)


DENSE_TYPE = {"model_type": ("a name", or_none(is_text))}
DENSE = {"model_type": ("a name", is_text), "num_hidden_layers": ("a number of blocks", is_whole)}
ABOUT = {
    "dense": ("a mapping", is_mapping),
    "source": ("a name or null", or_none(is_text)),
    "recipe": ("a mapping", is_mapping),
    "calibration": ("a mapping or null", or_none(is_mapping)),
    "layers": ("a mapping of at least one layer", lambda value: is_mapping(value) and bool(value)),
}
WINDOWS = {
    "text": ("a name", is_text),
    "windows": ("a whole number", is_whole),
    "seqlen": ("a whole number", is_whole),
}
MEASURED = {
    **WINDOWS,
    "perplexity": ("numbers or null, by name", lambda value: _all(value, or_none(is_number))),
    "sample": ("words by name, or null", or_none(lambda value: _all(value, is_text))),
}
TUNED = {
    "passes": ("a whole number", is_whole),
    "divergence": (
        "numbers or null",
        lambda value: isinstance(value, list) and any(map(is_number, value)),
    ),
}
ORIGIN = {
    "folder": ("a path or null", or_none(is_text)), "fingerprint": ("a mapping", is_mapping)
}  # fmt: skip
LAYER = {
    "shape": ("two sizes", _shape),
    "pattern": ("a pattern or null", or_none(is_text)),
    "rank": ("a whole number", is_whole),
    "kept": ("a whole number", is_whole),
    "bias": ("true or false", lambda value: isinstance(value, bool)),
    "pruned_error": ("a number or null", or_none(is_number)),
    "error": ("a number or null", or_none(is_number)),
    "output_error": ("a number or null", or_none(is_number)),
}


def check_entries(where: str, value: Any, entries: dict) -> None:
    """Raise ValueError unless `value` is a mapping with these entries, and perhaps others.

    Args:
        where: its name, for messages.
        value: what a file holds.
        entries: of each key, what it must be in words and as a predicate.

    >>> check_entries("spec", {"seqlen": "x"}, {"seqlen": ("a whole number", is_whole)})
    Traceback (most recent call last):
    ValueError: spec: 'seqlen' is 'x'; it must be a whole number
    """
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
        ValueError: no mapping, another format, a quantised model, or an entry that is missing or
            of another kind.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"{file} is {_short(raw)}; it must be a mapping")
    check_entries(str(file), {"model_type": None, **raw}, DENSE_TYPE)
    quantised = raw.get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ValueError(f"{file.parent} is quantised ({method}); slr reads 16 or 32-bit weights")
    if hf.NAME not in raw:
        if raw.get("model_type") == hf.NAME:
            raise ValueError(f"{file} lacks 'slr', what a compressed checkpoint says of itself")
        return raw
    where, about = f"{file}: 'slr'", raw[hf.NAME]
    if isinstance(about, dict) and about.get("format") != hf.FORMAT:
        found = about.get("format")
        raise ValueError(f"{file} has format {found}, but slr reads format {hf.FORMAT}")
    check_entries(where, about, ABOUT)
    check_entries(f"{where}.'dense'", about["dense"], DENSE)
    check_entries(f"{where}.'recipe'", about["recipe"], {"refine": ("a name", is_text)})
    if about.get("origin") is not None:
        check_entries(f"{where}.'origin'", about["origin"], ORIGIN)
    for name, entries in (("calibration", WINDOWS), ("measured", MEASURED), ("tuned", TUNED)):
        if about.get(name) is not None:
            check_entries(f"{where}.{name!r}", about[name], entries)
    for name, layer in about["layers"].items():
        check_entries(f"{where}.'layers'.{name!r}", layer, LAYER)
        _check_names(f"{where}.'layers'.{name!r}", layer)
    return raw


def _check_names(where: str, layer: dict) -> None:
    """Raise ValueError unless a pattern and grids are names of some."""
    if layer.get("factors") is not None and layer.get("grid") is None:
        raise ValueError(f"{where} has 'factors' but no 'grid'")
    for key, read in (("pattern", parse), ("grid", Grid.parse), ("factors", Grid.parse)):
        if layer.get(key) is not None:
            try:
                read(str(layer[key]))
            except ValueError as error:
                raise ValueError(f"{where}: {key!r}: {error}") from None
