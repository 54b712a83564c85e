"""The shared library of our C++ files: compiled when first needed, kept in the user's cache.

It takes a C++ compiler (``$CXX``, ``c++``, ``g++`` or ``clang++``) and some seconds, once.  Without
one, or with ``SLR_NATIVE=0``, layers multiply by torch's own operations.  Where torch's headers are
of no use, its operators of the kernels stay in Python.  Book: chapter 17.
"""

from __future__ import annotations

import ctypes
import glob
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch

__all__ = ["SETS", "Library", "cache_folder", "chosen", "library"]

HERE = Path(__file__).parent
SOURCES = (HERE / "native.cpp", HERE / "codes.cpp")
OPERATORS = HERE / "operators.cpp"
SETS = ("portable", "avx2", "avx512", "amx")  # as `Set` in native.cpp
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=default")
SECONDS = 600  # a compiler takes a few; it may be on a slow disk

Int: Any = ctypes.c_int
Long: Any = ctypes.c_int64
At: Any = ctypes.c_void_p


class Library:
    """The functions of our C++ files, the best instruction set here, or why there are none.

    Attributes:
        few, codes, spread, starts: ``slr_few`` and so on; see ``native.cpp``.
        codes_rows: see ``codes.cpp``.
        operators: whether torch's operators of them are in it as well; see ``operators.cpp``.
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
        self.codes, self.codes_rows = loaded.slr_codes, loaded.slr_codes_rows
        self.codes.argtypes = [Int] * 3 + [Long, At, Long] + [At] * 5
        self.codes_rows.argtypes = [Int] * 3 + [At, Long, Long, At]
        self.codes.restype = self.codes_rows.restype = None
        self.best, self.operators = loaded.slr_set(), hasattr(loaded, "slr_operators")


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
        named = os.environ.get("CXX")
        why = f"$CXX names {named!r}" if named else "g++ or clang++; $CXX names another"
        return Library(None, f"there is no C++ compiler ({why})")
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
    every = (*SOURCES, OPERATORS, HERE / "codes.h")
    key = hashlib.sha256(b"".join(source.read_bytes() for source in every))
    key.update(f"{compiler} {FLAGS} {torch.__version__} {torch.__file__}".encode())
    file = cache_folder() / f"native-{key.hexdigest()[:16]}.so"
    if file.is_file():
        try:
            return Library(file)
        except OSError:  # of another machine, or damaged
            file.unlink(missing_ok=True)
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
    """Compile and link in a folder: with threads and operators, if the compiler can."""
    for threads, operators in product((True, False), repeat=2):
        try:
            return _build(compiler, folder, threads, operators)
        except subprocess.CalledProcessError:
            if not threads and not operators:
                raise
    raise AssertionError("unreachable")


def _build(compiler: str, folder: Path, threads: bool, operators: bool) -> Path:
    """The library.

    Its threads are torch's own: two OpenMP libraries in one process would each keep some, which
    wait for one another's cores.
    """
    made, theirs = folder / "native.so", Path(torch.__file__).parent
    sources = [*SOURCES, OPERATORS] if operators else SOURCES
    flags = {source: ["-fopenmp"] if threads else [] for source in SOURCES}
    flags[OPERATORS] = ["-I", str(theirs / "include")]
    parts = [str(folder / f"{source.stem}.o") for source in sources]

    def compile_one(source: Path, part: str) -> None:
        _run(compiler, *FLAGS, *flags[source], "-c", str(source), "-o", part)

    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_one, sources, parts))
    own = glob.glob(str(theirs / "lib" / "lib*omp*.so*"))[:1]
    link = (own or ["-fopenmp"]) if threads else []
    link += [str(theirs / "lib" / "libtorch_cpu.so")] if operators else []
    _run(compiler, "-shared", *parts, *link, "-o", str(made))
    return made


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
