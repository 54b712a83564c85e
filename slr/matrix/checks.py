"""One clear error for each kind of bad input; nothing else."""

from collections.abc import Iterable, Sequence
from numbers import Real

import torch
from torch import Tensor

__all__ = [
    "check_choice", "check_count", "check_finite", "check_integer", "check_mask", "check_matrix",
    "check_number", "check_rank", "check_share", "check_tensor",
]  # fmt: skip


def check_matrix(name: str, value: Tensor, batch: bool = False) -> None:
    """Raise unless `value` is a finite, non-empty, floating-point matrix, or a stack if `batch`.

    >>> import torch
    >>> check_matrix("weight", torch.zeros(3))
    Traceback (most recent call last):
    ValueError: weight has shape (3,); it must be a matrix (out, in)
    """
    check_tensor(name, value)
    if value.ndim not in (2, 3 if batch else 2) or value.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be a matrix (out, in)")
    if not value.is_floating_point() or value.itemsize < 2:
        raise TypeError(
            f"{name} has dtype {value.dtype}; it must be floating point, of 16 bits or more"
        )
    check_finite(name, value)


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a tensor.

    >>> check_tensor("scale", [1.0])
    Traceback (most recent call last):
    TypeError: scale is a list; it must be a torch.Tensor
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a torch.Tensor")


def check_finite(name: str, value: Tensor) -> None:
    """Raise if `value` holds NaN or infinity, with their number.

    >>> import torch
    >>> check_finite("weight", torch.tensor([0.0, float("nan")]))
    Traceback (most recent call last):
    ValueError: weight holds 1 non-finite values (NaN or infinity) of 2; they must all be finite
    """
    wide = torch.promote_types(value.dtype, torch.float32)
    if value.sum(dtype=wide).isfinite():  # one pass; only a non-finite sum needs a second look
        return
    bad = int((~value.isfinite()).sum())
    if bad:
        raise ValueError(
            f"{name} holds {bad} non-finite values (NaN or infinity) of {value.numel()}; "
            "they must all be finite"
        )


def check_mask(mask: Tensor, weight: Tensor) -> None:
    """Raise unless `mask` is a boolean tensor of the shape and on the device of `weight`.

    >>> import torch
    >>> check_mask(torch.ones(2, 2, dtype=torch.bool), torch.zeros(2, 3))
    Traceback (most recent call last):
    ValueError: mask has shape (2, 2) but weight has shape (2, 3); they must be equal
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask is {kind}; it must be a boolean tensor, True where kept")
    if mask.shape != weight.shape:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)} but weight has shape {tuple(weight.shape)}; "
            "they must be equal"
        )
    if mask.device != weight.device:
        raise ValueError(f"mask is on {mask.device} but weight on {weight.device}; move one")


def check_rank(rank: int, shape: Sequence[int]) -> None:
    """Raise unless ``1 <= rank <= min(shape)``.

    >>> check_rank(0, (8, 4))
    Traceback (most recent call last):
    ValueError: rank is 0; for a matrix of shape (8, 4) it must be from 1 to 4
    """
    check_integer("rank", rank)
    if not 1 <= rank <= min(shape):
        raise ValueError(
            f"rank is {rank}; for a matrix of shape {tuple(shape)} it must be "
            f"from 1 to {min(shape)}"
        )


def check_integer(name: str, value: object) -> None:
    """Raise TypeError unless `value` is an integer, of Python or numpy.

    >>> check_integer("rank", 2.5)
    Traceback (most recent call last):
    TypeError: rank is 2.5; it must be an integer
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} is {value!r}; it must be an integer")


def check_number(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a real number, of Python or numpy.

    >>> check_number("tolerance", "4")
    Traceback (most recent call last):
    TypeError: tolerance is '4'; it must be a number
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}; it must be a number")


def check_choice(name: str, value: object, known: Iterable[str]) -> None:
    """Raise ValueError unless `value` is one of those known.

    >>> check_choice("solver", "best", ("fast", "exact"))
    Traceback (most recent call last):
    ValueError: solver 'best' is unknown; it must be one of fast, exact
    """
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} {value!r} is unknown; it must be one of {', '.join(known)}")


def check_share(name: str, value: float) -> None:
    """Raise unless `value` is a number from 0 to below 1.

    >>> check_share("tolerance", 2)
    Traceback (most recent call last):
    ValueError: tolerance is 2; it must be from 0 to below 1
    """
    check_number(name, value)
    if not 0 <= value < 1:
        raise ValueError(f"{name} is {value}; it must be from 0 to below 1")


def check_count(name: str, value: object, hint: str = "") -> None:
    """Raise unless `value` is an integer of 1 or more.

    >>> check_count("iterations", 2.5)
    Traceback (most recent call last):
    TypeError: iterations is 2.5; it must be an integer
    """
    check_integer(name, value)
    if value < 1:  # type: ignore[operator]
        raise ValueError(f"{name} is {value}; it must be at least 1 {hint}".rstrip())
