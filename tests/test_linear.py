import copy
import io
import pickle
import re

import pytest
import torch
from helpers import realistic
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import linear

import slr
from slr.layer import packing
from slr.layer.bits import pack_mask

W = realistic(12, 8)
MASK = slr.prune(W, "magnitude", "2:4").mask
BIG = realistic(400, 3000)  # two blocks of rows
PATTERNS = ["2:4", "0.5", "0.9", "1:4", "4:8"]


def layer_of(m, n, rank, pattern, bias=True, dtype=torch.float32, seed=0):
    weight = realistic(m, n, seed)
    mask = slr.patterns.parse(pattern).select(weight.abs())
    g = torch.Generator().manual_seed(seed)
    B, A = torch.randn(m, rank, generator=g), torch.randn(rank, n, generator=g) / n
    b = torch.randn(m, generator=g) if bias else None
    layer = slr.SLRLinear(weight * mask, B, A, b, mask=mask, pattern=pattern)
    return layer.to(dtype)


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (0, 8), (2, 0, 8), (2, 1, 3, 8)])
def test_equals_the_dense_product(shape):
    layer = slr.SLRLinear.from_refined(slr.refine(W, MASK, 3), torch.randn(12))
    x = torch.randn(shape)
    assert layer(x).shape == (*shape[:-1], 12)
    assert torch.allclose(layer(x), x @ layer.dense().T + layer.bias, atol=1e-5)


