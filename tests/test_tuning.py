"""A tuned block: nearer to the dense one, never further, and otherwise what it was."""

import copy

import pytest
import torch

import slr
from slr.checkpoint.folder import load_tokenizer
from slr.layer.rounded import layer_of
from slr.model import tuning
from slr.model.calibrate import first_inputs
from slr.model.tuning import tune_block


@pytest.fixture
def prepared(text):
    """A compressed block of the embedded model, as it was, and its inputs with dense outputs."""
    model = slr.load("tiny", dtype=torch.float32)
    windows = slr.data._tokens(text, load_tokenizer(slr.tiny.path()))[: 9 * 64].view(9, 64)
    inputs = first_inputs(model, windows).beside()
    dense = copy.deepcopy(model.model.layers[0])
    inputs.advance_dense(0, dense)
    recipe = slr.Recipe("magnitude", "2:4", rank=4, iterations=5, skip=["*.o_proj"])
    slr.compress(model, recipe)
    return model.model.layers[0], dense, inputs


def held_error(block, inputs):
    return tuning._error(block, 0, inputs, range(8, 9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_serves_the_held_out_window_best_is_kept(prepared, dtype):
    block, _, inputs = prepared
    block.to(dtype)
    before = copy.deepcopy(block)
    trace = tune_block(block, 0, inputs, 3)
    assert len(trace) == 4
    assert min(trace) < 0.8 * trace[0]
    block.float()
    before.float()
    assert held_error(before, inputs) == pytest.approx(trace[0], rel=1e-4)
    assert held_error(block, inputs) == pytest.approx(
        min(trace), rel=1e-4 if dtype.itemsize > 2 else 0.1
    )
    for name, layer in block.named_modules():
        old = before.get_submodule(name)
        if isinstance(old, slr.SLRLinear):
            assert layer.pattern == old.pattern
            assert torch.equal(layer.mask, old.mask)
            for part in ("values", "B", "A"):
                assert not torch.equal(getattr(layer, part), getattr(old, part))
    assert torch.equal(block.self_attn.o_proj.weight, before.self_attn.o_proj.weight)
    assert not torch.equal(block.input_layernorm.weight, before.input_layernorm.weight)
    for name, parameter in block.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == before.get_parameter(name).requires_grad


def test_dtypes_are_what_they_were(prepared):
    block, _, inputs = prepared
    block.bfloat16()
    tune_block(block, 0, inputs, 1)
    assert {p.dtype for p in block.parameters()} == {torch.bfloat16}


def test_a_block_that_only_gets_worse_stays_as_it_came(prepared, monkeypatch):
    block, _, inputs = prepared
    before = copy.deepcopy(block.state_dict())
    monkeypatch.setattr(tuning, "RATE", 30.0)
    trace = tune_block(block, 0, inputs, 2)
    assert not trace[1] < trace[0]
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_twice_is_the_same(prepared):
    block, _, inputs = prepared
    other = copy.deepcopy(block)
    assert tune_block(block, 0, inputs, 1) == tune_block(other, 0, inputs, 1)
    for name, value in block.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def test_one_window_is_enough(prepared):
    block, _, inputs = prepared
    inputs.hidden, inputs.dense = inputs.hidden[:1], inputs.dense[:1]
    trace = tune_block(block, 0, inputs, 2)
    assert min(trace) < trace[0]


def test_the_report_is_of_the_tuned_layer():
    model, dense = slr.load("tiny", dtype=torch.float32), slr.load("tiny", dtype=torch.float32)
    recipe = slr.Recipe("magnitude", rank=4, iterations=5, tune=1, samples=2, seqlen=32)
    for report in slr.compress(model, recipe):
        weight = dense.get_parameter(f"{report.name}.weight")
        error = (weight - model.get_submodule(report.name).dense()).norm() / weight.norm()
        assert report.error == pytest.approx(error.item(), rel=1e-4)
        assert report.output_error is None
        assert report.error > report.pruned_error * 0.5


@pytest.mark.parametrize("tune", [-1, 1.5, True, "2"])
def test_passes_are_counted(tune):
    with pytest.raises((TypeError, ValueError), match="tune"):
        slr.Recipe(tune=tune)


def test_a_pruned_model_is_tuned_too():
    recipe = slr.Recipe("magnitude", refine="none", tune=2, samples=2, seqlen=64)
    model = slr.load("tiny", dtype=torch.float32)
    slr.compress(model, recipe)
    assert all(m.rank == 0 for m in model.modules() if isinstance(m, slr.SLRLinear))


def _codes():
    gen = torch.Generator().manual_seed(0)
    W = torch.randn(16, 16, generator=gen)
    found = slr.refine(W, None, 4, grid="int4 by 8", factors="int8", iterations=4)
    layer = layer_of(found, torch.zeros(16))
    return torch.nn.Sequential(layer.requires_grad_(False))


@pytest.mark.parametrize("fixed", [None, torch.float32])
def test_codes_that_learn_nothing_stay_as_they_came(fixed):
    block = _codes()
    before = {name: value.clone() for name, value in block.state_dict().items()}
    with tuning.trainable(block, fixed):
        pass
    after = block.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(p.requires_grad for p in block.parameters())


@pytest.mark.parametrize("fixed", [None, torch.float32])
def test_what_is_measured_of_codes_is_what_is_stored(fixed):
    block, x = _codes(), torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    with tuning.trainable(block, fixed) as parameters:
        with torch.no_grad():
            for p in parameters:
                p.mul_(1.01).add_(0.003)
            measured = block(x)
        learnt = block(x).detach()
    assert torch.allclose(block(x), measured, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(learnt, measured, rtol=1e-5, atol=1e-5)
