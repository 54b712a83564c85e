"""Our CPU kernels: every instruction set there is here, against sums in float64."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import slr
from slr.layer import compiled, native, packing
from slr.layer.bits import pack_mask
from slr.layer.few import few_tokens

PLAIN = tuple("-O0" if flag == "-O3" else flag for flag in compiled.FLAGS)  # five times as soon
HERE = [] if native.missing() else list(compiled.SETS[: compiled.library().best + 1])
pytestmark = pytest.mark.skipif(not HERE, reason=native.missing() or "none")


def problem(m, n, rank, tokens, dtype, density=0.5, bias=True, seed=0):
    """x, packed S, factors and bias; S itself; the exact product, and the sum of its sizes."""
    g = torch.Generator().manual_seed(seed)

    def some(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    mask = torch.rand(m, n, generator=g) < density
    S, x, B, A = some(m, n) * mask, some(tokens, n), some(m, rank), some(rank, n)
    b = some(m) if bias else None
    bits = pack_mask(mask)
    wide, sizes = zip(*((t.double(), t.double().abs()) for t in (x, S, B, A)), strict=True)
    exact, size = (x @ S.T + (x @ A.T) @ B.T for x, S, B, A in (wide, sizes))
    if bias:
        exact, size = exact + b.double(), size + b.double().abs()
    starts = native.row_starts(bits, (m, n))
    return (x, S[mask], bits, starts, B, A, b), S, exact, size


@pytest.mark.hypothesis
@pytest.mark.parametrize("best", HERE)
@given(
    m=st.one_of(st.integers(1, 70), st.sampled_from([144, 300])),
    n=st.one_of(st.integers(1, 150), st.sampled_from([64, 128, 576])),
    rank=st.integers(0, 70),
    tokens=st.one_of(st.integers(0, 20), st.sampled_from([33, 70])),
    dtype=st.sampled_from(list(native.DTYPES)),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_product_and_s_itself(best, m, n, rank, tokens, dtype, density, bias, seed):
    arguments, S, exact, size = problem(m, n, rank, tokens, dtype, density, bias, seed)
    y = native.multiply(*arguments, best=best)
    assert (y.dtype, y.shape) == (dtype, (tokens, m))
    # A x is rounded to the dtype, and so is y; float32 sums are of up to a few hundred terms.
    assert ((y.double() - exact).abs() <= 1e-6 + 2 * torch.finfo(dtype).eps * size).all()
    _, values, bits, starts, *_ = arguments
    made = native.spread_(torch.full_like(S, 7), values, bits, starts, m, best=best)
    assert torch.equal(made, S)
    top = seed % m
    part = torch.full_like(S[top:], 7)
    assert torch.equal(native.spread_(part, values, bits, starts, m, top, best=best), S[top:])


@pytest.mark.parametrize("best", HERE)
@pytest.mark.parametrize("dtype", list(native.DTYPES))
@pytest.mark.parametrize("tokens", [1, 2, 4, 9, 16, 17, 70])
@pytest.mark.parametrize(("m", "n"), [(37, 70), (144, 128)])
def test_every_path_to_its_rounding(best, dtype, tokens, m, n):
    check_closely(problem(m, n, 20, tokens, dtype, seed=tokens), dtype, best)


@pytest.mark.parametrize("best", HERE)
@pytest.mark.parametrize(("m", "n", "tokens"), [(40, 4160, 40), (33, 9001, 600)])
def test_wide_matrices_and_many_tokens(best, m, n, tokens):
    check_closely(problem(m, n, 20, tokens, torch.bfloat16), torch.bfloat16, best)


def check_closely(found, dtype, best):
    """A x and y are rounded once each, and that is all that may be seen."""
    arguments, _S, exact, size = found
    x, _, _, _, B, A, _ = (None if t is None else t.double() for t in arguments)
    y = native.multiply(*arguments, best=best).double()
    rounding = torch.finfo(dtype).eps * (exact.abs() + (x @ A.T).abs() @ B.abs().T)
    assert ((y - exact).abs() <= rounding + 1e-5 * size + 1e-6).all()


@pytest.mark.parametrize("best", HERE)
@pytest.mark.parametrize("dtype", list(native.DTYPES))
def test_every_place_of_a_word(best, dtype):
    """One kept entry at a time, met by one token that is one there and by one that is not."""
    n = 70
    for place in range(n):
        mask = torch.zeros(2, n, dtype=torch.bool)
        mask[1, place] = True
        bits, v = pack_mask(mask), torch.tensor([3.0], dtype=dtype)
        x = torch.eye(n, dtype=dtype)[[place, (place + 1) % n]]
        B, A = v.new_zeros(2, 0), v.new_zeros(0, n)
        starts = native.row_starts(bits, (2, n))
        y = native.multiply(x, v, bits, starts, B, A, None, best=best)
        assert y.tolist() == [[0, 3], [0, 0]]


@pytest.mark.parametrize("best", HERE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_are_rounded_as_torch_rounds(best, dtype):
    """Halves to even, small numbers, overflow, Inf and NaN: y = v b, exact in float32."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    bits = pack_mask(torch.ones(len(every), 1, dtype=torch.bool))
    for factor in (1.0, 0.75, 1.5, 2.0**-10, 2.0**10):
        x = torch.tensor([[factor]], dtype=dtype)
        B, A = every.new_zeros(len(every), 0), every.new_zeros(0, 1)
        y = native.multiply(x, every, bits, None, B, A, None, best=best)[0]
        want = (every.float() * x.float()).to(dtype).flatten()
        tiny = 2 * torch.finfo(torch.float32).smallest_normal
        normal = (want.float().abs() >= tiny) & (every.float().abs() >= tiny)
        same = (y == want) | (y.isnan() & want.isnan())
        # AVX-512's product of bfloat16 takes denormal numbers for zero.
        assert bool((same | (~normal & (y.float().abs() <= want.float().abs()))).all())


