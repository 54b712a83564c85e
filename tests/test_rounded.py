"""A layer of codes: packed, used, moved, saved, loaded, adapted, tuned and exported."""

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import slr
from slr.layer import native, native_codes
from slr.layer.bits import pack_codes, unpack_codes
from slr.layer.compiled import SETS, library
from slr.layer.rounded import RoundedLinear, layer_of
from slr.matrix.rounding import Grid


def refined(m=24, n=40, rank=3, mask=True, grid="int4 by 16", factors="int8", dtype=torch.float32):
    made = torch.Generator().manual_seed(m * n + rank)
    W = torch.randn(m, n, generator=made).to(dtype)
    keep = torch.rand(m, n, generator=made) > 0.5 if mask else None
    return slr.refine(W, keep, rank, grid=grid, factors=factors if rank else None, iterations=3)


@given(bits=st.integers(2, 8), count=st.integers(1, 70), seed=st.integers(0, 9))
def test_codes_are_packed_exactly(bits, count, seed):
    made = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (count,), generator=made, dtype=torch.uint8)
    planes = pack_codes(codes, bits)
    assert planes.nbytes == (count if bits == 8 else bits * -(-count // 8))
    assert torch.equal(unpack_codes(planes, count), codes)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("grid", ["int8", "int3 by 16", "int4 by 7", "int4 by 16 symmetric"])
@pytest.mark.parametrize(("rank", "factors"), [(3, "int8"), (3, None), (0, None)])
def test_it_multiplies_by_what_was_refined(mask, grid, rank, factors):
    found = refined(mask=mask, grid=grid, rank=rank, factors=factors)
    bias = torch.arange(24.0)
    layer = layer_of(found, bias)
    assert isinstance(layer, RoundedLinear)
    assert torch.equal(layer.weight, found.sparse)
    assert torch.equal(layer.mask, found.mask)
    assert torch.equal(layer.values, found.sparse[found.mask])
    assert torch.equal(layer.B, found.B)
    assert torch.equal(layer.A, found.A)
    assert (layer.kept, layer.rank) == (int(found.mask.sum()), rank)
    x = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(0))
    expected = x @ (found.sparse + found.B @ found.A).T + bias
    assert torch.allclose(layer(x), expected, atol=1e-4)
    assert torch.allclose(layer.cache_()(x), expected, atol=1e-4)
    assert layer.cache_(False).cached is None


def test_bytes():
    layer = layer_of(refined(64, 128, 4, mask=False, grid="int4 by 32"))
    packed = sum(part.nbytes for part in layer.packed().values())
    assert packed == 64 * 128 // 2 + 64 * 4 * 2 + 64 * 4 // 2 + 4 * (64 + 128) + 2 * 2 * 4
    half = layer_of(refined(64, 128, 0, grid="int8"))
    assert sum(p.nbytes for p in half.packed().values()) == half.kept + 64 * 2 + 64 * 128 // 8


def test_moved_copied_and_cast_codes_stay():
    layer = layer_of(refined(dtype=torch.bfloat16), torch.ones(24, dtype=torch.bfloat16))
    before = {k: v.clone() for k, v in layer.packed().items() if k != "bias"}
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float32, torch.float16, torch.float64):
        wide = copy.deepcopy(layer).to(dtype)
        assert wide.dtype == wide(x.to(dtype)).dtype == dtype
        for name, part in before.items():
            assert torch.equal(wide.packed()[name], part)
    with pytest.raises(ValueError, match=r"x has dtype torch\.float32, but the layer"):
        layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="its last dimension must be 40"):
        layer(x[:, 1:])
    assert layer.to("meta").is_meta


def test_the_state_comes_back_bit_for_bit():
    layer = layer_of(refined())
    room = RoundedLinear.room(
        (24, 40), 3, layer.kept, False, torch.float32, "cpu", grid="int4 by 16", factors="int8"
    )
    room.load_state_dict(layer.state_dict())
    assert torch.equal(room.check_().dense(), layer.dense())
    room.bitmask[0] ^= 1
    with pytest.raises(ValueError, match="the bitmask keeps"):
        room.check_()
    room.load_state_dict(layer.state_dict())
    room.scale[0, 0] = torch.tensor(float("nan")).bfloat16().view(torch.int16)
    with pytest.raises(ValueError, match="scale"):
        room.check_()


