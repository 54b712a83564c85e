import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from helpers import realistic
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import slr
from slr.cli import app
from slr.methods.cap import Pool, allocate, excess_loss, pack, place, propose, unpack
from slr.methods.cap.policy import Policy, choose, learn, project, soften
from slr.methods.cap.robust_pca import Candidates, candidates
from slr.model.stream import Stream

F64 = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- projection -------------------------------------------------------------------------------


def project_slowly(v, c, budget):
    """Every choice of which are 0, 1 or between, the equation solved, the nearest feasible one."""
    best, nearest = None, float("inf")
    for kinds in itertools.product((0, 1, 2), repeat=len(v)):
        kinds = torch.tensor(kinds)
        free, s = kinds == 2, (kinds == 1).to(F64)
        rest = budget - float((c * s).sum())
        if free.any():
            tau = (float((c * v)[free].sum()) - rest) / float(c[free].sum())
            s[free] = v[free] - tau
        elif abs(rest) > 1e-12:
            continue
        distance = float((c * (s - v).square()).sum())
        if bool(((s >= -1e-12) & (s <= 1 + 1e-12)).all()) and distance < nearest:
            best, nearest = s, distance
    return best


@pytest.mark.parametrize("seed", range(6))
def test_projection_is_the_brute_force_one(seed):
    g = seeded(seed)
    v = 2 * torch.randn(4, generator=g, dtype=F64)
    c = torch.randint(1, 9, (4,), generator=g).to(F64)
    budget = float(c.sum() * torch.rand(1, generator=g))
    s = project(v, c, budget)
    assert torch.allclose(s, project_slowly(v, c, budget), atol=1e-9)
    assert float((c * s).sum()) == pytest.approx(budget, abs=1e-9)


def test_projection_of_shared_parameters_is_that_of_each():
    v, c = torch.tensor([0.9, 0.2, 0.6]), torch.tensor([1, 4, 2])
    one_by_one = project(v.repeat_interleave(c), torch.ones(7), 3)
    assert torch.allclose(project(v, c, 3).repeat_interleave(c), one_by_one)


def test_projection_at_the_ends():
    c = torch.tensor([3.0, 2.0])
    assert project(torch.tensor([5.0, -5.0]), c, 0).tolist() == [0, 0]
    assert project(torch.tensor([5.0, -5.0]), c, 5).tolist() == pytest.approx([1, 1])


# --- policy -----------------------------------------------------------------------------------


def enumerated(losses, s):
    """Expected loss of independent Bernoulli masks, a differentiable function of s."""
    total = s.new_zeros(())
    for mask, loss in losses.items():
        m = torch.tensor(mask, dtype=F64)
        total = total + loss * (m * s + (1 - m) * (1 - s)).prod()
    return total


@pytest.mark.parametrize("history", [[0.0], [3.0, 1.0, 7.0]])
def test_estimate_is_unbiased_whatever_the_baseline(history):
    g = seeded()
    masks = list(itertools.product((0, 1), repeat=4))
    losses = {m: float(x) for m, x in zip(masks, torch.randn(16, generator=g), strict=True)}
    policy = Policy(torch.tensor([1.0, 2.0, 1.0, 3.0]), 3.0, torch.rand(4, generator=g),
                    epsilon=1e-12)  # fmt: skip
    policy.losses = history
    s = policy.probabilities
    assert bool(((s > 0.05) & (s < 0.95)).all())
    mean = torch.zeros(4, dtype=F64)
    for m, loss in losses.items():
        mask = torch.tensor(m, dtype=F64)
        chance = (mask * s + (1 - mask) * (1 - s)).prod()
        mean += chance * policy.gradient(mask, loss)
    exact = torch.autograd.functional.jacobian(lambda s: enumerated(losses, s), s)
    assert torch.allclose(mean, exact, atol=1e-9)


