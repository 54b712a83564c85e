"""Sparsity by block and rank by layer, at the same total."""

import pytest
import torch
import yaml
from typer.testing import CliRunner

import slr
from slr.checkpoint.folder import about
from slr.cli import app
from slr.matrix.patterns import parse
from slr.model.allocation import by_energy, by_outliers, outliers
from slr.model.calibrate import BlockInputs
from slr.model.recipe import Recipe

FEW = {"samples": 4, "seqlen": 32}
run = CliRunner().invoke


def literal_owl(metrics, sparsity, above, spread):
    """What the authors of OWL publish, line by line: a list of scores for each block."""
    ratios = []
    for scores in metrics:
        flat = torch.cat([s.flatten() for s in scores])
        ratios.append(100 * float((flat > flat.mean() * above).sum()) / flat.numel())
    ratio = torch.tensor(ratios, dtype=torch.float64)
    ratio = (ratio - ratio.min()) * (1 / (ratio.max() - ratio.min()) * spread * 2)
    ratio = ratio - ratio.mean() + (1 - sparsity)
    return (1 - ratio).tolist()


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_owl_is_what_its_authors_publish(sparsity):
    made = torch.Generator().manual_seed(0)
    metrics = [
        [torch.randn(24, 40, generator=made).abs() ** (1 + block) for _ in range(3)]
        for block in range(5)
    ]
    found = by_outliers([outliers(block) for block in metrics], sparsity)
    want = literal_owl(metrics, sparsity, 5.0, 0.08)
    assert found == pytest.approx(want, abs=1e-4)
    assert sum(found) / 5 == pytest.approx(sparsity, abs=1e-4)
    assert max(found) - min(found) == pytest.approx(0.16, abs=1e-4)


@pytest.mark.parametrize("sparsity", [0.01, 0.99])
def test_no_block_is_asked_for_more_than_all(sparsity):
    for shares in ([0.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 1.0]):
        found = by_outliers(shares, sparsity)
        assert all(0 <= each <= 1 for each in found)
    assert by_outliers([0.2, 0.2], sparsity) == [sparsity, sparsity]


def test_energy_is_the_best_that_the_budget_buys():
    """Against all ways to spend it, of three layers that cost the same."""
    made = torch.Generator().manual_seed(1)
    spectra = [torch.rand(5, generator=made).sort(descending=True).values for _ in range(3)]

    def left(ranks):
        return sum(float(s[k:].sum()) for s, k in zip(spectra, ranks, strict=True))

    found = by_energy(spectra, [7, 7, 7], 3)
    every = [(a, b, c) for a in range(1, 6) for b in range(1, 6) for c in range(1, 6)]
    assert sum(found) == 9
    assert left(found) == pytest.approx(min(left(r) for r in every if sum(r) == 9))


def test_a_rank_that_does_not_fit_leaves_room_for_cheaper_ones():
    spectra = [torch.tensor([9.0, 8.0, 7.0]), torch.tensor([9.0, 1.0, 0.9])]
    assert by_energy(spectra, [100, 30], 1) == [1, 1]
    assert by_energy(spectra, [100, 30], 2) == [2, 2]


def test_energy_is_by_what_a_rank_costs():
    spectra = [torch.tensor([9.0, 0.6, 0.1]), torch.tensor([9.0, 0.5, 0.4])]
    assert by_energy(spectra, [100, 50], 2) == [1, 3]
    assert by_energy(spectra, [50, 50], 2) == [2, 2]


