import sys

import pytest
import torch
from helpers import realistic
from hypothesis import given
from hypothesis import strategies as st

import slr
from slr.matrix.filled import Filled, FullSVD, Subspace, fast_bfloat16, keep_, row_blocks

W = realistic(48, 40)
MASK = slr.prune(W, "magnitude", "0.5").mask
NONE = torch.ones(())
HALF = torch.bfloat16


def literal(weight, mask, fill, scale=NONE):
    inside = torch.zeros_like(weight) if fill is None else fill[0] @ fill[1]
    return torch.where(mask, inside, weight * scale)


@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    scaled=st.booleans(),
    filled=st.booleans(),
    stack=st.sampled_from([(), (3,)]),
)
def test_blocks_are_the_filled_in_matrix(m, n, seed, dtype, scaled, filled, stack):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(*stack, m, n, generator=g).to(dtype)
    mask = torch.rand(*stack, m, n, generator=g) < 0.5
    scale = torch.rand(n, generator=g) if scaled else NONE
    fill = (torch.randn(*stack, m, 2, generator=g), torch.randn(*stack, 2, n, generator=g))
    work = torch.float64 if dtype == torch.float64 else torch.float32
    fill = tuple(f.to(work) for f in fill) if filled else None
    L = Filled(weight, mask, scale.to(work) if scaled else scale, work).dense(fill)
    expected = literal(weight.to(work), mask, fill, scale.to(work))
    assert torch.equal(L[~mask], expected[~mask])  # bit for bit
    assert torch.allclose(L, expected, rtol=1e-5, atol=1e-5)  # fills of size 10 may cancel


def test_row_blocks_cover_every_row_once(monkeypatch):
    monkeypatch.setattr(sys.modules["slr.matrix.filled"], "BLOCK", {"cpu": 17 * 40})
    blocks = row_blocks(W)
    assert [row for rows in blocks for row in range(48)[rows]] == list(range(48))
    assert len(blocks) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, HALF])
def test_keep_leaves_plain_zeros_off_the_mask(dtype):
    values = -W.to(dtype)
    kept = keep_(values.clone(), MASK)
    assert torch.equal(kept[MASK], values[MASK])
    assert not kept[~MASK].any()
    assert not kept[~MASK].signbit().any()


def test_bfloat16_search_finds_what_float32_does():
    weight = realistic(256, 192)
    mask = slr.prune(weight, "magnitude", "2:4").mask
    for schedule in ("paper", "accelerated"):
        single, half = (
            slr.refine(weight, mask, 8, schedule=schedule, search_dtype=dtype)
            for dtype in (torch.float32, HALF)
        )
        assert half.error == pytest.approx(single.error, rel=3e-4)
        assert not torch.equal(half.B, single.B)
        last = half.trace[-2].error
        assert last == pytest.approx(single.trace[-2].error, rel=5e-3)


def test_bfloat16_search_does_not_bound_the_accuracy():
    """Where S + B A can be exact, rounding of 2^-9 in the search must not remain."""
    g = torch.Generator().manual_seed(0)
    low = torch.randn(96, 2, generator=g) @ torch.randn(2, 80, generator=g)
    mask = torch.rand(96, 80, generator=g) < 0.3
    weight = low + mask * torch.randn(96, 80, generator=g)
    refined = slr.refine(weight, mask, 2, iterations=300, schedule="accelerated", search_dtype=HALF)
    assert refined.error < 1e-4 * float(weight.norm())


def test_bfloat16_is_chosen_for_large_matrices_on_fast_processors_only(monkeypatch):
    module = sys.modules["slr.matrix.filled"]
    for fast in (True, False):
        monkeypatch.setattr(module, "fast_bfloat16", lambda device, fast=fast: fast)
        for large in (1 << 20, 1024):
            monkeypatch.setattr(module, "LARGE", large)
            for dtype in (torch.float32, torch.float64):
                whole = Filled(W.to(dtype), MASK, NONE, dtype)
                chosen = Subspace(whole, 2, torch.Generator()).filled.dtype
                goes = fast and large == 1024 and dtype == torch.float32
                assert chosen == (HALF if goes else dtype)
    assert fast_bfloat16(torch.device("cpu")) == bool(torch.cpu.get_capabilities().get("amx_bf16"))


def test_both_solvers_know_the_tail():
    whole = Filled(W, MASK, NONE, torch.float32)
    exact = torch.linalg.svdvals(literal(W, MASK, None).double())[3:].norm()
    assert FullSVD(whole, 3)(None, 3)[1] == pytest.approx(float(exact), rel=1e-5)
    fast = Subspace(whole, 30, torch.Generator().manual_seed(0))
    assert fast(None, 3)[1] == pytest.approx(float(exact), rel=1e-3)
