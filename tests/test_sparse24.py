"""2:4 packed and back, the backends that are chosen, and those of torch, emulated on the CPU."""

import copy
import re

import pytest
import torch
from helpers import realistic
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import linear
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

import slr
from slr.chapters import packed24
from slr.layer import backends, sparse24
from slr.layer.backends import Machine, choose
from slr.layer.bits import pack_mask
from slr.layer.packing import keep, unpack

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPE = (4096, 11008)
TURING = Machine("cuda", (7, 5), True, True)
AMPERE = Machine("cuda", (8, 0), True, True)
ADA = Machine("cuda", (8, 9), True, False)
HOPPER = Machine("cuda", (9, 0), True, True)
BLACKWELL = Machine("cuda", (10, 0), True, True)


def two_four(m, n, dtype=torch.float32, seed=0, zeros=False):
    """A random mask and a weight that is 0 off it, and with `zeros` -0 here and there on it."""
    g = torch.Generator().manual_seed(seed)
    mask = slr.patterns.parse("2:4").select(torch.rand(m, n, generator=g))
    weight = torch.randn(m, n, generator=g).to(dtype)
    if zeros:
        weight[torch.rand(m, n, generator=g) < 0.1] = -0.0
    return torch.where(mask, weight, 0), mask


def bits(tensor):
    """Its bytes, so that -0 is not 0."""
    return tensor.contiguous().view(torch.uint8)


