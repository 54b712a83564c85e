"""Layers with a common input in one call: the operators, and the pass that makes the calls."""

import operator

import pytest
import torch
from test_native import HERE, problem
from test_rounded import refined
from torch._inductor.utils import fresh_cache

import slr
from slr.layer import native, native_codes
from slr.layer.joint import SEVERAL, JoinCalls
from slr.layer.rounded import layer_of

pytestmark = pytest.mark.skipif(not HERE, reason=native.missing() or "none")

FEW, CODES = (SEVERAL[one] for one in (native.OPERATOR, native_codes.OPERATOR))


def together(x, layers, several):
    return several(x, *(list(part) for part in zip(*layers, strict=True)))


@pytest.mark.parametrize("dtype", list(native.DTYPES))
@pytest.mark.parametrize("tokens", [0, 1, 3, 16, 20, 40])
def test_layers_together_are_what_each_is_alone(dtype, tokens):
    sizes = [(70, 18, 0.5, True), (300, 0, 0.1, False), (1, 40, 1.0, True)]
    made = [problem(m, 576, k, 1, dtype, d, b, seed=m)[0][1:] for m, k, d, b in sizes]
    made.append((made[0][0], made[0][1], made[0][2], *made[0][3:5], None))
    x = torch.randn(tokens, 576, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = together(x, made, FEW)
    assert len(found) == 4
    for y, layer in zip(found, made, strict=True):
        assert torch.equal(y, native.multiply(x, *layer))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 8, 12, 40])
def test_layers_of_codes_together_are_what_each_is_alone(dtype, tokens):
    made = []
    for m, rank, mask, bias in [(48, 3, True, True), (24, 0, False, False), (80, 5, False, True)]:
        layer = layer_of(refined(m, 40, rank, mask=mask, dtype=dtype))
        S, B, A = layer.ready[0], layer.B, layer.A
        b = torch.arange(m).to(dtype) if bias else None
        made.append((S.planes, S.scale, S.zero, S.mask, S.starts, B, A, b, S.bits, S.group, S.kept))
    x = torch.randn(tokens, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    for y, layer in zip(together(x, made, CODES), made, strict=True):
        assert torch.equal(y, native_codes.OPERATOR(x, *layer))


def test_the_operators_are_well_formed():
    layers = [problem(m, 24, 3, 1, torch.float32)[0][1:] for m in (12, 8)]
    every = (torch.randn(2, 5, 24), *(list(part) for part in zip(*layers, strict=True)))
    torch.library.opcheck(FEW, every, test_utils=("test_schema", "test_faketensor"))
    for name in ("slr::native_together", "slr::native_codes_together"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
    assert [y.shape for y in FEW(*every)] == [(2, 5, 12), (2, 5, 8)]
    assert FEW(every[0], *[[]] * 6) == []
    with pytest.raises(RuntimeError, match="x must be bfloat16"):
        FEW(every[0].double(), *every[1:])


class Heads(torch.nn.Module):
    """Three layers of x, and one of what the first makes."""

    def __init__(self, made):
        super().__init__()
        self.q, self.k, self.v, self.o = made

    def forward(self, x):
        x = torch.nn.functional.rms_norm(x, x.shape[-1:])
        q = self.q(x)
        return self.o(q.sin()) + self.v(x), self.k(x) * q


def sparse(m, seed):
    torch.manual_seed(seed)
    made = slr.SLRLinear.from_linear(torch.nn.Linear(64, m, bias=seed == 1), rank=3, pattern=0.5)
    return made.requires_grad_(False)


def coded(m, seed):
    return layer_of(refined(m, 64, seed, mask=seed == 1)).requires_grad_(False)


@pytest.mark.parametrize("make", [sparse, coded])
def test_a_compiled_program_makes_one_call_of_what_reads_the_same(make, monkeypatch):
    heads, calls = Heads([make(64, seed) for seed in range(4)]), []
    run = JoinCalls.__call__

    def watched(self, graph):
        run(self, graph)
        calls.extend(node.target for node in graph.nodes if "slr" in str(node.target))

    monkeypatch.setattr(JoinCalls, "__call__", watched)
    x = torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), fresh_cache():
        expected = heads(x)
        torch._dynamo.reset()
        compiled = torch.compile(heads, fullgraph=True, options=slr.compile_options())
        for y, exact in zip(compiled(x), expected, strict=True):
            assert torch.allclose(y, exact, atol=1e-4)
    several, one = (FEW, native.OPERATOR) if make is sparse else (CODES, native_codes.OPERATOR)
    assert calls == [several, one]


def test_a_call_that_reads_something_made_stays():
    one, several = native.OPERATOR, FEW
    graph = torch.fx.Graph()
    x, bias, *parts = (graph.placeholder(name) for name in "xbvmBA")
    v, m, B, A = parts
    first = graph.call_function(one, (x, v, m, None, B, A, None))
    made = graph.call_function(operator.add, (first, bias))
    second = graph.call_function(one, (x, v, m, None, B, A, made))
    third = graph.call_function(one, (x, v, m, None, B, A, bias))
    graph.output((second, third))
    for node in graph.nodes:
        node.meta["val"] = node.name
    JoinCalls()(graph)
    graph.lint()
    assert [n.target for n in graph.nodes if n.target in (one, several)] == [several, one]
    assert second in graph.nodes
    joint = next(n for n in graph.nodes if n.target is several)
    assert joint.args == (x, [v, v], [m, m], [None, None], [B, B], [A, A], [None, bias])
    assert joint.meta["val"] == [first.name, third.name]
