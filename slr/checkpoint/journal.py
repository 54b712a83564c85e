"""A folder that comes into being file by file, survives being killed, and appears whole.

Work is done in ``OUT.partial``: the files of the result in its folder ``files``, and beside it
``journal.json`` and a lock.  Every file is written in the folder ``scratch``, flushed to disk and
moved, then entered with its SHA-256 in the journal, which is written the same way.  A run that
was killed, at any byte, goes on after the last entry; only at the end is ``files`` renamed to
``OUT``, and then ``OUT.partial`` goes.  Nothing in the files depends on when or how often a run
was interrupted.  What a journal does not list is never removed.

Book: the page on the format.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor

from slr.checkpoint.atomic import NO_ROOM, sync_folder, write_atomically, write_text
from slr.checkpoint.digests import SUMS, sha256, sums
from slr.checkpoint.place import become, check_free, check_rename, target

__all__ = ["Journal"]

NAME = "journal.json"
LOCK = "lock"
FILES = "files"
SCRATCH = "scratch"
LAST = "config.json"  # written last
SMALL = "small"  # folder in `scratch`, for small files that others write


class Journal:
    """The work folder of one output; a context manager that holds its lock.

    Args:
        out: the folder to make.
        key: plain values that decide the result; a journal with others is not resumed.
        resume: go on with what is there; ``False`` starts over.
        memory: plain values to find again on resuming, as what takes long to compute anew.
        again: how to start over, for messages; by removing the work folder if not told.

    Attributes:
        out: the folder to make; where a link leads, if `out` is one.
        folder: where the files of the result are until then.
        scratch: a folder for what is of use to this run alone.
        entries: SHA-256, tensor names and notes of each finished tensor file.
        bytes_written, seconds: of tensor files, in this run.

    Raises:
        ValueError: `out` exists or cannot be made by a rename; its work folder is in use, was begun
            with another key, or is not one of slr's.
    """

    def __init__(
        self, out: str | Path, key: dict, resume: bool = True, memory: dict | None = None,
        again: str | None = None,
    ) -> None:  # fmt: skip
        self.out = target(out)
        self.work = self.out.with_name(f"{self.out.name}.partial")
        self.folder, self.scratch = self.work / FILES, self.work / SCRATCH
        self.key = json.loads(json.dumps(key))
        self.resume, self.memory, self._given = resume, memory or {}, memory or {}
        self.again = again or f"by removing {self.work}"
        self.entries: dict[str, dict] = {}
        self.names: list[str] = []  # of every file that was ever begun here
        self.bytes_written, self.seconds = 0, 0.0
        self._lock = FileLock(self.work / LOCK)

    def __enter__(self) -> Journal:
        try:
            if not self.work.exists():
                check_free(self.out)
            self.work.mkdir(parents=True, exist_ok=True)
            if not (self.work / NAME).exists():
                self._check_ours()
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"{self.work} is in use by another run") from None
        except OSError as error:
            raise ValueError(f"cannot write to {self.work}: {error.strerror}") from None
        try:
            self._open()
        except BaseException:
            self._leave()
            raise
        return self

    @staticmethod
    def remembered(out: str | Path) -> dict:
        """The memory of a journal that was begun for `out`, if there is one that can be read."""
        journal = Journal(out, {})
        with suppress(ValueError, OSError):
            journal._found()
        return journal.memory

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not self.entries:
            self._clear()
        self._leave()
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            kept = f"what is done is kept in {self.work}: make room and give the same command again"
            raise OSError(
                error.errno,
                f"no space left for {self.out}; {kept if self.entries else 'nothing is written'}",
            ) from None

    def _leave(self) -> None:
        """Let go of the lock, and of the work folder if nothing is left in it."""
        for folder in (self.folder, self.scratch / SMALL, self.scratch):
            with suppress(OSError):
                folder.rmdir()
        if not any(file.name != LOCK for file in self.work.iterdir()):
            # Unlinked while it is held: who waits for it finds that it is no file any more.
            with suppress(OSError):
                (self.work / LOCK).unlink()
        self._lock.release()
        with suppress(OSError):
            self.work.rmdir()

    def _open(self) -> None:
        """Take up what is there, under the lock."""
        found = self._found()
        if found is not None:
            self._empty_scratch()
        if found is not None and not self.folder.exists() and self.out.exists():
            self._clear()  # the run was killed after its last rename
        check_free(self.out)
        if found is not None and not self.resume:
            self._clear()
            self.memory = self._given  # nothing of the run that is given up
            found = None
        self._check_ours()
        check_rename(self.work, self.out)
        self.folder.mkdir(exist_ok=True)
        if found is None:
            self._write()
        self.scratch.mkdir(exist_ok=True)
        if found is None:
            return
        if found["key"] != self.key:
            raise ValueError(
                f"{self.work} was begun differently ({_difference(found['key'], self.key)}); "
                f"give the same options, or start over {self.again}"
            )
        self.entries = {
            name: entry for name, entry in found["entries"].items()
            if (self.folder / name).is_file() and sha256(self.folder / name) == entry["sha256"]
        }  # fmt: skip
        for name in set(self.names) - set(self.entries):
            (self.folder / name).unlink(missing_ok=True)

    def _check_ours(self) -> None:
        """Raise ValueError if anything is there that no run of slr left."""
        ours = {self.work / name for name in (LOCK, NAME, f"{NAME}.tmp")}
        ours |= {self.folder / name for name in self.names}
        for file in self.work.rglob("*"):
            if file not in ours and not file.is_dir():
                raise ValueError(
                    f"{file} is in the way: no run of slr left it, so it is not touched; move it, "
                    "or give another name for the folder to make"
                )

    def _found(self) -> dict | None:
        """The journal that is there; its list of names is taken over."""
        file = self.work / NAME
        if not file.exists():
            return None
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            digest = found.pop("sha256")
            if digest != _digest(found):
                raise ValueError("its own SHA-256 is another")
            self.names = list(found["files"])
            if any(Path(name).is_absolute() or ".." in Path(name).parts for name in self.names):
                raise ValueError("it lists files elsewhere")
            self.memory = found["memory"] | self.memory
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{file} is not a journal that this version of slr wrote ({error}); finish with "
                f"the version that began, or remove {self.work} and start again"
            ) from None
        return found

    def _empty_scratch(self) -> None:
        """Remove what a killed run had no time to: our files and folder, and safetensors' own."""
        shutil.rmtree(self.scratch / SMALL, ignore_errors=True)
        for file in (*self.scratch.glob("*.tmp"), *self.scratch.glob(".tmp*")):
            file.unlink(missing_ok=True)

    def _clear(self) -> None:
        """Remove what the journal lists, and the journal."""
        for name in self.names:
            (self.folder / name).unlink(missing_ok=True)
            with suppress(OSError):
                if (above := (self.folder / name).parent) != self.folder:
                    above.rmdir()
        self._empty_scratch()
        for name in (NAME, f"{NAME}.tmp"):
            (self.work / name).unlink(missing_ok=True)
        self.names, self.entries = [], {}

    def _write(self) -> None:
        now = {
            "key": self.key, "memory": self.memory, "files": self.names, "entries": self.entries
        }  # fmt: skip
        told = {**now, "sha256": _digest(now)}
        write_text(self.work / NAME, json.dumps(told, indent=1, allow_nan=False) + "\n")

    def _begin(self, name: str) -> Path:
        """List a file before it is written, so that it is known to be ours."""
        if name not in self.names:
            self.names.append(name)
            self._write()
        file = self.folder / name
        file.parent.mkdir(exist_ok=True)
        return file

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def add(self, name: str, tensors: dict[str, Tensor], notes: object = None) -> None:
        """Write a safetensors file and enter it with `notes`."""
        parts = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        self.add_file(
            name, lambda at: save_file(parts, at, metadata={"format": "pt"}), sorted(parts), notes
        )

    def add_file(
        self, name: str, write: Callable[[Path], object], tensors: Sequence[str] = (),
        notes: object = None,
    ) -> None:  # fmt: skip
        """Let `write` make a file at another path, and enter it with `notes`."""
        started = time.perf_counter()
        file = self._begin(name)
        write_atomically(file, write, self.scratch)
        self.entries[name] = {"sha256": sha256(file), "tensors": list(tensors), "notes": notes}
        self._write()
        self.bytes_written += file.stat().st_size
        self.seconds += time.perf_counter() - started

    def remove(self, name: str) -> None:
        """Take a file out again: one that only the work needed."""
        del self.entries[name]
        self._write()
        (self.folder / name).unlink(missing_ok=True)

    def remember(self, **values: object) -> None:
        """Add plain values to the memory, to be found again on resuming."""
        self.memory |= json.loads(json.dumps(values))
        self._write()

    def room(self) -> Path:
        """An empty folder for small files, to be copied from there; a later run empties it."""
        self._empty_scratch()
        folder = self.scratch / SMALL
        folder.mkdir()
        return folder

    def add_text(self, name: str, text: str) -> None:
        """Write a small text file; it is not entered, and written again on resuming."""
        write_text(self._begin(name), text, self.scratch)

    def add_copy(self, source: Path) -> None:
        """Copy a small file, likewise."""
        copy = partial(shutil.copyfile, source)
        write_atomically(self._begin(source.name), copy, self.scratch)

    def finish(self, config: str | None = None) -> Path:
        """Write ``config.json`` and the digests of all files, and give the folder its name."""
        if config is not None:
            self.add_text(LAST, config)
        files = {f for name in self.names if (f := self.folder / name).is_file()}
        names = {str(file.relative_to(self.folder).as_posix()): file for file in files}
        known = {name: entry["sha256"] for name, entry in self.entries.items()}
        names.pop(SUMS, None)
        self.add_text(SUMS, sums({n: known.get(n) or sha256(file) for n, file in names.items()}))
        try:
            become(self.folder, self.out)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{self.folder} is complete, but cannot become {self.out} ({error.strerror}); "
                "make way and give the same command again",
            ) from None
        sync_folder(self.out.parent)
        self._clear()
        return self.out


def _digest(journal: dict) -> str:
    return hashlib.sha256(json.dumps(journal, sort_keys=True).encode()).hexdigest()


def _difference(old: dict, new: dict, path: str = "") -> str:
    """The first difference of two nested dictionaries, in words."""
    for name in sorted({*old, *new}):
        before, now = old.get(name), new.get(name)
        if before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            return _difference(before, now, f"{path}{name}.")
        return f"{path}{name} was {reprlib.repr(before)}, now {reprlib.repr(now)}"
    return "nothing"