@given(
    m=st.integers(1, 40),
    quarters=st.integers(1, 40),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 999),
)
def test_packed_and_back_bit_for_bit(m, quarters, dtype, seed):
    S, mask = two_four(m, 4 * quarters, dtype, seed, zeros=True)
    packed = packed24.pack(S, mask)
    assert packed.values.shape == (m, 2 * quarters)
    assert packed.indices.shape == (-(-m * quarters // 2),)
    assert torch.equal(bits(packed24.unpack(packed)), bits(S))
    bitmask = pack_mask(mask)
    assert torch.equal(packed24.bitmask_of(packed.indices), bitmask)
    assert torch.equal(sparse24.indices_of(bitmask), packed.indices)
    again, same = unpack(S[mask], bitmask, tuple(S.shape))
    assert torch.equal(bits(again), bits(S))
    assert torch.equal(same, mask)
    assert torch.equal(keep(S, bitmask, True), keep(S, bitmask))


def test_the_layout_by_hand():
    S = torch.tensor([[1.0, 2, 0, 0, 0, 3, 0, 4], [0, 5, 6, 0, 7, 0, 0, 8]])
    values, indices = packed24.pack(S)
    assert values.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    # Places (0, 1) and (1, 3); (1, 2) and (0, 3); the first in the lower two bits.
    assert indices.tolist() == [0b11_01_01_00, 0b11_00_10_01]


def test_all_six_groups_and_no_other():
    for code in range(16):
        bitmask = torch.tensor([code], dtype=torch.uint8)
        if code.bit_count() != 2:
            assert not sparse24.is_two_four(bitmask, (1, 4))
            with pytest.raises(ValueError, match=f"{code.bit_count()} weights are kept"):
                sparse24.check_two_four(bitmask, (1, 4))
            continue
        assert sparse24.is_two_four(bitmask, (1, 4))
        place = int(sparse24.indices_of(bitmask))
        assert 1 << (place & 3) | 1 << (place >> 2) == code
        for dtype in FLOATS:
            out = torch.full((1, 4), 9.0, dtype=dtype)
            sparse24.expand_(out, torch.tensor([5.0, -6.0], dtype=dtype), bitmask)
            expected = torch.zeros(4)
            expected[place & 3], expected[place >> 2] = 5, -6
            assert out[0].tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_is_the_layout_of_torchs_cutlass(dtype):
    S, mask = two_four(96, 192, dtype)
    values, meta = sparse_semi_structured_from_dense_cutlass(S)
    packed = packed24.pack(S, mask)
    assert torch.equal(packed.values, values)
    assert torch.equal(sparse24.cutlass_metadata(packed.indices, (96, 192)), meta)


def test_a_matrix_with_fewer_weights_is_filled_up_with_zeros():
    S = torch.tensor([[0.0, 0, 0, 0, 0, 0, 3, 0]])
    assert torch.equal(packed24.unpack(packed24.pack(S)), S)


@pytest.mark.parametrize(
    ("weight", "mask", "says"),
    [
        (torch.ones(2, 8), None, "row 0, columns 0 to 3: 4 weights are kept; 2:4 keeps exactly 2"),
        (torch.eye(8)[:5], torch.eye(8)[:5] > 0, "row 0, columns 0 to 3: 1 weights are kept"),
        (torch.zeros(2, 6), None, "columns divisible by 4, but there are 6"),
        (torch.ones(1, 4), torch.tensor([[True, True, False, False]]), "not zero off the mask"),
        (torch.full((1, 4), torch.nan), None, "non-finite"),
    ],
)
def test_what_is_not_two_four_is_named(weight, mask, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        packed24.pack(weight, mask)


def test_the_row_and_group_that_are_wrong():
    mask = slr.patterns.parse("2:4").select(torch.rand(7, 20))
    mask[5, 12:16] = torch.tensor([True, False, True, True])
    with pytest.raises(ValueError, match="row 5, columns 12 to 15: 3 weights are kept"):
        slr.SLRLinear(torch.randn(7, 20) * mask, mask=mask, pattern="2:4")


def test_cutlass_metadata_needs_its_shape():
    with pytest.raises(ValueError, match=re.escape("rows divisible by 32 and columns by 64")):
        sparse24.cutlass_metadata(torch.zeros(8, dtype=torch.uint8), (16, 4))


@pytest.mark.parametrize(
    ("where", "tokens", "expected", "because"),
    [
        (Machine(), 1, "cpu", "not looked for"),
        (Machine(native=""), 1, "native", "1 tokens: reading S takes the time"),
        (Machine(native=""), 17, "cpu", "17 tokens: multiplying takes the time"),
        (Machine(native="", tiles=True), 17, "native", "17 tokens: unpacked for the matrix units"),
        (Machine(native="", tiles=True), 1025, "cpu", "multiplying takes the time"),
        (Machine("mps"), 1, "dense", "the tensors are on mps, not on a CUDA device"),
        (Machine("cuda", None), 1, "dense", "this build of torch is not for CUDA"),
        (TURING, 1, "dense", "capability 7.5 has no units for 2:4"),
        (TURING, 4096, "dense", "capability 7.5 has no units for 2:4"),
        (AMPERE, 1, "triton", "1 tokens: reading S takes the time"),
        (AMPERE, 16, "triton", "16 tokens"),
        (AMPERE, 17, "cutlass", "17 tokens: multiplying takes the time"),
        (AMPERE, 4096, "cutlass", ""),
        (ADA, 4096, "cutlass", ""),
        (AMPERE._replace(triton=False), 1, "cutlass", "triton is not installed"),
        (HOPPER, 1, "triton", ""),
        (HOPPER, 4096, "cusparselt", ""),
        (HOPPER._replace(triton=False), 1, "cusparselt", "triton is not installed"),
        (HOPPER._replace(cusparselt=False), 4096, "dense", "8.x, not 9.x; this build of torch has"),
        (BLACKWELL, 1, "triton", ""),
        (BLACKWELL, 4096, "cusparselt", ""),
        (BLACKWELL._replace(cusparselt=False), 4096, "dense", "not 10.x"),
    ],
)
def test_the_backend_of_every_generation(where, tokens, expected, because):
    found = choose(SHAPE, torch.bfloat16, where, tokens)
    assert found.backend == expected
    assert because in found.reason


@pytest.mark.parametrize(
    ("shape", "dtype", "options", "expected", "because"),
    [
        (SHAPE, torch.float32, {}, "dense", "float32 is not float16 or bfloat16"),
        (SHAPE, torch.float16, {"two_four": False}, "dense", "does not keep 2 of every 4"),
        ((48, 64), torch.float16, {}, "cusparselt", ""),
        ((40, 64), torch.float16, {}, "dense", "40 × 64 matrix is not divisible by 32 × 64"),
        ((32, 100), torch.float16, {}, "dense", "is not divisible by 16 × 16"),
    ],
)
def test_shapes_and_dtypes_fall_back_with_a_reason(shape, dtype, options, expected, because):
    found = choose(shape, dtype, AMPERE, 4096, **options)
    assert found.backend == expected
    assert because in found.reason


@pytest.mark.parametrize(
    ("name", "where", "dtype", "says"),
    [
        ("fast", AMPERE, torch.float16, "backend 'fast' is unknown; it must be auto or one of"),
        ("cutlass", Machine(), torch.float16, "the tensors are on cpu, not on a CUDA device"),
        ("cusparselt", Machine(), torch.float16, "the tensors are on cpu"),
        ("triton", Machine("cpu", None, True), torch.float16, "the tensors are on cpu"),
        ("cpu", AMPERE, torch.float16, "the tensors are on cuda, not the CPU"),
        ("native", AMPERE, torch.float16, "the tensors are on cuda, not the CPU"),
        ("native", Machine(native=""), torch.float64, "our kernels have no float64"),
        ("native", Machine(native="no compiler"), torch.float16, "no compiler"),
        ("triton", TURING, torch.float16, "compute capability 7.5 has no units for 2:4"),
        ("cutlass", HOPPER, torch.float16, "CUTLASS kernels are for capability 8.x, not 9.x"),
        ("triton", AMPERE._replace(triton=False), torch.float16, "pip install triton"),
        ("cusparselt", ADA, torch.float16, "this build of torch has no cuSPARSELt"),
        ("cutlass", AMPERE, torch.float32, "float32 is not float16 or bfloat16"),
    ],
)
def test_a_named_backend_is_taken_or_refused(name, where, dtype, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        choose(SHAPE, dtype, where, 4096, backend=name)
    assert choose(SHAPE, dtype, where, 1, backend="dense") == ("dense", "named")


def test_naming_one_on_a_cpu_is_refused_and_changes_nothing():
    S, mask = two_four(32, 64, torch.bfloat16)
    layer = slr.SLRLinear(S, mask=mask)
    with pytest.raises(ValueError, match="backend 'cutlass' cannot be used: the tensors are on cp"):
        layer.use_("cutlass")
    assert layer.backend == "auto"
    assert layer.choice(1025).backend == "cpu"
    assert layer.use_("dense").choice(1) == ("dense", "named")
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(layer(x), layer.use_("cpu")(x))


@pytest.fixture
def cores(monkeypatch):
    """torch's sparse products, emulated: what they get is unpacked by torch's own functions."""
    calls = []

    def mm(packed, meta, x):
        calls.append(("cutlass", x.shape[1]))
        assert x.shape[0] % 64 == 0
        assert x.shape[1] % 8 == 0  # torch pads
        return sparse_semi_structured_to_dense_cutlass(packed, meta) @ x

    def compress(S):
        packed = packed24.pack(S)
        return torch.cat((packed.values.flatten(), packed.indices.view(S.dtype)))

    def library(packed, x, bias=None, transpose_result=False, **_):
        calls.append(("cusparselt", x.shape[1]))
        n = x.shape[0]
        m = packed.numel() * 16 // 9 // n
        places = packed[m * n // 2 :].view(torch.uint8)
        S = packed24.Packed24(packed[: m * n // 2].view(m, -1), places)
        y = packed24.unpack(S) @ x
        y = y if bias is None else y + bias[:, None]
        return y.T.contiguous() if transpose_result else y

    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", mm)
    monkeypatch.setattr(
        torch, "_sparse_semi_structured_addmm", lambda b, *args: mm(*args) + b[:, None]
    )
    monkeypatch.setattr(torch, "_cslt_compress", compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", library)
    return calls


def pretend(monkeypatch, where):
    """Take tensors on the CPU for tensors on `where`."""
    monkeypatch.setattr("slr.layer.backed.machine", lambda device: where)


CORES = [("cutlass", AMPERE), ("cusparselt", HOPPER)]


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemi")
@pytest.mark.parametrize(("name", "where"), CORES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_sparse_cores_compute_the_product(name, where, dtype, bias, cores, monkeypatch):
    S, mask = two_four(64, 128, dtype)
    b = torch.randn(64).to(dtype) if bias else None
    factors = torch.randn(64, 3).to(dtype), torch.randn(3, 128).to(dtype)
    plain = slr.SLRLinear(S, *factors, b, mask=mask)
    pretend(monkeypatch, where._replace(triton=False))
    layer = slr.SLRLinear(S, *factors, b, mask=mask)
    assert (layer.few, layer.many) == (name, name)
    for shape in [(1, 128), (17, 128), (2, 11, 128), (0, 128), (128,)]:
        x = torch.randn(shape).to(dtype)
        assert torch.allclose(layer(x), plain(x), rtol=2e-2, atol=0.3)
    assert {used for used, _ in cores} == {name}
    assert layer(torch.randn(22, 2, 128).to(dtype)[::2]).shape == (11, 2, 64)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemi")
@pytest.mark.parametrize(("name", "where"), CORES)
def test_gradients_through_sparse_cores(name, where, cores, monkeypatch):
    S, mask = two_four(64, 128, torch.bfloat16)
    plain = slr.SLRLinear(S, mask=mask, bias=torch.randn(64).bfloat16())
    pretend(monkeypatch, where)
    layer = slr.SLRLinear(S, mask=mask, bias=plain.bias.data)
    x = torch.randn(20, 128).bfloat16()
    for one in (layer, plain):
        one(x).square().sum().backward()
    assert cores
    for ours, theirs in zip(layer.parameters(), plain.parameters(), strict=True):
        assert ours.numel() == 0 or torch.allclose(ours.grad, theirs.grad, rtol=2e-2, atol=1)
    with torch.no_grad():  # and what is computed with follows the values
        layer.values.mul_(2)
    expected = linear(x, 2 * S, layer.bias)
    assert torch.allclose(layer(x), expected, rtol=1e-2, atol=1e-1)


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemi")
def test_only_one_copy_of_the_values(cores, monkeypatch):
    S, mask = two_four(64, 128, torch.bfloat16)
    pretend(monkeypatch, HOPPER)
    layer = slr.SLRLinear(S, mask=mask)
    assert layer.shared
    assert layer.form.untyped_storage().data_ptr() == layer.values.untyped_storage().data_ptr()
    assert layer.form.nbytes == 0.5625 * S.nbytes
    assert set(layer.state_dict()) == {"values", "bitmask", "B", "A"}
    pretend(monkeypatch, AMPERE)
    layer = slr.SLRLinear(S, mask=mask)
    assert layer.form.nbytes == 0.0625 * S.nbytes


def test_a_foreign_order_of_values_is_not_shared_and_not_trained(cores, monkeypatch):
    right = torch._cslt_compress
    monkeypatch.setattr(torch, "_cslt_compress", lambda S: right(S).flip(0))
    pretend(monkeypatch, HOPPER)
    S, mask = two_four(64, 128, torch.bfloat16)
    layer = slr.SLRLinear(S, mask=mask)
    x = torch.randn(20, 128).bfloat16()
    assert not layer.shared
    assert torch.equal(layer(x), linear(x, S))  # values may change, so the copy is not used
    assert not cores
    layer.requires_grad_(False)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", lambda *args, **_: torch.full((20, 64), 7.0))
    assert (layer(x) == 7).all()


def test_moving_prepares_again(cores, monkeypatch):
    S, mask = two_four(64, 128, torch.float32)
    layer = slr.SLRLinear(S, mask=mask)
    assert layer.form is None
    pretend(monkeypatch, AMPERE)
    layer.half()
    assert layer.form.dtype == torch.int16
    assert (layer.few, layer.many) == ("triton", "cutlass")
    layer.use_("cutlass")
    with pytest.warns(UserWarning, match="float32 is not float16 or bfloat16; using 'auto'"):
        layer.float()
    assert (layer.few, layer.many, layer.backend, layer.form) == ("dense", "dense", "auto", None)


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemi")
def test_autocast_leaves_the_sparse_cores(cores, monkeypatch):
    pretend(monkeypatch, HOPPER)
    S, mask = two_four(64, 128, torch.float16)
    layer, x = slr.SLRLinear(S, mask=mask), torch.randn(20, 128)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(layer(x), linear(x.bfloat16(), S.bfloat16()))
    assert not cores


def test_a_checkpoint_goes_straight_to_the_packed_layer(small, tmp_path):
    """Loaded, a 2:4 model in bfloat16 takes at most 0.65 of its dense linears, after use too."""
    slr.compress(
        small, slr.Recipe(prune="magnitude", pattern="2:4", iterations=2), out=tmp_path / "a"
    )
    model = slr.load(tmp_path / "a")
    with torch.no_grad():
        model(torch.randint(4096, (2, 20)))
    dense = held = 0
    for layer in model.modules():
        if isinstance(layer, slr.SLRLinear):
            assert layer.two_four
            dense += 2 * layer.in_features * layer.out_features
            tensors = [*layer.parameters(), *layer.buffers()]
            tensors += [v for v in vars(layer).values() if isinstance(v, torch.Tensor)]
            tensors = [t for t in tensors if t is not layer.bias]
            held += sum(t.untyped_storage().nbytes() for t in tensors)
    assert 0.5625 * dense < held <= 0.67 * dense  # 64 wide: rank 2 of a 32 × 64 matrix is 0.09
    assert held - dense * 0.5625 == 2 * sum(
        layer.rank * (layer.in_features + layer.out_features)
        for layer in model.modules()
        if isinstance(layer, slr.SLRLinear)
    )


def test_a_dense_copy_is_loaded_on_request(small, tmp_path):
    slr.compress(
        small, slr.Recipe(prune="magnitude", pattern="2:4", iterations=2), out=tmp_path / "a"
    )
    packed, cached = slr.load(tmp_path / "a"), slr.load(tmp_path / "a", cache=True)
    ids = torch.randint(4096, (2, 20))
    for layer in packed.modules():
        if isinstance(layer, slr.SLRLinear):
            layer.use_("cpu")  # the same products
    with torch.no_grad():
        assert torch.equal(packed(ids).logits, cached(ids).logits)
    for layer, other in zip(packed.modules(), cached.modules(), strict=True):
        if isinstance(layer, slr.SLRLinear):
            assert layer.cached is None
            assert torch.equal(other.cached, layer.weight)
    assert set(packed.state_dict()) == set(cached.state_dict())


def test_machine_is_looked_up():
    assert backends.machine(torch.device("cpu")).device == "cpu"
    assert backends.machine(torch.device("cpu")).capability is None
    layer = slr.SLRLinear(realistic(8, 8) * slr.prune(realistic(8, 8), "magnitude", "2:4").mask)
    assert layer.choice(17) == ("cpu", "17 tokens: multiplying takes the time")