@pytest.mark.parametrize("best", HERE)
def test_it_reads_and_writes_nothing_else(best):
    """The same numbers between others: before and behind them lie NaN, and y's room is whole."""
    for n in (40, 64, 129):
        arguments, _, _, _ = problem(17, n, 5, 3, torch.bfloat16, seed=n)
        want = native.multiply(*arguments, best=best)

        def between(tensor):
            room = torch.full((tensor.numel() + 128,), float("nan"), dtype=tensor.dtype)
            room[64 : 64 + tensor.numel()] = tensor.flatten()
            return room[64 : 64 + tensor.numel()].view(tensor.shape)

        x, values, bits, starts, B, A, b = arguments
        moved = (between(x), between(values), bits, starts, between(B), between(A), between(b))
        assert torch.equal(native.multiply(*moved, best=best), want)


def test_it_and_torch_take_turns():
    """Tiles are a state of the processor that torch's own products use as well."""
    arguments, _, exact, size = problem(64, 128, 8, 16, torch.bfloat16)
    a, b = torch.randn(2, 96, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    torchs, ours = a @ b, native.multiply(*arguments)
    for _ in range(3):
        assert torch.equal(native.multiply(*arguments), ours)
        assert torch.equal(a @ b, torchs)
    assert ((ours.double() - exact).abs() <= 2 * torch.finfo(torch.bfloat16).eps * size).all()


def test_gradients_are_those_of_torch():
    arguments, _, _, _ = problem(12, 24, 3, 5, torch.float32)
    x, v, bits, starts, B, A, b = arguments
    ours = [t.clone().requires_grad_() for t in (x, v, B, A, b)]
    y = few_tokens(*ours[:2], bits, starts, *ours[2:], False, "native")
    y.square().sum().backward()
    theirs = [t.clone().requires_grad_() for t in (x, v, B, A, b)]
    S = torch.zeros(12, 24).masked_scatter(packing.unpack_mask(bits, (12, 24)), theirs[1])
    z, _, B, A, b = theirs
    (z @ S.T + z @ A.T @ B.T + b).square().sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shape", [(24,), (2, 3, 24)])
def test_gradients_of_any_number_of_dimensions(shape):
    layer = slr.SLRLinear.from_linear(torch.nn.Linear(24, 12), pattern=0.5, rank=3)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2), requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    by_x, by_B = x.grad, layer.B.grad
    assert (y.shape, by_x.shape) == ((*shape[:-1], 12), shape)
    x.grad = layer.B.grad = None
    torch.nn.functional.linear(x, layer.dense(), layer.bias).square().sum().backward()
    assert torch.allclose(by_x, x.grad, atol=1e-4)
    assert torch.allclose(by_B, layer.B.grad, atol=1e-4)