@given(
    m=st.integers(1, 70),
    quarters=st.integers(1, 40),
    rank=st.integers(0, 5),
    tokens=st.integers(0, 20),
    pattern=st.sampled_from(PATTERNS),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_any_shape_equals_the_dense_product(m, quarters, rank, tokens, pattern, dtype, seed):
    n = 8 * quarters if pattern == "4:8" else 4 * quarters
    layer = layer_of(m, n, min(rank, m, n), pattern, dtype=dtype, seed=seed)
    x = torch.randn(tokens, n, generator=torch.Generator().manual_seed(seed)).to(dtype)
    with torch.no_grad():
        exact = x.double() @ layer.dense().double().T + layer.bias.double()
        size = x.double().abs() @ layer.dense().double().abs().T + layer.bias.double().abs() + 1
        # dense() is rounded once, t = A x, B t, S x + b and their sum once each.
        assert ((layer(x).double() - exact).abs() <= 8 * torch.finfo(dtype).eps * size).all()


@pytest.mark.parametrize("pattern", PATTERNS[:3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_several_blocks_of_rows(pattern, dtype, monkeypatch):
    monkeypatch.setattr(packing, "ROWS", 80)  # five blocks
    layer = layer_of(400, 3000, 3, pattern, dtype=dtype)
    x = torch.randn(5, 3000).to(dtype)
    S = layer.weight
    assert torch.equal(S, BIG.to(dtype) * layer.mask)
    expected = linear(x, S, layer.bias) + linear(linear(x, layer.A), layer.B)
    assert torch.allclose(layer(x), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-2)
    assert torch.equal(layer(x), layer(x))


def test_rank_zero_is_the_pruned_layer():
    layer = slr.SLRLinear(W * MASK)
    x = torch.randn(5, 8)
    assert torch.allclose(layer(x), linear(x, W * MASK), rtol=0, atol=1e-6)
    assert torch.equal(layer.use_("cpu")(x), linear(x, W * MASK))
    assert layer.rank == 0


def test_without_any_kept_weight_it_is_its_low_rank(monkeypatch):
    W = torch.randn(12, 20)
    refined = slr.svd_repair(W, torch.zeros(12, 20, dtype=torch.bool), rank=3)
    bias = torch.randn(12)
    layer = slr.SLRLinear.from_refined(refined, bias, pattern="1.0")
    assert layer.values.numel() == 0
    U, s, Vh = torch.linalg.svd(W)
    x = torch.randn(2, 5, 20)
    monkeypatch.setattr("slr.layer.linear.sparse_linear", None)  # S is not multiplied
    expected = x @ ((U[:, :3] * s[:3]) @ Vh[:3]).T + bias
    assert torch.allclose(layer(x), expected, atol=1e-5)
    layer(x).sum().backward()
    assert layer.B.grad is not None


def test_what_it_holds_is_what_is_stored():
    layer = layer_of(12, 8, 3, "2:4", dtype=torch.bfloat16)
    assert list(layer.state_dict()) == ["values", "B", "A", "bias", "bitmask"]
    stored = layer.packed()
    assert torch.equal(stored["values"], (W * MASK)[MASK].bfloat16())
    assert torch.equal(stored["bitmask"], pack_mask(MASK))
    size = sum(value.nbytes for value in stored.values())
    assert size == 12 * 8 + 12 * 8 // 8 + 2 * 3 * (12 + 8) + 2 * 12


def held(layer):
    """Bytes of all tensors of a layer, parameters, buffers and others."""
    tensors = [*layer.parameters(), *layer.buffers()]
    tensors += [v for v in vars(layer).values() if isinstance(v, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def test_no_dense_copy_is_kept_unless_asked_for():
    layer = layer_of(400, 3000, 10, "2:4", dtype=torch.bfloat16)
    layer(torch.randn(3, 3000).bfloat16())
    dense = 2 * 400 * 3000
    assert held(layer) <= 0.65 * dense
    x = torch.randn(3, 3000).bfloat16()
    packed = layer(x)
    assert held(layer.cache_()) >= 1.5 * dense
    assert torch.allclose(layer(x), packed, atol=1e-1)
    assert "cached" not in layer.state_dict()
    assert held(layer.cache_(False)) <= 0.65 * dense


def test_the_cache_does_not_go_stale():
    layer = layer_of(12, 8, 0, "2:4").cache_()
    x = torch.randn(3, 8)
    assert not layer.values.requires_grad
    before = layer(x)
    layer.load_state_dict({**layer.state_dict(), "values": 2 * layer.values})
    assert torch.allclose(layer(x) - layer.bias, 2 * (before - layer.bias), atol=1e-5)
    assert layer.cache_().double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
@pytest.mark.parametrize("shape", [(12, 8), (400, 3000)])
def test_gradients_are_those_of_the_dense_product(pattern, shape, monkeypatch):
    monkeypatch.setattr(packing, "ROWS", 80)
    m, n = shape
    layer = layer_of(m, n, 3, pattern).double()
    x = torch.randn(4, n, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, m, dtype=torch.float64)
    (layer(x) * weights).sum().backward()
    S = layer.weight.detach().requires_grad_()
    leaves = [t.detach().clone().requires_grad_() for t in (x, layer.B, layer.A, layer.bias)]
    z, B, A, b = leaves
    ((linear(z, S, b) + linear(linear(z, A), B)) * weights).sum().backward()
    assert torch.allclose(layer.values.grad, S.grad[layer.mask])
    for ours, theirs in zip((x, layer.B, layer.A, layer.bias), leaves, strict=True):
        assert torch.allclose(ours.grad, theirs.grad)
    layer.values.grad = None
    (layer.weight * S.detach()).sum().backward()
    assert torch.equal(layer.values.grad, S.detach()[layer.mask])


def test_only_the_gradients_that_are_wanted():
    layer = layer_of(12, 8, 0, "2:4")
    layer.values.requires_grad_(False)
    x = torch.randn(3, 8, requires_grad=True)
    layer(x).sum().backward()
    assert layer.values.grad is None
    assert torch.allclose(x.grad, layer.weight.sum(0).expand(3, 8), atol=1e-5)


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_gradcheck(pattern):
    layer = layer_of(6, 8, 2, pattern).double()
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, v: torch.func.functional_call(layer, {"values": v}, (x,)), (x, layer.values)
    )


def test_training_lowers_the_loss_and_keeps_the_mask():
    layer, x = layer_of(12, 8, 2, "2:4"), torch.randn(64, 8)
    target = x @ W.T
    mask, optimizer = layer.mask, torch.optim.Adam(layer.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    assert torch.equal(layer.mask, mask)
    assert not layer.weight[~mask].any()


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.add_(1),
        lambda w: w.data.mul_(2),
        lambda w: w.__setitem__(0, 1.0),
        lambda w: w.T.zero_(),
        lambda w: w.detach()[0].fill_(3),
        lambda w: w.chunk(2)[0].zero_(),
        lambda w: setattr(w, "data", torch.ones(12, 8)),
        lambda w: torch.mul(torch.ones(12, 8), 2, out=w.detach()),
        lambda w: torch._foreach_add_([w.detach()], 1),
        torch.nn.init.zeros_,
    ],
)
def test_what_is_unpacked_cannot_be_written_into_the_void(write):
    layer = layer_of(12, 8, 2, "2:4")
    before = layer.weight.clone()
    with pytest.raises(ValueError, match="would be lost; write the layer's values"):
        write(layer.weight)
    with pytest.raises(ValueError, match="would be lost"):
        layer.mask[0] = True
    assert torch.equal(layer.weight, before)


def test_what_is_computed_from_it_is_plain():
    layer = layer_of(12, 8, 2, "2:4")
    W, x = layer.weight, torch.ones(12, 8)
    for made in (W + 1, W.clone(), W @ W.T, W[layer.mask], copy.deepcopy(W.detach()), x.add(W)):
        assert type(made) is torch.Tensor
    x[layer.mask] = 0
    assert torch.equal(x.bool(), ~layer.mask)
    assert torch.equal(x.data.copy_(W.detach()), W)
    compiled = torch.compile(lambda x: x @ layer.weight.T, backend="eager")
    assert torch.equal(compiled(x), x @ W.T)


def test_pickles_and_prepares_anew():
    layer = layer_of(12, 8, 2, "2:4")
    layer.few, layer.many, layer.form = "triton", "cutlass", torch.zeros(3)  # of another machine
    x, want = torch.randn(3, 8), layer_of(12, 8, 2, "2:4")(torch.randn(3, 8)).shape
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    for twin in (
        pickle.loads(pickle.dumps(layer)), torch.load(saved, weights_only=False),
        copy.deepcopy(layer),
    ):  # fmt: skip
        assert (twin.few, twin.many, twin.form) == (layer.choice(1).backend, "cpu", None)
        assert twin(x).shape == want
        pairs = zip(twin.packed().values(), layer.packed().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_peft_trains_an_adapter_on_it():
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(layer_of(12, 8, 2, "2:4"))
    x = torch.randn(5, 8)
    before = model(x)
    config = peft.LoraConfig(r=2, target_modules=["0"])
    tuned = peft.get_peft_model(model, config)
    assert torch.equal(tuned(x), before)
    tuned(x).square().sum().backward()
    grads = {name: p.grad for name, p in tuned.named_parameters() if p.requires_grad}
    assert len(grads) == 2
    assert all(g is not None for g in grads.values())


def test_copies_casts_and_state():
    layer = slr.SLRLinear.from_refined(slr.refine(W, MASK, 3), pattern="2:4")
    twin = copy.deepcopy(layer).to(torch.bfloat16)
    assert twin.A.dtype == twin.values.dtype == twin.weight.dtype == torch.bfloat16
    assert twin.bitmask.dtype == torch.uint8
    assert twin.mask.dtype == torch.bool
    assert layer.values.dtype == torch.float32
    assert copy.deepcopy(layer).half()(torch.randn(2, 8).half()).dtype == torch.float16
    assert "pattern=2:4, rank=3" in repr(layer)
    assert (layer.in_features, layer.out_features) == (8, 12)
    assert torch.equal(layer.mask, MASK)


def test_a_state_dict_moves_values_and_mask():
    one, other = layer_of(12, 8, 2, "2:4", seed=0), layer_of(12, 8, 2, "2:4", seed=1)
    x = torch.randn(3, 8)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x))
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    fresh = slr.SLRLinear.placeholder((12, 8), 2, 48, True, torch.float32, "cpu", "2:4")
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(one(x), fresh(x))
    assert fresh.two_four


@pytest.mark.parametrize("damage", ["one value less", "a third weight", "a short mask"])
def test_a_state_that_does_not_fit_is_an_error(damage):
    layer = layer_of(12, 8, 2, "2:4")
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    room, says = 48, "row 3, columns 0 to 3: 3 weights"
    if damage == "one value less":
        state["values"], room, says = state["values"][1:], 47, "there are 47 values"
    elif damage == "a third weight":
        at = 3  # a byte is a row of 8
        bits = int(state["bitmask"][at])
        spare = next(j for j in range(4) if not bits >> j & 1)
        state["bitmask"][at] = bits | 1 << spare
        last = next(j for j in range(4, 8) if bits >> j & 1)
        state["bitmask"][at] -= 1 << last
    else:
        layer.register_buffer("bitmask", torch.zeros(3, dtype=torch.uint8))
        fresh = layer
        with pytest.raises(ValueError, match="a bitmask of 3 bytes is not that"):
            fresh.check_()
        return
    fresh = slr.SLRLinear.placeholder((12, 8), 2, room, True, torch.float32, "cpu", "2:4")
    with pytest.raises(RuntimeError, match=re.escape(says)):
        fresh.load_state_dict(state)


def test_autocast():
    layer, x = layer_of(12, 8, 2, "2:4"), torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), layer(x), atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).float().sum().backward()
    assert layer.values.grad.dtype == torch.float32