def test_a_step_by_hand():
    costs = torch.tensor([1.0, 1.0, 2.0])
    policy = Policy(costs, 2.0, torch.tensor([0.7, 0.3, 0.5]), rate=0.1, window=2, epsilon=0.05)
    s = policy.probabilities
    policy.losses = [9.0, 2.0, 4.0]
    mask = policy.sample(seeded(3)).double()
    policy.step(5.0)
    moved = s - 0.1 * (5 - (2 + 4) / 2) * (mask - s) / (s * (1 - s) + 0.05)
    assert torch.allclose(policy.probabilities, project(moved, costs, 2.0))
    assert policy.baseline == pytest.approx(4.5)
    with pytest.raises(ValueError, match="sample first"):
        policy.step(1.0)


def test_the_first_loss_is_only_a_baseline():
    policy = Policy(torch.ones(4), 2, torch.tensor([0.1, 0.4, 0.6, 0.9]))
    before = policy.probabilities
    policy.sample(seeded())
    policy.step(100.0)
    assert torch.allclose(policy.probabilities, before, rtol=1e-12)


def test_masks_are_drawn_with_the_probabilities():
    policy, g = Policy(torch.ones(3), 1.5, torch.tensor([0.1, 0.5, 0.9])), seeded()
    often = sum(policy.sample(g).double() for _ in range(4000)) / 4000
    assert torch.allclose(often, policy.probabilities, atol=0.03)


def test_softened_order_spends_the_budget():
    costs = torch.tensor([4, 1, 3, 5, 2])
    priority = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0])
    s = soften(priority, costs, 8)
    assert float((s * costs).sum()) == pytest.approx(8)
    assert bool((s[priority.argsort(descending=True)].diff() <= 0).all())
    assert torch.allclose(soften(priority, costs, 7, 1e-6), torch.tensor([1.0, 0, 1, 0, 0]).to(F64))


def test_choice_spends_the_budget_exactly():
    g = seeded()
    for _ in range(20):
        units = torch.tensor([6, 6, 1, 1, 10, 1])
        costs = units * torch.randint(1, 8, (6,), generator=g)
        priority = torch.rand(6, generator=g)
        budget = int(costs.sum() * torch.rand(1, generator=g))
        amounts = choose(priority, costs, units, budget)
        assert bool(((amounts >= 0) & (amounts <= costs) & (amounts % units == 0)).all())
        left = budget - int(amounts.sum())
        entries = int((costs - amounts)[units == 1].sum())
        assert left == 0 or (left > 0 and entries == 0)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_learned_goes_to_the_known_answer_where_uniform_and_greedy_do_not(seed):
    # The loss knows the first matrix only; the second has the larger squares.
    W = {"matters": realistic(24, 20, 1), "idle": 3 * realistic(24, 20, 2)}
    pool = Pool({name: candidates(weight, share=2) for name, weight in W.items()})
    costs, first, size = pool.costs, len(pool.found["matters"].units), W["matters"].norm()
    budget = int(costs[:first].sum())
    known = costs * (torch.arange(len(costs)) < first)

    def loss(amounts):
        return float((W["matters"] - pool.found["matters"].dense(amounts[:first])).norm() / size)

    def chosen(priority):
        return loss(choose(priority, costs, pool.units, budget))

    assert loss(known) < 1e-3
    policy = Policy(costs, budget, soften(pool.uniform(), costs, budget))
    learn(policy, lambda mask, step: 5 * loss(mask * costs), 300, seeded(seed))
    learned = chosen(policy.probabilities)
    assert learned < 0.5 * chosen(pool.uniform())
    assert learned < 0.5 * chosen(pool.greedy())


# --- candidates -------------------------------------------------------------------------------


def test_candidates_of_a_planted_sum_are_what_was_planted():
    g = seeded()
    low = torch.randn(60, 3, generator=g).double() @ torch.randn(3, 60, generator=g).double()
    where = torch.rand(60, 60, generator=g) < 0.05
    found = candidates(low + where * 10 * torch.randn(60, 60, generator=g), share=1)
    assert found.ranks == len(found.low.s) == 3
    large = found.values.abs() > 1e-3
    planted = torch.zeros(60 * 60, dtype=torch.bool)
    planted[found.places[large]] = True
    assert torch.equal(planted.view(60, 60), where)
    assert bool((found.values.abs().diff() <= 0).all())


