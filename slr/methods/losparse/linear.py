"""The form of LoSparse: linear layers as U V + S, some rows of S pruned, and a model of them.

Explained, and trained, in :mod:`slr.methods.losparse`.  Book: chapter 14.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from slr.matrix.checks import check_choice, check_matrix
from slr.matrix.lowrank import truncated_svd
from slr.model.account import Account

__all__ = ["MODES", "LoSparseLinear", "account", "convert", "layers", "remaining_ratio"]

MODES = ("losparse", "itp", "lowrank")


class LoSparseLinear(nn.Module):
    """y = U (V x) + S x + b, where S has all rows, some of them pruned, or only the kept ones.

    Attributes:
        U, V: (m, r) and (r, n); r is 0 for ``"itp"``.
        S: (m, n) while rows are pruned; (k, n) once compact.
        bias: (m,) or ``None``.
        kept: bool (m,), which rows of S count; ``None`` once compact.
        rows: int64 (k,), the neuron of each row of a compact S; ``None`` before.

    A row that is not kept adds nothing and gets no gradient, whatever S holds there.

    Cost of a forward pass: 2 (r (m + n) + k n) FLOPs a token, k = m before it is compact.

    >>> layer = LoSparseLinear.from_linear(nn.Linear(8, 6), rank_ratio=0.5)
    >>> layer.rank, tuple(layer.S.shape)
    (2, (6, 8))
    """

    kept: Tensor | None
    rows: Tensor  # None before it is compact

    def __init__(
        self, U: Tensor, V: Tensor, S: Tensor, bias: Tensor | None = None,
        *, kept: Tensor | None = None, rows: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if (kept is None) == (rows is None):
            raise ValueError("give either kept (S has all rows) or rows (S is compact)")
        self.U, self.V, self.S = nn.Parameter(U), nn.Parameter(V), nn.Parameter(S)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.register_buffer("kept", kept)
        self.register_buffer("rows", rows)

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls, dense: nn.Linear, rank_ratio: float, mode: str = "losparse"
    ) -> LoSparseLinear:
        """U = U_r √Σ_r, V = √Σ_r V_rᵀ from the SVD of W, S = W - U V, r = ceil(ρ m n / (m + n)).

        Args:
            dense: the layer; not changed, and nothing is shared with it.
            rank_ratio: ρ, parameters of U and V over those of W, above 0 and below 1; without
                meaning for ``"itp"``.
            mode: one of :data:`MODES`.

        Raises:
            ValueError: unknown mode, a ratio out of range, or non-finite weights.

        Cost: one SVD.  Source: Li et al. 2023, algorithm 1.
        """
        check_choice("mode", mode, MODES)
        if mode != "itp" and not 0 < rank_ratio < 1:
            raise ValueError(f"rank_ratio is {rank_ratio}; it must be above 0 and below 1")
        W = dense.weight.detach()
        check_matrix("weight", W)
        (m, n), bias = W.shape, None if dense.bias is None else dense.bias.detach().clone()
        if mode == "itp":
            U, V, S = W.new_zeros(m, 0), W.new_zeros(0, n), W.clone()
        else:
            r = math.ceil(Fraction(repr(float(rank_ratio))) * m * n / (m + n))
            left, s, right = truncated_svd(W, r)
            U, V = (left * s.sqrt()).to(W.dtype), (right * s.sqrt()).mT.to(W.dtype).contiguous()
            # From the rounded factors, so that S makes up for their rounding too.
            S = (W.to(s.dtype) - U.to(s.dtype) @ V.to(s.dtype)).to(W.dtype)
        if mode == "lowrank":
            return cls(U, V, S[:0].clone(), bias, rows=torch.arange(0, device=W.device))
        return cls(U, V, S, bias, kept=torch.ones(m, dtype=torch.bool, device=W.device))

    @property
    def in_features(self) -> int:
        """Number of inputs, n."""
        return self.V.shape[1]

    @property
    def out_features(self) -> int:
        """Number of outputs, m."""
        return self.U.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the matrix it stands for."""
        return self.out_features, self.in_features

    @property
    def rank(self) -> int:
        """Rank r of U V."""
        return self.V.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """y for x of shape (…, n)."""
        y = linear(linear(x, self.V), self.U, self.bias)
        own = linear(x, self.S)
        return y.index_add(-1, self.rows, own) if self.kept is None else y + own * self.kept

    @torch.no_grad()
    def compact_(self) -> LoSparseLinear:
        """Drop the pruned rows of S, in place; returns the layer.  S is a new parameter."""
        if self.kept is not None:
            self.rows = self.kept.nonzero().flatten()
            self.S = nn.Parameter(self.S[self.kept].clone(), self.S.requires_grad)
            self.kept = None
        return self

    @torch.no_grad()
    def sparse(self) -> tuple[Tensor, Tensor]:
        """S with all its rows (m, n), zero where they are pruned, and which are kept (m,)."""
        if self.kept is not None:
            return self.S * self.kept.unsqueeze(1), self.kept.clone()
        kept = torch.zeros(self.out_features, dtype=torch.bool, device=self.S.device)
        kept[self.rows] = True
        return self.S.new_zeros(self.shape).index_copy(0, self.rows, self.S), kept

    def dense(self) -> Tensor:
        """U V + S as one (m, n) matrix."""
        return self.sparse()[0] + (self.U @ self.V).detach()

    def extra_repr(self) -> str:
        """Shape, rank and rows of S."""
        rows = self.S.shape[0] if self.kept is None else int(self.kept.sum())
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, rows={rows}, bias={self.bias is not None}"
        )


