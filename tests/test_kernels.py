"""Our Triton kernels: interpreted on the CPU, and compiled for GPUs that are not here."""

import os
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import slr
from slr.layer import backends, kernels
from slr.layer.backends import Machine, choose
from slr.layer.bits import pack_mask
from slr.layer.few import few_tokens

triton = pytest.importorskip("triton")
SIXTEEN = [torch.float16, torch.bfloat16]


def problem(m, n, rank, tokens, dtype, bias=True, seed=0):
    """x, S, its packed form, factors and bias, and the exact product with the sum of its sizes."""
    g = torch.Generator().manual_seed(seed)
    mask = slr.patterns.parse("2:4").select(torch.rand(m, n, generator=g))
    S = torch.where(mask, torch.randn(m, n, generator=g), 0).to(dtype)
    B = torch.randn(m, rank, generator=g).to(dtype)
    A = torch.randn(rank, n, generator=g).to(dtype)
    b = torch.randn(m, generator=g).to(dtype) if bias else None
    x = torch.randn(tokens, n, generator=g).to(dtype)
    wide = [t.double() for t in (x, S, B, A)]
    exact, size = (one + two for one, two in zip(_sums(*wide), _ends(b), strict=True))
    return (x, S[mask], pack_mask(mask), B, A, b), exact, size


def few(x, values, bits, B, A, bias):
    """By the Triton kernels."""
    return few_tokens(x, values, bits, None, B, A, bias, True, "triton")


def _sums(x, S, B, A):
    exact = x @ S.T + x @ A.T @ B.T
    return exact, x.abs() @ S.abs().T + x.abs() @ A.abs().T @ B.abs().T


def _ends(b):
    return (0, 0) if b is None else (b.double(), b.double().abs())


@given(
    m=st.integers(1, 40),
    quarters=st.integers(1, 80),
    rank=st.integers(0, 40),
    tokens=st.integers(0, 18),
    dtype=st.sampled_from(SIXTEEN),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_interpreted_kernels_compute_the_product(m, quarters, rank, tokens, dtype, bias, seed):
    arguments, exact, size = problem(m, 4 * quarters, rank, tokens, dtype, bias, seed)
    y = few(*arguments)
    assert (y.dtype, y.shape) == (dtype, (tokens, m))
    # Several tokens round t to 16 bits, and the interpreter cuts bits off where a GPU rounds.
    assert ((y.double() - exact).abs() <= 1e-6 + 2 * torch.finfo(dtype).eps * size).all()


@pytest.mark.parametrize("tokens", [1, 3])
def test_one_weight_after_another(tokens):
    """Every place of every group: a matrix of ones meets the unit vectors."""
    for code in (0b0011, 0b0101, 0b1001, 0b0110, 0b1010, 0b1100):
        bits = torch.tensor([code | code << 4], dtype=torch.uint8)
        values = torch.tensor([1.0, 2, 4, 8], dtype=torch.float16)
        B, A = torch.zeros(1, 0).half(), torch.zeros(0, 8).half()
        for j in range(8):
            x = torch.zeros(tokens, 8, dtype=torch.float16)
            x[-1, j] = 1
            kept = sum((code | code << 4) >> i & 1 for i in range(j))
            expected = 2**kept if (code | code << 4) >> j & 1 else 0
            y = few(x, values, bits, B, A, None)
            assert y.flatten().tolist() == [0] * (tokens - 1) + [expected]


@pytest.mark.parametrize("tokens", [1, 5])
def test_gradients(tokens):
    (x, v, bits, B, A, b), _, _ = problem(12, 16, 3, tokens, torch.float16)
    leaves = [t.clone().requires_grad_() for t in (x, v, B, A, b)]
    x, v, B, A, b = leaves
    few(x, v, bits, B, A, b).float().square().sum().backward()
    ours = [t.grad for t in leaves]
    layer = slr.SLRLinear.placeholder((12, 16), 3, 96, True, torch.float64, "cpu", "2:4")
    state = {"values": v, "bitmask": bits, "B": B, "A": A, "bias": b}
    layer.load_state_dict(state)
    layer.requires_grad_()
    z = x.detach().double().requires_grad_()
    layer(z).square().sum().backward()
    theirs = [z.grad] + [getattr(layer, k).grad for k in ("values", "B", "A", "bias")]
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one.double(), other, rtol=0.05, atol=0.05 * float(other.abs().max()))


