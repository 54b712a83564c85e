import re

import pytest
import torch
from helpers import realistic

import slr
from slr.matrix.pruning import METHODS

W = realistic(16, 24)
NORM = torch.rand(24, generator=torch.Generator().manual_seed(0)) + 0.1


@pytest.mark.parametrize("method", [m for m in METHODS if m != "sparsegpt"])
@pytest.mark.parametrize("pattern", ["2:4", "0.5", "0.7"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kept_weights_are_untouched(method, pattern, dtype):
    weight = W.to(dtype)
    before = weight.clone()
    mask, kept = slr.prune(weight, method, pattern, activation_norm=NORM)
    assert torch.equal(weight, before)
    assert torch.equal(kept[mask], weight[mask])
    assert not kept[~mask].any()
    assert kept.dtype == dtype
    assert slr.patterns.parse(pattern).verify(mask)


def test_wanda_is_magnitude_after_scaling_the_columns():
    scaled = slr.prune(W * NORM, "magnitude", "0.5").mask
    assert torch.equal(slr.prune(W, "wanda", "0.5", activation_norm=NORM).mask, scaled)
    assert not torch.equal(slr.prune(W, "magnitude", "0.5").mask, scaled)


def test_magnitude_by_matrix_uses_one_threshold():
    pattern = slr.patterns.parse("0.5", "matrix")
    mask, _ = slr.prune(W, "magnitude", pattern)
    assert W.abs()[mask].min() >= W.abs()[~mask].max()
    assert len(mask.sum(1).unique()) > 1  # rows differ


def test_random_follows_the_generator():
    masks = [
        slr.prune(W, "random", "0.5", generator=torch.Generator().manual_seed(s)).mask
        for s in (1, 1, 2)
    ]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "says"),
    [
        ((W, "best", "2:4"), {}, ValueError, "'best' is unknown"),
        ((W, "magnitude", "5:4"), {}, ValueError, "5:4"),
        ((W[:, :22], "magnitude", "2:4"), {}, ValueError, "there are 22"),
        ((W * torch.inf, "magnitude", "2:4"), {}, ValueError, "non-finite"),
        ((W[0], "magnitude", "2:4"), {}, ValueError, "shape (24,)"),
        ((W.int(), "magnitude", "2:4"), {}, TypeError, "int32"),
        ((W.tolist(), "magnitude", "2:4"), {}, TypeError, "list"),
        ((W, "wanda", "2:4"), {}, ValueError, "needs activation_norm"),
        ((W, "wanda", "2:4"), {"activation_norm": NORM[1:]}, ValueError, "shape (23,)"),
        ((W, "wanda", "2:4"), {"activation_norm": -NORM}, ValueError, "non-negative"),
        ((W, "wanda", "2:4"), {"activation_norm": 0 * NORM}, ValueError, "all zero"),
        ((W, "wanda", "2:4"), {"activation_norm": NORM / 0}, ValueError, "non-finite"),
    ],
)
def test_bad_input_is_named(arguments, options, error, says):
    with pytest.raises(error, match=re.escape(says)):
        slr.prune(*arguments, **options)


def test_float64_is_compared_in_float64():
    tiny = torch.tensor([[4e-50, 3e-50, 2e-50, 1e-50]], dtype=torch.float64)
    near = torch.tensor([[1 + 3e-9, 1 + 2e-9, 1 + 1e-9, 1]], dtype=torch.float64)
    for weight in (tiny, near):
        for method in ("magnitude", "wanda"):
            kept = slr.prune(weight, method, "2:4", activation_norm=torch.ones(4)).mask
            assert kept.tolist() == [[True, True, False, False]]
    large = torch.tensor([[1e300, 1e200, 3e300, 2e300]], dtype=torch.float64)
    kept = slr.prune(large, "sparsegpt", "2:4", gram=torch.eye(4))
    assert kept.mask.tolist() == [[False, False, True, True]]
    assert torch.allclose(kept.weight[kept.mask], large[kept.mask])


@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_sparsegpt_is_the_same_in_any_unit_of_the_inputs(unit):
    gen = torch.Generator().manual_seed(0)
    W, X = torch.randn(16, 16, generator=gen), torch.randn(16, 64, generator=gen)
    X[3] = 0  # an input that is never there
    one, other = (slr.prune(W, "sparsegpt", "2:4", gram=X @ X.T * u) for u in (1.0, unit))
    assert torch.equal(one.mask, other.mask)
    assert torch.allclose(one.weight, other.weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda W: slr.prune(W.to(torch.float8_e4m3fn), "magnitude", "2:4"), "of 16 bits or more"),
        (lambda W: slr.prune(W, "wanda", "2:4", activation_norm=[1.0] * 4), "is a list"),
        (lambda W: slr.Diagonal([1.0, 2.0]), "scale is a list; it must be a torch.Tensor"),
        (lambda W: slr.Gram([[1.0]]), "gram is a list; it must be a torch.Tensor"),
        (lambda W: slr.Gram(torch.eye(2), damping="1"), "damping is '1'; it must be a number"),
        (lambda W: slr.svd_repair(W, None, 1), "mask is NoneType; it must be a boolean tensor"),
        (lambda W: slr.Unstructured("0.5"), "sparsity is '0.5'; it must be a number"),
        (lambda W: slr.NM(1.5, 4), "n is 1.5; it must be an integer"),
        (lambda W: slr.Recipe(rank_ratio="4"), "rank_ratio is '4'; it must be a number"),
        (lambda W: slr.Recipe(tolerance="4"), "tolerance is '4'; it must be a number"),
    ],
)
def test_another_type_is_named(call, says):
    with pytest.raises(TypeError, match=re.escape(says)):
        call(torch.ones(4, 4))
