"""Methods of other papers: as those write them, in the pattern, and as good as they promise."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from helpers import activations, realistic
from hypothesis import given
from hypothesis import strategies as st
from rival_oracles import basil_slowly, best_of_rank, hassle_slowly, oats_slowly, slim_slowly
from torch.testing import assert_close

import slr
from slr import options
from slr.evaluate.tables import Spec
from slr.matrix.metric import Diagonal, Gram
from slr.matrix.pruners import Known
from slr.matrix.rivals import basil
from slr.matrix.rivals.exact import leading, projected
from slr.matrix.steps import REPAIRS, prune_and_repair
from slr.model.block import compress_layer
from slr.model.recipe import Recipe
from slr.reports import told

W = realistic(24, 32, seed=1).double()
X = activations(400, 32, seed=2).double()
H = X.T @ X / len(X)
NORM = (X.T @ X).diagonal().sqrt()
KNOWN = Known(NORM, H)
PATTERNS = ["2:4", "4:8", "0.5", "0.7", "0.5 by matrix"]
RIVALS = {"oats": "wanda", "slim": "wanda", "hassle": "sparsegpt", "3basil": "wanda"}


def repaired(name, weight=W, known=KNOWN, pattern="2:4", prune=None, rank=3, **more):
    """Result and what pruning left."""
    made = prune_and_repair(
        weight, slr.steps.PRUNERS[prune or RIVALS[name]](), slr.patterns.parse(pattern),
        REPAIRS[name](rank=rank, **more), known,
    )  # fmt: skip
    return made.refined, made.pruned


def parts(refined):
    return refined.sparse, refined.B @ refined.A


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_exact_step_is_a_truncated_svd(shape, rank):
    M = torch.randn(*shape).double()
    U = leading(M, rank)
    assert_close(U.T @ U, torch.eye(rank).double())
    assert_close(U @ U.T @ M, best_of_rank(M, rank))
    B, A, error = projected(M, M @ torch.eye(shape[1]).double() * 2, rank)
    assert_close(B @ A, best_of_rank(M, rank))
    assert error == pytest.approx(2 * float((M - best_of_rank(M, rank)).norm()), abs=1e-9)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_the_exact_step_where_the_rank_is_lower(shape):
    M = torch.outer(torch.ones(shape[0]), torch.arange(1.0, shape[1] + 1))
    for matrix in (M, 0 * M):
        U = leading(matrix, 3)
        assert_close(U @ U.T @ matrix, matrix, atol=1e-5, rtol=0)
        assert_close(U.T @ U, torch.eye(3), atol=1e-5, rtol=0)


@given(
    pattern=st.sampled_from(PATTERNS), seed=st.integers(0, 30), m=st.integers(4, 20),
    iterations=st.integers(1, 6),
)  # fmt: skip
def test_oats_is_what_the_paper_writes(pattern, seed, m, iterations):
    weight, rank = realistic(m, 32, seed).double(), 1 + seed % min(m, 4)
    found, _ = repaired("oats", weight, pattern=pattern, rank=rank, iterations=iterations)
    S, L = oats_slowly(weight, NORM, slr.patterns.parse(pattern), rank, iterations)
    metric = Diagonal(NORM)  # of inputs of another size than NORM's, which changes nothing
    assert found.error == pytest.approx(metric.error(weight - S - L), rel=1e-6)
    assert len(found.trace) == iterations + 1


def test_oats_finds_the_paper_s_mask():
    found, _ = repaired("oats", iterations=10)
    S, L = oats_slowly(W, NORM, slr.NM(2, 4), 3, 10)
    assert torch.equal(found.mask, S != 0)
    assert_close(parts(found), (S, L))


@given(pattern=st.sampled_from(PATTERNS), seed=st.integers(0, 30), rank=st.integers(1, 4))
def test_slim_is_what_the_paper_writes(pattern, seed, rank):
    weight = realistic(12, 32, seed).double()
    for prune in ("wanda", "magnitude", "sparsegpt"):
        found, pruned = repaired("slim", weight, pattern=pattern, prune=prune, rank=rank)
        S, L = slim_slowly(weight, pruned.weight, pruned.mask, NORM, rank)
        assert torch.equal(found.mask, pruned.mask)
        assert found.error == pytest.approx(Diagonal(NORM).error(weight - S - L), rel=1e-6)


@pytest.mark.parametrize("iterations", [1, 2, 4])
def test_hassle_is_what_the_paper_writes(iterations):
    found, _ = repaired("hassle", iterations=iterations)
    S, L = hassle_slowly(W, H, 2, 4, 3, iterations)
    assert found.error == pytest.approx(
        Gram(H).error(W - S - L), rel=2e-3
    )  # ours sweeps in float32
    assert float((found.mask == (S != 0)).float().mean()) > 0.98


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("iterations", [1, 10, 23, 2000])
def test_3basil_is_what_the_paper_writes(pattern, iterations):
    found, pruned = repaired("3basil", pattern=pattern, iterations=iterations)
    S, L, rounds = basil_slowly(W, H, pruned.weight, slr.patterns.parse(pattern), 3, iterations)
    assert found.error == pytest.approx(Gram(H).error(W - S - L), rel=1e-6)
    assert torch.equal(found.mask, S != 0)
    assert_close(parts(found), (S, L), rtol=1e-6, atol=1e-8)
    assert len(found.trace) == -(-rounds // 10) + 1
    assert rounds < 1000


@pytest.mark.parametrize("settled", [0.05, 0.5])
def test_3basil_stops_late_at_few_flips(monkeypatch, settled):
    """Shares that this small matrix can have; the paper's is less than one of its entries."""
    full, pruned = repaired("3basil")
    monkeypatch.setattr(basil, "SETTLED", settled)
    found, _ = repaired("3basil")
    _, _, rounds = basil_slowly(W, H, pruned.weight, slr.NM(2, 4), 3, 2000, settled)
    assert 10 < len(found.trace) == rounds // 10 + 1 < len(full.trace)