def convert(
    model: nn.Module,
    *,
    rank_ratio: float = 0.1,
    mode: str = "losparse",
    include: Sequence[str] | None = None,
    skip: Sequence[str] = (),
) -> list[str]:
    """Replace linear layers by :class:`LoSparseLinear`, in place.  Make the optimiser afterwards.

    Args:
        model: any model of ``nn.Linear`` layers.
        rank_ratio: ρ, see :meth:`LoSparseLinear.from_linear`.
        mode: one of :data:`MODES`.
        include: names of layers to replace, with ``*`` for anything.  By default every linear
            inside a list of blocks (``nn.ModuleList``): all of attention and MLP, whatever they
            are called, and no embedding, pooler or head.
        skip: names to leave dense all the same.

    Returns:
        The names of the replaced layers, in the order of the model.

    Raises:
        ValueError: nothing to replace, a name that fits no layer, converted already, or a weight
            that is shared (tied), which would come apart.

    Cost: one SVD a layer.

    >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> convert(net, rank_ratio=0.5, include=["0"])
    ['0']
    """
    # Of exactly this type: subclasses are read by name (nn.MultiheadAttention) or quantised.
    linears = {k: m for k, m in model.named_modules() if type(m) is nn.Linear}
    if any(isinstance(module, LoSparseLinear) for module in model.modules()):
        raise ValueError("the model is converted already; give its dense source")
    for given in (*(include or ()), *skip):
        if not any(fnmatchcase(name, given) for name in linears):
            raise ValueError(f"{given!r} fits no linear layer; there are {list(linears)[:3]} …")
    if include is None:
        lists = [k for k, m in model.named_modules() if isinstance(m, nn.ModuleList)]
        inside = tuple(f"{name}." if name else "" for name in lists)
        chosen = [name for name in linears if name.startswith(inside)]
    else:
        chosen = [name for name in linears if any(fnmatchcase(name, p) for p in include)]
    chosen = [name for name in chosen if not any(fnmatchcase(name, p) for p in skip)]
    if not chosen:
        raise ValueError(
            f"no layer is chosen of {len(linears)} nn.Linear; "
            "without an nn.ModuleList of blocks, name them by include"
        )
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name in chosen:
        if uses[id(linears[name].weight)] > 1:
            raise ValueError(f"the weight of {name!r} is shared with another module; skip it")
    made = {name: LoSparseLinear.from_linear(linears[name], rank_ratio, mode) for name in chosen}
    for name, layer in made.items():
        model.set_submodule(name, layer.train(linears[name].training))
    return chosen


def layers(model: nn.Module) -> dict[str, LoSparseLinear]:
    """The converted layers of a model by name.

    Raises:
        ValueError: there is none.

    >>> layers(nn.Linear(2, 2))
    Traceback (most recent call last):
    ValueError: the model has no LoSparseLinear; call losparse.convert(model) first
    """
    found = {k: m for k, m in model.named_modules() if isinstance(m, LoSparseLinear)}
    if not found:
        raise ValueError("the model has no LoSparseLinear; call losparse.convert(model) first")
    return found


def account(model: nn.Module) -> Account:
    """What the converted matrices of a model cost.

    ``parameters`` counts the entries of the dense W, ``nonzero`` those of U, V and the kept rows of
    S; ``bytes`` is what these take once compact, row indices included, biases not; ``flops`` are
    those of a token.

    Raises:
        ValueError: no layer is converted.

    Cost: none.

    >>> net = nn.ModuleList([nn.Linear(16, 16)])
    >>> _ = convert(net, rank_ratio=0.25, mode="lowrank", include=["0"])
    >>> account(net).flops
    128.0
    """
    total = Account()
    for layer in layers(model).values():
        (m, r), n = layer.U.shape, layer.in_features
        k = layer.S.shape[0] if layer.kept is None else int(layer.kept.sum())
        numbers = r * (m + n) + k * n
        size = numbers * layer.S.element_size() + 8 * k
        total += Account(m * n, numbers, size, 2 * numbers, size)
    return total


def remaining_ratio(model: nn.Module) -> float:
    """Parameters of U, V and the kept rows of S over those of the matrices they stand for.

    Biases and what is not converted do not count, as in the paper.

    Raises:
        ValueError: no layer is converted.

    Cost: none.

    >>> net = nn.ModuleList([nn.Linear(16, 16)])
    >>> _ = convert(net, rank_ratio=0.25, mode="lowrank", include=["0"])
    >>> remaining_ratio(net)
    0.25
    """
    total = account(model)
    return total.nonzero / total.parameters
