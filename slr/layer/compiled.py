"""The shared library of our C++ files: compiled when first needed, kept in the user's cache.

It takes a C++ compiler (``$CXX``, ``c++``, ``g++`` or ``clang++``) and some seconds, once.  Without
one, or with ``SLR_NATIVE=0``, layers multiply by torch's own operations.  Book: chapter 15.
"""

from __future__ import annotations

import ctypes
import glob
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

__all__ = ["SETS", "Library", "cache_folder", "chosen", "library"]

SOURCES = tuple(Path(__file__).with_name(name) for name in ("native.cpp", "codes.cpp"))
SETS = ("portable", "avx2", "avx512", "amx")  # as `Set` in native.cpp
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=default")
SECONDS = 600  # a compiler takes a few; it may be on a slow disk

Int: Any = ctypes.c_int
Long: Any = ctypes.c_int64
At: Any = ctypes.c_void_p


class Library:
    """The functions of our C++ files, the best instruction set here, or why there are none.

    Attributes:
        few, spread, starts: ``slr_few`` and so on; see ``native.cpp``.
        codes_rows, codes_few: see ``codes.cpp``.
        best: an index of :data:`SETS`.
        missing: why there is no library; empty if there is one.
    """

    def __init__(self, file: Path | None, missing: str = "") -> None:
        self.missing = missing
        if file is None:
            return
        loaded = ctypes.CDLL(str(file))
        self.few, self.spread, self.starts = loaded.slr_few, loaded.slr_spread, loaded.slr_starts
        self.few.argtypes = [Int] * 3 + [Long] * 4 + [At, At, Long, At, At, Long] + [At] * 4
        self.spread.argtypes = [Int] * 3 + [Long] * 4 + [At, Long, At, At, Long, At]
        self.starts.argtypes = [Int] * 2 + [Long] * 2 + [At, At]
        self.few.restype = self.spread.restype = None
        self.codes_rows, self.codes_few = loaded.slr_codes_rows, loaded.slr_codes_few
        self.codes_rows.argtypes = [Int] * 3 + [At, Long, Long, At]
        self.codes_few.argtypes = [Int] * 2 + [At, Long, Long, At, At, At]
        self.codes_rows.restype = self.codes_few.restype = None
        self.best = loaded.slr_set()


def cache_folder() -> Path:
    """What is made once on a machine: ``$SLR_CACHE``, else ``slr`` in the user's cache folder.

    >>> cache_folder().name
    'slr'
    """
    if os.environ.get("SLR_CACHE"):
        return Path(os.environ["SLR_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slr"


@cache
def library() -> Library:
    """The library, compiled if this machine has not yet.

    Cost: some seconds once on a machine, then nothing.

    >>> library().missing == "" or library().missing
    True
    """
    if os.environ.get("SLR_NATIVE", "1") == "0":
        return Library(None, "SLR_NATIVE=0 is set")
    compiler = _compiler()
    if compiler is None:
        return Library(None, "there is no C++ compiler (g++ or clang++; $CXX names another)")
    try:
        return _kept(compiler)
    except (OSError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", None) or str(error)
        return Library(None, f"our C++ does not compile here: {told.strip().splitlines()[-1]}")


def chosen(best: str | None) -> int:
    """The best instruction set here, but none better than the one named: an index of `SETS`.

    Cost: none, once the library is there.

    >>> chosen("portable") if not library().missing else 0
    0
    """
    return library().best if best is None else min(SETS.index(best), library().best)


def _compiler() -> str | None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((found for name in names if (found := shutil.which(name))), None)


def _kept(compiler: str) -> Library:
    """From the cache, else compiled into it; where nothing can be kept, for this process alone."""
    key = hashlib.sha256(b"".join(source.read_bytes() for source in SOURCES))
    key.update(f"{compiler} {FLAGS} {torch.__version__} {torch.__file__}".encode())
    file = cache_folder() / f"native-{key.hexdigest()[:16]}.so"
    if file.is_file():
        try:
            return Library(file)
        except OSError:  # of another machine, or damaged
            file.unlink()
    with tempfile.TemporaryDirectory() as folder:
        made = _compile(compiler, Path(folder))
        found = Library(made)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            beside = file.with_name(f"{file.name}.{os.getpid()}")
            shutil.copyfile(made, beside)
            beside.replace(file)
        except OSError:
            pass
    return found


def _compile(compiler: str, folder: Path) -> Path:
    """Compile and link in a folder: with threads if the compiler can, and torch's own of them.

    Two OpenMP libraries in one process would each keep threads of their own, which wait for one
    another's cores.
    """
    made, parts = folder / "native.so", [folder / f"{source.stem}.o" for source in SOURCES]
    own = glob.glob(str(Path(torch.__file__).parent / "lib" / "lib*omp*.so*"))
    for threads in (["-fopenmp"], []):
        try:
            for source, part in zip(SOURCES, parts, strict=True):
                _run(compiler, *FLAGS, *threads, "-c", str(source), "-o", str(part))
            link = own[:1] if threads and own else threads
            _run(compiler, "-shared", *map(str, parts), *link, "-o", str(made))
            return made
        except subprocess.CalledProcessError:
            if not threads:
                raise
    raise AssertionError("unreachable")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