@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("share", [1, 5])
def test_all_candidates_together_are_the_matrix(pattern, share):
    W = realistic(48, 40)
    found = candidates(W, share=share, pattern=pattern)
    assert float((found.dense(found.costs) - W).norm() / W.norm()) < 1e-3
    in_all = len(found.low.s) * 88 + len(found.places)
    assert int(found.costs.sum()) + found.fixed == in_all
    assert found.costs.shape == found.units.shape == found.energy.shape
    assert int(found.costs.max()) == share * 88
    squares = found.low.s.square().sum() + (0 if pattern else found.values.square().sum())
    assert float(found.energy.sum()) == pytest.approx(float(squares), rel=1e-5)


def test_what_is_kept_in_part_is_the_largest():
    W = realistic(48, 40)
    found = candidates(W, share=4)
    amounts = torch.zeros_like(found.costs)
    amounts[0], amounts[found.ranks] = 3 * 88, 10
    refined = found.refined(amounts, W)
    assert refined.B.shape == (48, 3)
    assert int(refined.mask.sum()) == 10
    low = found.low.truncate(3)
    assert torch.allclose(refined.B @ refined.A, (low.U * low.s) @ low.V.T, atol=1e-5)
    assert torch.allclose(refined.B.norm(dim=0), refined.A.norm(dim=1), rtol=1e-4)
    S = torch.zeros(48 * 40)
    S[found.places[:10]] = found.values[:10]
    assert torch.equal(refined.sparse.flatten(), S)
    assert refined.error == pytest.approx(float((W - refined.dense()).norm()), rel=1e-4)
    again = found.refined(amounts, W, refit=True)
    assert torch.allclose(again.dense()[again.mask], W[again.mask], atol=1e-5)
    assert again.error < refined.error


def test_a_smaller_balance_leaves_less_to_low_rank():
    W = realistic(48, 40)
    pursued = slr.matrix.pcp.pursue(W, balance=0.8 / 48**0.5, tolerance=1e-6)
    found = candidates(W, balance_ratio=0.8)
    assert torch.equal(found.values.abs().sort().values[-1], pursued.sparse.abs().max())
    ranks = [len(candidates(W, balance_ratio=ratio).low.s) for ratio in (1, 0.8, 0.01)]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] > ranks[1] > ranks[2] == 0


def test_greedy_weighs_squares_by_parameters():
    found = {n: candidates(realistic(m, 20, m), share=1) for n, m in (("a", 24), ("b", 48))}
    pool = Pool(found)
    for name, priority in pool.split(pool.greedy()).items():
        c, size = found[name], sum(found[name].shape)
        entries = torch.stack([part.double().square().mean() for part in c.values.split(size)])
        assert torch.allclose(priority, torch.cat([c.low.s.double().square() / size, entries]))


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_candidates_come_back_from_a_file_to_the_last_bit(pattern, tmp_path):
    W = realistic(48, 40).bfloat16()
    found = candidates(W, share=3, pattern=pattern)
    save_file(found.to_tensors(), tmp_path / "a.safetensors")
    again = Candidates.from_tensors(load_file(tmp_path / "a.safetensors"))
    assert again[3:] == found[3:]
    for ours, theirs in zip(again.to_tensors().items(), found.to_tensors().items(), strict=True):
        assert ours[0] == theirs[0]
        assert torch.equal(ours[1], theirs[1])
    amounts = found.costs - (torch.arange(len(found.costs)) % 2) * found.units
    for ours, theirs in zip(again.refined(amounts, W), found.refined(amounts, W), strict=True):
        same = torch.equal if isinstance(ours, torch.Tensor) else lambda one, two: one == two
        assert same(ours, theirs)
    tensors = found.to_tensors()
    del tensors["V"]
    with pytest.raises(ValueError, match="tensors lack V"):
        Candidates.from_tensors(tensors)


# --- a model ----------------------------------------------------------------------------------


@pytest.fixture
def model(small):
    return slr.load(small, dtype=torch.float32)


