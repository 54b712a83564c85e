"""The masks of a model that was pruned before: read, one matrix at a time, where a recipe asks.

The authors' code calls the dense model the reference of the pruned one, and repairs the one towards
the other.  The folder holds an ordinary checkpoint of the same shapes, with zeros in it.

Book: chapter 5.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import Tensor

from slr.matrix.pruners import Like, Pruner
from slr.model.tensors import TensorFiles

__all__ = ["Masks"]


class Masks:
    """Binds pruners ``"like FOLDER"`` to the matrices there; others stay as they are."""

    def __init__(self) -> None:
        self._files: dict[str, TensorFiles] = {}
        self._shapes: dict[str, dict[str, tuple[tuple[int, ...], str]]] = {}

    def bound(self, pruner: Pruner, layer: str, shape: tuple[int, int]) -> Pruner:
        """The pruner of one layer.

        Args:
            pruner: of its recipe.
            layer: full name; its matrix is ``LAYER.weight``.
            shape: of its weight, (m, n).

        Raises:
            ValueError: no such folder, or none that holds a matrix of this name and shape.

        Cost: reads headers; a matrix is read when it is pruned.
        """
        if not isinstance(pruner, Like):
            return pruner
        folder, name = pruner.folder, f"{layer}.weight"
        if folder not in self._files:
            if not Path(folder).is_dir():
                raise ValueError(f"prune={str(pruner)!r}: {folder} is no folder here")
            self._files[folder] = TensorFiles(Path(folder))
            self._shapes[folder] = self._files[folder].headers()
        found = self._shapes[folder].get(name, (None, ""))[0]
        if found != shape:
            told = f"has shape {found}" if found else "is not"
            raise ValueError(
                f"prune={str(pruner)!r}: {name} {told} there, and should be of shape {shape}; the "
                "folder has to hold the same model, pruned, as an ordinary checkpoint"
            )
        return Like(folder, partial(_read, self._files[folder], name))


def _read(files: TensorFiles, name: str) -> Tensor:
    return files.read([name])[name]
