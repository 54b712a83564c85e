"""Files that appear whole or not at all.  Book: the page on the format."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

__all__ = ["NO_ROOM", "sync_folder", "write_atomically", "write_text"]

NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def write_atomically(
    file: Path, write: Callable[[Path], object], scratch: Path | None = None
) -> None:
    """Let `write` make a temporary file, flush it to disk, and rename it to `file`.

    Args:
        file: to appear.
        write: makes it at another path.
        scratch: folder on the same disk for that path; that of `file` when ``None``.

    Raises:
        OSError: no space, or not writable; `file` is then as it was.
    """
    temporary = (scratch or file.parent) / f"{file.name}.tmp"
    try:
        try:
            write(temporary)
        except OSError:
            raise
        except Exception as error:  # safetensors reports a full disk with an error of its own
            if "space left" in str(error) or "File too large" in str(error):
                raise OSError(errno.ENOSPC, str(error)) from None
            raise
        temporary.chmod(0o644)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(file)
        sync_folder(file.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(file: Path, text: str, scratch: Path | None = None) -> None:
    """The same of a text."""
    write_atomically(file, lambda at: at.write_text(text, encoding="utf-8", newline="\n"), scratch)


def sync_folder(folder: Path) -> None:
    """Flush a folder's names to disk, where folders can be opened (not on Windows)."""
    with suppress(PermissionError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
