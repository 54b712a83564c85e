"""The filled-in matrix L = W off the mask, B A on it: never stored, and its leading triplets.

L is what refinement iterates on.  :class:`Filled` makes it row block by row block in a buffer that
stays in cache; :class:`FullSVD` and :class:`Subspace` find its leading singular triplets, exactly
or by one block power step from the last ones: L V and Lᵀ(L V), while the block is at hand.

Power steps mend the errors of those before them, so they may be taken in bfloat16, with sums in
float32, where the processor multiplies it several times faster.  The last ones never are, nor
any on an L so close to rank k that the rounding would show.  Book: chapter 7.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from slr.matrix.lowrank import LowRank, ritz, truncated_svd

__all__ = [
    "RANGE", "Factors", "Filled", "FullSVD", "Subspace", "fast_bfloat16", "keep_", "row_blocks",
    "svd_pays",
]  # fmt: skip

OVERSAMPLING = 8  # directions that the power steps carry beyond the rank
WARMUP = 3  # power steps on the first L, and again on the last
SMALL, MIDDLE = 128, 1024  # sides up to which a full SVD is as fast as power steps, and nearly so
SHARE = 32  # a rank above a 32nd of the side is found too slowly by one power step a time
RANGE = 30.0  # of singular values, above which products in float32 lose the small ones
POLISH = 10  # last iterations of a ramp, which take two: what it added last has to settle
CLOSE = 0.1  # ‖L - [L]_r‖ / ‖L‖ below which bfloat16's rounding of 2^-8 an entry would show
BLOCK = {"cpu": 1 << 20, "cuda": 1 << 26}  # entries of L that exist at a time: cache, occupancy
LARGE = 1 << 20  # entries of a matrix from which bfloat16 pays
INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes

Factors = tuple[Tensor, Tensor]  # B (…, m, r) and A (…, r, n)


def row_blocks(like: Tensor, share: int = 1) -> list[slice]:
    """Slices of rows, of some `BLOCK` / share entries each, that cover (…, m, n).

    Cost: none.

    >>> row_blocks(torch.empty(3000, 1024))
    [slice(0, 1024, None), slice(1024, 2048, None), slice(2048, 3000, None)]
    """
    *batch, m, n = like.shape
    entries = BLOCK.get(like.device.type, 1 << 24) // share
    height = max(16, entries // (n * math.prod(batch)))
    return [slice(top, min(top + height, m)) for top in range(0, m, height)]


def svd_pays(like: Tensor, rank: int) -> bool:
    """Is a full SVD of (…, m, n) as fast as power steps that come as near?

    It is for small matrices, and for middling ones at a rank above an eighth of their side.

    Cost: none.

    >>> svd_pays(torch.empty(576, 576), 128), svd_pays(torch.empty(4096, 4096), 128)
    (True, False)
    """
    side = min(like.shape[-2:])
    return side <= SMALL or (side <= MIDDLE and 8 * rank > side)


def fast_bfloat16(device: torch.device) -> bool:
    """Does `device` multiply bfloat16 several times faster than float32?  (AMX, tensor cores.)

    Cost: none.

    >>> fast_bfloat16(torch.device("meta"))
    False
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and bool(_cpu().get("amx_bf16"))