@pytest.fixture(scope="module")
def windows(small, text):
    return slr.data.windows(text, slr.load_tokenizer(small), 16, limit=6)


@pytest.fixture(scope="module")
def found(small):
    return dict(propose(slr.load(small, dtype=torch.float32), share=4))


def kept_parameters(model):
    layers = [m for m in model.modules() if isinstance(m, slr.SLRLinear)]
    return sum(int(la.mask.sum()) + la.B.numel() + la.A.numel() for la in layers)


@pytest.mark.parametrize("method", ["learned", "uniform", "greedy"])
@pytest.mark.parametrize("budget", [0.3, 0.5])
def test_budget_is_kept_to_the_parameter(model, windows, found, method, budget):
    dense = sum(c.shape[0] * c.shape[1] for c in found.values())
    before = {name: p.clone() for name, p in model.named_parameters()}
    reports = allocate(model, windows, budget, method=method, found=found, steps=3)
    assert kept_parameters(model) == int(budget * dense)
    assert [report.name for report in reports] == list(found)
    for report in reports:
        layer, W = model.get_submodule(report.name), before[report.name + ".weight"]
        assert (layer.rank, int(layer.mask.sum())) == (report.rank, report.kept)
        error = float(((W - layer.dense()).norm() / W.norm()).detach())
        assert report.error == pytest.approx(error, rel=1e-3)
        assert report.bias == (report.name + ".bias" in before)
        assert not report.bias or torch.equal(layer.bias, before[report.name + ".bias"])
    assert torch.equal(model.model.embed_tokens.weight, before["model.embed_tokens.weight"])


def test_uniform_keeps_the_same_share_everywhere(model, found):
    reports = allocate(model, budget=0.5, method="uniform", found=found)
    for report, c in zip(reports, found.values(), strict=True):
        share = 0.5 * Pool(found).parameters / int(Pool(found).costs.sum())
        assert report.rank == pytest.approx(share * len(c.low.s), abs=1)
        assert report.kept == pytest.approx(share * len(c.places), abs=sum(c.shape))


def test_pattern_is_respected(model, small, windows):
    reports = allocate(model, windows, 0.7, pattern="2:4", share=2, steps=2)
    for report in reports:
        layer = model.get_submodule(report.name)
        assert layer.pattern == slr.patterns.NM(2, 4)
        assert layer.pattern.verify(layer.mask)
        assert report.pattern == "2:4"
    dense = sum(r.shape[0] * r.shape[1] for r in reports)
    assert 0 <= int(0.7 * dense) - kept_parameters(model) < 64 + 128
    with pytest.raises(ValueError, match=re.escape("the n:m parts alone take 0.5")):
        allocate(slr.load(small, dtype=torch.float32), windows, 0.4, pattern="2:4")


@pytest.mark.parametrize("refit", [False, True])
def test_loss_of_a_mask_is_that_of_the_model_it_makes(model, windows, found, refit):
    pool = Pool(found)
    loss = excess_loss(model, pool, windows, len(windows), refit)
    nothing_lost = torch.ones(len(pool.costs), dtype=torch.bool)
    assert loss(nothing_lost * pool.costs, 0) == pytest.approx(0, abs=1e-4)
    mask = torch.rand(len(pool.costs), generator=seeded()) < 0.5
    before = torch.tensor(slr.perplexity(model, windows)).log()
    told = loss(mask * pool.costs, 0)
    place(model, pool, mask * pool.costs, {"refine": "cap"}, refit)
    after = torch.tensor(slr.perplexity(model, windows)).log()
    assert told == pytest.approx(float(after - before), abs=1e-5)
    assert abs(told) > 1e-4


