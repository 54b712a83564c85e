"""The loop that trains, all of LoSparse on a causal model, and its way into a checkpoint."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import slr
from slr.methods import losparse
from slr.methods.losparse import Pruner, fit, train
from slr.model import hf


class Net(nn.Module):
    """A little regression; `broken` makes its loss what it says from that call on."""

    def __init__(self, broken=(10**9, 0.0)):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 12), nn.Linear(12, 6)])
        self.broken, self.calls = broken, 0

    def forward(self, x):
        self.calls += 1
        y = self.layers[1](self.layers[0](x).tanh())
        loss = (y - x.flip(-1)).square().mean()
        if self.calls >= self.broken[0]:
            loss = loss * self.broken[1]
        return SimpleNamespace(loss=loss, logits=y)


def batches(count):
    g = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(16, 6, generator=g)} for _ in range(count)]


def converted(mode="itp", **options):
    torch.manual_seed(0)
    model = Net(**options)
    losparse.convert(model, mode=mode, rank_ratio=0.2)
    return model


def test_it_trains_and_prunes():
    model = converted("losparse")
    pruner = Pruner(model, remaining=0.7, steps=40, warmup=4, cooldown=10)
    losses = fit(model.eval(), batches(40), lr=0.02, pruner=pruner)
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert 0.6 < losparse.remaining_ratio(model) <= 0.7
    assert pruner.done == 40
    assert not model.training


def test_the_rate_rises_falls_and_gradients_are_clipped(monkeypatch):
    rates, norms = [], []
    step = torch.optim.AdamW.step

    def watch(self, *args, **options):
        rates.append(self.param_groups[0]["lr"])
        grads = [p.grad.flatten() for p in self.param_groups[0]["params"]]
        norms.append(float(torch.cat(grads).norm()))
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    # Too large a loss: a hundredfold from the first step on.
    fit(converted(broken=(0, 100.0)), batches(20), lr=0.01)
    expected = [0.01 * min(t / 2, (1 + math.cos(math.pi * t / 20)) / 2) for t in range(1, 21)]
    assert rates == pytest.approx(expected)
    assert max(norms) <= 1.0001


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e4])
def test_a_diverging_loss_leaves_the_model_as_it_was(value):
    model = converted(broken=(7, value))
    pruner = Pruner(model, remaining=0.4, steps=12)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"loss diverges: .* at step 7.*as it was.*below 0.02"):
        fit(model, batches(12), lr=0.02, pruner=pruner)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert pruner.done == 0
    assert not pruner.importance
    model.broken = (10**9, 0.0)
    fit(model, batches(12), lr=0.02, pruner=pruner)  # and it can be tried again
    assert losparse.remaining_ratio(model) <= 0.4


def test_infinite_gradients_of_a_finite_loss_diverge_too():
    model = converted()
    model.layers[1].bias.register_hook(lambda g: g * float("inf"))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"non-finite.*as it was"):
        fit(model, batches(3), lr=0.02)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_other_errors_are_not_hidden():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fit(converted(), [{"x": torch.ones(2, 5)}], lr=0.1)


def test_bad_input_of_fit_is_named():
    model = converted()
    with pytest.raises(ValueError, match="batches is empty"):
        fit(model, [], lr=0.1)
    with pytest.raises(ValueError, match="3 batches, fewer than the pruner's 9 steps"):
        fit(model, batches(3), lr=0.1, pruner=Pruner(model, remaining=0.5, steps=9))


def test_a_teacher_is_learned_from():
    torch.manual_seed(1)
    teacher, student = Net(), converted()
    with torch.no_grad():
        ours, theirs = (m(**batches(1)[0]) for m in (student, teacher))
        apart = losparse.distillation_loss(ours.logits, theirs.logits).item()
    before = copy.deepcopy(teacher.state_dict())
    losses = fit(student, batches(1), lr=0.1, teacher=teacher)
    assert losses[0] == pytest.approx(ours.loss.item() + apart, rel=1e-5)
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())


def test_distillation_by_hand():
    def model(logits, *hidden):
        return lambda **batch: SimpleNamespace(
            loss=torch.tensor(2.0), logits=torch.tensor(logits),
            hidden_states=[torch.tensor(h) for h in hidden],
        )  # fmt: skip

    student = model([[0.0, 1.0]], [[1.0, 2.0]], [[3.0, 4.0]])
    teacher = model([[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 4.0]])
    loss, outputs = losparse.Distillation().learn(student, teacher, {})
    assert loss == 2 + 15 * (4 / 2 + 9 / 2)
    assert outputs.loss == 2
    loss, _ = losparse.Distillation(output=3, hidden=0).learn(student, teacher, {})
    p, q = (torch.tensor(x).div(2).softmax(0) for x in ([1.0, 0.0], [0.0, 1.0]))
    assert loss.item() == pytest.approx(2 + 3 * 4 * float((p * (p / q).log()).sum()), rel=1e-5)
    short = model([[1.0, 0.0]], [[1.0, 0.0]])
    with pytest.raises(ValueError, match="student has 2 hidden states and teacher 1; they must"):
        losparse.Distillation().learn(student, short, {})
    other = model([[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 4.0, 0.0]])
    with pytest.raises(ValueError, match=r"student has shape \(1, 2\) and teacher \(1, 3\)"):
        losparse.Distillation().learn(student, other, {})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"output": -1}, "output is -1; it must be 0 or more"),
        ({"hidden": math.inf}, "hidden is inf; it must be 0 or more"),
        ({"temperature": 0}, "temperature is 0; it must be above 0"),
        ({"hidden": 0}, "output and hidden are both 0"),
    ],
)
def test_bad_distillation_is_named(options, says):
    with pytest.raises(ValueError, match=says):
        losparse.Distillation(**options)


def tiny():
    return slr.load("tiny", dtype=torch.float32)


@pytest.fixture(scope="module")
def text():
    tokenizer = slr.load_tokenizer("tiny")
    return {
        split: slr.data.windows(slr.data.corpus(split), tokenizer, 64, count)
        for split, count in (("calibration", 48), ("validation", 24))
    }


def test_losparse_beats_both_baselines_on_the_embedded_model(text):
    """A dozen steps at 30%; benchmarks/losparse.py has longer trainings at every ratio."""
    found = {}
    for mode in losparse.MODES:
        model = tiny()
        train(model, text["calibration"], remaining=0.3, mode=mode, lr=1e-3)
        assert losparse.remaining_ratio(model) == pytest.approx(0.3, abs=0.005)
        assert all(layer.kept is None for layer in losparse.layers(model).values())
        found[mode] = slr.perplexity(model, text["validation"])
    assert found["losparse"] < 0.9 * min(found["itp"], found["lowrank"])


def test_skipped_layers_stay_dense_and_frozen_ones_as_they_were(text):
    model = slr.load("tiny", dtype=torch.float32).requires_grad_(False)
    model.model.layers[0].requires_grad_(True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    windows = text["calibration"][:8]
    train(model, windows, remaining=0.5, skip=["model.layers.[1-9].*"], lr=1e-3)
    found = losparse.layers(model)
    assert len(found) == 7
    assert all(name.startswith("model.layers.0.") for name in found)
    after = {k: v for k, v in model.state_dict().items() if not k.startswith("model.layers.0.")}
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    with pytest.raises(ValueError, match="'no such' fits no linear layer"):
        train(tiny(), windows, remaining=0.5, skip=["no such"])


def test_a_stored_student_is_taught_by_the_dense_model(text, tmp_path):
    """Phase one, a file, phase two: nearer to the dense model, and as small as before."""
    model, windows = tiny(), text["calibration"]
    train(model, windows[:24], remaining=0.3, lr=1e-3)
    losparse.save(model, tmp_path / "student.safetensors")
    student = losparse.load(tiny(), tmp_path / "student.safetensors")
    sizes = {name: layer.rows.clone() for name, layer in losparse.layers(student).items()}
    teacher = tiny().train()
    before, held = copy.deepcopy(teacher.state_dict()), text["validation"][:8]

    def apart():
        with torch.no_grad():
            a, b = (m(held, output_hidden_states=True).hidden_states for m in (student, teacher))
        return sum(float((x - y).square().mean()) for x, y in zip(a, b, strict=True))

    gap = apart(), slr.perplexity(student, text["validation"])
    weights = losparse.Distillation(output=1, hidden=1)
    batch = {"input_ids": windows[:4], "labels": windows[:4]}
    first = weights.learn(student, teacher, batch)[0].item()
    modes = []
    teacher.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    losses = losparse.teach(student, teacher, windows, distillation=weights, lr=1e-3)
    assert len(losses) == 12
    assert losses[0] == pytest.approx(first, rel=1e-5)
    assert set(modes) == {False}
    assert apart() < 0.9 * gap[0]
    assert slr.perplexity(student, text["validation"]) < gap[1]
    assert teacher.training
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    for name, layer in losparse.layers(student).items():
        assert torch.equal(layer.rows, sizes[name])
        assert len(layer.S) == len(layer.rows)


def test_a_student_that_is_not_pruned_yet_is_named(text):
    student = tiny()
    losparse.convert(student)
    with pytest.raises(
        ValueError, match=r"q_proj still has its pruned rows; call losparse\.compact"
    ):
        losparse.teach(student, tiny(), text["calibration"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lr": 1e6}, "the loss diverges"),
        ({"warmup": 0.7, "cooldown": 0.4}, "must be below steps"),
        ({"remaining": 0.001}, "U and V alone take"),
        ({"mode": "dense"}, "mode 'dense' is unknown"),
    ],
)
def test_a_failed_training_leaves_the_dense_model(options, says, text):
    model, windows = tiny(), text["calibration"][:24]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=says):
        train(model, windows, **{"remaining": 0.3, **options})
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], v) for k, v in after.items())


@pytest.mark.parametrize("mode", losparse.MODES)
@pytest.mark.parametrize("compact", [True, False])
def test_a_checkpoint_like_any_other(mode, compact, text, tmp_path):
    from transformers import AutoModelForCausalLM

    source, model = tiny(), tiny()
    losparse.convert(model, mode=mode, rank_ratio=0.15)
    g = torch.Generator().manual_seed(0)
    for layer in losparse.layers(model).values():
        if layer.kept is not None:
            layer.kept.copy_(torch.rand(layer.out_features, generator=g) < 0.2)
    count = losparse.account(model).nonzero
    if compact:
        losparse.compact(model)
    ids = text["validation"][:2]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    records = losparse.to_slr(model, source)
    assert sum(r["kept"] + r["rank"] * sum(r["shape"]) for r in records.values()) == count
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-3)
    layer = model.model.layers[1].mlp.down_proj
    W = source.model.layers[1].mlp.down_proj.weight.detach()
    record = records["model.layers.1.mlp.down_proj"]
    assert record["error"] == pytest.approx(
        float((W - layer.dense().detach()).norm() / W.norm()), rel=1e-4
    )
    hf.adopt(model, {"source": "tiny", "recipe": {}, "calibration": None, "layers": records})
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    loaded = again.get_submodule("model.layers.1.mlp.down_proj")
    assert isinstance(loaded, slr.SLRLinear)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_to_slr_needs_the_source_it_came_from():
    model = Net()
    losparse.convert(model, mode="itp")
    with pytest.raises(ValueError, match=r"source has no nn.Linear 'layers.0' of shape \(12, 6\)"):
        losparse.to_slr(model, nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(5, 12)])}))
    assert isinstance(model.layers[0], losparse.LoSparseLinear)


@pytest.mark.parametrize("compact", [True, False])
def test_to_slr_keeps_biases(compact):
    source, model = Net(), Net()
    model.load_state_dict(source.state_dict())
    losparse.convert(model, rank_ratio=0.3)
    model.layers[0].kept[::2] = False
    x = batches(1)[0]["x"]
    if compact:
        losparse.compact(model)
    with torch.no_grad():
        expected = model(x).logits
        records = losparse.to_slr(model, source)
        assert torch.allclose(model(x).logits, expected, atol=1e-6)
    assert records["layers.0"]["bias"]
    assert torch.equal(model.layers[0].bias, source.layers[0].bias)
