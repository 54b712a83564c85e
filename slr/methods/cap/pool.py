"""Candidates of all matrices of a model: made block by block, kept in files, and as one list.

Stage 1 of :mod:`slr.methods.cap` for a whole model; :mod:`slr.methods.cap.robust_pca` is that of
one matrix.  Book: part IV.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slr.methods.cap.robust_pca import Candidates, candidates
from slr.model.blocks import check_dense, decoder_blocks, walk
from slr.model.stream import Stream

__all__ = ["Pool", "block_candidates", "pack", "propose", "unpack"]


def propose(source: nn.Module | Stream, **options) -> Iterator[tuple[str, Candidates]]:
    """Candidates of every linear layer of every decoder block, one after the other.

    Args:
        source: a loaded dense model, or a streamed checkpoint, of which one block at a time is in
            memory; a caller who puts each result on disk never holds more.
        options: as for :func:`candidates`.

    Yields:
        Full name of a layer, and its candidates.

    Raises:
        ValueError: a model that is compressed already, or has no linear layers in decoder blocks;
            as :func:`candidates`, with the name.

    Warns:
        RuntimeWarning: as :func:`candidates`, with the name.

    Cost: a :func:`candidates` each; a result holds about three times the memory of its matrix.
    """
    model = source.model if isinstance(source, Stream) else source
    check_dense(model)
    if not any(type(module) is nn.Linear for module in decoder_blocks(model).modules()):
        raise ValueError(f"{type(model).__name__} has no linear layers in its decoder blocks")
    for _, name, block in source.filled() if isinstance(source, Stream) else walk(model):
        yield from block_candidates(name, block, **options)


def block_candidates(name: str, block: nn.Module, **options) -> Iterator[tuple[str, Candidates]]:
    """Candidates of every linear layer of one decoder block, as :func:`propose` makes them.

    For a run that can be resumed: after each block, write :func:`pack` of these to a file; in the
    end, give :func:`slr.methods.cap.allocate` the :func:`unpack` of all files as ``found``.

    Args:
        name: of the block in its model.
        block: its weights are there.
        options: as for :func:`candidates`.
    """
    for inner, layer in block.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        full = f"{name}.{inner}"
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                found = candidates(layer.weight.data, **options)
            except ValueError as error:
                raise ValueError(f"{full}: {error}") from None
        for warning in told:
            warnings.warn(f"{full}: {warning.message}", warning.category, stacklevel=2)
        yield full, found


def pack(found: Mapping[str, Candidates]) -> dict[str, Tensor]:
    """Candidates of some layers, those of a block for example, as tensors for one file.

    >>> found = {"a.b": candidates(torch.eye(4)), "c": candidates(torch.ones(2, 4))}
    >>> sorted(pack(found))[:3]
    ['a.b.U', 'a.b.V', 'a.b.about']
    >>> list(unpack(pack(found)))
    ['a.b', 'c']
    """
    return {
        f"{name}.{part}": tensor
        for name, c in found.items()
        for part, tensor in c.to_tensors().items()
    }


def unpack(tensors: Mapping[str, Tensor]) -> dict[str, Candidates]:
    """The inverse of :func:`pack`, to the last bit.

    Layers are in the order of `tensors`, which a file does not keep: :func:`slr.methods.cap
    .allocate` does not depend on it.

    Raises:
        ValueError: a tensor is missing.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        name, _, part = full.rpartition(".")
        parts.setdefault(name, {})[part] = tensor
    return {name: Candidates.from_tensors(part) for name, part in parts.items()}


@dataclass(frozen=True)
class Pool:
    """The candidates of all matrices of a model as one list.

    Args:
        found: candidates by the name of their layer.

    Raises:
        ValueError: no candidates.

    >>> pool = Pool({"a": candidates(torch.eye(4), share=1), "b": candidates(torch.ones(4, 4))})
    >>> pool.parameters
    32
    """

    found: Mapping[str, Candidates]

    def __post_init__(self) -> None:
        if not self.found:
            raise ValueError("found holds no candidates; give those of one layer at least")

    @property
    def parameters(self) -> int:
        """Of the dense matrices."""
        return sum(c.shape[0] * c.shape[1] for c in self.found.values())

    @property
    def fixed(self) -> int:
        """Parameters kept in any case: those of n:m parts."""
        return sum(c.fixed for c in self.found.values())

    @property
    def costs(self) -> Tensor:
        """int64 (p,)."""
        return torch.cat([c.costs for c in self.found.values()])

    @property
    def units(self) -> Tensor:
        """int64 (p,)."""
        return torch.cat([c.units for c in self.found.values()])

    def budget(self, fraction: float) -> int:
        """Parameters to spend on candidates for `fraction` of the dense parameters in all.

        Raises:
            ValueError: a fraction out of range, or one that the fixed parts exceed.
        """
        if not 0 < fraction <= 1:
            raise ValueError(f"budget is {fraction}; it must be above 0 and at most 1")
        rest = int(fraction * self.parameters) - self.fixed
        if rest < 0:
            least = self.fixed / self.parameters
            raise ValueError(f"budget is {fraction}; the n:m parts alone take {least:.4g}")
        return min(rest, int(self.costs.sum()))

    def uniform(self) -> Tensor:
        """Priority (p,) that keeps the same leading share of triplets and of entries everywhere."""
        parts = []
        for c in self.found.values():
            for costs in (c.costs[: c.ranks].double(), c.costs[c.ranks :].double()):
                parts.append(-(costs.cumsum(0) - costs / 2) / costs.sum())
        return torch.cat(parts)

    def greedy(self) -> Tensor:
        """Priority (p,): squares of singular values, or of entries, for a parameter."""
        return torch.cat([c.energy for c in self.found.values()]) / self.costs

    def split(self, amounts: Tensor) -> dict[str, Tensor]:
        """Amounts (p,) by layer."""
        parts = amounts.split([len(c.units) for c in self.found.values()])
        return dict(zip(self.found, parts, strict=True))

    def finest(self) -> Pool:
        """The same with a group for every triplet."""
        return Pool({name: c._replace(share=1) for name, c in self.found.items()})
