import re

import numpy as np
import pytest
import torch
from helpers import select_slowly
from hypothesis import given
from hypothesis import strategies as st

from slr.matrix.patterns import NM, Unstructured, parse


@given(
    rows=st.integers(1, 6),
    groups=st.integers(1, 5),
    nm=st.sampled_from([(1, 2), (2, 4), (1, 4), (4, 8), (3, 5)]),
    levels=st.integers(1, 4),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_nm_equals_sorting_each_group(rows, groups, nm, levels, seed, dtype):
    n, m = nm
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (rows, groups * m), generator=g).to(dtype)  # many ties
    mask = NM(n, m).select(scores)
    assert torch.equal(mask, select_slowly(scores, n, m))
    assert NM(n, m).verify(mask)


@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 30),
    percent=st.integers(0, 99),
    group=st.sampled_from(["row", "matrix"]),
    seed=st.integers(0, 99),
)
def test_unstructured_prunes_exactly_the_smallest(rows, columns, percent, group, seed):
    pattern = Unstructured(percent / 100, group)
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(5, (rows, columns), generator=g).float()
    mask = pattern.select(scores)
    assert pattern.verify(mask)
    flat, kept = (scores, mask) if group == "row" else (scores.view(1, -1), mask.view(1, -1))
    for row, keep in zip(flat, kept, strict=True):
        assert int((~keep).sum()) == percent * flat.shape[1] // 100
        if keep.any() and not keep.all():
            assert row[keep].min() >= row[~keep].max()


def test_ties_fall_by_position():
    same = torch.ones(1, 8)
    assert NM(2, 4).select(same).int().tolist() == [[0, 0, 1, 1, 0, 0, 1, 1]]
    assert Unstructured(0.5).select(same).int().tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]


def test_verify_sees_one_wrong_entry():
    for pattern in (NM(2, 4), Unstructured(0.5), Unstructured(0.5, "matrix")):
        mask = pattern.select(torch.rand(4, 8))
        mask[0, 0] = ~mask[0, 0]
        assert not pattern.verify(mask)


def test_parse_gives_patterns_back():
    assert parse(NM(1, 4)) == NM(1, 4)
    assert parse(0.25) == Unstructured(0.25)
    assert parse(" 4:8 ") == NM(4, 8)
    assert str(parse("0.5", "matrix")) == "0.5 by matrix"


@pytest.mark.parametrize("name", ["1.0", "1.0 by matrix"])
def test_a_pattern_may_keep_nothing(name):
    mask = parse(name).select(torch.randn(5, 7))
    assert mask.shape == (5, 7)
    assert not mask.any()
    assert parse(name).verify(mask)
    assert not parse(name).verify(~mask)
    assert str(parse(name)) == name


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: parse("3:2"), "3:2 would keep 3 of every 2"),
        (lambda: parse("0:4"), "0:4"),
        (lambda: parse("4:4"), "4:4"),
        (lambda: parse("half"), "'half' is neither"),
        (lambda: parse("1.1"), "sparsity is 1.1"),
        (lambda: parse("-0.1"), "sparsity is -0.1"),
        (lambda: parse("nan"), "sparsity is nan"),
        (lambda: parse("0.5", "column"), "group is 'column'"),
        (lambda: NM(2, 4).select(torch.zeros(2, 6)), "divisible by 4, but there are 6"),
        (lambda: NM(2, 4).select(torch.zeros(8)), "shape (8,)"),
        (lambda: Unstructured(0.5).select(torch.full((2, 2), torch.nan)), "4 non-finite"),
    ],
)
def test_bad_patterns_are_named(call, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        call()


def test_a_name_is_read_to_its_end_and_a_number_is_plain():
    with pytest.raises(ValueError, match="neither n:m"):
        parse("0.5 by matrixfoo")
    assert parse("0.5 by matrix") == Unstructured(0.5, "matrix")
    assert str(Unstructured(np.float64(0.5))) == "0.5"
