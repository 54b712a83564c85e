"""The part of a layer that knows where it is: which backend multiplies S, and what it needs.

Chosen anew whenever the tensors move.  Book: chapter 17.
"""

from __future__ import annotations

import warnings
from typing import TypeVar

import torch
from torch import Tensor, nn

from slr.layer.backends import FEW, MANY, Choice, choose, few, machine, pack_for
from slr.layer.native import row_starts

__all__ = ["Backed", "autocast_dtype"]

Self = TypeVar("Self", bound="Backed")


def autocast_dtype(kind: str) -> torch.dtype | None:
    """What a device of this type computes in while ``torch.autocast`` is on for it.

    >>> autocast_dtype("cpu")
    """
    if kind != "cpu" and not torch.amp.is_autocast_available(kind):
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


class Backed(nn.Module):
    """Base of :class:`~slr.layer.linear.SLRLinear`: its backends.

    Attributes:
        backend: a name of :data:`slr.layer.backends.BACKENDS`, or ``"auto"``.
        few, many: the backends for up to `most` tokens, and for more.
        form: what sparse tensor cores need beside the values.
        starts: where the values of each row begin, for our CPU kernels; ``None`` if rows keep
            equally many.
        two_four: whether the mask keeps 2 of every 4.
    """

    in_features: int
    out_features: int
    dtype: torch.dtype
    values: Tensor
    bitmask: Tensor
    B: Tensor
    A: Tensor
    form: Tensor | None
    starts: Tensor | None
    two_four: bool
    backend = "auto"
    few = many = "dense"
    most = FEW
    shared = True  # whether `form` follows when values change

    @property
    def _shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.out_features, self.in_features

    def _received(self, x: Tensor) -> Tensor:
        """x (…, in) in the dtype that it is multiplied in: autocast's, else it must be S's."""
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(
                f"x has shape {tuple(x.shape)}; its last dimension must be {self.in_features}"
            )
        to = autocast_dtype(x.device.type)
        if to is None and x.dtype != self.dtype:
            raise ValueError(f"x has dtype {x.dtype}, but the layer {self.dtype}")
        return x if to is None else x.to(to)

    def _alike(self, device: torch.device) -> None:
        """Raise ValueError unless B, A and the bias have the dtype of S and are where it is."""
        for name in ("B", "A", "bias"):
            part = self._parameters.get(name)
            if part is not None and (part.dtype, part.device) != (self.dtype, device):
                raise ValueError(
                    f"{name} is {part.dtype} on {part.device}, but S {self.dtype} on {device}; "
                    "all parts of a layer must be alike"
                )

    def choice(self, tokens: int) -> Choice:
        """The backend for so many tokens where the layer is now, and why.

        Raises:
            ValueError: one was named that cannot be used here.
        """
        where = machine(self.values.device)
        dtype, named = self.values.dtype, self.backend
        return choose(
            self._shape, dtype, where, tokens, two_four=self.two_four, backend=named
        )  # fmt: skip

    def use_(self: Self, backend: str) -> Self:
        """Name the backend, or ``"auto"``; returns the layer.  See :mod:`slr.layer.backends`.

        Raises:
            ValueError: it cannot be used here; the message says why, and nothing has changed.
        """
        before, self.backend = self.backend, backend
        try:
            self.choice(1)
            self._prepare()
        except (ValueError, RuntimeError):
            self.backend = before
            raise
        return self

    def _prepare(self) -> None:
        """Choose the backends, and pack for them, where the tensors are now."""
        self.form, self.starts, self.shared = None, None, True
        self.few, self.many = self.choice(1).backend, self.choice(MANY).backend
        self.most = few(self.values.dtype, machine(self.values.device))
        if self.few == "native" and not self.two_four:
            self.starts = row_starts(self.bitmask, self._shape)
        name = self.many if self.many in ("cutlass", "cusparselt") else self.few
        if name not in ("cutlass", "cusparselt"):
            return
        with torch.no_grad():
            form = pack_for(name, self.values, self.bitmask, self._shape)
            self.form = form
            if name == "cutlass":
                return
            same = form.flatten()[: self.values.numel()]
            self.shared = same.dtype == self.values.dtype and torch.equal(same, self.values)
            if self.shared:  # one copy of the values, not two
                self.values.data = same

    def _apply(self, fn, recurse=True):
        before = self.values.data
        super()._apply(fn, recurse)
        now = self.values
        if now.data_ptr() != before.data_ptr() or now.dtype != before.dtype:
            self._prepare_anew()
        return self

    def __setstate__(self, state: dict) -> None:
        """Unpickled or copied, perhaps for another device and on another machine."""
        super().__setstate__(state)
        self._prepare_anew()

    def _prepare_anew(self) -> None:
        try:
            self._prepare()
        except ValueError as error:  # named for another device or dtype
            warnings.warn(f"{error}; using 'auto'", stacklevel=3)
            self.backend = "auto"
            self._prepare()

    def _backend(self, x: Tensor, values: Tensor) -> str:
        """The backend for x (…, n) and the values as they are multiplied."""
        name = self.few if x.numel() <= self.most * self.in_features else self.many
        changed = values.dtype != self.values.dtype  # autocast
        stale = name == "cusparselt" and not self.shared and self.values.requires_grad
        return "dense" if changed or stale or x.device != values.device else name