def test_the_same_seed_gives_the_same_model(small, windows, found):
    made = []
    for seed in (1, 1, 2):
        model = slr.load(small, dtype=torch.float32)
        allocate(model, windows, found=found, steps=5, batch=2, rate=1e4, generator=seeded(seed))
        made.append([m.mask for m in model.modules() if isinstance(m, slr.SLRLinear)])
    same = [all(map(torch.equal, made[0], other)) for other in made[1:]]
    assert same == [True, False]


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_saved_and_loaded(small, windows, tmp_path, pattern):
    from transformers import AutoModelForCausalLM

    model = slr.load(small)
    reports = allocate(model, windows, 0.7, method="greedy", share=4, pattern=pattern)
    assert len({report.rank for report in reports}) > 2
    model.save_pretrained(tmp_path / "a")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(again(windows).logits, model(windows).logits)
    for report in reports:
        layer = again.get_submodule(report.name)
        assert (layer.rank, str(layer.pattern)) == (report.rank, str(pattern))
    told = CliRunner().invoke(app, ["info", str(tmp_path / "a")])
    assert told.exit_code == 0, told.output
    spent = sum(r.kept + r.rank * sum(r.shape) for r in reports)
    dense = sum(r.shape[0] * r.shape[1] for r in reports)
    assert f"{dense:,} -> {spent:,} ({spent / dense:.3f})" in told.output
    assert "method CAP, greedy" in told.output
    assert "budget 0.7" in told.output


def test_candidates_of_a_file_give_the_same_model(small, windows, found, tmp_path):
    save_file(pack(found), tmp_path / "a.safetensors")
    read = unpack(load_file(tmp_path / "a.safetensors"))
    backwards = {name: read[name] for name in sorted(read, reverse=True)}
    models = []
    for given in (found, backwards):
        models.append(slr.load(small, dtype=torch.float32))
        allocate(models[-1], windows, 0.4, found=given, steps=5, batch=2, rate=10.0)
    ours, theirs = (made.state_dict() for made in models)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_stage_two_runs_forward_only(model, windows, found, monkeypatch):
    runs = []

    def watched(*args, **kwargs):
        out = forward(*args, **kwargs)
        runs.append(out.logits.requires_grad)
        return out

    forward = model.forward
    monkeypatch.setattr(model, "forward", watched)
    losses = []
    allocate(model, windows, found=found, steps=4, batch=3, losses=losses)
    # Masks, the dense model on each of two batches, the choice before and after on five.
    assert runs == [False] * (4 + 2 + 2 * 5)
    assert len(losses) == 4


