"""Layers that read the same x, multiplied in one call: q, k and v; gate and up.

Every call wakes the threads, which for one token takes as long as a small matrix.  A compiled
program has such calls put together by a pass over its graph::

    model = torch.compile(model, options=slr.compile_options())

No module changes, and no number.  Book: chapter 17.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from slr.layer import native, native_codes

__all__ = ["JoinCalls", "compile_options"]


def compile_options() -> dict[str, Any]:
    """Options of ``torch.compile`` with which layers of a common input are one call on a CPU.

    For ``generate`` of transformers: ``CompileConfig(mode=None, options=slr.compile_options())``.

    >>> compile_options() == compile_options()
    True
    """
    return {"post_grad_custom_pre_pass": JOIN}


class JoinCalls(CustomGraphPass):
    """The pass: calls of our kernels with the same x become one, in place of the first.

    A call stays as it is where the program computes something else that it reads, which need not
    be there yet.
    """

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite a graph in place.

        Cost: one pass.
        """
        for one, several in SEVERAL.items():
            calls: dict[fx.Node, list[fx.Node]] = defaultdict(list)
            for node in graph.find_nodes(op="call_function", target=one):
                x, *others = node.all_input_nodes
                if all(other.op == "placeholder" for other in others):
                    calls[x].append(node)
            for x, alike in calls.items():
                if len(alike) > 1:
                    _join(graph, several, x, alike)

    def uuid(self) -> Any:
        """Of this file, for the compiler's cache."""
        return get_hash_for_files((__file__,))


JOIN = JoinCalls()  # one, so that a program is not compiled anew for another


def _join(graph: fx.Graph, several: Any, x: fx.Node, calls: list[fx.Node]) -> None:
    parts = [list(part) for part in zip(*(call.args[1:] for call in calls), strict=True)]
    with graph.inserting_before(calls[0]):
        joint = graph.call_function(several, (x, *parts))
        joint.meta["val"] = [call.meta["val"] for call in calls]
        for i, call in enumerate(calls):
            mine = graph.call_function(operator.getitem, (joint, i))
            mine.meta["val"] = call.meta["val"]
            call.replace_all_uses_with(mine)
    for call in calls:
        graph.erase_node(call)


def _define(one: Any, name: str, schema: str) -> Any:
    """An operator for several layers of what `one` is for one."""

    def multiply(x: Tensor, *parts: list) -> list[Tensor]:
        return [one(x, *layer) for layer in zip(*parts, strict=True)]

    torch.library.define(f"slr::{name}", schema)
    torch.library.impl(f"slr::{name}", "default")(multiply)
    torch.library.register_fake(f"slr::{name}", multiply)
    return getattr(torch.ops.slr, name).default


# In C++ where `operators.cpp` was compiled.
SEVERAL = {
    one: _define(one, name, schema)
    for one, name, schema in (
        (
            native.OPERATOR,
            "native_together",
            "(Tensor x, Tensor[] values, Tensor[] bitmask, Tensor?[] starts, Tensor[] B,"
            " Tensor[] A, Tensor?[] bias) -> Tensor[]",
        ),
        (
            native_codes.OPERATOR,
            "native_codes_together",
            "(Tensor x, Tensor[] planes, Tensor[] scale, Tensor?[] zero, Tensor?[] mask,"
            " Tensor?[] starts, Tensor[] B, Tensor[] A, Tensor?[] bias, int[] bits, int[] group,"
            " int[] kept) -> Tensor[]",
        ),
    )
}