def test_the_operator_is_well_formed_and_compiles_without_a_break():
    (x, v, bits, starts, B, A, b), _, exact, _ = problem(12, 24, 3, 5, torch.float32)
    every = (x.requires_grad_(), v, bits, starts, B, A, b, False, "native")
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.slr.few_tokens.default, every, test_utils=checks)
    layer = slr.SLRLinear.placeholder((12, 24), 3, len(v), True, torch.float32, "cpu")
    layer.load_state_dict({"values": v, "bitmask": bits, "B": B, "A": A, "bias": b})
    torch._dynamo.reset()
    compiled_ = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled_(x).double(), exact, atol=1e-4)
        program = torch.export.export(layer, (x.detach(),))
        assert torch.equal(program.module()(x), layer(x))


def test_where_nothing_is_differentiated_compilers_call_c_plus_plus():
    arguments, _, exact, _ = problem(12, 24, 3, 5, torch.float32)
    x, v, bits, starts, *rest = arguments
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.slr.native.default, arguments, test_utils=checks)
    assert torch._C._dispatch_has_kernel_for_dispatch_key("slr::native", "CPU")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("slr::native_codes", "CPU")
    y = torch.ops.slr.native(*arguments)
    assert torch.equal(y, native._multiply(*arguments))
    assert torch.allclose(y.double(), exact, atol=1e-4)
    apart = x.mT.contiguous().mT, v.repeat_interleave(2)[::2], bits, starts, *rest
    assert torch.equal(torch.ops.slr.native(*apart), y)
    with pytest.raises(RuntimeError, match="x must be bfloat16"):
        torch.ops.slr.native(x.double(), *arguments[1:])
    layer = slr.SLRLinear.from_linear(torch.nn.Linear(24, 12), pattern=0.5, rank=3)
    program = torch.export.export(layer.requires_grad_(False), (x,))
    assert any(node.target is torch.ops.slr.native.default for node in program.graph.nodes)


def test_without_torchs_headers_the_operators_stay_in_python(tmp_path):
    (tmp_path / "operators.cpp").write_text("#error no headers\n")
    code = (
        "import pathlib, torch, slr; from slr.layer import compiled, native\n"
        f"compiled.OPERATORS = pathlib.Path({str(tmp_path / 'operators.cpp')!r})\n"
        f"compiled.FLAGS = {PLAIN!r}\n"
        "layer = slr.SLRLinear.from_linear(torch.nn.Linear(24, 12), pattern=0.5, rank=3)\n"
        "print(compiled.library().operators, compiled.library().missing, layer.few)\n"
        "with torch.no_grad():\n"
        "    x = torch.randn(3, 24)\n"
        "    assert torch.allclose(layer(x), x @ layer.dense().T + layer.bias, atol=1e-4)\n"
        "    fast = torch.compile(layer, backend='aot_eager', fullgraph=True)\n"
        "    assert torch.equal(fast(x), layer(x))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, env={**os.environ, "SLR_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "native"]


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_whole_compressed_model_is_exported_by_torch(dynamic, tmp_path):
    slr.compress("tiny", slr.Recipe("magnitude", rank=4, iterations=2), out=tmp_path / "c")

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = slr.load(tmp_path / "c", dtype=torch.float32)

        def forward(self, ids):
            return self.model(input_ids=ids, use_cache=False).logits

    model = Logits().eval()
    ids = torch.randint(4000, (2, 20))
    batch, tokens = torch.export.Dim("batch", max=8), torch.export.Dim("tokens", min=20, max=256)
    shapes = {"ids": {0: batch, 1: tokens}} if dynamic else None
    with torch.no_grad():
        program = torch.export.export(model, (ids,), dynamic_shapes=shapes)
        for shape in ((2, 20), (3, 33)) if dynamic else ((2, 20),):
            other = torch.randint(4000, shape)
            assert torch.equal(program.module()(other), model(other))


