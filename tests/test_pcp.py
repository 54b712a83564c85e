import re

import pytest
import torch
from helpers import realistic

import slr
from slr.matrix.pcp import pcp_repair, pursue


def planted(n=60, rank=3, share=0.1, seed=0):
    g = torch.Generator().manual_seed(seed)
    low = torch.randn(n, rank, generator=g).double() @ torch.randn(rank, n, generator=g).double()
    where = torch.rand(n, n, generator=g) < share
    return low, where * 10 * torch.randn(n, n, generator=g).double()


def test_recovers_a_planted_sum():
    low, sparse = planted(200, 10)
    found = pursue(low + sparse)
    assert (found.low - low).norm() <= 1e-6 * low.norm()
    assert (found.sparse - sparse).norm() <= 1e-6 * sparse.norm()


def test_with_a_mask_only_kept_entries_differ():
    low, sparse = planted()
    mask = sparse != 0
    found = pursue(low + sparse, mask)
    assert not found.sparse[~mask].any()
    assert (found.low - low).norm() <= 1e-5 * low.norm()


def test_repair_is_a_baseline():
    W = realistic(48, 40)
    mask = slr.prune(W, "magnitude", "0.5").mask
    repaired = pcp_repair(W, mask, 4)
    assert not repaired.sparse[~mask].any()
    assert repaired.error == pytest.approx(float((W - repaired.dense()).norm()), rel=1e-4)
    assert slr.refine(W, mask, 4).error < repaired.error


def test_says_so_when_it_did_not_converge():
    with pytest.warns(RuntimeWarning, match="stopped after 2 iterations"):
        pursue(sum(planted()), iterations=2)
    assert pursue(torch.zeros(3, 4)).iterations == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"balance": 0}, "balance 0"),
        ({"tolerance": 0}, "tolerance 0"),
        ({"iterations": 0}, "iterations is 0"),
        ({"mask": torch.ones(2, 2).bool()}, "(2, 2)"),
    ],
)
def test_bad_input_is_named(options, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        pursue(torch.ones(3, 3), **options)
