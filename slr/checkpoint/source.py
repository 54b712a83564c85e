"""The dense source of a compressed folder: what is recorded of it, and when it is opened again.

A configuration may come from anybody, so the path in it is no reason to open one.  A recorded
source is looked at unasked only if the folder was not downloaded, and used only if it is, byte for
byte, what the folder was made from.

Book: chapter 10 and the page on the format.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from slr.checkpoint.digests import fingerprint
from slr.checkpoint.folder import resolve
from slr.checkpoint.named import NAMES
from slr.model.data import OURS
from slr.model.tensors import TensorFiles

__all__ = ["downloaded", "may_read", "origin", "source_of"]


def origin(folder: Path, digests: dict) -> dict:
    """What a compressed folder records of its source.

    Args:
        folder: of the source.
        digests: its :func:`~slr.checkpoint.digests.fingerprint`.
    """
    return {"folder": str(folder.absolute()), "fingerprint": digests}


def downloaded(folder: Path) -> bool:
    """Whether a folder is from the hub's cache, or from the hub or git into a place of its own."""
    inside = folder.absolute()
    return inside.parent.name == "snapshots" or any(
        (inside / name).exists() for name in (".cache/huggingface", ".git")
    )


def may_read(folder: Path, notes: dict) -> bool:
    """Whether the texts that a compressed folder names are none of a downloaded one's choice.

    Args:
        folder: compressed.
        notes: what it says of itself.
    """
    told = [notes[name] for name in ("calibration", "measured") if notes.get(name) is not None]
    return all(each.get("text") in OURS for each in told) or not downloaded(folder)


def source_of(
    folder: Path, notes: dict, asked: bool | str | Path | None = None
) -> tuple[Path | None, str]:
    """The folder of the source to compare a compressed folder with.

    Args:
        folder: compressed.
        notes: what it says of itself.
        asked: ``None`` looks for the recorded one unless the folder was downloaded, ``True`` in
            any case, ``False`` for none; or the source itself, as for
            :func:`~slr.checkpoint.folder.resolve`.

    Returns:
        The folder, or ``None`` and in a few words why there is none.

    Raises:
        ValueError: a source that is not what the folder was made from, or one that was asked for
            by name and is not there.

    Cost: reads the source once, for its fingerprint.
    """
    if asked is False:
        return None, "not asked for"
    told = notes.get("origin")
    if not isinstance(asked, bool) and asked is not None:
        found: Path | None = resolve(asked)
    elif told is None:
        return None, f"what its source {notes['source']!r} was is not recorded; give it by --source"
    elif asked is None and downloaded(folder):
        return None, "it was downloaded; give its source by --source, or --compare to look for it"
    else:
        found = _recorded(notes)
    if found is None:
        return None, f"its source {notes['source']!r} is not here; give it by --source"
    if told is None:
        _check_shapes(found, notes["layers"])
    else:
        now = fingerprint(found)
        for file in sorted({*now, *told["fingerprint"]}):
            if now.get(file) != told["fingerprint"].get(file):
                raise ValueError(
                    f"source {found} is not what {folder} was made from ({file} differs); give "
                    "the right one by --source, or evaluate without it (--no-compare)"
                )
    return found, ""


def _check_shapes(found: Path, layers: dict) -> None:
    """All that can be said of a source that was not recorded."""
    shapes = {name: shape for name, (shape, _) in TensorFiles(found).headers().items()}
    for name, layer in layers.items():
        have = shapes.get(f"{name}.weight")
        if have != tuple(layer["shape"]):
            raise ValueError(
                f"source {found} does not fit: {name}.weight has shape {have} there, and "
                f"{tuple(layer['shape'])} before it was compressed"
            )


def _recorded(notes: dict) -> Path | None:
    """Its folder, or what its name stands for here; nothing is downloaded."""
    folder, name = notes["origin"]["folder"], notes["source"]
    at_home = folder is not None and Path(folder).is_absolute()
    for each in ([folder] if at_home else []) + ([name] if _on_hub(name) else []):
        with suppress(ValueError):
            return resolve(each, download=False)
    return None


def _on_hub(name: str | None) -> bool:
    """Whether a source is the embedded model or has a name on the hub, and is no path here."""
    if name is None or Path(name).exists():
        return False
    return name in NAMES or (name.count("/") == 1 and not name.startswith((".", "/", "~")))
