"""Masks by ADMM: as the paper writes it, better than a score, and on every pattern."""

import pytest
import torch
from helpers import activations, admm_slowly, realistic
from typer.testing import CliRunner

import slr
from slr import options
from slr.cli import app
from slr.matrix import admm
from slr.matrix.metric import Gram
from slr.model.block import compress_layer
from slr.model.recipe import Recipe

W = realistic(48, 64, seed=1)
X = activations(400, 64, seed=2)
H = X.T @ X / len(X)
UNSEEN = activations(400, 64, seed=3)
PATTERNS = ["2:4", "4:8", "0.5", "0.7", "0.5 by matrix"]


def exactly(rest, H, U, rank):
    """The low-rank step without a power iteration."""
    root = torch.linalg.cholesky(H)
    left = torch.linalg.svd(rest @ root, full_matrices=False)[0][:, :rank]
    return U, left, left.T @ rest


@pytest.mark.parametrize("pattern", PATTERNS)
def test_it_is_what_the_paper_writes(monkeypatch, pattern):
    monkeypatch.setattr(admm, "_leading", exactly)
    pattern = slr.patterns.parse(pattern)
    w, h = W.double(), Gram(H).damped(W.double())
    start = slr.prune(W, "magnitude", pattern).mask
    rounds = 15
    penalties = [0.1 * 8 ** ((t * 6 // rounds) / 5) for t in range(rounds)]
    S, mask, _ = admm.choose_mask(
        w, h, start, pattern, 4, rounds=rounds, generator=torch.Generator().manual_seed(0)
    )
    slow, theirs = admm_slowly(w, h, start, pattern, 4, penalties)
    assert torch.equal(mask, theirs)
    assert torch.allclose(S, slow, atol=1e-10)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_it_is_better_than_a_score(pattern):
    start = slr.prune(W, "wanda", pattern, activation_norm=H.diagonal().sqrt()).mask
    before = start.clone()
    options = {"metric": Gram(H), "update_mask": pattern}
    score = slr.refine(W, start, 4, **options)
    found = slr.refine(W, start, 4, **options, search="admm")
    assert torch.equal(start, before)
    assert slr.patterns.parse(pattern).verify(found.mask)
    assert not found.sparse[~found.mask].any()
    assert found.error < 0.97 * score.error
    assert len(found.trace) == 7  # the last ninth of 50, and the result


@pytest.mark.parametrize("units", [1e-4, 1.0, 1e4])
def test_units_change_nothing(units):
    loud, start = torch.logspace(-2, 2, 64).double(), slr.prune(W, "magnitude", "2:4").mask
    w, h = W.double(), Gram(H).damped(W.double())
    found = [
        admm.choose_mask(
            weight, gram, start, slr.NM(2, 4), 4, rounds=20,
            generator=torch.Generator().manual_seed(0),
        )[1]
        for weight, gram in ((w, h), (w / loud, h * loud * loud[:, None] * units))
    ]  # fmt: skip
    assert torch.equal(*found)


@pytest.mark.parametrize("iterations", [1, 2, 7])
def test_a_few_iterations_will_do(iterations):
    start = slr.prune(W, "magnitude", "2:4").mask
    found = slr.refine(
        W, start, 4, metric=Gram(H), update_mask="2:4", search="admm", iterations=iterations
    )
    assert slr.NM(2, 4).verify(found.mask)
    assert found.sparse.isfinite().all()


def test_inputs_that_never_spoke_do_no_harm():
    h = H.clone()
    h[:8] = h[:, :8] = 0
    start = slr.prune(W, "magnitude", "2:4").mask
    found = slr.refine(W, start, 4, metric=Gram(h), update_mask="2:4", search="admm")
    assert found.sparse.isfinite().all()
    assert slr.NM(2, 4).verify(found.mask)


def test_bad_searches_are_named():
    start = slr.prune(W, "magnitude", "2:4").mask
    with pytest.raises(ValueError, match="search 'swaps' is unknown; it must be one of score, ad"):
        slr.refine(W, start, 4, metric=Gram(H), update_mask="2:4", search="swaps")
    with pytest.raises(ValueError, match="search='admm' needs update_mask, a pattern"):
        slr.refine(W, start, 4, metric=Gram(H), search="admm")


def test_the_flags_of_the_command():
    assert options.mask_anew(None, None) is None
    assert options.mask_anew(True, None) is True
    assert options.mask_anew(None, True) == "admm"
    assert options.parse_override("*:update_mask=admm") == ("*", {"update_mask": "admm"})
    assert options.parse_override("*:update_mask=true") == ("*", {"update_mask": True})
    refused = CliRunner().invoke(
        app, ["compress", "tiny", "--out", "x", "--admm", "--update-mask"]
    )  # fmt: skip
    assert refused.exit_code != 0
    assert "give one" in refused.output


@pytest.mark.parametrize(("update_mask", "search"), [("admm", "admm"), (True, "score")])
def test_the_recipe_does_it(update_mask, search):
    recipe = Recipe("wanda", "2:4", refine="activations", update_mask=update_mask, rank=4)
    known = slr.steps.Known(H.diagonal().sqrt(), H)
    made = compress_layer(W, recipe, known=known).refined
    start = slr.prune(W, "wanda", "2:4", activation_norm=known.norm).mask
    direct = slr.refine(W, start, 4, metric=Gram(H), update_mask="2:4", search=search)
    assert torch.equal(made.mask, direct.mask)
    assert torch.equal(made.sparse, direct.sparse)


def test_the_recipe_holds_it():
    recipe = Recipe(
        "wanda", "2:4", refine="activations", update_mask="admm", rank=4, asymmetric=True
    )
    assert Recipe(**recipe.as_dict()) == recipe
    assert not recipe.keeps_weights
    assert Recipe("wanda", rank=4) == recipe
