"""Which code multiplies a 2:4 matrix: chosen by shape, dtype, device and tokens, or named.

=============== ============================================================ =================
name            what                                                         where
=============== ============================================================ =================
``native``      our kernels for few tokens, any mask (:mod:`slr.layer.native`)      CPU
``cpu``         unpacks a few rows at a time (:mod:`slr.layer.product`)             CPU
``dense``       the same in larger pieces, then the dense units               any other device
``triton``      our kernel for few tokens (:mod:`slr.layer.kernels`)                CUDA, from 8.0
``cutlass``     sparse tensor cores through ``torch.sparse``                  CUDA, 8.x
``cusparselt``  the same through NVIDIA's library                             CUDA, from 8.0
=============== ============================================================ =================

``cutlass`` shares our values and adds the places in its own order, 1/16 of the dense bytes.
``cusparselt`` packs in its own way; its copy of the values becomes ours where it is the same.
Book: chapter 17.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from slr.layer import native
from slr.layer.product import dense, gradients, wants_operator
from slr.layer.sparse24 import cutlass_metadata, indices_of

__all__ = [
    "BACKENDS", "FEW", "Choice", "Machine", "choose", "few", "machine", "pack_for", "sparse_cores",
]  # fmt: skip

BACKENDS = ("native", "cpu", "dense", "triton", "cutlass", "cusparselt")
FEW = 16  # tokens up to which our own kernels are taken,
TILED = 1024  # and where they have matrix units of a CPU
MANY = 4096  # tokens that stand for many
FIRST = (8, 0)  # the first compute capability with sparse units: Ampere
SHAPES = {"cutlass": (32, 64), "cusparselt": (16, 16), "triton": (1, 4)}
SIXTEEN = (torch.float16, torch.bfloat16)


class Machine(NamedTuple):
    """Where to compute: the device, its compute capability if CUDA, and what is installed."""

    device: str = "cpu"
    capability: tuple[int, int] | None = None
    triton: bool = False
    cusparselt: bool = False
    interpreter: bool = False
    native: str = "not looked for"  # why our CPU kernels are missing; empty if they are not
    tiles: bool = False  # whether they have matrix units, for bfloat16


class Choice(NamedTuple):
    """A name of :data:`BACKENDS`, and why."""

    backend: str
    reason: str


def interpreting() -> bool:
    """Does Triton interpret its kernels, on a CPU too?  Set ``TRITON_INTERPRET=1`` before it.

    >>> isinstance(interpreting(), bool)
    True
    """
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def _installed(index: int | None, interpreter: bool) -> Machine:
    """The machine of a CUDA device, or the CPU with Triton's interpreter."""
    triton = importlib.util.find_spec("triton") is not None
    if index is None:
        own = (native.missing(), native.tiled())
        return Machine("cpu", None, triton, False, interpreter and triton, *own)
    cusparselt = bool(torch.version.cuda) and torch.backends.cusparselt.is_available()
    capability = torch.cuda.get_device_capability(index) if torch.version.cuda else None
    return Machine("cuda", capability, triton, cusparselt, interpreter and triton)


def machine(device: torch.device) -> Machine:
    """What is known of a device.

    Cost: looked up once.

    >>> machine(torch.device("meta"))
    Machine(device='meta', capability=None, triton=False, cusparselt=False, interpreter=False, \
native='not looked for', tiles=False)
    """
    if device.type not in ("cpu", "cuda"):
        return Machine(device.type)
    index = None
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
    return _installed(index, interpreting())


def choose(
    shape: tuple[int, int],
    dtype: torch.dtype,
    where: Machine,
    tokens: int,
    *,
    two_four: bool = True,
    backend: str = "auto",
) -> Choice:
    """The backend for a product S x, and the reason.

    Args:
        shape: (m, n) of S.
        dtype: of S and x.
        where: the machine, real or made up.
        tokens: rows of x.
        two_four: whether S is 2:4; else only ``native``, ``cpu`` and ``dense`` can.
        backend: ``"auto"``, or a name, which is taken or refused.

    Raises:
        ValueError: an unknown name, or one that cannot do this here; it says why.

    Cost: none.

    >>> a100 = Machine("cuda", (8, 0), triton=True)
    >>> choose((4096, 4096), torch.bfloat16, a100, 4096).backend
    'cutlass'
    >>> choose((4096, 4096), torch.bfloat16, Machine("cuda", (7, 5)), 1).reason
    'compute capability 7.5 has no units for 2:4; they begin with 8.0'
    """
    if backend == "auto":
        return _automatic(shape, dtype, where, tokens, two_four)
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; it must be auto or one of {BACKENDS}")
    problem = _problem(backend, shape, dtype, where, two_four)
    if problem:
        raise ValueError(f"backend {backend!r} cannot be used: {problem}")
    return Choice(backend, "named")


def few(dtype: torch.dtype, where: Machine) -> int:
    """Tokens up to which our own kernels are the fastest, if they can be used.

    >>> few(torch.bfloat16, Machine("cpu", native="", tiles=True))
    1024
    """
    return TILED if where.tiles and dtype == torch.bfloat16 else FEW


