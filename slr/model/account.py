"""What a model costs by its shapes: parameters, bytes, FLOPs.

"The pruned model is the same size" is the usual complaint: zeros that are stored are not saved.
Everything here is counted for a storage format:

========== ================================================ ============================
format     bytes of an (m, n) matrix of density δ           reads
========== ================================================ ============================
dense      m n w                                            zeros too
bitmask    δ m n w + m n / 8                                any pattern
2:4        m n (w / 2 + 1 / 8), 2 bits for each kept value  2:4 only; what GPUs multiply
csr        δ m n (w + 4) + 4 (m + 1)                        any pattern
========== ================================================ ============================

with w bytes a value, plus w k (m + n) for the low-rank factors; :mod:`slr.checkpoint.sizes` adds up
models.  Book: chapters 1 and 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from slr.matrix.patterns import NM, Pattern, parse

__all__ = ["FORMATS", "Account", "matrix_account"]

FORMATS = ("dense", "bitmask", "2:4", "csr")


@dataclass(frozen=True)
class Account:
    """Costs of one thing; accounts add up.

    Attributes:
        parameters: entries of the dense thing that this stands for.
        nonzero: numbers that are not zero by construction: kept entries and factors.
        bytes: of storage in the format asked for.
        flops: multiplications and additions a token that the non-zero numbers need.
        decode_bytes: bytes of weights read to decode one token at batch 1.
    """

    parameters: float = 0.0
    nonzero: float = 0.0
    bytes: float = 0.0
    flops: float = 0.0
    decode_bytes: float = 0.0

    def __add__(self, other: Account) -> Account:
        return Account(*(a + b for a, b in zip(self._values(), other._values(), strict=True)))

    def _values(self) -> tuple[float, ...]:
        return (self.parameters, self.nonzero, self.bytes, self.flops, self.decode_bytes)


def matrix_account(
    shape: tuple[int, int],
    pattern: str | float | Pattern | None = None,
    rank: int = 0,
    *,
    dtype: torch.dtype = torch.bfloat16,
    storage: str = "dense",
) -> Account:
    """The account of one (m, n) matrix as S + B A.

    Args:
        shape: (m, n).
        pattern: of S; ``None`` is dense.  Counted by its density, before rounding to entries.
        rank: k of B A, 0 for none.
        dtype: of the stored values.
        storage: one of :data:`FORMATS`.

    Raises:
        ValueError: unknown format, or ``"2:4"`` for another pattern.

    Cost: none; arithmetic.

    >>> small = matrix_account((4096, 4096), "2:4", 128, storage="2:4")
    >>> small.bytes / matrix_account((4096, 4096)).bytes
    0.625
    """
    m, n = shape
    width = dtype.itemsize
    parsed = None if pattern is None else parse(pattern)
    density = 1.0 if parsed is None else parsed.density
    kept = density * m * n
    if storage == "dense":
        stored: float = m * n * width
    elif storage == "bitmask":
        stored = kept * width + m * n / 8
    elif storage == "csr":
        stored = kept * (width + 4) + 4 * (m + 1)
    elif storage == "2:4":
        if parsed != NM(2, 4):
            raise ValueError(f"storage '2:4' holds 2:4 matrices, not {parsed or 'dense'}")
        stored = m * n * (width / 2 + 1 / 8)
    else:
        raise ValueError(f"storage {storage!r} is unknown; it must be one of {', '.join(FORMATS)}")
    factors = rank * (m + n)
    total = stored + factors * width
    return Account(m * n, kept + factors, total, 2 * (kept + factors), total)