def _cpu() -> dict:
    """What the processor can do, as far as this torch tells."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def keep_(values: Tensor, mask: Tensor) -> Tensor:
    """values ← 0 off the mask, in place; returns `values`.  Cost: one pass.

    >>> print(keep_(torch.tensor([-3.0, -4.0]), torch.tensor([True, False])))
    tensor([-3.,  0.])
    """
    return _blend_(values, mask, None, None)


def _blend_(inside: Tensor, mask: Tensor, outside: Tensor | None, bits: Tensor | None) -> Tensor:
    """inside ← outside (or 0) off the mask, in place.

    torch.where and masked_fill take one entry an instruction on a CPU; integer operations on the
    same bits are 10 times faster.  `bits` is room for them.
    """
    if inside.device.type != "cpu":
        other = inside.new_zeros(()) if outside is None else outside
        return torch.where(mask, inside, other, out=inside)
    kind = INTEGER[inside.itemsize]
    bits = torch.empty_like(inside, dtype=kind) if bits is None else bits
    bits.copy_(mask.view(torch.int8)).neg_()  # 0 or all ones
    x = inside.view(kind)
    if outside is None:
        x.bitwise_and_(bits)
    else:
        y = outside.view(kind)
        x.bitwise_xor_(y).bitwise_and_(bits).bitwise_xor_(y)
    return inside


class Filled:
    """L of a weight and a mask: W diag(scale) off the mask, and on it a fill B A.

    Args:
        weight: (…, m, n), any float dtype; neither copied nor changed.
        mask: bool (…, m, n), True = filled in.
        scale: (n,), or () for none.
        dtype: of L and its products.

    Cost: making L once, 2 m n r FLOPs for a fill of rank r and one pass over W and P.

    >>> W, P = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.eye(2).bool()
    >>> ones = torch.ones(2, 1), torch.ones(1, 2)
    >>> print(Filled(W, P, torch.ones(()), torch.float32).dense(ones))
    tensor([[1., 2.],
            [3., 1.]])
    """

    def __init__(self, weight: Tensor, mask: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        self.weight, self.mask, self.scale, self.dtype = weight, mask, scale, dtype
        self.slices = row_blocks(weight)
        *batch, _m, n = weight.shape
        shape = (*batch, self.slices[0].stop, n)
        self.inside = weight.new_empty(shape, dtype=dtype)
        as_it_is = weight.dtype == dtype and not scale.ndim
        self.outside = None if as_it_is else torch.empty_like(self.inside)
        on_cpu = weight.device.type == "cpu"
        self.bits = torch.empty_like(self.inside, dtype=INTEGER[dtype.itemsize]) if on_cpu else None

    def blocks(self, fill: Factors | None) -> Iterator[tuple[slice, Tensor]]:
        """Rows, and L of those rows (…, h, n), which the next block overwrites.

        A `fill` of None is 0.
        """
        if fill is not None:
            fill = fill[0].to(self.dtype), fill[1].to(self.dtype)
            if self.dtype == torch.bfloat16:
                # Kernels for bfloat16 are made, and kept, for each shape: let there be few.
                spare = -fill[0].shape[-1] % 32
                pad = torch.nn.functional.pad
                fill = pad(fill[0], (0, spare)), pad(fill[1], (0, 0, 0, spare))
        for rows in self.slices:
            height = rows.stop - rows.start
            L = self.inside[..., :height, :]
            if fill is None:
                L.zero_()
            else:
                torch.matmul(fill[0][..., rows, :], fill[1], out=L)
            W = self.weight[..., rows, :]
            if self.outside is not None:
                W = self.outside[..., :height, :].copy_(W)
                if self.scale.ndim:
                    W *= self.scale
            bits = None if self.bits is None else self.bits[..., :height, :]
            yield rows, _blend_(L, self.mask[..., rows, :], W, bits)

    def dense(self, fill: Factors | None) -> Tensor:
        """L itself, (…, m, n)."""
        whole = self.weight.new_empty(self.weight.shape, dtype=self.dtype)
        for rows, L in self.blocks(fill):
            whole[..., rows, :] = L
        return whole


class FullSVD:
    """[L]_r by a full SVD.

    Args:
        filled: L (…, m, n).
        rank: the largest that will be asked for.

    Attributes:
        range: of the singular values of the first L, as for :class:`Subspace`.

    Cost: O(m n min(m, n)) a call.

    >>> W = torch.diag(torch.tensor([3.0, 4.0]))
    >>> low, tail = FullSVD(Filled(W, W > 9, torch.ones(()), torch.float32), 1)(None, 1)
    >>> float(low.s), tail
    (4.0, 3.0)
    """

    def __init__(self, filled: Filled, rank: int) -> None:
        self.filled = filled
        low, self.first = self(None, rank)
        self.range = _range(low.s)

    def one_shot(self, rank: int) -> float:
        """‖L - [L]_r‖_F of the first L, for the rank it was made with."""
        return self.first

    def __call__(self, fill: Factors | None, rank: int, steps: int = 1) -> tuple[LowRank, float]:
        """The leading `rank` triplets of L, and ‖L - [L]_r‖_F; `steps` is without meaning here."""
        L = self.filled.dense(fill)
        every = truncated_svd(L, min(L.shape[-2:]))
        return every.truncate(rank), float(every.s[..., rank:].double().norm())

    def last(self, fill: Factors, rank: int) -> LowRank:
        """The leading `rank` triplets of L."""
        return self(fill, rank)[0]


class Subspace:
    """[L]_r by one block power step from the last right singular vectors.

    Args:
        filled: L.
        rank: the largest that will be asked for.
        generator: for the first vectors.
        search: dtype of the products of all but the last steps; None chooses.

    Attributes:
        range: the largest singular value of the first L over the smallest that is followed.

    Cost: 2 m n (r + 2 q) FLOPs a step for a fill of rank r and q = rank + 8 vectors, and
        O((m + n) q²) for the vectors.  Above a rank of a 32nd of the side, three steps at a time.
    Source: block power iteration with Rayleigh-Ritz, warm-started; our own arrangement.

    >>> W = torch.diag(torch.tensor([3.0, 4.0]))
    >>> filled = Filled(W, W > 9, torch.ones(()), torch.float32)
    >>> low, tail = Subspace(filled, 1, torch.Generator().manual_seed(0))(None, 1)
    >>> round(float(low.s), 4), round(tail, 4)
    (4.0, 3.0)
    """

    def __init__(
        self,
        filled: Filled,
        rank: int,
        generator: torch.Generator,
        search: torch.dtype | None = None,
    ) -> None:
        weight, self.generator = filled.weight, generator
        self.fine = self.filled = filled
        *batch, m, n = weight.shape
        if search is None:
            pays = filled.dtype == torch.float32 and m * n >= LARGE
            search = torch.bfloat16 if pays and fast_bfloat16(weight.device) else filled.dtype
        if search != filled.dtype:
            self.filled = Filled(weight, filled.mask, filled.scale, search)
        width = min(rank + OVERSAMPLING, m, n)
        self.Y = filled.inside.new_empty(*batch, m, width)
        self.Z = filled.inside.new_empty(*batch, n, width)
        self.V = self._random()
        self.often = 1 if SHARE * rank <= min(m, n) else 3
        for _ in range(WARMUP - 1):
            s = self(None, rank)[0].s
        self.range = _range(s)

    def __call__(self, fill: Factors | None, rank: int, steps: int = 1) -> tuple[LowRank, float]:
        """The leading `rank` triplets of L that so many steps find, and ‖L - [L]_r‖_F."""
        for _ in range(steps * self.often):
            low, tail = self._step(fill, rank)
        return low, tail

    def _step(self, fill: Factors | None, rank: int) -> tuple[LowRank, float]:
        norm2 = self.Z.new_zeros((), dtype=torch.float64)
        V = self.V.to(self.filled.dtype)
        self.Z.zero_()
        for rows, L in self.filled.blocks(fill):
            part = L @ V
            self.Y[..., rows, :] = part
            self.Z += L.mT @ part
            norm2 += torch.linalg.vector_norm(L, dim=-1).double().square().sum()
        low = ritz(self.Y, self.Z)
        missing = (low.s == 0).unsqueeze(-2)  # L had lower rank; later it may not
        self.V = torch.where(missing, self._random(), low.V) if missing.any() else low.V
        low = low.truncate(rank)
        tail, share = _tail(norm2, low)
        if share < CLOSE:
            self.filled = self.fine
        return low, tail

    def one_shot(self, rank: int) -> float:
        """‖L - [L]_r‖_F of the first L, to the accuracy of some more steps and of its sums."""
        low, tail = self(None, rank, WARMUP)
        return tail + torch.finfo(low.s.dtype).eps ** 0.5 * float(low.s.norm())  # rounding

    def last(self, fill: Factors, rank: int) -> LowRank:
        """The leading `rank` triplets of L, by several steps."""
        for step in range(WARMUP):
            if step:
                self.filled = self.fine
            low = self(fill, rank)[0]
        return low

    def _random(self) -> Tensor:
        return torch.randn(
            self.Z.shape, generator=self.generator, dtype=self.Z.dtype, device=self.Z.device
        )


def _range(s: Tensor) -> float:
    """Largest over smallest of singular values (…, r), over all matrices of a stack."""
    return float((s[..., 0] / s[..., -1].clamp_min(torch.finfo(s.dtype).tiny)).max())


def _tail(norm2: Tensor, low: LowRank) -> tuple[float, float]:
    """‖L - [L]_r‖_F from ‖L‖² and the leading singular values; and its share of ‖L‖."""
    rest = float((norm2 - low.s.double().square().sum()).clamp_min(0))
    whole = float(norm2)
    return math.sqrt(rest), math.sqrt(rest / whole) if whole else 0.0
