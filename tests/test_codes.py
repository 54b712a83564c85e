"""Rounding with the outputs in view, and the alternation of codes with a low-rank part."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import slr
from slr.matrix.alternation import refine_rounded
from slr.matrix.codes import Columns, descend, feed_back
from slr.matrix.metric import Diagonal, Gram, Identity
from slr.matrix.rounding import Grid, Rounded


def inputs(n, seed=0, tokens=200):
    """Second moments of correlated inputs of unequal loudness, damped."""
    made = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, n, generator=made) @ torch.randn(n, n, generator=made)
    X = X * torch.linspace(0.5, 2, n)
    H = X.T @ X / tokens
    H.diagonal().add_(0.01 * H.diagonal().mean())
    return H


def matrix(m, n, seed=1):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def cost(E, H):
    return float(((E.double() @ H.double()) * E.double()).sum())


def optimal_brain_quantizer(W, H, grid, levels, mask):
    """GPTQ as OBQ states it: the inverse of what remains, one column taken out at a time."""
    scale, zero = (each.double() for each in levels.spread(grid, W.shape[1]))
    W, left = W.double().clone(), list(H.diagonal().argsort(descending=True).tolist())
    codes = torch.zeros_like(W)
    low, high = grid.codes
    while left:
        inverse = torch.linalg.inv(H.double()[left][:, left])
        j = left[0]
        code = (W[:, j] / scale[:, j] + zero[:, j]).round().clamp(low, high)
        code = torch.where(mask[:, j], code, zero[:, j])
        codes[:, j] = code
        error = (W[:, j] - (code - zero[:, j]) * scale[:, j]) / inverse[0, 0]
        W[:, left] -= torch.outer(error, inverse[0])
        left.pop(0)
    return Rounded(codes.to(torch.uint8), levels, grid)


@pytest.mark.parametrize("grid", [Grid(4, 8), Grid(3), Grid(4, 16, True), Grid(8)])
@pytest.mark.parametrize("masked", [False, True])
def test_feedback_is_the_optimal_brain_quantizer(grid, masked):
    W, H = matrix(24, 40), inputs(40)
    mask = matrix(24, 40, 2).abs() > (0.6 if masked else -1)
    mine = feed_back(W, Columns(H), grid, mask if masked else None)
    theirs = optimal_brain_quantizer(W, H, grid, mine.levels, mask)
    # A value that lies between two codes may fall either way, and all after it follow.
    assert (mine.codes == theirs.codes).float().mean() > 0.97
    assert cost(W - mine.values(), H) == pytest.approx(cost(W - theirs.values(), H), rel=0.02)
    assert not mine.values()[~mask].any()


def test_many_columns_are_taken_by_blocks():
    W, H = matrix(3, 300), inputs(300, tokens=900)
    mine = feed_back(W, Columns(H), Grid(4, 32))
    everything = torch.ones_like(W, dtype=torch.bool)
    theirs = optimal_brain_quantizer(W, H, Grid(4, 32), mine.levels, everything)
    assert cost(W - mine.values(), H) == pytest.approx(cost(W - theirs.values(), H), rel=0.03)
    assert cost(W - mine.values(), H) < 0.7 * cost(W - Grid(4, 32).nearest(W), H)


@given(
    m=st.integers(1, 6), n=st.integers(1, 40), bits=st.integers(2, 8),
    group=st.sampled_from([None, 2, 7]), symmetric=st.booleans(), masked=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_descent_never_raises_the_error(m, n, bits, group, symmetric, masked, seed):
    W, H, grid = matrix(m, n, seed), inputs(n, seed), Grid(bits, group, symmetric or group is None)
    mask = matrix(m, n, seed + 1) > 0 if masked else torch.ones(m, n, dtype=torch.bool)
    columns = Columns(H)
    now = feed_back(W, columns, grid, mask)
    for _ in range(3):
        after = descend(now, W, columns, mask)
        assert cost(W - after.values(), H) <= cost(W - now.values(), H) * (1 + 1e-5) + 1e-9
        assert torch.equal(after.levels.scale, now.levels.scale)
        assert not after.values()[~mask].any()
        now = after


def test_where_it_ends_no_single_code_is_better():
    W, H, grid = matrix(4, 12), inputs(12), Grid(3, 4)
    columns = Columns(H)
    found = descend(feed_back(W, columns, grid), W, columns, sweeps=30)
    least = cost(W - found.values(), H)
    for i in range(4):
        for j in range(12):
            for code in range(8):
                codes = found.codes.clone()
                codes[i, j] = code
                assert cost(W - found._replace(codes=codes).values(), H) >= least * (1 - 1e-6)


def test_levels_that_count_errors_may_clip():
    W = torch.tensor([[0.1, -0.2, 0.3, 8.0]])
    quiet = Grid(2, 4).levels(W, torch.tensor([1.0, 1.0, 1.0, 1e-6]))
    assert float(quiet.scale) < float(Grid(2, 4).levels(W).scale)
    W = torch.tensor([[0.0, 1.0, 2.0, 3.0]])  # which a grid over all of the range has
    assert torch.equal(Grid(2, 4).levels(W, torch.ones(4)).scale, Grid(2, 4).levels(W).scale)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["gram", "identity", "diagonal"])
def test_the_alternation_beats_rounding_then_repair(kind, masked):
    W, H = matrix(48, 64) + 2 * matrix(48, 2, 3) @ matrix(2, 64, 4), inputs(64)
    metric = {"gram": Gram(H), "identity": Identity(), "diagonal": Diagonal(H.diagonal().sqrt())}[
        kind
    ]
    mask = slr.prune(W, "magnitude", "0.5").mask if masked else None
    options = {"metric": metric, "grid": "int3 by 16"}
    once = slr.refine(W, mask, 4, iterations=1, **options)
    many = slr.refine(W, mask, 4, iterations=12, **options)
    assert many.error < 0.97 * once.error
    assert len(many.trace) == 13
    assert many.coded.A is None
    values = many.coded.sparse.values()
    kept = values if mask is None else values * mask
    assert torch.allclose(many.sparse, kept)
    E = W - many.sparse - many.B @ many.A
    assert many.error == pytest.approx(metric.error(E), rel=1e-4)


def test_factors_are_rounded_and_made_up_for():
    W, H = matrix(48, 64) + 0.5 * matrix(48, 2, 3) @ matrix(2, 64, 4), inputs(64)
    options = {"metric": Gram(H), "grid": "int4 by 16", "iterations": 10}
    free = slr.refine(W, None, 4, **options)
    coded = slr.refine(W, None, 4, factors="int8", **options)
    assert coded.error < 1.05 * free.error
    assert torch.equal(coded.B, coded.coded.B.values().T)
    assert torch.equal(coded.A, coded.coded.A.values())
    assert slr.refine(W, None, 4, factors="int3", **options).error > coded.error


def test_rank_0_is_rounding_alone():
    W, H = matrix(16, 32), inputs(32)
    found = slr.refine(W, None, 0, grid=Grid(4, 8), metric=Gram(H))
    assert found.B.shape == (16, 0)
    assert cost(W - found.sparse, H) < cost(W - Grid(4, 8).nearest(W), H)
    assert torch.equal(slr.refine(W, None, 0, grid="int4 by 8").sparse, _nearest_of_least(W))


def _nearest_of_least(W):
    grid = Grid(4, 8)
    return grid.rounded(W, grid.levels(W, torch.ones(W.shape[1]))).values()


def test_a_mask_chosen_anew_and_a_grid():
    W, H = matrix(32, 64), inputs(64)
    start = slr.prune(W, "magnitude", "2:4").mask
    options = {"metric": Gram(H), "iterations": 18}
    fixed = slr.refine(W, start, 2, grid="int4 by 16", **options)
    anew = slr.refine(W, start, 2, grid="int4 by 16", update_mask="2:4", search="admm", **options)
    assert anew.error < fixed.error
    assert (anew.mask.view(32, 16, 4).sum(-1) == 2).all()
    assert not anew.sparse[~anew.mask].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e3])
def test_dtypes_and_sizes(dtype, size):
    W, H = (matrix(16, 32) * size).to(dtype), inputs(32) * 1e-8
    found = slr.refine(W, None, 2, grid="int8", factors="int8", metric=Gram(H), iterations=4)
    assert found.sparse.dtype == found.B.dtype == dtype
    assert float((found.dense().double() - W.double()).norm() / W.double().norm()) < 0.02
    values = found.coded.sparse.values().to(dtype)
    assert torch.equal(values, found.sparse)


def test_the_same_twice():
    W, H = matrix(16, 32), inputs(32)
    one, two = (
        slr.refine(W, None, 2, grid="int4 by 8", metric=Gram(H), iterations=6) for _ in range(2)
    )
    assert torch.equal(one.sparse, two.sparse)
    assert torch.equal(one.B, two.B)


def test_a_planted_answer_is_found():
    S = Grid(3, 8).nearest(matrix(32, 32, 5))
    W = S + 0.4 * matrix(32, 1, 6) @ matrix(1, 32, 7)
    found = refine_rounded(
        W, None, Identity(), 1, Grid(3, 8), iterations=12,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert float((W - found.sparse - found.B @ found.A).norm()) < 0.8 * float(
        (W - Grid(3, 8).nearest(W)).norm()
    )


def test_what_is_refused():
    W, mask = matrix(8, 8), matrix(8, 8) > 0
    for options, message in (
        ({"factors": "int8"}, "factors='int8' has no effect without grid"),
        ({"grid": "int9"}, "bits is 9"),
        ({"grid": "int4/64"}, "rounding 'int4/64' is unknown"),
        ({"grid": "int4 by 8", "factors": "int8 by 4"}, "their grid is of whole rows"),
        ({"grid": "int4 by 8", "schedule": "accelerated"}, "schedule='accelerated' has no effect"),
        ({"grid": "int4 by 8", "tolerance": 0.1}, "tolerance=0.1 has no effect"),
        ({"grid": "int4 by 8", "solver": "exact"}, "solver='exact' has no effect"),
    ):
        with pytest.raises(ValueError, match=message):
            slr.refine(W, mask, 1, **options)
    with pytest.raises(ValueError, match="mask is None; give a mask"):
        slr.refine(W, None, 1)
    with pytest.raises(ValueError, match="rank is 0"):
        slr.refine(W, mask, 0)
    with pytest.raises(ValueError, match="shape"):
        slr.refine(W[None], mask[None], 1, grid="int4 by 8")
    for options, message in (
        ({"factors": "int8"}, "has no effect without values"),
        ({"values": "int4 by 8", "tolerance": 0.1}, "no effect with values on a grid"),
        ({"values": "int4 by 8", "factors": "int8 by 8"}, "of whole rows"),
        ({"values": "four"}, "rounding 'four' is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            slr.Recipe(**options)
    with pytest.raises(ValueError, match="no effect with values on a grid"):
        slr.Recipe("magnitude", values="int8", schedule="accelerated", refine="weights")
    with pytest.raises(ValueError, match="values='int8' has no effect with refine='svd'"):
        slr.Recipe(refine="svd", values="int8")
