import itertools
import re
import warnings

import pytest
import torch
from helpers import activations, realistic, sparsegpt_slowly
from hypothesis import given
from hypothesis import strategies as st

import slr
from slr.matrix.gram import masked_least_squares
from slr.matrix.metric import Diagonal, Gram, Identity, definite

W = realistic(24, 32)
X = activations(400, 32)
H = X.T @ X / 400
MASK = slr.prune(W, "magnitude", "2:4").mask


def output_error(weight, refined):
    return float((X @ (weight - refined.dense()).T).norm()) / 400**0.5


@given(seed=st.integers(0, 30), m=st.integers(1, 12), groups=st.integers(1, 6))
def test_sparsegpt_is_the_literal_algorithm(seed, m, groups):
    weight, x = realistic(m, 4 * groups, seed), activations(100, 4 * groups, seed)
    gram = x.T @ x / 100
    mask, updated, clear = sparsegpt_slowly(weight, gram, 2, 4)
    ours = slr.prune(weight, "sparsegpt", "2:4", gram=gram)
    assert slr.patterns.parse("2:4").verify(ours.mask)
    assert torch.equal(ours.mask[clear], mask[clear])
    assert torch.allclose(
        ours.weight.double()[clear], updated[clear], atol=1e-3 * float(weight.abs().max())
    )


@pytest.mark.parametrize("pattern", ["2:4", "0.5", "0.7", "4:8"])
def test_sparsegpt_blocks_counts_and_gain(pattern, monkeypatch):
    import sys

    monkeypatch.setattr(sys.modules["slr.matrix.pruning"], "BLOCK", 8)
    mask, updated = slr.prune(W, "sparsegpt", pattern, gram=H)
    kept = slr.patterns.parse(pattern, None if ":" in pattern else "matrix")
    assert kept.verify(mask)
    assert not updated[~mask].any()
    plain = slr.prune(W, "wanda", pattern, activation_norm=H.diagonal().sqrt()).weight
    assert Gram(H).error(W - updated) < Gram(H).error(W - plain)


def test_sparsegpt_with_dead_inputs():
    dead = H.clone()
    dead[3], dead[:, 3] = 0, 0
    mask, updated = slr.prune(W, "sparsegpt", "0.5", gram=dead)
    assert updated.isfinite().all()
    assert not updated[:, 3].any()
    assert mask.sum() == W.numel() // 2


def test_eora_is_the_best_repair_of_its_rank():
    repaired = slr.svd_repair(W, MASK, 4, Gram(H, damping=1e-6))
    assert torch.equal(repaired.sparse, W * MASK)
    eigenvalues = torch.linalg.svdvals((W - W * MASK).double() @ torch.linalg.cholesky(H.double()))
    assert repaired.error == pytest.approx(float(eigenvalues[4:].norm()), rel=1e-3)
    assert repaired.error < output_error(W, slr.svd_repair(W, MASK, 4))


def test_masked_least_squares_solves_each_row():
    target = realistic(5, 32, seed=3)
    mask = torch.rand(5, 32) < 0.5
    gram = (H + 0.1 * torch.eye(32)).double()
    S = masked_least_squares(target.double(), mask, gram, torch.zeros(5, 32).double(), 60)
    for i in range(5):
        p = mask[i]
        exact = torch.linalg.solve(gram[p][:, p], gram[p] @ target[i].double())
        assert torch.allclose(S[i, p], exact, atol=1e-6)
    assert not S[~mask].any()