def test_not_contiguous_and_sliced_input():
    layer = layer_of(12, 8, 2, "2:4")
    x = torch.randn(8, 6, 5).permute(2, 1, 0)
    assert not x.is_contiguous()
    assert torch.allclose(layer(x), layer(x.contiguous()), atol=1e-5)
    wide = torch.randn(5, 20)
    assert torch.allclose(layer(wide[:, 3:11]), layer(wide[:, 3:11].clone()), atol=1e-5)


def test_values_that_begin_anywhere_in_memory():
    layer, x = layer_of(12, 8, 0, "2:4").bfloat16(), torch.randn(3, 8).bfloat16()
    y = layer(x)
    for shift in range(1, 4):
        room = torch.zeros(48 + shift, dtype=torch.bfloat16)
        room[shift:] = layer.values.data
        layer.values.data = room[shift:]
        assert torch.equal(layer(x), y)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_torch_compile_without_a_break(backend, pattern):
    torch._dynamo.reset()
    layer = layer_of(12, 8, 2, pattern)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for shape in [(3, 8), (2, 5, 8)]:
        x = torch.randn(shape)
        assert torch.allclose(compiled(x), layer(x), atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(compiled(x), layer(x), atol=1e-6)
    compiled(x).square().sum().backward()
    by_compiled, layer.values.grad = layer.values.grad, None
    layer(x).square().sum().backward()
    assert torch.allclose(layer.values.grad, by_compiled, atol=1e-4)


def test_operators_are_well_formed():
    layer = layer_of(12, 8, 0, "2:4")
    x = torch.randn(3, 8, requires_grad=True)
    arguments = (x, layer.values, layer.bitmask, layer.bias, 12, True)
    torch.library.opcheck(torch.ops.slr.sparse_linear.default, arguments)
    torch.library.opcheck(torch.ops.slr.dense.default, (*arguments[1:3], 12, 8, True))


def test_on_meta_only_shapes():
    layer = slr.SLRLinear.placeholder((12, 8), 2, 48, True, torch.bfloat16, pattern="2:4")
    assert layer(torch.empty(3, 8, dtype=torch.bfloat16, device="meta")).shape == (3, 12)
    assert layer.weight.shape == (12, 8)


def test_a_kept_weight_may_be_zero():
    S = torch.tensor([[0.0, 0.0, 3.0, 0.0], [1.0, 0.0, 2.0, 0.0]])
    layer = slr.SLRLinear(S, pattern="2:4")
    assert layer.two_four
    assert torch.equal(layer.weight, S)
    assert not slr.SLRLinear(S).two_four


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        ((W, torch.ones(12, 2), torch.ones(3, 8)), {}, "(12, 2) and A (3, 8)"),
        ((W, None, None, torch.ones(8)), {}, "bias has shape (8,)"),
        ((W,), {"mask": MASK}, "not zero off the mask"),
        ((W,), {"mask": MASK.T}, "(8, 12)"),
        ((W,), {"pattern": "2:4"}, "not zero off the mask"),
        ((W,), {"mask": W != 0, "pattern": "2:4"}, "row 0, columns 0 to 3: 4 weights are kept"),
        ((W[:, :6],), {"mask": W[:, :6] != 0, "pattern": "2:4"}, "columns divisible by 4"),
    ],
)
def test_bad_input_is_named(arguments, options, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        slr.SLRLinear(*arguments, **options)


def test_input_that_does_not_fit_is_named():
    layer = layer_of(12, 8, 2, "2:4")
    with pytest.raises(ValueError, match=re.escape("x has shape (3, 7)")):
        layer(torch.randn(3, 7))
    with pytest.raises(ValueError, match=r"x has dtype torch\.bfloat16, but the layer torch\.fl"):
        layer(torch.randn(3, 8).bfloat16())


def test_a_dense_layer_becomes_a_compressed_one():
    linear = torch.nn.Linear(64, 48)
    before = linear.weight.clone()
    layer = slr.SLRLinear.from_linear(linear, pattern="2:4", rank=3)
    mask = slr.prune(linear.weight, "magnitude", "2:4").mask
    expected = slr.refine(linear.weight, mask, 3)
    assert torch.equal(layer.dense(), expected.sparse + expected.B @ expected.A)
    assert torch.equal(layer.bias, linear.bias)
    assert torch.equal(linear.weight, before)
    x = torch.randn(100, 64) * torch.rand(64)
    with slr.observe({"only": linear}, slr.GramStatistic) as seen:
        linear(x)
    better = slr.SLRLinear.from_linear(
        linear, prune="wanda", refine="activations", rank=3, statistic=seen["only"]
    )
    gram = slr.Gram(seen["only"].gram())
    assert gram.error(before - better.dense()) < gram.error(before - layer.dense())
    for options, says in (
        ({"prune": "wanda"}, "'wanda' needs a NormStatistic of the layer's inputs"),
        ({"refine": "eora"}, "'eora' needs a GramStatistic"),
        ({"refine": "none", "rank": 2}, "rank=2 has no effect"),
    ):
        with pytest.raises(ValueError, match=says):
            slr.SLRLinear.from_linear(linear, **options)


def _layer(bias=None, dtype=torch.float32, like=torch.float32):
    gen = torch.Generator().manual_seed(0)
    S, B, A = (torch.randn(s, generator=gen) for s in ((8, 16), (8, 2), (2, 16)))
    S = S * (S.abs() > 0.5)
    return slr.SLRLinear(S.to(dtype), B.to(like), A.to(like), bias)


@pytest.mark.parametrize(
    ("dtype", "like", "bias"),
    [
        (torch.bfloat16, torch.float32, None),
        (torch.float32, torch.bfloat16, None),
        (torch.bfloat16, torch.bfloat16, torch.float32),
    ],
)
def test_parts_of_another_dtype_are_refused_and_never_read_as_they_are_not(dtype, like, bias):
    bias = None if bias is None else torch.zeros(8, dtype=bias)
    with pytest.raises(ValueError, match="all parts of a layer must be alike"):
        _layer(bias, dtype, like)


def test_parts_that_change_their_dtype_later_are_an_error_too():
    layer = _layer()
    state = {k: v.bfloat16() if k in "BA" else v for k, v in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match="all parts of a layer must be alike"):
        layer.load_state_dict(state, assign=True)
    layer = _layer(torch.zeros(8))
    for part in (layer.B, layer.bias):
        was, part.data = part.data, part.data.bfloat16()
        with torch.no_grad(), pytest.raises((RuntimeError, ValueError), match=r"dtype|but a part"):
            layer(torch.randn(1, 16))
        part.data = was
    assert layer(torch.randn(1, 16)).isfinite().all()


def test_a_bias_that_is_not_contiguous():
    bias = torch.arange(16.0)[::2]
    layer, x = _layer(bias), torch.ones(1, 16)
    with torch.no_grad():
        assert torch.allclose(layer(x), linear(x, layer.dense(), bias), rtol=1e-4, atol=1e-4)
        layer.bias.data = bias + 1
        layer.bias.data = torch.stack([bias + 1, bias], 1)[:, 0]
        assert not layer.bias.is_contiguous()
        assert torch.allclose(layer(x), linear(x, layer.dense(), bias + 1), rtol=1e-4, atol=1e-4)
