import importlib
import itertools
import re

import pytest
import torch
from helpers import algorithm_1, constant_rank, realistic
from hypothesis import given
from hypothesis import strategies as st

import slr
from slr.matrix.filled import Subspace
from slr.matrix.lowrank import ritz, truncated_svd
from slr.matrix.refinement import SCHEDULES, SOLVERS, ramp

SHAPES = [(64, 64), (96, 48), (48, 96)]


def error(weight, refined):
    return float((weight.double() - refined.dense().double()).norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pattern", ["2:4", "0.5", "0.7"])
def test_exact_is_the_literal_algorithm(shape, pattern):
    W = realistic(*shape, dtype=torch.float64)
    mask = slr.prune(W, "magnitude", pattern).mask
    S, B, A = algorithm_1(W, mask, k=5, T=20)
    ours = slr.refine(W, mask, 5, iterations=20, solver="exact")
    assert (ours.sparse - S).norm() <= 1e-9 * S.norm()
    assert (ours.B @ ours.A - B @ A).norm() <= 1e-9 * (B @ A).norm()
    # In float32 the rounding of 20 SVDs stands between the two, whoever makes them.
    single = slr.refine(W.float(), mask, 5, iterations=20, solver="exact")
    assert (single.sparse - S).norm() <= 1e-4 * S.norm()
    assert single.error == pytest.approx(float((W - S - B @ A).norm()), rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pattern", ["2:4", "0.5", "0.7"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_fast_reaches_the_exact_error(shape, pattern, schedule):
    W = realistic(*shape)
    mask = slr.prune(W, "magnitude", pattern).mask
    exact, fast = (slr.refine(W, mask, 4, solver=s, schedule=schedule) for s in ("exact", "fast"))
    assert error(W, fast) <= 1.001 * error(W, exact)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pattern", ["2:4", "0.7"])
def test_constant_is_the_literal_iteration_and_monotone(shape, pattern):
    W = realistic(*shape)
    mask = slr.prune(W, "magnitude", pattern).mask
    options = {"iterations": 40, "schedule": "constant", "solver": "exact"}
    ours = slr.refine(W, mask, 4, **options)
    S, low = constant_rank(W.double(), mask, k=4, T=40)
    assert (ours.sparse - S).norm() <= 1e-5 * S.norm()
    assert (ours.B @ ours.A - low).norm() <= 1e-5 * low.norm()
    assert ours.error == pytest.approx(float((W - S - low).norm()), rel=1e-5)
    assert ours.error == pytest.approx(float(((W - ours.B @ ours.A) * ~mask).norm()), rel=1e-5)
    trace = slr.refine(W.double(), mask, 4, **options).trace
    assert [step.rank for step in trace] == [4] * 41
    assert all(b.error <= a.error * (1 + 1e-12) for a, b in itertools.pairwise(trace))
    short = slr.refine(W.double(), mask, 4, **options, tolerance=1e-2).trace
    stop = len(short) - 1  # the first step that gains less than a hundredth is the last
    gains = [1 - b.error / a.error for a, b in itertools.pairwise(trace)]
    assert 2 < stop < 40
    assert gains[stop - 2] < 1e-2 <= min(gains[: stop - 2])
    assert [step.error for step in short[:-1]] == [step.error for step in trace[:stop]]


@pytest.mark.parametrize("k", [2, 4])
def test_the_ramp_falls_short_of_a_planted_optimum_and_the_others_do_not(k):
    g = torch.Generator().manual_seed(0)
    M = torch.randn(20, 20, k, generator=g).double() @ torch.randn(20, k, 20, generator=g).double()
    P = torch.rand(20, 20, 20, generator=g) > 0.9
    W = M + P * torch.randn(20, 20, 20, generator=g).double()
    size = M.flatten(1).norm(dim=1)
    solved = {}
    for schedule in SCHEDULES:
        refined = slr.refine(W, P, k, iterations=150, schedule=schedule, solver="exact")
        off = (refined.B @ refined.A - M).flatten(1).norm(dim=1)
        solved[schedule] = int((off < 1e-4 * size).sum())
    assert solved == {"paper": 0, "constant": 20, "accelerated": 20}


def test_by_hand():
    # Only 5 is kept.  [x, 2; 1, 4] has rank one when 4 x = 2 · 1, so S = 5 - 1/2 loses nothing.
    W = torch.tensor([[5.0, 2.0], [1.0, 4.0]], dtype=torch.float64)
    mask = torch.tensor([[True, False], [False, False]])
    for solver in SOLVERS:
        refined = slr.refine(W, mask, 1, iterations=200, solver=solver)
        assert error(W, refined) < 1e-6
        assert torch.allclose(refined.sparse, torch.tensor([[4.5, 0], [0, 0]]).double())


def test_a_saddle_holds_the_iteration():
    # Kept diagonal, [., 2; 3, .]: x y = 6 would be exact, but zeros are a fixed point.
    W = torch.tensor([[10.0, 2.0], [3.0, 10.0]], dtype=torch.float64)
    stuck = slr.refine(W, torch.eye(2).bool(), 1, iterations=200, solver="exact")
    assert error(W, stuck) == pytest.approx(2.0)


@given(
    m=st.integers(2, 20),
    groups=st.integers(1, 5),
    seed=st.integers(0, 50),
    solver=st.sampled_from(SOLVERS),
    schedule=st.sampled_from(SCHEDULES),
    kind=st.sampled_from(["full", "rank one", "zero rows", "constant", "zero"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_invariants(m, groups, seed, solver, schedule, kind, dtype):
    W = realistic(m, 4 * groups, seed)
    if kind == "rank one":
        W = W[:, :1] @ W[:1]
    elif kind == "zero rows":
        W[::2] = 0
    elif kind in ("constant", "zero"):
        W = torch.full_like(W, float(kind == "constant"))
    W = W.to(dtype)
    mask = slr.prune(W, "magnitude", "2:4").mask
    rank = 1 + seed % min(W.shape)
    before = W.clone()
    refined = slr.refine(W, mask, rank, iterations=8, solver=solver, schedule=schedule)
    again = slr.refine(W, mask, rank, iterations=8, solver=solver, schedule=schedule)
    assert torch.equal(W, before)
    assert not refined.sparse[~mask].any()
    assert refined.B.shape == (m, rank)
    assert refined.A.shape == (rank, 4 * groups)
    assert refined.sparse.dtype == refined.B.dtype == refined.A.dtype == dtype
    assert refined.dense().isfinite().all()
    assert torch.equal(refined.dense(), again.dense())
    assert len(refined.trace) >= 9  # more where it gave way to one SVD
    unit = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 1e-5)
    assert abs(refined.error - error(W, refined)) <= unit * float(W.double().norm())


def test_error_falls_while_the_rank_is_constant():
    W = realistic(48, 40, dtype=torch.float64)
    mask = slr.prune(W, "magnitude", "0.5").mask
    trace = slr.refine(W, mask, 3, iterations=100, solver="exact").trace
    for before, after in itertools.pairwise(trace):
        if before.rank == after.rank:
            assert after.error <= before.error * (1 + 1e-12)


def test_better_than_one_shot_and_accelerated_better_still():
    W = realistic(96, 128)
    mask = slr.prune(W, "magnitude", "2:4").mask
    svd = error(W, slr.svd_repair(W, mask, 8))
    paper = error(W, slr.refine(W, mask, 8))
    fast = error(W, slr.refine(W, mask, 8, schedule="accelerated"))
    assert fast <= paper < svd < float((W - W * mask).norm())


def test_the_mask_of_another_model_is_the_toolkits_reference_model():
    """Its loop starts at the other model's kept weights; ours at the reference's: one end."""
    reference = realistic(96, 128, seed=1, dtype=torch.float64)
    noise = torch.randn(96, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for tuned in (reference + 0.3 * reference.std() * noise, realistic(96, 128, 2, torch.float64)):
        mask = slr.prune(tuned, "magnitude", "0.5").mask
        S = tuned * mask
        for r in ramp(8, 50):
            U, sigma, Vh = torch.linalg.svd(reference - S, full_matrices=False)
            S = S + mask * ((U[:, r:] * sigma[r:]) @ Vh[r:])
        error = float(torch.linalg.svdvals(reference - S)[8:].norm())
        refined = slr.refine(reference, mask, 8, solver="exact")
        assert refined.error == pytest.approx(error, rel=1e-4)
        assert not refined.sparse[~mask].any()


def test_full_rank_is_exact():
    W = realistic(12, 8)
    mask = slr.prune(W, "magnitude", "2:4").mask
    assert error(W, slr.refine(W, mask, 8)) < 1e-5


def test_all_kept_and_all_pruned_are_defined():
    W = realistic(12, 8)
    everything = torch.ones_like(W, dtype=torch.bool)
    assert error(W, slr.refine(W, everything, 2)) < 1e-5
    nothing = slr.refine(W, ~everything, 2)
    best = truncated_svd(W, 2).factors()
    assert (nothing.dense() - best[0] @ best[1]).norm() < 1e-4


def test_a_kept_zero_stays_kept():
    W = realistic(16, 16)
    W[0, 0] = 0
    mask = torch.rand(16, 16) < 0.5
    mask[0, 0] = True
    assert slr.refine(W, mask, 2).sparse[0, 0] != 0


@given(
    m=st.integers(1, 40),
    n=st.integers(2, 40),
    seed=st.integers(0, 99),
    density=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    kind=st.sampled_from(["full", "rank one", "zero rows", "zero columns", "constant"]),
)
def test_no_exact_step_raises_the_error(m, n, seed, density, kind):
    """While the rank is constant, in the metric of the problem; and k = min(m, n) is exact."""
    W = realistic(m, n, seed, dtype=torch.float64)
    if kind == "rank one":
        W = W[:, :1] @ W[:1]
    elif kind == "zero rows":
        W[::2] = 0
    elif kind == "zero columns":
        W[:, ::2] = 0
    elif kind == "constant":
        W = torch.ones_like(W)
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(m, n, generator=g) < density
    size = float(W.norm())
    rank = 1 + seed % min(m, n)
    for metric in (None, slr.Diagonal(torch.rand(n, generator=g).double() + 0.1)):
        trace = slr.refine(W, mask, rank, iterations=30, solver="exact", metric=metric).trace
        for before, after in itertools.pairwise(trace):
            if before.rank == after.rank:
                assert after.error <= before.error * (1 + 1e-9) + 1e-7 * size
    full = min(m, n)
    for solver in SOLVERS:
        assert error(W, slr.refine(W, mask, full, iterations=5, solver=solver)) <= 1e-6 * size


def test_rows_all_kept_or_all_pruned_are_defined():
    W = realistic(24, 20)
    mask = slr.prune(W, "magnitude", "0.5").mask
    mask[3], mask[7] = True, False
    for metric in (None, slr.Diagonal(torch.ones(20)), slr.Gram(torch.eye(20))):
        refined = slr.refine(W, mask, 3, metric=metric)
        assert not refined.sparse[7].any()
        assert (W[3] - refined.dense()[3]).norm() < 0.02 * W[3].norm()  # S alone can match it
        assert refined.dense().isfinite().all()


def test_a_mask_on_another_device_is_named():
    with pytest.raises(ValueError, match="mask is on meta but weight on cpu"):
        slr.refine(torch.ones(4, 4), torch.ones(4, 4, device="meta").bool(), 1)


def test_row_blocks_do_not_change_the_answer(monkeypatch):
    import sys

    W = realistic(40, 32)
    mask = slr.prune(W, "magnitude", "2:4").mask
    whole = slr.refine(W, mask, 4)
    monkeypatch.setattr(sys.modules["slr.matrix.filled"], "BLOCK", {"cpu": 17 * 32})
    blocks = slr.refine(W, mask, 4)
    assert torch.allclose(whole.dense(), blocks.dense(), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    """In-dtype updates, as the authors' toolkit makes them, lose what float32 keeps."""
    W = realistic(64, 96, dtype=dtype)
    mask = slr.prune(W, "magnitude", "2:4").mask
    exact = algorithm_1(W.double(), mask, 4, 50)
    best = float((W.double() - exact[0] - exact[1] @ exact[2]).norm())

    S = W * mask
    for r in ramp(4, 50):
        U, sigma, Vh = torch.linalg.svd((W - S).float(), full_matrices=False)
        S = S + mask * (U[:, r:] * sigma[r:] @ Vh[r:]).to(dtype)
    B, A = truncated_svd(W - S, 4).factors()
    in_dtype = float((W.double() - S.double() - (B.to(dtype) @ A.to(dtype)).double()).norm())

    ours = slr.refine(W, mask, 4)
    assert ours.error == pytest.approx(best, rel=1e-3)
    rounded = (W.double() - ours.sparse.double() - ours.B.double() @ ours.A.double()).norm()
    assert float(rounded) < 1.002 * best  # rounding of the result, once
    assert float(rounded) <= in_dtype * 1.0001  # in float16 the two are nearly the same


def test_half_precision_does_not_overflow():
    W = 3e4 * realistic(16, 32).to(torch.float16)  # squares are far above 65504
    assert W.isfinite().all()
    refined = slr.refine(W, slr.prune(W, "magnitude", "2:4").mask, 4)
    small = slr.refine(W.double() / 3e4, slr.prune(W, "magnitude", "2:4").mask, 4)
    assert refined.dense().isfinite().all()
    assert refined.error / 3e4 == pytest.approx(small.error, rel=1e-2)


def test_ramp_is_the_papers():
    for k in (1, 2, 7, 128):
        for T in (2, 3, 50, 200):
            ranks = ramp(k, T)
            assert ranks == [1 + (k - 1) * t // (T - 1) for t in range(T)]
            assert ranks[0] == 1
            assert ranks[-1] == k
    assert ramp(5, 1) == [5]


def test_ritz_finds_what_the_subspace_holds():
    L = realistic(30, 20, dtype=torch.float64)
    V = torch.linalg.svd(L)[2].T[:, :6]
    found = ritz(L @ V, L.T @ (L @ V))
    exact = truncated_svd(L, 6)
    assert torch.allclose(found.s, exact.s)
    assert torch.allclose(found.U.T @ found.U, torch.eye(6).double(), atol=1e-10)
    assert torch.allclose(*(B @ A for B, A in (found.factors(), exact.factors())))


def test_ritz_drops_directions_that_are_not_there():
    L = torch.outer(torch.arange(1.0, 9), torch.ones(5))
    Y = L @ torch.randn(5, 3)
    assert int((ritz(Y, L.T @ Y).s > 0).sum()) == 1


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"rank": 0}, ValueError, "rank is 0; for a matrix of shape (12, 8)"),
        ({"rank": 9}, ValueError, "from 1 to 8"),
        ({"rank": 2.0}, TypeError, "2.0"),
        ({"iterations": 0}, ValueError, "iterations is 0"),
        ({"solver": "magic"}, ValueError, "'magic' is unknown"),
        ({"schedule": "slow"}, ValueError, "'slow' is unknown"),
        ({"mask": torch.ones(8, 12).bool()}, ValueError, "(8, 12)"),
        ({"mask": torch.ones(12, 8)}, TypeError, "boolean"),
        ({"weight": torch.full((12, 8), torch.nan)}, ValueError, "96 non-finite"),
        ({"weight": torch.ones(12, 8).long()}, TypeError, "int64"),
    ],
)
def test_bad_input_is_named(change, kind, says):
    arguments = {"weight": realistic(12, 8), "mask": torch.ones(12, 8).bool(), "rank": 2} | change
    with pytest.raises(kind, match=re.escape(says)):
        slr.refine(**arguments)


def loud(kind, size, m=320, n=256):
    """A matrix with one loud channel (and its metric), or one loud entry that is pruned."""
    W = realistic(m, n)
    mask = slr.prune(W, "magnitude", "2:4").mask
    if kind == "channel":
        scale = torch.rand(n) + 0.5
        scale[5] *= size
        return W, mask, slr.Diagonal(scale)
    W[3, 7], mask[3, 7] = size * float(W.abs().max()), False
    return W, mask, slr.Identity()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("size", [1e3, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("kind", ["channel", "entry"])
def test_one_loud_channel_or_entry_does_not_drown_the_rest(kind, size, schedule):
    W, mask, metric = loud(kind, size)
    options = {"metric": metric, "schedule": schedule, "iterations": 20}
    fast, exact = (slr.refine(W, mask, 8, solver=s, **options) for s in ("fast", "exact"))
    one_shot = slr.svd_repair(W.double(), mask, 8, metric).error
    assert exact.error <= one_shot
    assert fast.error <= min(one_shot, 1.002 * exact.error)
    assert len(fast.trace) == 21


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("m", "n", "rank"),
    [(8, 8, 4), (16, 12, 3), (24, 40, 12), (64, 48, 24), (96, 128, 48), (256, 192, 40)],
)
def test_fast_is_within_a_thousandth_at_any_rank(m, n, rank, schedule):
    W = torch.randn(m, n, generator=torch.Generator().manual_seed(m + rank))
    mask = slr.prune(W, "magnitude", "0.5").mask
    exact, fast = (slr.refine(W, mask, rank, solver=s, schedule=schedule) for s in SOLVERS[::-1])
    assert fast.error <= 1.001 * exact.error


@pytest.mark.parametrize("schedule", ["paper", "constant"])
def test_a_rank_above_a_32nd_of_the_side_takes_more_steps(schedule):
    W = torch.randn(288, 256, generator=torch.Generator().manual_seed(288))
    mask = slr.prune(W, "magnitude", "2:4").mask
    exact, fast = (slr.refine(W, mask, 28, solver=s, schedule=schedule) for s in SOLVERS[::-1])
    assert fast.error <= 1.0005 * exact.error


@pytest.mark.parametrize("rank", [18, 128])
def test_fast_is_within_a_thousandth_on_a_layer_of_576(rank):
    W = realistic(576, 576)
    mask = slr.prune(W, "magnitude", "2:4").mask
    options = {"schedule": "accelerated", "iterations": 20}
    exact, fast = (slr.refine(W, mask, rank, solver=s, **options) for s in SOLVERS[::-1])
    assert fast.error <= 1.001 * exact.error


def test_a_fast_result_that_is_no_better_than_one_svd_is_done_again_and_says_so(monkeypatch):
    W = realistic(160, 192)
    mask = slr.prune(W, "magnitude", "2:4").mask
    real = Subspace.last
    lost = lambda self, fill, rank: real(self, fill, rank)._replace(s=torch.zeros(rank))  # noqa: E731
    monkeypatch.setattr(Subspace, "last", lost)
    refined = slr.refine(W, mask, 4, iterations=5, schedule="constant")
    exact = slr.refine(W, mask, 4, iterations=5, schedule="constant", solver="exact")
    assert refined.error == exact.error < slr.svd_repair(W, mask, 4).error
    assert len(refined.trace) == 2 * 6
    assert refined.trace[5].error > exact.error


def test_outputs_are_never_worse_than_eora():
    W = realistic(96, 64)
    X = torch.randn(64, 300) * torch.rand(64, 1)
    X[3] *= 1e4
    mask = slr.prune(W, "magnitude", "2:4").mask
    gram = slr.Gram(X @ X.T / 300)
    refined = slr.refine(W, mask, 4, metric=gram)
    assert refined.error <= slr.svd_repair(W, mask, 4, gram).error


@pytest.mark.parametrize("repair", ["refine", "svd_repair", "gram"])
def test_halves_never_overflow_in_silence(repair):
    W = torch.full((8, 8), 40000.0, dtype=torch.float16)
    mask = slr.prune(W, "magnitude", "2:4").mask
    metric = slr.Gram(torch.eye(8)) if repair == "gram" else None
    verb = slr.svd_repair if repair == "svd_repair" else slr.refine
    found = verb(W, mask, 1, metric=metric)
    assert found.B.dtype == torch.float16
    assert found.dense().isfinite().all()
    assert torch.allclose(found.dense().float(), W.float(), rtol=2e-3)
    ruin = torch.full((512, 512), 65000.0, dtype=torch.float16)
    ruin[::2, ::3] *= -1
    far = slr.refine(ruin, slr.prune(ruin, "magnitude", "2:4").mask, 1, iterations=3)
    assert all(part.isfinite().all() for part in far[:3])


@pytest.mark.parametrize("size", [1e19, 1e-19])
@pytest.mark.parametrize("metric", ["identity", "diagonal", "gram"])
def test_units_do_not_matter(size, metric):
    W = realistic(48, 64)
    mask = slr.prune(W * size, "magnitude", "2:4").mask
    made = {
        "identity": slr.Identity(), "diagonal": slr.Diagonal(torch.rand(64) + 0.1),
        "gram": slr.Gram(torch.eye(64) + 0.1),
    }[metric]  # fmt: skip
    plain, scaled = (slr.refine(V, mask, 3, metric=made) for V in (W, W * size))
    assert scaled.error == pytest.approx(size * plain.error, rel=1e-3)
    assert torch.allclose(scaled.dense() / size, plain.dense(), atol=1e-3)
    wanda = slr.prune(W * size, "wanda", "2:4", activation_norm=torch.ones(64) * size)
    assert torch.equal(wanda.mask, slr.prune(W, "magnitude", "2:4").mask)
    gpt = slr.prune(W * size, "sparsegpt", "2:4", gram=torch.eye(64) + 0.1)
    assert torch.allclose(
        gpt.weight / size, slr.prune(W, "sparsegpt", "2:4", gram=torch.eye(64) + 0.1).weight
    )
    pursued = slr.pcp.pursue(W * size)
    assert torch.allclose(pursued.low / size, slr.pcp.pursue(W).low, atol=1e-4)


def test_a_parameter_may_be_given_and_no_history_comes_back():
    W = torch.nn.Parameter(realistic(24, 32))
    gram = torch.eye(32) + 0.1
    pruned = [slr.prune(W, m, "2:4", gram=gram, activation_norm=gram[0])
              for m in ("magnitude", "wanda", "sparsegpt")]  # fmt: skip
    mask = pruned[0].mask
    results = [slr.refine(W, mask, 2), slr.refine(W, mask, 2, metric=slr.Gram(gram)),
               slr.svd_repair(W, mask, 2), slr.pcp.pcp_repair(W, mask, 2)]  # fmt: skip
    tensors = [p.weight for p in pruned] + [part for r in results for part in r[:3]]
    assert not any(t.requires_grad for t in tensors)
    assert W.grad is None


@pytest.mark.parametrize("bad", [2.5, True, "3", None])
def test_counts_are_integers(bad):
    W, mask = torch.randn(8, 8), torch.ones(8, 8, dtype=torch.bool)
    with pytest.raises(TypeError, match=f"iterations is {bad!r}; it must be an integer"):
        slr.refine(W, mask, 1, iterations=bad)
    with pytest.raises(TypeError, match=f"rank is {bad!r}; it must be an integer"):
        slr.refine(W, mask, bad)
    with pytest.raises(TypeError, match=f"iterations is {bad!r}; it must be an integer"):
        slr.pcp.pursue(W, iterations=bad)


def test_what_is_given_is_looked_at_once(monkeypatch):
    count = []
    modules = ("pruning", "patterns", "checks", "metric")
    real = importlib.import_module("slr.matrix.checks").check_finite

    def scan(name, value):
        count.append(name)
        real(name, value)

    for name in modules:
        monkeypatch.setattr(f"slr.matrix.{name}.check_finite", scan, raising=False)
    slr.prune(realistic(32, 64), "sparsegpt", "2:4", gram=torch.eye(64))
    assert count == ["weight", "gram"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mask": None, "grid": "int4"}, "needs a mask to start from"),
        ({"update_mask": "nonsense"}, "neither n:m"),
        ({"search_dtype": torch.int8, "update_mask": None}, "search_dtype is torch.int8"),
    ],
)
def test_a_mask_is_chosen_anew_or_the_call_is_refused(options, says):
    W = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    given = {"mask": W.abs() > 0.5, "update_mask": "2:4", "search": "score", **options}
    with pytest.raises(ValueError, match=says):
        slr.refine(W, given.pop("mask"), 1, metric=slr.Gram(torch.eye(8)), **given)