def _automatic(
    shape: tuple[int, int], dtype: torch.dtype, where: Machine, tokens: int, two_four: bool
) -> Choice:
    if where.device == "cpu":
        if tokens > few(dtype, where):
            return Choice("cpu", f"{tokens} tokens: multiplying takes the time")
        problem = _problem("native", shape, dtype, where, two_four)
        if problem:
            return Choice("cpu", problem)
        reason = "reading S takes the time" if tokens <= FEW else "unpacked for the matrix units"
        return Choice("native", f"{tokens} tokens: {reason}")
    order = ["cutlass", "cusparselt"]
    why = ""
    if tokens <= FEW:
        order.insert(0, "triton")
        why = f"{tokens} tokens: reading S takes the time"
    problems: list[str] = []
    for name in order:
        problem = _problem(name, shape, dtype, where, two_four)
        if not problem:
            missing = f" ({problems[0]})" if problems and order[0] == "triton" else ""
            return Choice(name, (why or f"{tokens} tokens: multiplying takes the time") + missing)
        if problem not in problems:
            problems.append(problem)
    return Choice("dense", "; ".join(problems))


def _problem(
    backend: str, shape: tuple[int, int], dtype: torch.dtype, where: Machine, two_four: bool
) -> str:
    """Why a backend cannot do it; empty if it can."""
    if backend in ("native", "cpu"):
        if where.device != "cpu":
            return f"the tensors are on {where.device}, not the CPU"
        if backend == "native" and dtype not in native.DTYPES:
            return f"our kernels have no {str(dtype).removeprefix('torch.')}"
        return where.native if backend == "native" else ""
    if backend == "dense":
        return ""
    if not two_four:
        return "the mask does not keep 2 of every 4"
    interpreted = backend == "triton" and where.device == "cpu" and where.interpreter
    if where.device != "cuda" and not interpreted:
        return f"the tensors are on {where.device}, not on a CUDA device"
    if where.device == "cuda" and where.capability is None:
        return "this build of torch is not for CUDA"
    major, minor = where.capability or FIRST
    if (major, minor) < FIRST:
        return f"compute capability {major}.{minor} has no units for 2:4; they begin with 8.0"
    if dtype not in SIXTEEN:
        return f"{str(dtype).removeprefix('torch.')} is not float16 or bfloat16"
    (m, n), (by_m, by_n) = shape, SHAPES[backend]
    if m % by_m or n % by_n:
        return f"a {m} × {n} matrix is not divisible by {by_m} × {by_n}"
    if backend == "cutlass" and major != 8:
        return f"torch's CUTLASS kernels are for capability 8.x, not {major}.x"
    if backend == "cusparselt" and not where.cusparselt:
        return "this build of torch has no cuSPARSELt"
    if backend == "triton" and not where.triton:
        return "triton is not installed (pip install triton)"
    return ""


def pack_for(backend: str, values: Tensor, bitmask: Tensor, shape: tuple[int, int]) -> Tensor:
    """What sparse tensor cores need beside values: the places, or all in cuSPARSELt's own form.

    Args:
        backend: ``"cutlass"`` or ``"cusparselt"``.
        values: (m n / 2,).
        bitmask: uint8 (⌈m n / 8⌉,), 2:4.
        shape: (m, n).

    Cost: for cuSPARSELt the matrix is unpacked once.
    """
    if backend == "cutlass":
        return cutlass_metadata(indices_of(bitmask), shape)
    return torch._cslt_compress(dense(values.detach(), bitmask, *shape, True))


def sparse_cores(
    x: Tensor, values: Tensor, bitmask: Tensor, form: Tensor, bias: Tensor | None, rows: int,
    backend: str,
) -> Tensor:  # fmt: skip
    """y = S x + b on sparse tensor cores; torch pads the tokens as they need.

    Args:
        x: (tokens, n).
        values, bitmask: 2:4.
        form: from :func:`pack_for`.
        bias: (m,).
        rows: m.
        backend: ``"cutlass"`` or ``"cusparselt"``.

    Returns:
        (tokens, m).  Gradients reach x, values and bias.
    """
    run = _cores if wants_operator(x, values, bias) else _on_cores
    return run(x, values, bitmask, form, bias, rows, backend)


def _on_cores(
    x: Tensor, values: Tensor, bitmask: Tensor, form: Tensor, bias: Tensor | None, rows: int,
    backend: str,
) -> Tensor:  # fmt: skip
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT as Library
    from torch.sparse import SparseSemiStructuredTensorCUTLASS as Cutlass

    m, n = rows, x.shape[1]
    if not x.shape[0]:
        return x.new_empty(0, m)
    cutlass = backend == "cutlass"
    packed = values.detach().view(m, n // 2) if cutlass else form
    S = (Cutlass if cutlass else Library)(
        torch.Size((m, n)), packed, form if cutlass else None, None, None, None
    )
    return torch.nn.functional.linear(x.detach(), S, None if bias is None else bias.detach())


_cores = torch.library.custom_op("slr::sparse_cores", _on_cores, mutates_args=())


@_cores.register_fake
def _(x, values, bitmask, form, bias, rows, backend):
    return x.new_empty(x.shape[0], rows)


def _remember(ctx, inputs, output) -> None:
    x, values, bitmask, _form, bias, _rows, _backend = inputs
    ctx.save_for_backward(x, values, bitmask)
    ctx.bias = bias is not None


def _backward(ctx, grad):
    x, values, bitmask = ctx.saved_tensors
    found = gradients(grad, x, values, bitmask, True, ctx.needs_input_grad[:2])
    by_bias = grad.sum(0) if ctx.bias and ctx.needs_input_grad[4] else None
    return *found, None, None, by_bias, None, None


_cores.register_autograd(_backward, setup_context=_remember)
