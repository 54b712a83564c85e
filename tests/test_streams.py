"""Two streams: what is found of a block, what is asked of its layers, and that it helps."""

import copy

import pytest
import torch
from helpers import activations, realistic
from test_pipeline import family, hashes, stop_after_first_block
from torch.nn.functional import linear

import slr
from slr.checkpoint import estimates
from slr.checkpoint.folder import load_tokenizer
from slr.matrix.gram import RIDGE, aimed
from slr.matrix.metric import Gram
from slr.matrix.statistics import CrossStatistic
from slr.model.arithmetic import computing
from slr.model.block import compress_layer, measure
from slr.model.blocks import decoder_blocks
from slr.model.calibrate import first_inputs
from slr.model.stream import FAMILIES
from slr.model.streams import look, stages

BEST = {"prune": "wanda", "rank": 4, "iterations": 9, "samples": 4, "seqlen": 32}
PLAIN = {**BEST, "refine": "activations", "update_mask": "admm"}


def spoilt(block, share=0.3, seed=0):
    """A block whose linear layers are a little off."""
    block, generator = copy.deepcopy(block), torch.Generator().manual_seed(seed)
    for layer in block.modules():
        if isinstance(layer, torch.nn.Linear):
            noise = torch.randn(layer.weight.shape, generator=generator)
            layer.weight.data += share * layer.weight.data.std() * noise
    return block


def test_an_aim_is_ridge_regression():
    W, X, Y = realistic(6, 16), activations(100, 16, seed=1), activations(100, 6, seed=2)
    H = X.T @ X / len(X)
    cross = CrossStatistic(6, 16)
    cross.update(Y[:30], X[:30])
    cross.update(Y[30:].reshape(7, 10, 6), X[30:].reshape(7, 10, 16))
    found = aimed(W, Gram(H), cross.moments())
    ridge = (RIDGE * H.diagonal().mean() * len(X)).sqrt()
    # min ‖X Vᵀ - (X Wᵀ + Y)‖² + ‖ridge (V - W)‖², as one least-squares problem
    left = torch.cat([X, ridge * torch.eye(16)]).double()
    right = torch.cat([X @ W.T + Y, ridge * W.T]).double()
    assert torch.allclose(found.double(), torch.linalg.lstsq(left, right).solution.T, atol=1e-5)


def test_an_aim_of_nothing_is_the_weight():
    W, H = realistic(6, 16), torch.eye(16)
    assert torch.equal(aimed(W, Gram(H), torch.zeros(6, 16)), W)


def test_other_tokens_are_refused():
    with pytest.raises(ValueError, match=r"y is \(3, 2\); it must be \(4, 2\)"):
        CrossStatistic(2, 5).update(torch.zeros(3, 2), torch.zeros(4, 5))


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_stages_of_every_family(kind, tmp_path):
    model = family(kind, tmp_path / kind, tied=False, dtype=torch.float32)
    inputs = first_inputs(model, torch.randint(96, (2, 16)))
    found = stages(decoder_blocks(model)[0], 0, inputs)
    qkv = {"phi3": ["qkv_proj"]}.get(kind, ["q_proj", "k_proj", "v_proj"])
    up = {"phi3": ["gate_up_proj"], "opt": ["fc1"]}.get(kind, ["gate_proj", "up_proj"])
    last = {"opt": ["out_proj", "fc2"]}.get(kind, ["o_proj", "down_proj"])
    short = [[name.rpartition(".")[2] for name in stage.names] for stage in found]
    assert short == [qkv, last[:1], up, last[1:]]
    straight = kind != "gemma3_text"  # where a norm stands before the residual stream
    assert [stage.added for stage in found] == [False, straight, False, straight]
    assert [len(stage.before) for stage in found] == [0, 0, straight, straight]


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_block_is_given_what_its_model_gives_it_and_no_cache(small, name, monkeypatch):
    """Under the name that this version of transformers has for it, and no other."""
    model = slr.load(small, dtype=torch.float32)

    def forward(input_ids, use_cache):
        states = model.model.embed_tokens(input_ids)
        for block in model.model.layers:
            states = block(states, **{name: "a cache"}, use_cache=use_cache)

    monkeypatch.setattr(model, "forward", forward)
    inputs = first_inputs(model, torch.randint(4096, (2, 16)))
    assert {size: given[0] for size, given in inputs.arguments.items()} == {
        1: {name: None, "use_cache": False},
        2: {name: None, "use_cache": False},
    }


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_what_is_lacking_is_what_the_dense_model_puts_out(small, rows):
    """Against the sums written out, with the block's own parts called by hand."""
    model = slr.load(small, dtype=torch.float32)
    dense = model.model.layers[0]
    inputs = first_inputs(model, torch.randint(4096, (3, 16)), rows=rows).beside()
    inputs.hidden += 0.1 * torch.randn_like(inputs.hidden)
    here, there = inputs.hidden.clone(), inputs.dense.clone()
    block = spoilt(dense)

    def parts(block, states):
        x = block.input_layernorm(states)
        arguments = {**inputs.arguments[1][0]}
        with torch.no_grad():
            put = torch.cat([block.self_attn(row[None], **arguments)[0] for row in x])
        middle = states + put
        y = block.post_attention_layernorm(middle)
        mlp = block.mlp
        return x, middle, y, mlp.act_fn(mlp.gate_proj(y)) * mlp.up_proj(y)

    x, middle, y, z = parts(block, here)
    x_, middle_, y_, z_ = parts(dense, there)
    down = dense.mlp.down_proj.weight
    wanted = {
        "self_attn.k_proj": (linear(x_ - x, dense.self_attn.k_proj.weight), x),
        "mlp.up_proj": (linear(y_ - y, dense.mlp.up_proj.weight), y),
        "mlp.down_proj": (linear(z_ - z, down) + middle_ - middle, z),
    }
    found = {}
    for number, stage in enumerate(stages(dense, 0, inputs)):
        found |= look(stage, block, dense, 0, inputs, last=number == 3)
    assert len(found) == 7
    for name, (lacking, x) in wanted.items():
        lacking, x = (each.detach().reshape(-1, each.shape[-1]) for each in (lacking, x))
        assert torch.allclose(found[name].lacking, lacking.T @ x / len(x), atol=1e-5), name
        assert torch.allclose(found[name].gram, x.T @ x / len(x), atol=1e-5), name
    assert torch.equal(inputs.hidden, here)
    assert torch.allclose(inputs.dense, middle_ + linear(z_, down, dense.mlp.down_proj.bias))