@given(
    m=st.integers(2, 20),
    groups=st.integers(2, 6),
    seed=st.integers(0, 50),
    kind=st.sampled_from(["full", "rank one", "zero rows", "constant"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_gram_refinement_invariants(m, groups, seed, kind, dtype):
    n = 4 * groups
    weight, x = realistic(m, n, seed), activations(200, n, seed)
    if kind == "rank one":
        weight = weight[:, :1] @ weight[:1]
    elif kind == "zero rows":
        weight[::2] = 0
    elif kind == "constant":
        weight = torch.ones_like(weight)
    weight = weight.to(dtype)
    before, metric = weight.clone(), Gram(x.T @ x / 200)
    mask = slr.prune(weight, "magnitude", "2:4").mask
    rank = 1 + seed % min(m, n)
    refined = slr.refine(weight, mask, rank, iterations=6, metric=metric)
    again = slr.refine(weight, mask, rank, iterations=6, metric=metric)
    assert torch.equal(weight, before)
    assert not refined.sparse[~mask].any()
    assert torch.equal(refined.dense(), again.dense())
    assert refined.A.dtype == dtype
    errors = [step.error for step in refined.trace[:-1]]
    size = metric.error(weight)
    for one, two in itertools.pairwise(errors):
        assert two <= one * (1 + 1e-3) + 1e-3 * size
    pruned = metric.error(weight * ~mask)
    assert refined.error <= pruned * (1 + 1e-3) + 1e-3 * size


def test_gram_beats_its_halves_and_the_data_free():
    metric = Gram(H)
    refined = slr.refine(W, MASK, 4, metric=metric)
    rivals = {
        "paper": slr.refine(W, MASK, 4),
        "EoRA": slr.svd_repair(W, MASK, 4, metric),
        "diagonal": slr.refine(W, MASK, 4, metric=Diagonal(H.diagonal().sqrt())),
    }
    mask, moved = slr.prune(W, "sparsegpt", "2:4", gram=H)
    rivals["SparseGPT + SVD"] = slr.svd_repair(W, mask, 4, sparse=moved)
    for name, rival in rivals.items():
        assert output_error(W, refined) < output_error(W, rival), name


@pytest.mark.parametrize("pattern", ["2:4", "0.6"])
def test_choosing_the_mask_anew_helps(pattern):
    start = slr.prune(W, "magnitude", pattern).mask
    fixed = slr.refine(W, start, 4, metric=Gram(H))
    before = start.clone()
    moved = slr.refine(W, start, 4, metric=Gram(H), update_mask=pattern)
    assert torch.equal(start, before)
    assert torch.equal(fixed.mask, start)
    assert not torch.equal(moved.mask, start)
    assert slr.patterns.parse(pattern).verify(moved.mask)
    assert not moved.sparse[~moved.mask].any()
    assert moved.error < fixed.error
    with pytest.raises(ValueError, match="update_mask needs"):
        slr.refine(W, start, 4, update_mask=pattern)


def test_an_indefinite_gram_is_refused():
    bad = H.clone()
    bad[0, 1] = bad[1, 0] = 10 * float(H.diagonal().max())
    for call in (slr.refine, slr.svd_repair):
        with pytest.raises(ValueError, match="gram is indefinite"):
            call(W, MASK, 3, metric=Gram(bad))


def test_diagonal_is_the_paper_on_scaled_columns():
    d = torch.rand(32) + 0.1
    ours = slr.refine(W, MASK, 4, metric=Diagonal(d), solver="exact")
    scaled = slr.refine(W * d, MASK, 4, solver="exact")
    assert torch.allclose(ours.dense() * d, scaled.dense(), atol=1e-5)
    assert ours.error == pytest.approx(scaled.error, rel=1e-4)
    assert Diagonal(d).error(W - ours.dense()) < Diagonal(d).error(
        W - slr.refine(W, MASK, 4, solver="exact").dense()
    )


def test_silent_channels_keep_their_weights():
    d = torch.rand(32) + 0.1
    d[5] = 0
    refined = slr.refine(W, MASK, 4, metric=Diagonal(d))
    assert torch.equal(refined.sparse[:, 5], (W * MASK)[:, 5])
    assert not refined.A[:, 5].any()


def test_a_stack_is_refined_like_its_matrices():
    stack = torch.stack([realistic(24, 32, seed) for seed in range(3)])
    masks = torch.stack([slr.prune(w, "magnitude", "2:4").mask for w in stack])
    for schedule in ("paper", "accelerated"):
        both = slr.refine(stack, masks, 4, schedule=schedule)
        assert both.sparse.shape == (3, 24, 32)
        assert both.B.shape == (3, 24, 4)
        squares = 0.0
        for i in range(3):
            one = slr.refine(stack[i], masks[i], 4, schedule=schedule)
            error = (stack[i] - both.dense()[i]).norm()
            # Other random starts; momentum makes a little more of them.
            assert abs(float(error) / one.error - 1) < 1e-2
            squares += one.error**2
        assert both.error == pytest.approx(squares**0.5, rel=1e-2)


def test_early_stop():
    long = slr.refine(W, MASK, 4, schedule="accelerated", iterations=200)
    short = slr.refine(W, MASK, 4, schedule="accelerated", iterations=200, tolerance=1e-4)
    assert len(short.trace) < len(long.trace) == 201
    assert short.error < 1.03 * long.error
    gram = slr.refine(W, MASK, 4, metric=Gram(H), iterations=200, tolerance=1e-3)
    assert len(gram.trace) < 150


def test_equivariance():
    """Scaling W scales the answer; permuting rows, or columns with their mask, permutes it."""
    base = slr.refine(W, MASK, 4, solver="exact").dense()
    assert torch.allclose(
        slr.refine(8 * W, MASK, 4, solver="exact").dense(), 8 * base, rtol=1e-3, atol=1e-4
    )
    rows, columns = torch.randperm(24), torch.randperm(32)
    moved = slr.refine(W[rows][:, columns], MASK[rows][:, columns], 4, solver="exact").dense()
    assert torch.allclose(moved, base[rows][:, columns], rtol=1e-3, atol=1e-4)


def test_cholesky_damps_with_a_warning_and_fails_honestly():
    spoiled = torch.diag(torch.tensor([1.0, 1.0, -1e-3]))
    with pytest.warns(RuntimeWarning, match="not positive definite"):
        assert definite(spoiled)[1].isfinite().all()
    with pytest.raises(ValueError, match="indefinite"):
        definite(torch.diag(torch.tensor([1.0, -5.0])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.allclose(definite(4 * torch.eye(2))[1], 2 * torch.eye(2))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Gram(H[:3]), "gram has shape (3, 32)"),
        (lambda: Gram(-H), "non-negative diagonal"),
        (lambda: Gram(0 * H), "not all zero"),
        (lambda: Gram(H / 0), "non-finite"),
        (lambda: Gram(torch.triu(H)), "not symmetric"),
        (lambda: Gram(H, damping=0), "damping is 0"),
        (lambda: Diagonal(H), "scale has shape"),
        (lambda: Diagonal(-torch.ones(32)), "non-negative"),
        (lambda: Diagonal(torch.zeros(32)), "not all zero"),
        (lambda: slr.refine(W, MASK, 4, metric=Gram(H[:8, :8])), "gram is 8 wide"),
        (lambda: slr.refine(W, MASK, 4, metric=Diagonal(torch.ones(8))), "scale has 8"),
        (lambda: slr.refine(W[None], MASK[None], 4, metric=Gram(H)), "weight is a stack"),
        (lambda: slr.refine(W, MASK, 4, tolerance=-1), "tolerance is -1"),
        (lambda: slr.prune(W, "sparsegpt", "2:4"), "needs gram"),
        (lambda: slr.prune(W, "sparsegpt", "2:4", gram=H[:8, :8]), "gram is 8 wide"),
        (lambda: slr.prune(W, "sparsegpt", "2:6", gram=H), "divisible by 6"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        call()


def test_a_metric_must_be_a_metric():
    with pytest.raises(TypeError, match="metric is 'gram'"):
        slr.refine(W, MASK, 4, metric="gram")
    assert Identity().error(torch.ones(2, 2)) == 2