def test_the_layer_uses_it_when_named():
    (x, v, bits, B, A, b), exact, size = problem(24, 40, 2, 4, torch.bfloat16)
    layer = slr.SLRLinear.placeholder((24, 40), 2, 480, True, torch.bfloat16, "cpu", "2:4")
    layer.load_state_dict({"values": v, "bitmask": bits, "B": B, "A": A, "bias": b})
    assert layer.use_("triton").choice(1) == ("triton", "named")
    before = kernels.multiply
    calls = []
    kernels.multiply = lambda *args: calls.append(args[0].numel() // 40) or before(*args)
    try:
        with torch.no_grad():
            for shape in [(4, 40), (2, 2, 40)]:
                y = layer(x.view(shape))
                assert ((y.view(4, 24).double() - exact).abs() <= 0.02 * size).all()
            assert layer(x[:0]).shape == (0, 24)
            assert torch.equal(layer(x[0]), layer(x[:1])[0])
            assert torch.equal(layer(x.T.contiguous().T), y.view(4, 24))
    finally:
        kernels.multiply = before
    assert calls == [4, 4, 0, 1, 1, 4]


def test_operator_is_well_formed_and_compiles_without_a_break():
    arguments, _, _ = problem(12, 16, 3, 5, torch.float16)
    arguments = [a if a.dtype == torch.uint8 else a.requires_grad_() for a in arguments]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    x, v, bits, *rest = arguments
    every = (x, v, bits, None, *rest, True, "triton")
    torch.library.opcheck(torch.ops.slr.few_tokens.default, every, test_utils=checks)
    torch._dynamo.reset()
    compiled = torch.compile(few, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(*arguments), few(*arguments))


def test_values_that_begin_at_an_odd_place():
    (x, v, bits, B, A, b), _, _ = problem(12, 16, 3, 5, torch.float16)
    room = torch.zeros(len(v) + 1, dtype=v.dtype)
    room[1:] = v
    expected = few(x, v, bits, B, A, b)
    assert torch.equal(few(x, room[1:], bits, B, A, b), expected)


def test_without_triton_it_says_so(monkeypatch):
    arguments, _, _ = problem(12, 16, 3, 1, torch.float16)
    monkeypatch.setattr(kernels, "jit", kernels._without)
    with pytest.raises(ImportError, match="pip install triton"):
        few(*arguments)
    gone = Machine("cpu", None, triton=False)
    with pytest.raises(ValueError, match="cannot be used"):
        choose((16, 16), torch.float16, gone, 1, backend="triton")


def test_slr_is_imported_without_it():
    code = "import sys; sys.modules['triton'] = None; import slr, slr.layer.kernels; print('fine')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "fine\n", done.stderr
    code = "import sys, slr; print('triton' in sys.modules, 'slr.layer.kernels' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False False\n", done.stderr


def test_the_interpreter_is_found():
    assert backends.machine(torch.device("cpu")).interpreter
    # but a CPU is never given to it unasked
    here = backends.machine(torch.device("cpu"))
    assert choose((16, 16), torch.float16, here, 1).backend in ("cpu", "native")


COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from slr.layer import kernels

def compiled(kernel, types, constants, capability):
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel, signature={n: types.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): v for n, v in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in types},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))

for capability, kind, one in ((80, "bf16", True), (90, "fp16", False)):
    pointer = {name: "*" + kind for name in ("x", "A", "B", "bias", "y")}
    sizes = dict.fromkeys(("tokens", "m", "n", "k", "width", "parts"), "i32")
    types = {**pointer, **sizes, "t": "*fp32", "pairs": "*i32", "bits": "*u8"}
    shape = {"ONE": one, "WIDE": False, "SLAB": 1 if one else kernels.SLAB}
    product = {
        **shape, "BF16": kind == "bf16", "WHOLE": one, "BIAS": True, "RANK": 128,
        "ROWS": kernels.ROWS, "GROUPS": kernels.GROUPS,
    }
    factor = {**shape, "RANKS": kernels.RANKS, "COLUMNS": kernels.COLUMNS}
    for kernel, constants in ((kernels._product, product), (kernels._factor, factor)):
        mine = {n: t for n, t in types.items() if n in kernel.arg_names}
        found = compiled(kernel, mine, constants, capability)
        ptx = found.asm["ptx"]
        print(capability, len(found.asm["cubin"]) > 0, "mma" in ptx, ".local" in ptx)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_they_compile_for_ampere_and_hopper():
    """To machine code, without a GPU; one token needs no tensor cores, several do; no spills."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE], capture_output=True, text=True,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.findall(r"(\d+) (\w+) (\w+) (\w+)", done.stdout)
    assert found == [("80", "True", "False", "False")] * 2 + [("90", "True", "True", "False")] * 2
