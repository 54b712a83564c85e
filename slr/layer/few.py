"""y = S x + B (A x) + b for few tokens: the operator of our own kernels, and its gradients.

They are :mod:`slr.layer.native` on a CPU and :mod:`slr.layer.kernels` on a GPU.  Compilers call
``torch.ops.slr.few_tokens`` as it is, or on a CPU, where nothing is differentiated,
``torch.ops.slr.native``, which has no Python in it.  Book: chapter 17.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slr.layer import native
from slr.layer.product import differentiates, gradients, wants_operator

__all__ = ["few_tokens"]


def few_tokens(
    x: Tensor, values: Tensor, bitmask: Tensor, starts: Tensor | None, B: Tensor, A: Tensor,
    bias: Tensor | None, two_four: bool, backend: str,
) -> Tensor:  # fmt: skip
    """y = S x + B (A x) + b, S packed.

    Args:
        x: (…, n); meant for up to 16 tokens, right for any number.
        values: (kept,), the dtype of `x`, like all that follow.
        bitmask: uint8 (⌈m n / 8⌉,).
        starts: from :func:`slr.layer.native.row_starts`.
        B, A: (m, k) and (k, n), k may be 0.
        bias: (m,).
        two_four: whether the mask is known to be 2:4, as it must be for ``"triton"``.
        backend: ``"native"`` or ``"triton"``.

    Returns:
        (…, m).  Gradients reach all but the bitmask.

    Raises:
        ImportError: Triton is not installed.
    """
    own = backend == "native"  # an operator itself
    wanted = differentiates if own else wants_operator
    run = _few if wanted(x, values, B, A, bias) else _launch
    return run(x, values, bitmask, starts, B, A, bias, two_four, backend)


def _launch(
    x: Tensor, values: Tensor, bitmask: Tensor, starts: Tensor | None, B: Tensor, A: Tensor,
    bias: Tensor | None, two_four: bool, backend: str,
) -> Tensor:  # fmt: skip
    if backend == "native":
        return native.multiply(x, values, bitmask, starts, B, A, bias)
    from slr.layer import kernels  # takes Triton along

    return kernels.multiply(x, values, bitmask, B, A, bias)


_few = torch.library.custom_op("slr::few_tokens", _launch, mutates_args=())


@_few.register_fake
def _(x, values, bitmask, starts, B, A, bias, two_four, backend):
    return x.new_empty(*x.shape[:-1], B.shape[0])


def _remember(ctx, inputs, output) -> None:
    x, values, bitmask, _starts, B, A, bias, two_four, _backend = inputs
    ctx.save_for_backward(x, values, bitmask, B, A)
    ctx.bias, ctx.two_four = bias is not None, two_four


def _backward(ctx, grad):
    whole, values, bitmask, B, A = ctx.saved_tensors
    x, grad = (t.reshape(-1, t.shape[-1]) for t in (whole, grad))
    want_x, want_values, _, _, want_B, want_A, want_bias, _, _ = ctx.needs_input_grad
    by_x, by_values = gradients(grad, x, values, bitmask, ctx.two_four, (want_x, want_values))
    by_t = grad @ B
    by_B = grad.T @ (x @ A.T) if want_B else None
    by_A = by_t.T @ x if want_A else None
    by_x = None if by_x is None else (by_x + by_t @ A).view(whole.shape)
    by_bias = grad.sum(0) if ctx.bias and want_bias else None
    return by_x, by_values, None, None, by_B, by_A, by_bias, None, None


_few.register_autograd(_backward, setup_context=_remember)
