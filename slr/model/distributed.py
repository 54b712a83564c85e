"""Several processes on one compression, under ``torchrun``.

Calibration windows are shared out over the ranks, their statistics are summed, and the matrices
of a block are shared out and sent round.  Rank 0 alone writes.  Without ``torchrun`` there is one
rank and nothing happens.  An error on one rank ends its process, and ``torchrun`` ends the others.

Book: how to use this book.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist

from slr.matrix.result import Refined

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from slr.matrix.statistics import CrossStatistic, GramStatistic, NormStatistic

__all__ = [
    "all_reduce",
    "alone",
    "average",
    "barrier",
    "first",
    "least",
    "mine",
    "rank",
    "share",
    "shared",
    "start",
    "world",
]


def start(device: str) -> None:
    """Join the group that ``torchrun`` announces, gloo on CPUs and NCCL on GPUs, if it does."""
    if _on() or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")


def alone() -> tuple[int, int]:
    """Number of this process and of all that ``torchrun`` started, for work that needs no group.

    Each uses its own GPU, if there are any.
    """
    number, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return number, count


def _on() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if _on() else 0


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if _on() else 1


def barrier() -> None:
    """Wait for all."""
    if _on():
        dist.barrier()


def mine(windows: Tensor) -> Tensor:
    """This rank's windows.

    Raises:
        ValueError: fewer windows than ranks.
    """
    if len(windows) < world():
        raise ValueError(f"{len(windows)} windows cannot be shared out over {world()} processes")
    return windows[rank() :: world()]


def shared(windows: Tensor, each: Callable[[Tensor], Tensor]) -> Tensor:
    """One number for each window, float64 (count,), the windows shared out over the ranks.

    Args:
        windows: (count, …); all of them.
        each: gives the numbers of some windows, on the CPU.
    """
    if world() == 1:
        return each(windows)
    found = torch.zeros(len(windows), dtype=torch.float64)
    found[rank() :: world()] = each(mine(windows))
    boxes: list = [None] * world()
    dist.all_gather_object(boxes, found)
    return torch.stack(boxes).sum(0)


def all_reduce(statistic: NormStatistic | GramStatistic | CrossStatistic) -> None:
    """Sum a statistic over all ranks, in place."""
    if _on():
        statistic.all_reduce()


def average(tensors: list[Tensor]) -> None:
    """Replace tensors, that each rank has its own of, by their mean over the ranks."""
    if world() > 1:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        pieces = flat.div_(world()).split([tensor.numel() for tensor in tensors])
        for tensor, piece in zip(tensors, pieces, strict=True):
            tensor.copy_(piece.view_as(tensor))


def least(count: int) -> int:
    """The least of all ranks' counts."""
    if world() == 1:
        return count
    boxes: list = [None] * world()
    dist.all_gather_object(boxes, count)
    return min(boxes)


def share(
    like: Tensor, width: int, refined: Refined | None, errors: Any, owner: int
) -> tuple[Refined, Any]:
    """Send the result of one matrix (m, n) from its owner to all.

    Args:
        like: weight, for shape, dtype and device.
        width: rank of the low-rank part.
        refined: on the owner.
        errors: on the owner.
        owner: its rank.
    """
    m, n = like.shape
    if refined is None:
        S, B, A = like.new_empty(m, n), like.new_empty(m, width), like.new_empty(width, n)
        bits = torch.empty(m, n, dtype=torch.uint8, device=like.device)
    else:
        S, B, A = (part.contiguous() for part in refined[:3])
        bits = refined.mask.to(torch.uint8).contiguous()
    for part in (S, B, A, bits):
        if part.numel():
            dist.broadcast(part.data, owner)
    box = [errors, None if refined is None else _moved(refined.coded, "cpu")]
    dist.broadcast_object_list(box, owner)
    coded = _moved(box[1], like.device)  # not where the owner has it
    return Refined(S.data, B.data, A.data, (), bits.bool(), coded), box[0]


def _moved(part: Any, device: Any) -> Any:
    """Named tuples of tensors, on a device."""
    if isinstance(part, Tensor):
        return part.to(device)
    if isinstance(part, tuple):
        return type(part)(*(_moved(each, device) for each in part))
    return part


@contextmanager
def first(journal) -> Iterator:
    """Open a journal on rank 0 alone; the others get its folder and entries, and wait for it."""
    if world() == 1:
        with journal:
            yield journal
        return
    if rank() == 0:
        with journal:
            dist.broadcast_object_list([journal.entries], 0)
            yield journal
    else:
        box: list = [None]
        dist.broadcast_object_list(box, 0)
        journal.entries = box[0]
        yield journal
