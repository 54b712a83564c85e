"""Where a folder is to appear, and whether it can: looked at before any work.

Book: the page on the format.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

__all__ = [
    "PROBE",
    "become",
    "check_folder",
    "check_free",
    "check_parent",
    "check_rename",
    "target",
]

PROBE = "probe"


def target(out: str | Path) -> Path:
    """The folder to make, absolute; where a link leads, if `out` is one.

    Raises:
        ValueError: a link to nothing, no name of a folder, or the folder that one is in.
    """
    path = Path(out).absolute()
    if path.is_symlink():
        if not path.exists():
            raise ValueError(f"{path} is a link to nothing; remove it or give another name")
        path = path.resolve()
    if not path.name or path.name == "..":
        raise ValueError(f"out {str(out)!r} is not the name of a new folder")
    if path == Path.cwd():
        raise ValueError(f"out {str(out)!r} is the folder you are in; give the name of a new one")
    return path


def check_free(out: Path) -> None:
    """Raise ValueError unless `out` does not exist yet or is an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already; give the name of a new folder")


def check_folder(out: Path) -> None:
    """Raise ValueError unless files can be written into `out`, or it can be made."""
    check_parent(out)
    if out.exists() and not (out.is_dir() and os.access(out, os.W_OK | os.X_OK)):
        why = "Permission denied" if out.is_dir() else "Not a directory"
        raise ValueError(f"cannot write to {out}: {why}; give another folder")


def check_parent(out: Path) -> None:
    """Raise ValueError unless folders can be made beside `out`."""
    parent = out.parent
    while not parent.exists():
        parent = parent.parent
    why = "Not a directory" if not parent.is_dir() else "Permission denied"
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write to {out}.partial: {why}")


def become(folder: Path, out: Path) -> None:
    """Rename a folder to `out`, which is free."""
    if os.name == "nt" and out.exists():
        out.rmdir()  # Windows renames onto no folder
    folder.replace(out)


def check_rename(work: Path, out: Path) -> None:
    """Rename an empty folder of `work` to `out` and undo it, as will be done at the end.

    Raises:
        ValueError: it cannot be done, as onto a mount point.
    """
    if os.path.ismount(out):
        raise ValueError(f"{out} is a mount point, which no folder can become; give one inside it")
    there, probe = out.exists(), work / PROBE
    with suppress(FileNotFoundError):
        probe.rmdir()  # of a run that was killed
    try:
        probe.mkdir()
        become(probe, out)
    except OSError as error:
        with suppress(OSError):
            probe.rmdir()
        raise ValueError(f"{out} cannot be made: {error.strerror}") from None
    if not there:
        out.rmdir()