@pytest.mark.parametrize(
    ("by", "options"),
    [
        ("owl", {"pattern": "0.5", "rank": 2}),
        ("owl", {"pattern": "0.5", "group": "matrix", "rank": 2}),
        ("energy", {"rank": 3}),
        ("energy", {"pattern": "dense", "values": "int4 by 16", "iterations": 2, "rank": 3}),
    ],
)
def test_the_total_is_kept_and_every_layer_is_told(small, tmp_path, by, options):
    recipe = Recipe(**options, **FEW)
    found = slr.allocate(small, recipe, by)
    layers = slr.compress(small, found, out=tmp_path / "uneven")
    even = slr.compress(small, recipe, out=tmp_path / "even")
    if by == "owl":
        assert len({layer.kept for layer in layers}) > len({layer.kept for layer in even})
        total = [sum(layer.kept for layer in each) for each in (layers, even)]
        assert total[0] == pytest.approx(total[1], rel=0.03)  # whole entries of short rows
    else:
        total = [sum(r.rank * sum(r.shape) for r in each) for each in (layers, even)]
        assert total[1] - max(sum(r.shape) for r in even) < total[0] <= total[1]
        assert len({layer.rank for layer in layers}) > 1
    assert about(tmp_path / "uneven")["recipe"]["overrides"] == found.overrides
    if "group" in options:
        assert {parse(each["pattern"]).group for each in found.overrides.values()} == {"matrix"}


def test_the_dense_model_is_not_followed_twice(small, monkeypatch):
    monkeypatch.setattr(BlockInputs, "beside", lambda *_: pytest.fail("a second copy"))
    recipe = Recipe(pattern="0.5", rank=2, asymmetric=True, **FEW)
    assert recipe.follows_dense
    assert slr.allocate(small, recipe, "owl").overrides


def test_a_loaded_model_is_only_read(small):
    model = slr.load(small, dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    seen = []
    model.model.layers[1].register_forward_pre_hook(lambda block, args: seen.append(block.training))
    windows = torch.randint(0, 60, (4, 16), generator=torch.Generator().manual_seed(1))
    slr.allocate(model, Recipe(pattern="0.5", rank=2), "owl", calibration=windows)
    found = slr.allocate(model, Recipe("magnitude", rank=2), "energy")
    assert seen
    assert not any(seen)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert found == slr.allocate(small, Recipe("magnitude", rank=2), "energy")


def test_overrides_of_the_recipe_count_more(small):
    own = {"*.q_proj": {"rank": 1}}
    found = slr.allocate(small, Recipe("magnitude", rank=3, overrides=own), "energy")
    assert list(found.overrides)[-1] == "*.q_proj"
    assert found.layer("model.layers.0.self_attn.q_proj", 32).rank == 1


@pytest.mark.parametrize(
    ("by", "options", "why"),
    [
        ("rows", {}, "by 'rows' is unknown; it must be one of owl, energy"),
        ("owl", {}, "pattern 2:4 fixes it"),
        ("owl", {"prune": "magnitude", "pattern": "0.5"}, "reads none; give prune='wanda'"),
        ("energy", {"refine": "none"}, "has none"),
    ],
)
def test_what_cannot_be_moved_is_refused(small, by, options, why):
    with pytest.raises(ValueError, match=why):
        slr.allocate(small, Recipe(**options), by)


def test_the_command_writes_a_recipe_that_compress_takes(small, tmp_path):
    file = tmp_path / "owl.yaml"
    options = ["--pattern", "0.5", "--rank", "2", "--samples", "4", "--seqlen", "32"]
    done = run(app, ["allocate", str(small), "--out", str(file), *options])
    assert done.exit_code == 0, done.output
    assert "model.layers.0.*" in done.stdout
    told = yaml.safe_load(file.read_text())
    want = slr.allocate(small, Recipe(pattern="0.5", rank=2, **FEW), "owl")
    assert Recipe(**told) == want
    out = tmp_path / "out"
    done = run(app, ["compress", str(small), "--config", str(file), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert about(out)["recipe"] == want.resolved(0).as_dict()
    again = run(app, ["allocate", str(small), "--out", str(file), *options])
    assert again.exit_code == 2
    assert "is there already" in " ".join(again.output.split())
    wrong = run(app, ["allocate", str(small), "--out", str(tmp_path / "owl.json")])
    assert wrong.exit_code == 2
    assert "must end with .yaml" in " ".join(wrong.output.split())