def test_gradients_reach_factors_that_are_floats():
    layer = layer_of(refined(factors=None))
    layer.A.requires_grad_(True)
    layer(torch.ones(2, 40)).sum().backward()
    assert layer.A.grad is not None
    coded = layer_of(refined())
    coded.free_factors_()
    assert torch.equal(coded.B, refined().B)
    coded(torch.ones(2, 40)).sum().backward()
    assert coded.B.grad is not None
    assert coded.factors is None


RECIPES = {
    "dense": {"pattern": "dense", "values": "int4 by 16"},
    "2:4": {"values": "int8", "iterations": 9},
    "data-free": {"prune": "magnitude", "pattern": "0.5", "values": "int4 by 16",
                  "refine": "weights", "factors": "float"},
    "gptq": {"pattern": "dense", "refine": "gptq", "values": "int3 by 16"},
    "tuned": {"pattern": "dense", "values": "int3 by 16", "tune": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_a_model_of_codes(small, tmp_path, name):
    windows = torch.randint(0, 60, (4, 16), generator=torch.Generator().manual_seed(2))
    recipe, out = slr.Recipe(**RECIPES[name]), tmp_path / "out"
    reports = slr.compress(
        small, recipe, out=out, calibration=windows if recipe.needs_data else None
    )
    assert all(report.grid == RECIPES[name]["values"] for report in reports)
    slr.verify(out)
    inside = slr.load(small, dtype=torch.float32)
    slr.compress(inside, recipe, calibration=windows if recipe.needs_data else None)
    model = slr.load(out, dtype=torch.float32)
    with torch.no_grad():
        logits = model(windows).logits
        near = inside(windows).logits  # float32 and bfloat16 may fall on two sides of a code
    assert float((logits - near).norm() / near.norm()) < 0.15
    model.save_pretrained(tmp_path / "again")
    again = slr.load(tmp_path / "again", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(windows).logits, logits)
    first, second = (load_file(tmp_path / d / "model.safetensors") for d in ("out", "again"))
    assert first.keys() == second.keys()
    for key, part in first.items():
        if part.dtype in (torch.uint8, torch.int16):
            assert torch.equal(part, second[key])
    config = json.loads((out / "config.json").read_text())
    layer = next(iter(config["slr"]["layers"].values()))
    assert Grid.parse(layer["grid"]) == Grid.parse(RECIPES[name]["values"])


def test_how_large_it_will_be_is_known_before(small, tmp_path):
    from slr.checkpoint.estimates import estimate
    from slr.checkpoint.work import look

    for name in ("dense", "2:4"):
        recipe, out = slr.Recipe(**RECIPES[name]), tmp_path / name.replace(":", "-")
        windows = torch.randint(0, 60, (4, 16), generator=torch.Generator().manual_seed(2))
        foretold = estimate(look(small, out, recipe, calibration=windows)).disk
        slr.compress(small, recipe, out=out, calibration=windows)
        there = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        headers = 300 * 14 * 9  # of a small model they count
        assert abs(foretold - there) < 0.01 * there + headers


@pytest.fixture
def of_codes(small, tmp_path):
    """A folder of codes, its model, and some windows."""
    windows = torch.randint(0, 60, (4, 16), generator=torch.Generator().manual_seed(2))
    out = tmp_path / "out"
    slr.compress(small, slr.Recipe(**RECIPES["dense"]), out=out, calibration=windows)
    return out, slr.load(out, dtype=torch.float32), windows


def test_exports(of_codes, tmp_path):
    peft = pytest.importorskip("peft")
    out, model, windows = of_codes
    slr.export(out, tmp_path / "dense", to="dense")
    slr.export(out, tmp_path / "peft", to="peft")
    with torch.no_grad():
        logits = model(windows).logits
        dense = slr.load(tmp_path / "dense", dtype=torch.float32)(windows).logits
        base = slr.load(tmp_path / "peft", dtype=torch.float32)
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "peft" / "adapter")
        assert torch.allclose(dense, logits, atol=2e-2)
        assert torch.allclose(adapted(windows).logits, logits, atol=2e-2)


def test_an_adapter_on_codes_is_merged_into_free_factors(of_codes, tmp_path):
    peft = pytest.importorskip("peft")
    _, model, windows = of_codes
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        before = adapted(windows).logits
        merged = adapted.merge_and_unload()
        assert torch.allclose(merged(windows).logits, before, atol=1e-4)
        merged.save_pretrained(tmp_path / "merged")
        again = slr.load(tmp_path / "merged", dtype=torch.float32)
        assert torch.equal(again(windows).logits, merged(windows).logits)


def coded_matrix(m, n, grid, mask, seed=0):
    made = torch.Generator().manual_seed(seed)
    keep = torch.rand(m, n, generator=made) > 0.6 if mask else None
    W = torch.randn(m, n, generator=made)
    layer = layer_of(slr.refine(W, keep, 0, grid=grid))
    return layer.ready[0], layer.weight


@pytest.mark.skipif(native.missing() != "", reason="no compiler")
@given(
    m=st.one_of(st.integers(1, 9), st.sampled_from([37, 144])), n=st.integers(1, 300),
    bits=st.integers(2, 8), group=st.sampled_from([None, 2, 7, 16, 32, 64]),
    symmetric=st.booleans(), mask=st.booleans(),
    rank=st.integers(0, 20), tokens=st.one_of(st.integers(1, 18), st.sampled_from([33, 70])),
    bias=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_every_instruction_set_reads_codes_alike(
    m, n, bits, group, symmetric, mask, rank, tokens, bias, seed
):
    S, dense = coded_matrix(m, n, Grid(bits, group, symmetric or group is None), mask, seed)
    for best in SETS[: library().best + 1]:
        rows = native_codes.rows_(torch.full((m, n), torch.nan), S, best=best)
        assert torch.allclose(rows, dense, rtol=1e-6, atol=0)
        below = native_codes.rows_(torch.empty(m - m // 2, n), S, m // 2, best=best)
        assert torch.equal(below, rows[m // 2 :])
        half = native_codes.rows_(torch.empty(m, n, dtype=torch.bfloat16), S, best=best)
        assert torch.equal(half, rows.bfloat16())
        for dtype in native_codes.KINDS:
            check_product(S, dense, rank, tokens, bias, dtype, best, seed)


@pytest.mark.skipif(native.missing() != "", reason="no compiler")
@pytest.mark.parametrize("best", [] if native.missing() else SETS[: library().best + 1])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize(("n", "tokens"), [(4160, 2), (4160, 40), (9001, 600)])
def test_wide_matrices_of_codes_and_many_tokens(best, mask, n, tokens):
    S, dense = coded_matrix(33, n, Grid(4, 64), mask)
    check_product(S, dense, 20, tokens, True, torch.bfloat16, best)


def check_product(S, dense, rank, tokens, bias, dtype, best, seed=0):
    """A x is rounded and so is y, and S where tiles multiply it, and that is all.

    In bfloat16 a code goes in as 128 + code: float32 rounds sums of 128 x, which cancel.
    """
    (m, n), made = dense.shape, torch.Generator().manual_seed(seed)
    shapes = ((tokens, n), (m, rank), (rank, n), (m,))
    x, B, A, b = (torch.randn(shape, generator=made).to(dtype) for shape in shapes)
    y = native_codes.multiply(x, S, B, A, b if bias else None, best=best)
    x, B, A, b, dense = (part.double() for part in (x, B, A, b, dense))
    exact = x @ dense.T + x @ A.T @ B.T + (b if bias else 0)
    low, eps = (x @ A.T).abs() @ B.abs().T, torch.finfo(dtype).eps
    size = x.abs() @ dense.abs().T + low
    tiles = best == "amx" and dtype == torch.bfloat16 and tokens > 4
    close = eps * (exact.abs() + low) + (eps / 2 if tiles else 0) * size
    if dtype == torch.bfloat16:
        scale = S.scale.view(dtype).double().amax(1)
        close += 2**-15 * scale * x.abs().sum(1, keepdim=True)
    assert bool(((y.double() - exact).abs() <= close + 1e-5 * size + 1e-5).all())


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("tokens", [1, 16, 17, 40])
def test_kernels_and_torch_agree(mask, tokens, monkeypatch):
    layer = layer_of(refined(1100, 40, 3, mask=mask, dtype=torch.bfloat16))
    x = torch.randn(tokens, 40, generator=torch.Generator().manual_seed(3)).bfloat16()
    fast = layer(x)
    monkeypatch.setattr(RoundedLinear, "_native", lambda self, x: False)
    slow = layer(x)
    assert float((fast - slow).float().norm() / slow.float().norm()) < 0.01


@pytest.mark.skipif(native.missing() != "", reason="no compiler")
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize(("tokens", "name"), [(1, "native_codes"), (40, "native_codes_by_rows")])
def test_it_is_compiled_and_exported_as_one_operator(mask, tokens, name):
    layer = layer_of(refined(48, 40, 3, mask=mask), torch.arange(48.0)).requires_grad_(False)
    x = torch.randn(tokens, 40, generator=torch.Generator().manual_seed(3))
    operator = getattr(torch.ops.slr, name).default
    y, (S, B, A) = layer(x), layer.ready
    parts = (S.planes, S.scale, S.zero, S.mask, S.starts, B, A, layer.bias, S.bits, S.group, S.kept)
    assert torch.allclose(y, torch.nn.functional.linear(x, layer.dense(), layer.bias), atol=1e-4)
    torch.library.opcheck(operator, (x, *parts), test_utils=("test_schema", "test_faketensor"))
    assert torch.equal(operator(x, *parts), y)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), y)
    program = torch.export.export(layer, (x,))
    assert torch.equal(program.module()(x), y)
    assert [n.target for n in program.graph.nodes if "slr" in str(n.target)] == [operator]
    again = copy.deepcopy(layer)
    assert again.ready[0].planes.data_ptr() == again.codes.data_ptr() != layer.codes.data_ptr()


def test_a_damaged_state_is_told_by_its_name_and_an_empty_model_is_filled_later():
    layer = layer_of(refined())
    model, state = torch.nn.Sequential(layer), layer.state_dict(prefix="0.")
    state["0.bitmask"] = state["0.bitmask"] ^ 1
    with pytest.raises(RuntimeError, match=r"0: there are \d+ codes"):
        model.load_state_dict(state)
    room = RoundedLinear.room(
        (24, 40), 3, layer.kept, False, torch.float32, grid="int4 by 16", factors="int8"
    )
    room.load_state_dict(layer_of(refined()).state_dict())  # on the meta device nothing is copied
    assert room.is_meta


def _refined(rank=4, **options):
    gen = torch.Generator().manual_seed(0)
    W = torch.randn(32, 32, generator=gen)
    options = {"grid": "int4 by 16", "factors": "int8", **options}
    return slr.refine(W, None, rank, iterations=4, **options)


def test_a_bias_that_does_not_fit_or_is_not_contiguous():
    with pytest.raises(ValueError, match=r"bias has shape \(7,\); it must be \(32,\)"):
        layer_of(_refined(), torch.zeros(7))
    with pytest.raises(ValueError, match="all parts of a layer must be alike"):
        layer_of(_refined(), torch.zeros(32).half())
    bias, x = torch.arange(64.0)[::2], torch.ones(1, 32)
    layer = layer_of(_refined(), bias)
    with torch.no_grad():
        assert torch.allclose(layer(x), x @ layer.dense().T + bias, rtol=1e-4, atol=1e-3)
        layer.bias.data = torch.stack([bias + 1, bias], 1)[:, 0]
        assert torch.allclose(layer(x), x @ layer.dense().T + bias + 1, rtol=1e-4, atol=1e-3)


def test_the_backend_can_be_named():
    layer, x = layer_of(_refined()), torch.ones(1, 32)
    with torch.no_grad():
        auto = layer(x)
        assert layer.use_("dense").backend == "dense"
        assert not layer._native(x)
        assert torch.allclose(layer(x), auto, rtol=1e-4, atol=1e-3)
    assert layer.use_("auto").backend == "auto"
    with pytest.raises(ValueError, match="'native' is unknown; it must be one of auto, dense"):
        layer.use_("native")


def test_factors_need_a_rank():
    with pytest.raises(ValueError, match="factors='int8' has no effect with rank 0"):
        _refined(rank=0)
