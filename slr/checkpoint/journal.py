"""A folder that comes into being file by file, survives being killed, and appears whole.

Work is done in ``OUT.partial``.  Every file is written under a temporary name, flushed to disk and
renamed, then entered with its SHA-256 in ``journal.json``, which is written the same way.  A run
that was killed, at any byte, goes on after the last entry; only at the end is the folder renamed
to ``OUT``.  Nothing in the files depends on when or how often a run was interrupted.

Book: the page on the format.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from safetensors.torch import save_file
from torch import Tensor

__all__ = ["Journal", "check_free", "sha256", "write_atomically"]

NAME = "journal.json"
LOCK = "lock"
LAST = "config.json"  # written last


def check_free(out: str | Path) -> Path:
    """Raise ValueError unless `out` does not exist yet or is an empty folder; return its path."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already; give the name of a new folder")
    return out


def sha256(file: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def write_atomically(file: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a temporary file, flush it to disk, and rename it to `file`.

    Raises:
        OSError: no space, or not writable; `file` is then as it was.
    """
    temporary = file.with_name(f"{file.name}.tmp")
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
        _sync_folder(file.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Journal:
    """The work folder of one output; a context manager that holds its lock.

    Args:
        out: the folder to make.
        key: plain values that decide the result; a journal with others is not resumed.
        resume: go on with what is there; ``False`` starts over.

    Attributes:
        folder: the work folder.
        entries: SHA-256, tensor names and notes of each finished file.
        bytes_written, seconds: of tensor files, in this run.

    Raises:
        ValueError: `out` exists, is being written by another run, or was begun with another key.
    """

    def __init__(self, out: str | Path, key: dict, resume: bool = True) -> None:
        self.out = check_free(out)
        self.folder = self.out.with_name(f"{self.out.name}.partial")
        self.key = json.loads(json.dumps(key))
        self.resume = resume
        self.entries: dict[str, dict] = {}
        self.bytes_written, self.seconds = 0, 0.0

    def __enter__(self) -> Journal:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / LOCK).open("w")
        except OSError as error:
            raise ValueError(f"cannot write to {self.folder}: {error.strerror}") from None
        try:
            self._take_lock()
            self._read()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()
        if error is not None and not self.entries:
            shutil.rmtree(self.folder, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            kept = (
                f"what is done is kept in {self.folder}: make room and give the same command again"
            )
            raise OSError(
                f"no space left for {self.out}; {kept if self.entries else 'nothing is written'}"
            ) from None

    def _take_lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{self.folder} is in use by another run") from None

    def _read(self) -> None:
        if not self.resume:
            self._clear()
        for rest in self.folder.glob("*.tmp"):
            rest.unlink()
        if not (self.folder / NAME).exists():
            self._clear()
            self._write()
            return
        found = json.loads((self.folder / NAME).read_text(encoding="utf-8"))
        if found["key"] != self.key:
            raise ValueError(
                f"{self.folder} was begun differently ({_difference(found['key'], self.key)}); "
                "give the same options, or start over with resume=False (--fresh)"
            )
        self.entries = {
            name: entry for name, entry in found["entries"].items()
            if (self.folder / name).is_file() and sha256(self.folder / name) == entry["sha256"]
        }  # fmt: skip
        for file in self.folder.glob("*.safetensors"):
            if file.name not in self.entries:
                file.unlink()

    def _clear(self) -> None:
        for file in self.folder.iterdir():
            if file.name == LOCK:
                continue
            shutil.rmtree(file) if file.is_dir() else file.unlink()

    def _write(self) -> None:
        text = json.dumps({"key": self.key, "entries": self.entries}, indent=1, allow_nan=False)
        write_atomically(self.folder / NAME, lambda file: _text(file, text))

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def add(self, name: str, tensors: dict[str, Tensor], notes: object = None) -> None:
        """Write a safetensors file and enter it with `notes`."""
        started = time.perf_counter()
        parts = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}

        def write(file: Path) -> None:
            save_file(parts, file, metadata={"format": "pt"})

        write_atomically(self.folder / name, write)
        digest = sha256(self.folder / name)
        self.entries[name] = {"sha256": digest, "tensors": sorted(parts), "notes": notes}
        self._write()
        self.bytes_written += (self.folder / name).stat().st_size
        self.seconds += time.perf_counter() - started

    def remove(self, name: str) -> None:
        """Take a file out again: one that only the work needed."""
        del self.entries[name]
        self._write()
        (self.folder / name).unlink()

    def add_text(self, name: str, text: str) -> None:
        """Write a small text file; it is not entered, and written again on resuming."""
        write_atomically(self.folder / name, lambda file: _text(file, text))

    def finish(self, config: str) -> Path:
        """Write ``config.json`` and give the folder its name."""
        self.add_text(LAST, config)
        (self.folder / NAME).unlink()
        (self.folder / LOCK).unlink()
        os.replace(self.folder, self.out)
        _sync_folder(self.out.parent)
        return self.out


def _text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def _difference(old: dict, new: dict, path: str = "") -> str:
    """The first difference of two nested dictionaries, in words."""
    for name in sorted({*old, *new}):
        before, now = old.get(name), new.get(name)
        if before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            return _difference(before, now, f"{path}{name}.")
        return f"{path}{name} was {before!r}, now {now!r}"
    return "nothing"
