"""Digests of files: which source it was, and whether a finished folder is still what was written.

A finished folder has a ``SHA256SUMS``, in the form that ``sha256sum -c`` reads; the tensors that it
must hold are in its index.  Book: the page on the format.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from slr.model.tensors import INDEX, TensorFiles

__all__ = ["SUMS", "check_sums", "fingerprint", "sha256", "stamps", "sums"]

SUMS = "SHA256SUMS"


def sha256(file: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _model_files(folder: Path) -> list[Path]:
    small = [file for name in ("config.json", INDEX) if (file := folder / name).is_file()]
    return [*small, *TensorFiles(folder).files]


def stamps(folder: Path) -> dict[str, list[int]]:
    """Size in bytes and time of change of each file that makes a model, by name."""
    found = {file.name: file.stat() for file in _model_files(folder)}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}


def fingerprint(folder: Path, known: dict | None = None) -> dict[str, str]:
    """SHA-256 of each file that makes a model, by name: configuration, index, tensors.

    Args:
        folder: of a checkpoint.
        known: ``{"stamps": …, "sha256": …}`` from before; files whose stamp is what it was are
            not read again.

    Cost: reads every byte of those files.
    """
    before, digests = (known or {}).get("stamps", {}), (known or {}).get("sha256", {})
    return {
        name: digests[name]
        if name in digests and before.get(name) == stamp
        else sha256(folder / name)
        for name, stamp in stamps(folder).items()
    }


def sums(digests: dict[str, str]) -> str:
    """``SHA256SUMS`` of the files of a folder, from their digests by name.

    >>> sums({"b": "01", "a": "02"})
    '02  a\\n01  b\\n'
    """
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))


def check_sums(folder: Path) -> list[Path]:
    """Compare every file of a compressed folder with its ``SHA256SUMS``.

    Returns:
        The files that were compared.

    Raises:
        ValueError: it has none, a file is missing, differs, or is not listed.

    Cost: reads every byte.
    """
    try:
        text = (folder / SUMS).read_text(encoding="ascii")
        listed = {
            name: digest
            for digest, _, name in (row.partition("  ") for row in text.split("\n"))
            if name
        }
    except FileNotFoundError:
        raise ValueError(
            f"folder {folder} has no {SUMS}, so there is nothing to compare with: slr compress "
            "writes it, save_pretrained and earlier versions do not"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / SUMS} cannot be read: {error}") from None
    if sums(listed) != text:
        raise ValueError(f"{folder / SUMS} is damaged: it is not in the form that slr wrote it in")
    found = {f.relative_to(folder).as_posix(): f for f in folder.rglob("*") if f.is_file()}
    there = {name: f for name, f in found.items() if not name.startswith(".") and name != SUMS}
    for name in sorted({*listed, *there}):
        if name not in there:
            raise ValueError(f"folder {folder} lacks {name}, which {SUMS} lists")
        if name not in listed:
            raise ValueError(f"folder {folder} holds {name}, which {SUMS} does not list")
        if sha256(there[name]) != listed[name]:
            raise ValueError(f"{there[name]} is not what was written: its SHA-256 is another")
    return [there[name] for name in listed]