@pytest.mark.parametrize("pattern", ["2:4", 0.5, 0.7])
def test_the_layer_uses_it_for_few_tokens(pattern, monkeypatch):
    W = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    layer = slr.SLRLinear.from_refined(
        slr.refine(W, slr.prune(W, "magnitude", pattern).mask, rank=4)
    )
    calls, before = [], native.multiply
    count = lambda *a: calls.append(a[0].numel() // 64) or before(*a)  # noqa: E731
    monkeypatch.setattr(native, "multiply", count)
    x = torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        dense = x @ layer.dense().T
        for some in (x[:, :1], x[0, :16], x[0, :17], x[0, 0], x[0, :0], x[:, :4].mT.clone().mT):
            y = layer(some)
            want = dense.view(40, 48)[: y.numel() // 48]
            if some.shape == (2, 1, 64):
                want = dense[:, :1]
            if some.shape == (2, 4, 64):
                want = dense[:, :4]
            assert torch.allclose(y.reshape(-1, 48), want.reshape(-1, 48), atol=1e-4)
        assert calls == [2, 16, 1, 0, 8]
        again = copy.deepcopy(layer).bfloat16()
        assert again.few == "native"
        assert again.most == (1024 if native.tiled() else 16)
        many = torch.cat([x, x, x]).view(-1, 64).bfloat16()
        assert torch.allclose(again(many).float(), dense.view(-1, 48).repeat(3, 1), atol=0.3)
        assert torch.allclose(again(x[0, :3].bfloat16()).float(), dense[0, :3], atol=0.3)


def test_without_it_the_answer_is_the_same():
    """No compiler, one that fails, or SLR_NATIVE=0: torch's operations, and a line that says so."""
    code = (
        "import torch, slr; from slr.layer import native\n"
        "W = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))\n"
        "mask = slr.prune(W, 'magnitude', 0.5).mask\n"
        "layer = slr.SLRLinear.from_refined(slr.refine(W, mask, rank=4))\n"
        "print(native.in_use()); print(layer.choice(1).backend)\n"
        "print(round(float(layer(torch.ones(64)).sum()), 2))\n"
    )
    told = {}
    for name, settings in {
        "here": {},
        "off": {"SLR_NATIVE": "0"},
        "none": {"CXX": "no-such-compiler"},
        "fails": {"CXX": "false"},
    }.items():
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True, text=True, env={**os.environ, **settings},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        told[name] = done.stdout.splitlines()
    assert told["here"][1] == "native"
    assert "SLR_NATIVE=0 is set" in told["off"][0]
    assert "there is no C++ compiler ($CXX names 'no-such-compiler')" in told["none"][0]
    assert "does not compile here" in told["fails"][0]
    assert all(lines[1] == "cpu" for name, lines in told.items() if name != "here")
    assert len({lines[2] for lines in told.values()}) == 1


def test_it_is_kept_and_a_damaged_copy_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "FLAGS", PLAIN)
    monkeypatch.setenv("SLR_CACHE", str(tmp_path / "one"))
    assert compiled.library.__wrapped__().missing == ""
    (file,) = (tmp_path / "one").iterdir()
    stamp = file.stat().st_mtime_ns
    assert compiled.library.__wrapped__().missing == ""
    assert file.stat().st_mtime_ns == stamp
    other = tmp_path / "two" / file.name
    other.parent.mkdir()
    other.write_bytes(b"cut off")
    monkeypatch.setenv("SLR_CACHE", str(other.parent))
    assert compiled.library.__wrapped__().missing == ""
    assert other.stat().st_size == file.stat().st_size
    assert [each.name for each in other.parent.iterdir()] == [file.name]
    monkeypatch.setenv("SLR_CACHE", "/dev/null/nowhere")  # cannot be written
    assert compiled.library.__wrapped__().missing == ""