def test_streamed_candidates_are_those_of_the_loaded_model(small, found):
    for name, c in propose(Stream(small, dtype=torch.float32), share=4):
        assert torch.equal(c.low.s, found[name].low.s)
        assert torch.equal(c.places, found[name].places)
    stream = Stream(small)
    next(propose(stream))
    assert [next(b.parameters()).is_meta for b in stream.blocks] == [False, True]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m, w: allocate(m, w, method="best"), "method 'best' is unknown"),
        (lambda m, w: allocate(m, w, prior="learned"), "prior 'learned' is unknown"),
        (lambda m, w: allocate(m), "needs calibration windows"),
        (lambda m, w: allocate(m, w, 1.5, found=one()), "budget is 1.5"),
        (lambda m, w: allocate(m, w, 0, found=one()), "budget is 0"),
        (lambda m, w: allocate(m, w, found={}), "no candidates"),
        (lambda m, w: allocate(m, w, found=one(), share=2), "share is for candidates"),
        (lambda m, w: allocate(m, w, found={"x": candidates(torch.eye(4))}), "'x'"),
        (lambda m, w: allocate(m, w[0], found=one(), steps=1), "(16,)"),
        (lambda m, w: allocate(m, w, found=one(), steps=-1), "steps is -1"),
        (lambda m, w: allocate(m, w, found=one(), rate=0), "rate 0"),
        (lambda m, w: allocate(m, w, found=one(), width=0), "width is 0"),
        (lambda m, w: allocate(broken(m), w, found=one(), steps=1), "loss 0 is nan"),
        (lambda m, w: allocate(broken(m, "q_proj"), w), "layers.0.self_attn.q_proj: weight holds"),
        (lambda m, w: allocate(bare("layers"), w), "Bare has no linear layers"),
        (lambda m, w: allocate(bare("other"), w), "Bare has no decoder blocks at model.layers"),
        (lambda m, w: candidates(torch.eye(4), share=0), "share is 0"),
        (lambda m, w: candidates(torch.eye(4), balance_ratio=0), "balance_ratio is 0"),
        (lambda m, w: candidates(torch.eye(4), pattern="0.5"), "pattern 0.5"),
        (lambda m, w: candidates(torch.ones(4, 6), pattern="2:4"), "divisible by 4"),
        (lambda m, w: candidates(torch.eye(4)).dense(torch.tensor([-1])), "from 0 to the costs"),
        (lambda m, w: project(torch.ones(2), torch.ones(2), 3), "budget is 3"),
        (lambda m, w: project(torch.ones(2), torch.zeros(2), 0), "must be positive"),
        (lambda m, w: choose(torch.ones(1), torch.ones(1), torch.ones(1), -1), "budget is -1"),
        (lambda m, w: rising(float("nan")), "loss 0 is nan"),
        (lambda m, w: rising(1.0), "the loss diverged, from 4.5 to 34.5 in 40 steps; rate 0.05"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(model, windows, call, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        call(model, windows)
    assert not any(isinstance(m, slr.SLRLinear) for m in model.modules())


def one():
    weight = realistic(64, 64, 5)
    return {"model.layers.0.self_attn.q_proj": candidates(weight, share=4)}


def broken(model, name="embed_tokens"):
    """Not a number in one place."""
    modules = (m for inner, m in model.named_modules() if inner.endswith(name))
    next(modules).weight.data[0].fill_(float("nan"))
    return model


def bare(name):
    """A model whose blocks hold no linear layers."""
    made = type("Bare", (nn.Module,), {})()
    made.model = nn.Module()
    made.model.add_module(name, nn.ModuleList([nn.LayerNorm(4)]))
    return made


def rising(by):
    learn(Policy(torch.ones(3), 1), lambda mask, step: by * step, 40, seeded())


def test_a_level_loss_is_not_taken_for_a_diverging_one():
    g = seeded(1)
    for seed in range(20):
        learn(Policy(torch.ones(3), 1), lambda mask, step: torch.randn(1, generator=g).item(), 40,
              seeded(seed))  # fmt: skip


def test_a_choice_worse_than_the_start_is_refused(model, windows, found, monkeypatch):
    pool = Pool(found)
    costs, spend = pool.costs, pool.budget(0.5)
    start = choose(soften(pool.uniform(), costs, spend), costs, pool.units, spend)

    def rigged(*_):
        return lambda amounts, step: 0.5 if torch.equal(amounts, start) else 1.0 + 1e-6 * step

    monkeypatch.setattr("slr.methods.cap.allocation.excess_loss", rigged)
    with pytest.raises(ValueError, match=r"it is 1 with the learned choice and was 0\.5 at the"):
        allocate(model, windows, found=found, steps=8, rate=1e4)
    assert not any(isinstance(m, slr.SLRLinear) for m in model.modules())
    allocate(model, windows, found=found, steps=0)


def test_pursuit_that_has_not_converged_is_a_warning_with_the_name(model):
    before = {name: p.clone() for name, p in model.named_parameters()}
    says = r"model\.layers\.0\.self_attn\.q_proj: .* stopped after 2 iterations"
    with pytest.warns(RuntimeWarning, match=says):
        next(propose(model, iterations=2))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# --- what was measured ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cap", "cap-refit"])
def test_learned_beats_uniform_for_every_seed_at_the_same_size(name):
    folder = Path(__file__).parent.parent / "results" / "measured" / "tiny"
    rows = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    losses = {}
    for row in rows:
        losses.setdefault(row["choice"], []).append(row["loss"])
        if row["choice"] in ("uniform", "greedy", "start", "learned", "magnitude"):
            assert row["parameters"] == 2_408_448
        elif row["choice"] != "dense":
            assert 0 <= 2_408_448 - row["parameters"] < 0.003 * 2_408_448
    assert len(losses["learned"]) == 3
    assert max(losses["learned"]) < losses["uniform"][0]


def test_a_compressed_model_is_refused(model, found):
    allocate(model, method="uniform", found=found)
    with pytest.raises(ValueError, match="compressed already"):
        allocate(model, method="uniform")
