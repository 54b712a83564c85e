import copy
import re

import pytest
import torch
from helpers import realistic

import slr

W = realistic(12, 8)
MASK = slr.prune(W, "magnitude", "2:4").mask


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (0, 8)])
def test_equals_the_dense_product(shape):
    layer = slr.SLRLinear.from_refined(slr.refine(W, MASK, 3), torch.randn(12))
    x = torch.randn(shape)
    assert torch.allclose(layer(x), x @ layer.dense().T + layer.bias, atol=1e-5)


def test_rank_zero_is_the_pruned_layer():
    layer = slr.SLRLinear(W * MASK)
    x = torch.randn(5, 8)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, W * MASK))
    assert layer.rank == 0


def test_copies_casts_and_state():
    layer = slr.SLRLinear.from_refined(slr.refine(W, MASK, 3), pattern="2:4")
    twin = copy.deepcopy(layer).to(torch.bfloat16)
    assert twin.A.dtype == torch.bfloat16
    assert twin.mask.dtype == torch.bool
    assert set(layer.state_dict()) == {"weight", "A", "B"}
    assert "pattern=2:4, rank=3" in repr(layer)
    assert (layer.in_features, layer.out_features) == (8, 12)


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        ((W, torch.ones(12, 2), torch.ones(3, 8)), {}, "(12, 2) and A (3, 8)"),
        ((W, None, None, torch.ones(8)), {}, "bias has shape (8,)"),
        ((W,), {"mask": MASK}, "not zero off the mask"),
        ((W,), {"mask": MASK.T}, "(8, 12)"),
    ],
)
def test_bad_input_is_named(arguments, options, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        slr.SLRLinear(*arguments, **options)