@given(
    name=st.sampled_from(list(RIVALS)),
    pattern=st.sampled_from(PATTERNS),
    m=st.integers(4, 20), groups=st.integers(1, 5), seed=st.integers(0, 50),
    kind=st.sampled_from(["full", "rank one", "zero rows", "constant", "zero"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)  # fmt: skip
def test_invariants(name, pattern, m, groups, seed, kind, dtype):
    weight, n = realistic(m, 8 * groups, seed), 8 * groups
    weight = {
        "full": weight, "rank one": weight[:, :1] @ weight[:1], "constant": 0 * weight + 1,
        "zero rows": weight * (torch.arange(m) % 2)[:, None], "zero": 0 * weight,
    }[kind].to(dtype)  # fmt: skip
    x = activations(50, n, seed)
    known = Known(x.norm(dim=0), x.T @ x / 50)
    more = {} if name == "slim" else {"iterations": 12 if name == "3basil" else 3}
    before, rank = weight.clone(), 1 + seed % min(m, n, 4)
    found, pruned = repaired(name, weight, known, pattern, rank=rank, **more)
    again, _ = repaired(name, weight, known, pattern, rank=rank, **more)
    assert torch.equal(weight, before)
    assert torch.equal(found.dense(), again.dense())
    assert not found.sparse[~found.mask].any()
    assert not pruned.weight[~pruned.mask].any()
    if name != "hassle":  # SparseGPT's unstructured masks hold the sparsity by blocks
        assert slr.patterns.parse(pattern).verify(found.mask)
    assert {part.dtype for part in found[:3]} == {dtype}
    assert (found.B.shape, found.A.shape) == ((m, rank), (rank, n))
    assert found.dense().isfinite().all()
    metric = Gram(known.gram) if name in ("hassle", "3basil") else Diagonal(known.norm)
    size = metric.error(weight)
    rounding = {torch.float32: 1e-5, torch.float64: 1e-6}.get(dtype, 0.03)
    missed = metric.error(
        weight.double() - found.sparse.double() - found.B.double() @ found.A.double()
    )
    assert found.error == pytest.approx(missed, rel=rounding, abs=rounding * size)
    assert found.error <= metric.error(weight - pruned.weight) + rounding * size


@pytest.mark.parametrize("pattern", PATTERNS)
def test_oats_never_rises_and_stops_when_told(pattern):
    found, _ = repaired("oats", pattern=pattern)
    errors = [step.error for step in found.trace]
    assert len(errors) == 81
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(errors))
    short, _ = repaired("oats", pattern=pattern, tolerance=0.01)
    assert 2 < len(short.trace) < 40
    before, now = short.trace[-3].error, short.trace[-2].error
    assert before - now < 0.01 * before
    assert short.trace[-4].error - before >= 0.01 * short.trace[-4].error


@pytest.mark.parametrize("prune", ["wanda", "magnitude", "sparsegpt"])
def test_slim_is_never_worse_than_the_one_svd(prune):
    found, pruned = repaired("slim", prune=prune)
    one = slr.svd_repair(W, pruned.mask, 3, Diagonal(NORM), sparse=pruned.weight)
    assert found.trace[0].error == pytest.approx(one.error, rel=1e-9)
    assert found.error < one.error


def test_hassle_starts_as_eora_and_gets_better():
    found, pruned = repaired("hassle")
    eora = slr.svd_repair(W, pruned.mask, 3, Gram(H), sparse=pruned.weight)
    once, _ = repaired("hassle", iterations=1)
    assert once.error == pytest.approx(eora.error, rel=1e-6)
    assert_close(parts(once)[1], parts(eora)[1], rtol=1e-6, atol=1e-8)
    assert found.error < 0.95 * eora.error
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(32).double()
    assert found.trace[-2].error == pytest.approx(Gram(damped).error(W - found.dense()), rel=1e-6)
    short, _ = repaired("hassle", tolerance=0.05)
    assert len(short.trace) < len(found.trace)


def test_3basil_is_the_best_of_them_and_its_low_rank_is_exact():
    errors = {name: Gram(H).error(W - repaired(name)[0].dense()) for name in RIVALS}
    assert errors["3basil"] < errors["hassle"] < errors["slim"]
    assert errors["3basil"] < 0.9 * errors["oats"]
    found, _ = repaired("3basil")
    again = slr.svd_repair(W, found.mask, 3, Gram(H, damping=0.005), sparse=found.sparse)
    assert found.error == pytest.approx(again.error, rel=1e-2)  # damped a little differently


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_units_change_nothing(name, dtype):
    more = {} if name == "slim" else {"iterations": 12}
    plain, _ = repaired(name, W.to(dtype), Known(NORM.to(dtype), H.to(dtype)), **more)
    for size, loud in ((2.0**70, 1.0), (2.0**-70, 1.0), (1.0, 2.0**20), (1.0, 2.0**-20)):
        known = Known(NORM.to(dtype) * loud, H.to(dtype) * loud**2)
        other, _ = repaired(name, W.to(dtype) * size, known, **more)
        assert torch.equal(other.mask, plain.mask)
        assert_close(other.dense() / size, plain.dense(), rtol=1e-3, atol=1e-4)
        assert other.error == pytest.approx(plain.error * size * loud, rel=1e-4)
        assert other.trace[0].error == pytest.approx(plain.trace[0].error * size * loud, rel=1e-4)


@pytest.mark.parametrize("name", RIVALS)
def test_silent_channels_do_no_harm(name):
    h, norm = H.clone(), NORM.clone()
    h[:5] = h[:, :5] = 0
    norm[:5] = 0
    found, pruned = repaired(name, known=Known(norm, h))
    assert found.dense().isfinite().all()
    assert slr.NM(2, 4).verify(found.mask)
    if name in ("oats", "slim"):
        assert not found.A[:, :5].any()
        assert torch.equal(found.sparse[:, :5], (W * found.mask)[:, :5])
        assert found.error < Diagonal(norm).error(W - pruned.weight)


@pytest.mark.parametrize("name", RIVALS)
def test_bad_input_is_named(name):
    bad = W.clone()
    bad[0, 0] = float("nan")
    for weight, known, rank, says in (
        (W, Known(), 3, f"'{name}' needs a"),
        (W, KNOWN, 25, "rank is 25; for a matrix of shape (24, 32) it must be from 1 to 24"),
        (W, Known(NORM[:8], H[:8, :8]), 3, "but the weight has 32 columns"),
        (bad, KNOWN, 3, "weight holds 1 non-finite values"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            repaired(name, weight, known, prune="magnitude", rank=rank)
    with pytest.raises(ValueError, match="the rank is not resolved"):
        repaired(name, rank=None)


@pytest.mark.parametrize("name", ["hassle", "3basil"])
def test_an_indefinite_gram_is_refused(name):
    bad = H.clone()
    bad[0, 1] = bad[1, 0] = 10 * float(H.diagonal().max())
    with pytest.raises(ValueError, match="gram is indefinite"):
        repaired(name, known=Known(NORM, bad), prune="wanda")


@pytest.mark.parametrize(
    ("options_", "says"),
    [
        ({"prune": "magnitude", "refine": "oats"}, "prune='magnitude' has no effect with refine="),
        ({"prune": "sparsegpt", "refine": "oats"}, "chooses a mask of its own; give 'wanda', the"),
        ({"prune": "random", "overrides": {"*": {"refine": "oats"}}}, "overrides['*']: prune='ra"),
        ({"refine": "slim", "iterations": 3}, "iterations=3 has no effect with refine='slim'"),
        ({"refine": "3basil", "tolerance": 0.1}, "tolerance=0.1 has no effect"),
        ({"refine": "hassle", "update_mask": True}, "update_mask=True has no effect"),
        ({"refine": "oats", "asymmetric": True}, "asymmetric=True has no effect"),
        ({"refine": "oats", "iterations": 0}, "iterations is 0; it must be at least 1"),
        ({"refine": "3basil", "iterations": 0}, "iterations is 0; it must be at least 1"),
        ({"refine": "oats", "tolerance": 1}, "tolerance is 1; it must be from 0 to below 1"),
        ({"prune": "wanda", "pattern": "1.0", "refine": "oats"}, "has nothing to work on"),
    ],
)
def test_an_option_without_effect_is_refused(options_, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        Recipe(**options_)


@pytest.mark.parametrize("name", RIVALS)
def test_a_recipe_does_it(name):
    recipe = Recipe(RIVALS[name], refine=name, rank=3)
    assert Recipe(**recipe.as_dict()) == recipe
    assert (
        options.recipe_of(None, {}, {"prune": RIVALS[name], "refine": name, "rank": 3}, None)
        == recipe
    )
    made = compress_layer(W, recipe, known=KNOWN).refined
    assert_close(made.dense(), repaired(name)[0].dense())
    assert recipe.keeps_weights == (name == "slim")
    assert recipe.statistic is type(recipe.refine).needs or RIVALS[name] == "sparsegpt"
    assert "refined by" not in told(recipe)


@pytest.mark.parametrize("name", RIVALS)
def test_a_model_is_compressed_and_loaded(small, text, tmp_path, name):
    windows = slr.data.windows(text, slr.load_tokenizer(small), 32, limit=4)
    few = {} if name == "slim" else {"iterations": 2}
    recipe = Recipe(RIVALS[name], refine=name, rank=2, skip=["*.layers.1.*"], **few)
    reports = slr.compress(small, recipe, calibration=windows, out=tmp_path / "out")
    model = slr.load(tmp_path / "out")
    assert {report.rank for report in reports} == {2}
    for report in reports:
        layer = model.get_submodule(report.name)
        assert slr.NM(2, 4).verify(layer.mask)
        assert layer.B.dtype == torch.bfloat16
        assert 0 < report.error < 1


def test_rows_of_the_table():
    spec = Spec.read(str(Path(__file__).parent.parent / "results/specs/smollm2.json"))
    rows = [row for row in spec.rows if row.split("/")[1:] and row.split("/")[1] in RIVALS]
    assert [row for row in rows if "oats" in row] == ["wanda/oats"]
    assert len(rows) == 10
    cells = {cell.row: cell.recipe for cell in spec.cells(columns=["2:4"]) if cell.row in rows}
    assert {row.split("/")[1]: cells[row].refine.options().get("iterations") for row in rows} == {
        "oats": 80, "slim": None, "hassle": 20, "3basil": 400,
    }  # fmt: skip