def test_where_nothing_was_spoilt_nothing_is_asked(small):
    """The first layers of a model have the dense model's own inputs."""
    model = slr.load(small, dtype=torch.float32)
    inputs = first_inputs(model, torch.randint(4096, (3, 16))).beside()
    dense = model.model.layers[0]
    for stage in stages(dense, 0, inputs):
        for known in look(stage, dense, dense, 0, inputs, last=False).values():
            assert not known.lacking.any()


def test_the_error_told_is_of_what_was_aimed_at():
    W, X = realistic(16, 32), activations(200, 32, seed=1)
    H, lacking = X.T @ X / len(X), 0.2 * activations(16, 32, seed=2)
    known = slr.steps.Known(H.diagonal().sqrt(), H, lacking)
    recipe = slr.Recipe("wanda", rank=2, iterations=9)
    made = compress_layer(W, recipe, known=known)
    V = aimed(W, Gram(H), lacking)
    assert not torch.allclose(V, W, rtol=0.1)
    assert torch.equal(made.target, V)
    told = measure(W, made, known)
    left = (V - made.refined.dense()) @ X.T
    assert told.output_error == pytest.approx((left.norm() / (V @ X.T).norm()).item(), rel=1e-4)
    assert told.error == pytest.approx(((W - made.refined.dense()).norm() / W.norm()).item())


@pytest.mark.parametrize("asymmetric", [False, True])
def test_an_estimate_tries_out_what_will_be_done(small, asymmetric):
    model = slr.load(small, dtype=torch.float32)
    inputs = first_inputs(model, torch.randint(4096, (3, 16)))
    recipe = slr.Recipe(**BEST, asymmetric=asymmetric)
    known = estimates._learn(model.model.layers[0], recipe, inputs)
    assert len(known) == 7
    assert all((each.lacking is not None) == asymmetric for each in known.values())


def after(model, windows, recipe):
    """The outputs of the compressed model's blocks, and the dense model's."""

    def last(model):
        with torch.no_grad():
            return model.model(windows).last_hidden_state

    dense = last(model)
    slr.compress(model, recipe, calibration=windows)
    return last(model), dense


@pytest.mark.parametrize(("options", "most"), [({"asymmetric": True}, 0.8), ({"tune": 2}, 0.98)])
def test_the_dense_model_is_followed_more_closely(options, most, text):
    ids = slr.data._tokens(text, load_tokenizer(slr.tiny.path()))[: 8 * 128].view(8, 128)
    errors = {}
    for name, recipe in {
        "plain": slr.Recipe(**{**PLAIN, "seqlen": 128, "samples": 8}),
        "more": slr.Recipe(**{**PLAIN, "seqlen": 128, "samples": 8}, **options),
    }.items():
        found, dense = after(slr.load("tiny", dtype=torch.float32), ids, recipe)
        errors[name] = float((found - dense).norm() / dense.norm())
    assert errors["more"] < most * errors["plain"]


@pytest.mark.parametrize(
    "options", [{}, {"tune": 1}, {"refine": "weights", "tune": 1}, {"prepare": "induction"}]
)
def test_stopped_it_ends_with_the_same_files(small, tmp_path, options):
    recipe = {**BEST, **options}
    slr.compress(small, slr.Recipe(**recipe), out=tmp_path / "calm")
    stop_after_first_block(small, tmp_path / "out", recipe)
    slr.compress(small, slr.Recipe(**recipe), out=tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "calm")


@pytest.mark.parametrize("kind", ["opt", "gemma3_text", "phi3"])
@pytest.mark.parametrize("options", [{}, {"tune": 1}, {"skip": ["*.0.*"]}])
def test_a_folder_and_a_loaded_model_become_the_same(kind, options, tmp_path):
    whole = family(kind, tmp_path / "source", tied=True)
    windows = torch.randint(96, (3, 32))
    recipe = slr.Recipe(prune="wanda", rank=2, iterations=5, **options)
    reports = slr.compress_model(whole, recipe, windows)
    streamed = slr.compress(tmp_path / "source", recipe, out=tmp_path / "out", calibration=windows)
    assert [r[:-1] for r in streamed] == [r[:-1] for r in reports]
    with torch.no_grad():
        assert torch.equal(slr.load(tmp_path / "out")(windows).logits, whole(windows).logits)


def test_what_is_narrowed_for_a_while_is_as_it_was():
    for own, other in (
        (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float32),
    ):  # fmt: skip
        layer = torch.nn.Linear(8, 8).to(own)
        before = layer.weight.detach().clone()
        with computing(layer, other):
            assert layer.weight.dtype == other
        assert torch.equal(layer.weight, before)
