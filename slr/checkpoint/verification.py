"""Is a compressed folder whole, and still what was written?  Book: the page on the format."""

from __future__ import annotations

from pathlib import Path

from slr.checkpoint.digests import check_sums
from slr.checkpoint.folder import resolve
from slr.model.stream import Stream

__all__ = ["verify"]


def verify(model: str | Path) -> list[Path]:
    """Compare a compressed folder with its digests, and read all of it, block by block.

    Args:
        model: a compressed folder, or its name on the hub.

    Returns:
        The files that were compared.

    Raises:
        ValueError: the first thing that is wrong: a file that is missing, not listed or differs in
            any bit, a tensor that is missing, of another shape or dtype, or not finite, a mask that
            does not have as many entries as are stored.

    Cost: reads every byte twice.

    Example: ``tests/test_integrity.py``.
    """
    folder = resolve(model)
    files = check_sums(folder)
    stream = Stream(folder)
    stream.fill_outside()
    for _ in stream.filled():
        pass
    return files
