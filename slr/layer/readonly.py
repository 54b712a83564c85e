"""Tensors to look at: what a packed layer unpacks is new each time, so writing into it is refused.

Book: chapter 17.
"""

from __future__ import annotations

from torch import Tensor
from torch._C import DisableTorchFunctionSubclass
from torch.compiler import is_compiling

__all__ = ["ReadOnly", "read_only"]

FLAGS = ("requires_grad_", "retain_grad")  # of the tensor itself, not of what it holds
WRITES = ("__setitem__", "__set__", "__delitem__")


class ReadOnly(Tensor):
    """A tensor that refuses to be written, as do its views; what is computed from it, and a copy,
    is plain.

    Raises (when written):
        ValueError: it names what to write instead.
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        written = [kwargs.get("out"), args[0] if args and _writes(func.__name__) else None]
        if any(isinstance(tensor, ReadOnly) for each in written for tensor in _each(each)):
            raise ValueError(
                "this tensor is unpacked from an SLRLinear, and what is written into it would be "
                "lost; write the layer's values, B, A or bias, or a clone()"
            )
        with DisableTorchFunctionSubclass():
            made = func(*args, **kwargs)
            viewed = {_storage(tensor) for tensor in args if isinstance(tensor, ReadOnly)}
            if type(made) in (list, tuple):
                return type(made)(_guarded(each, viewed) for each in made)
            return _guarded(made, viewed)

    def __deepcopy__(self, memo):
        return self.detach().clone()

    def __reduce_ex__(self, protocol):
        with DisableTorchFunctionSubclass():
            return self.detach().as_subclass(Tensor).__reduce_ex__(protocol)


def read_only(tensor: Tensor) -> Tensor:
    """The same tensor, guarded; gradients pass through.  In code that is compiled it is plain.

    Cost: none.

    >>> import torch
    >>> seen = read_only(torch.ones(2))
    >>> (seen + 1).tolist()
    [2.0, 2.0]
    >>> seen[0] = 3
    Traceback (most recent call last):
    ValueError: this tensor is unpacked from an SLRLinear, and what is written into it would be \
lost; write the layer's values, B, A or bias, or a clone()
    """
    return tensor if is_compiling() else tensor.as_subclass(ReadOnly)


def _writes(name: str) -> bool:
    """Does a function of this name write its first argument?  As ``add_``, ``__iadd__``."""
    if name.startswith("__"):
        return name in WRITES or (name.startswith("__i") and name not in ("__index__", "__int__",
                                  "__invert__", "__init__", "__iter__"))  # fmt: skip
    return name.endswith("_") and name not in FLAGS


def _each(given) -> tuple:
    return tuple(given) if isinstance(given, list | tuple) else (given,)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _guarded(made, viewed: set[int]):
    """A view of what is guarded is, too."""
    if type(made) is Tensor and _storage(made) in viewed:
        return read_only(made)
    return made
