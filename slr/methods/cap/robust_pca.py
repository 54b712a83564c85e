"""Stage 1 of CAP: what one matrix could be made of.

Robust PCA splits W = L + S (:func:`slr.matrix.pcp.pursue`).  The singular triplets of L and the
entries of S are the candidates; all of them together are W, and :mod:`slr.methods.cap` chooses.

Neighbours share a candidate: `share` triplets, in the order of singular values, or
share · (m + n) entries, in the order of magnitude.  The public text leaves the relative scaling of
the two kinds open; chosen is that they cost the same, so that neither is easier to keep or to
drop.  The paper's policy has a probability for every triplet (``share=1``).

The weight λ = 1/√max(m, n) of ‖S‖₁ is the one that recovers a planted L and S.  A trained matrix
is no such sum: there it splits W into an L of more than half the full rank and an S of more than
half the entries, which together hold more parameters than W.  `balance_ratio` is λ in
units of 1/√max(m, n); with less, L is smaller, until all of W is S.

With an n:m pattern S is the n:m sparse matrix of a masked pursuit, on the places where |W| is
largest, so that W = L + S again.  Such an S costs n/m of W whatever is in it: it is kept whole, and
only triplets are candidates.

Book: part IV.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from slr.matrix.checks import check_matrix
from slr.matrix.lowrank import LowRank, truncated_svd
from slr.matrix.patterns import NM, Pattern, parse
from slr.matrix.pcp import pursue
from slr.matrix.result import Refined, Step

__all__ = ["Candidates", "candidates"]

NEGLIGIBLE = 1e-4  # of the largest singular value: what an L that has nearly converged has left


class Candidates(NamedTuple):
    """What one matrix could be made of; groups are numbered triplets first, then entries.

    Attributes:
        low: the r singular triplets of L, descending.
        places: int64 (count,), where S may be kept, as positions in the flattened matrix, by
            decreasing magnitude.
        values: (count,), S there.
        shape: (m, n).
        share: triplets in a group.
        pattern: n:m, if the entries are kept as they are and are no candidates.
    """

    low: LowRank
    places: Tensor
    values: Tensor
    shape: tuple[int, int]
    share: int
    pattern: NM | None

    @property
    def fixed(self) -> int:
        """Parameters that are kept in any case."""
        return 0 if self.pattern is None else len(self.places)

    @property
    def ranks(self) -> int:
        """Groups of triplets."""
        return -(-len(self.low.s) // self.share)

    @property
    def units(self) -> Tensor:
        """int64 (p,): the parameters of the smallest part of each group."""
        entries = 0 if self.fixed else -(-len(self.places) // (self.share * sum(self.shape)))
        return torch.tensor([sum(self.shape)] * self.ranks + [1] * entries, dtype=torch.int64)

    @property
    def costs(self) -> Tensor:
        """int64 (p,): the parameters of each group."""
        units = self.units
        full = self.share * sum(self.shape)
        costs = torch.full_like(units, full)
        if self.ranks:
            costs[self.ranks - 1] = len(self.low.s) * sum(self.shape) - full * (self.ranks - 1)
        if len(units) > self.ranks:
            costs[-1] = len(self.places) - full * (len(units) - self.ranks - 1)
        return costs

    @property
    def energy(self) -> Tensor:
        """float64 (p,): the squares of each group's singular values, or of its entries."""
        full = self.share * sum(self.shape)
        parts = [*self.low.s.split(self.share)]
        parts += [] if self.fixed else [*self.values.split(full)]
        return torch.tensor([float(part.double().square().sum()) for part in parts if len(part)],
                            dtype=torch.float64)  # fmt: skip

    def kept(self, amounts: Tensor) -> tuple[int | Tensor, Tensor]:
        """Which triplets, bool (r,), and which places, (k,), `amounts` parameters (p,) stand for.

        Of a group that is kept in part, the largest are.
        """
        most, units, device = self.costs, self.units, self.places.device
        if amounts.shape != most.shape or bool(((amounts < 0) | (amounts > most)).any()):
            raise ValueError(
                f"amounts must be {len(most)} numbers of parameters, from 0 to the costs"
            )
        first = _first(amounts // units, most // units)
        triplets = first[: len(self.low.s)].to(device)
        if self.fixed:
            return triplets, self.places
        return triplets, self.places[first[len(self.low.s) :].to(device)]

    def dense(self, amounts: Tensor, weight: Tensor | None = None) -> Tensor:
        """The matrix of the chosen parameters, (m, n).

        Args:
            amounts: int64 (p,), parameters kept of each group.
            weight: if given, the kept entries are set so that the result equals it there.

        Cost: 2 m n (rank) FLOPs.
        """
        S, B, A, _mask = self._parts(amounts, weight)
        return torch.addmm(S, B, A)

    def refined(self, amounts: Tensor, weight: Tensor, refit: bool = False) -> Refined:
        """S, B = U√Σ, A = √ΣVᵀ and mask of the chosen parameters, in the dtype of `weight`.

        Args:
            amounts: int64 (p,), parameters kept of each group.
            weight: W, (m, n), for the error.
            refit: set the kept entries to W - B A instead of S.
        """
        S, B, A, mask = self._parts(amounts, weight if refit else None)
        error = float((weight.to(S.dtype) - torch.addmm(S, B, A)).norm())
        trace = (Step(A.shape[0], error),)
        return Refined(S.to(weight.dtype), B.to(weight.dtype), A.to(weight.dtype), trace, mask)

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything as contiguous tensors, for a safetensors file; see :meth:`from_tensors`."""
        kept, group = (0, 0) if self.pattern is None else (self.pattern.n, self.pattern.m)
        about = torch.tensor([*self.shape, self.share, kept, group])
        low = self.low._asdict()
        return {**low, "places": self.places, "values": self.values, "about": about}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Candidates:
        """The inverse of :meth:`to_tensors`, to the last bit.

        Raises:
            ValueError: a tensor is missing.

        >>> found = candidates(torch.eye(4), share=2)
        >>> again = Candidates.from_tensors(found.to_tensors())
        >>> torch.equal(again.low.U, found.low.U), again.shape, again.share
        (True, (4, 4), 2)
        """
        missing = {"U", "s", "V", "places", "values", "about"} - set(tensors)
        if missing:
            raise ValueError(f"tensors lack {', '.join(sorted(missing))} of candidates")
        m, n, share, kept, group = tensors["about"].tolist()
        low = LowRank(tensors["U"], tensors["s"], tensors["V"])
        pattern = NM(kept, group) if group else None
        return cls(low, tensors["places"], tensors["values"], (m, n), share, pattern)

    def _parts(self, amounts: Tensor, weight: Tensor | None) -> tuple[Tensor, ...]:
        triplets, places = self.kept(amounts)
        root = self.low.s[triplets].sqrt()
        B, A = self.low.U[:, triplets] * root, root[:, None] * self.low.V[:, triplets].mT
        mask = torch.zeros(self.shape, dtype=torch.bool, device=places.device)
        mask.view(-1)[places] = True
        if weight is not None:
            return (weight.to(B.dtype) - B @ A) * mask, B, A, mask
        S = torch.zeros(self.shape, dtype=B.dtype, device=places.device)
        S.view(-1)[self.places] = self.values
        return S * mask, B, A, mask


def _first(counts: Tensor, sizes: Tensor) -> Tensor:
    """bool (Σ sizes,): the first `counts` of each group of `sizes`.

    >>> print(_first(torch.tensor([1, 2]), torch.tensor([3, 2])).int())
    tensor([1, 0, 0, 1, 1], dtype=torch.int32)
    """
    starts = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    return torch.arange(len(starts)) - starts < torch.repeat_interleave(counts, sizes)


def candidates(
    weight: Tensor,
    *,
    share: int = 16,
    pattern: str | Pattern | None = None,
    balance_ratio: float = 1.0,
    tolerance: float = 1e-6,
    iterations: int = 200,
) -> Candidates:
    """Candidates of one matrix.

    Args:
        weight: (m, n), finite, any float dtype; computed in float32 at least.
        share: triplets that one group holds, at least 1.
        pattern: n:m of S; ``None`` for any entries.
        balance_ratio: λ √max(m, n), above 0; 1 is the paper's.
        tolerance, iterations: of robust PCA, see :func:`slr.matrix.pcp.pursue`.

    Returns:
        :class:`Candidates`; all of them together are W to about 1e-4 ‖L‖₂.

    Warns:
        RuntimeWarning: robust PCA has not converged; then they are W less what it says.

    Raises:
        ValueError: a pattern that is not n:m or does not divide the inputs, a share below 1, a
            ratio that is not positive, non-finite weights.

    Cost: robust PCA, some 30 SVDs; with a pattern about as much.
    Source: CAP, stage 1; Candès et al. 2011.

    >>> W = torch.ones(8, 8)
    >>> W[2, 3] = 10.0
    >>> found = candidates(W, share=1)
    >>> print(found.costs)  # one triplet of 8 + 8 parameters, one entry
    tensor([16,  1])
    >>> print((found.dense(torch.tensor([0, 1])) > 8).nonzero())
    tensor([[2, 3]])
    """
    check_matrix("weight", weight)
    if share < 1:
        raise ValueError(f"share is {share}; it must be at least 1")
    if not balance_ratio > 0:
        raise ValueError(f"balance_ratio is {balance_ratio}; it must be above 0")
    chosen = None if pattern is None else parse(pattern)
    if chosen is not None and not isinstance(chosen, NM):
        raise ValueError(f"pattern {chosen} is a fraction; CAP takes n:m, as 2:4, or None")
    mask = None if chosen is None else chosen.select(weight.abs().float())
    balance = balance_ratio / max(weight.shape) ** 0.5
    found = pursue(weight, mask, balance=balance, tolerance=tolerance, iterations=iterations)
    low = truncated_svd(found.low, min(weight.shape))
    low = low.truncate(int((low.s > NEGLIGIBLE * low.s[0]).sum()))
    # The layout decides the last bit of products, and a file keeps only contiguous tensors.
    low = LowRank(*(part.contiguous() for part in low))
    flat = found.sparse.flatten()
    places = flat.abs().argsort(descending=True, stable=True)
    allowed = flat != 0 if mask is None else mask.flatten()
    places = places[allowed[places]]
    m, n = weight.shape
    return Candidates(low, places, flat[places], (m, n), share, chosen)
