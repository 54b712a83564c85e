"""y = S x + b from the packed S, a few rows at a time, and its gradients.

S is unpacked into one buffer of some rows, multiplied and overwritten, so that a product takes
little memory beyond the packed form.  The functions are operators of torch
(``torch.ops.slr``): compilers call them as they are, and a backward pass unpacks again instead of
keeping S.
Book: chapter 17.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slr.layer.packing import blocks, keep

__all__ = ["dense", "differentiates", "gradients", "sparse_linear", "wants_operator"]


def differentiates(*tensors: Tensor | None) -> bool:
    """Does torch differentiate by one of these?

    >>> differentiates(torch.ones(1), None), differentiates(torch.ones(1, requires_grad=True))
    (False, True)
    """
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def wants_operator(first: Tensor, *others: Tensor | None) -> bool:
    """Must torch see an operator?  When it differentiates or compiles, and for meta tensors."""
    return torch.compiler.is_compiling() or first.is_meta or differentiates(first, *others)


def sparse_linear(
    x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None, rows: int, two_four: bool
) -> Tensor:
    """y = S x + b, S packed.

    Args:
        x: (tokens, n), tokens may be 0.
        values: (kept,), the dtype of `x`.
        bitmask: uint8 (⌈m n / 8⌉,).
        bias: (m,).
        rows: m.
        two_four: whether the mask is known to be 2:4, which is unpacked faster.

    Returns:
        (tokens, m).  Gradients reach x, values and bias.

    Cost: 2 tokens m n FLOPs and unpacking S once; on a CPU about 0.1 ns an entry and thread by our
        kernels, else 0.5 to 1.5 ns.  Memory: fewer than 2048 rows.

    >>> bits = torch.tensor([6], dtype=torch.uint8)
    >>> sparse_linear(torch.eye(2), torch.tensor([3.0, 4.0]), bits, None, 2, False).tolist()
    [[0.0, 4.0], [3.0, 0.0]]
    """
    product = _linear if wants_operator(x, values, bias) else _multiply
    return product(x, values, bitmask, bias, rows, two_four)


def dense(values: Tensor, bitmask: Tensor, rows: int, columns: int, two_four: bool) -> Tensor:
    """S (rows, columns), a new tensor; gradients reach `values`.

    Cost: one pass.

    >>> dense(torch.tensor([3.0, 4.0]), torch.tensor([6], dtype=torch.uint8), 2, 2, False).tolist()
    [[0.0, 3.0], [4.0, 0.0]]
    """
    made = _dense if wants_operator(values) else _unpack
    return made(values, bitmask, rows, columns, two_four)


def gradients(
    grad: Tensor, x: Tensor, values: Tensor, bitmask: Tensor, two_four: bool, wanted: tuple
) -> tuple[Tensor | None, Tensor | None]:
    """Of a loss by x and by the values, from its gradient by y = S x.

    Args:
        grad: (tokens, m).
        x: (tokens, n).
        values, bitmask, two_four: as for :func:`sparse_linear`.
        wanted: whether each of the two is.

    Cost: 4 tokens m n FLOPs and unpacking S; a block of the dense gradient exists at a time.

    >>> x, v, bits = torch.eye(2), torch.tensor([3.0, 4.0]), torch.tensor([6], dtype=torch.uint8)
    >>> [g.tolist() for g in gradients(torch.eye(2), x, v, bits, False, (True, True))]
    [[[0.0, 3.0], [4.0, 0.0]], [0.0, 0.0]]
    """
    by_x, by_values = _gradients(grad, x, values, bitmask, two_four, *map(bool, wanted))
    return by_x if wanted[0] else None, by_values if wanted[1] else None


def _multiply(
    x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None, rows: int, two_four: bool
) -> Tensor:
    if x.shape[0] == 0:
        return x.new_empty(0, rows)
    y = x.new_empty(x.shape[0], rows)
    for some, S in blocks(values, bitmask, (rows, x.shape[1]), two_four):
        if bias is None:
            torch.mm(x, S.T, out=y[:, some])
        else:
            torch.addmm(bias[some], x, S.T, out=y[:, some])
    return y


_linear = torch.library.custom_op("slr::sparse_linear", _multiply, mutates_args=())


@_linear.register_fake
def _(x, values, bitmask, bias, rows, two_four):
    return x.new_empty(x.shape[0], rows)


@torch.library.custom_op("slr::sparse_linear_backward", mutates_args=())
def _gradients(
    grad: Tensor, x: Tensor, values: Tensor, bitmask: Tensor, two_four: bool,
    want_x: bool, want_values: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    by_x = torch.zeros_like(x) if want_x else x.new_empty(0)
    by_values = torch.empty_like(values) if want_values else values.new_empty(0)
    after, n = 0, x.shape[1]
    shape = (grad.shape[1], n)
    for rows, S in blocks(values, bitmask, shape, two_four):
        some = grad[:, rows]
        if want_x:
            by_x.addmm_(some, S)
        if want_values:
            bits = bitmask[rows.start * n // 8 : -(-rows.stop * n // 8)]
            kept = keep(some.T @ x, bits, two_four)
            by_values[after : after + len(kept)] = kept
            after += len(kept)
    return by_x, by_values


@_gradients.register_fake
def _(grad, x, values, bitmask, two_four, want_x, want_values):
    by_x = torch.empty_like(x) if want_x else x.new_empty(0)
    return by_x, torch.empty_like(values) if want_values else values.new_empty(0)


def _remember(ctx, inputs, output) -> None:
    x, values, bitmask, bias, _rows, two_four = inputs
    ctx.save_for_backward(x, values, bitmask)
    ctx.two_four, ctx.bias = two_four, bias is not None


def _backward(ctx, grad):
    x, values, bitmask = ctx.saved_tensors
    found = gradients(grad, x, values, bitmask, ctx.two_four, ctx.needs_input_grad[:2])
    by_bias = grad.sum(0) if ctx.bias and ctx.needs_input_grad[3] else None
    return *found, None, by_bias, None, None


_linear.register_autograd(_backward, setup_context=_remember)


def _unpack(values: Tensor, bitmask: Tensor, rows: int, columns: int, two_four: bool) -> Tensor:
    S = values.new_empty(rows, columns)
    for some, block in blocks(values, bitmask, (rows, columns), two_four):
        S[some] = block
    return S


_dense = torch.library.custom_op("slr::dense", _unpack, mutates_args=())


@_dense.register_fake
def _(values, bitmask, rows, columns, two_four):
    return values.new_empty(rows, columns)


@torch.library.custom_op("slr::keep", mutates_args=())
def _keep(matrix: Tensor, bitmask: Tensor, count: int, two_four: bool) -> Tensor:
    return keep(matrix, bitmask, two_four).clone()


@_keep.register_fake
def _(matrix, bitmask, count, two_four):
    return matrix.new_empty(count)


def _remember_mask(ctx, inputs, output) -> None:
    values, bitmask, _rows, _columns, ctx.two_four = inputs
    ctx.save_for_backward(bitmask)
    ctx.count = values.numel()


def _backward_of_dense(ctx, grad):
    return _keep(grad, *ctx.saved_tensors, ctx.count, ctx.two_four), None, None, None, None


_dense.register_autograd(_backward_of_dense, setup_context=_remember_mask)
