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
