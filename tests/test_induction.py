import copy
import re
import warnings

import pytest
import torch
from torch import nn

import slr
from slr.matrix.patterns import NM, Unstructured, parse
from slr.matrix.statistics import NormStatistic
from slr.methods.blockwise import plan_layers
from slr.methods.induction import Induction, Scales, absorb, induce, induce_block, train_scales
from slr.methods.induction.families import dense_linears
from slr.methods.induction.loss import BlockLoss, soft_mask, starting_scales
from slr.methods.induction.scales import PLACES, ROWS, SHIFTS
from slr.model import hf
from slr.model.block import compress_block
from slr.model.blocks import decoder_blocks
from slr.model.calibrate import first_inputs, observe
from slr.model.stream import Stream


def random_model(kind="llama", **options):
    """A small float64 model with grouped heads, whose biases (if it has any) are not zero."""
    from transformers import AutoConfig, AutoModelForCausalLM

    biases = {"attention_bias": True, "mlp_bias": True} if kind == "llama" else {}
    options = {"ffn_dim": 80, "word_embed_proj_dim": 48, **options} if kind == "opt" else options
    sizes = {
        "vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    config = AutoConfig.for_model(kind, **{**sizes, **biases, **options})
    model = AutoModelForCausalLM.from_config(config).double().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
        elif "norm" in name:
            nn.init.uniform_(parameter, 0.5, 2)
    return model


def norms_in_float64(model, monkeypatch):
    """transformers' RMSNorm computes in float32, which would hide what float64 can show."""

    def forward(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            monkeypatch.setattr(type(module), "forward", forward)


def random_scales(block, shift=True):
    ones = Scales.ones(block)
    made = {name: 3 * torch.randn_like(log).clamp(-2, 2) for name, log in ones.logs().items()}
    moved = {name: torch.randn_like(each) for name, each in ones.shifts().items() if shift}
    return Scales(**made, **moved)


def outputs(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "opt"])
def test_absorbed_scales_change_no_output(kind, monkeypatch):
    model, ids = random_model(kind), torch.randint(300, (2, 20))
    norms_in_float64(model, monkeypatch)
    before, weights = outputs(model, ids), [p.clone() for p in model.parameters()]
    for block in decoder_blocks(model):
        scales = random_scales(block)
        # of those with an RMSNorm, which has no bias, one has a bias of o
        shifts = {"llama": {"shift"}, "opt": {"shift", "attention_shift", "mlp_shift"}}
        assert scales.shifts().keys() == shifts.get(kind, set())
        assert (scales.rotary is None) == (kind == "qwen3")  # whose q and k are normed
        absorb(block, scales)
    assert float((outputs(model, ids) - before).abs().max()) < 1e-10 * float(before.abs().max())
    changed = [not torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True)]
    # embeddings, last norm, head; in each block biases of gate and down, or norms of q and k
    kept = 3 + 2 * (2 if kind in ("llama", "qwen3") else 0)
    if kind == "opt":  # whose head is tied, and norm biased; there are positions, and fc2's bias
        kept = 4 + 2
    assert sum(changed) == len(changed) - kept


@pytest.mark.parametrize(
    ("kind", "name"),
    [("llama", name) for name in PLACES[:6]] + [("opt", name) for name in PLACES],
)
def test_each_scale_alone_moves_something_and_no_output(kind, name, monkeypatch):
    model, ids = random_model(kind), torch.randint(300, (1, 16))
    norms_in_float64(model, monkeypatch)
    before = outputs(model, ids)
    block = decoder_blocks(model)[1]
    scales = Scales.ones(block)
    getattr(scales, name).normal_()
    weights = {k: p.clone() for k, p in block.named_parameters()}
    absorb(block, scales)
    moved = {k for k, p in block.named_parameters() if not torch.equal(p, weights[k])}
    assert len(moved) >= 2
    assert float((outputs(model, ids) - before).abs().max()) < 1e-10


def test_rotary_scales_are_shared_by_the_pair_that_turns_together(monkeypatch):
    """A scale on channel i alone, not on i + d/2, is no equivalence under RoPE."""
    model, ids = random_model(), torch.randint(300, (1, 16))
    norms_in_float64(model, monkeypatch)
    before, attention = outputs(model, ids), decoder_blocks(model)[0].self_attn
    with torch.no_grad():
        for layer, factor in ((attention.q_proj, 2.0), (attention.k_proj, 0.5)):
            layer.weight[:: attention.head_dim] *= factor
            layer.bias[:: attention.head_dim] *= factor
    assert float((outputs(model, ids) - before).abs().max()) > 1e-4


def test_a_scale_of_normed_queries_is_refused():
    block = decoder_blocks(random_model("qwen3"))[0]
    scales = Scales(**Scales.ones(block).logs(), rotary=torch.zeros(8))
    with pytest.raises(ValueError, match=r"scales.rotary has shape \(8,\); it must be None"):
        absorb(block, scales)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("gemma3_text", {"head_dim": 8}),
        ("phi3", {"pad_token_id": 0}),
        ("gemma2", {"head_dim": 8}),
    ],
)
def test_families_in_which_scales_cannot_move_are_named(kind, sizes):
    model = random_model(kind, **sizes)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"of model type '{kind}'; scales can be moved exactly"):
        induce(model, torch.randint(300, (2, 8)))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("option", "value", "right"),
    [
        ("do_layer_norm_before", False, "True"),
        ("layer_norm_elementwise_affine", False, "True"),
        ("activation_function", "gelu", "'relu'"),
    ],
)
def test_an_opt_in_which_scales_cannot_move_is_named(option, value, right):
    model = random_model("opt", **{option: value})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    says = f"of an OPT with {option}={value!r}; scales can be moved exactly with {option}={right}"
    with pytest.raises(ValueError, match=says):
        induce(model, torch.randint(300, (2, 8)))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_an_opt_without_biases_has_scales_and_no_shift():
    model, ids = random_model("opt", enable_bias=False), torch.randint(300, (2, 20))
    before = outputs(model, ids)
    for block in decoder_blocks(model):
        assert not Scales.ones(block).shifts()
        assert Scales.ones(block).rotary.shape == (48,)  # nothing turns: each channel has its own
        absorb(block, random_scales(block))
    assert float((outputs(model, ids) - before).abs().max()) < 1e-10


@pytest.fixture(scope="module")
def tiny_ids(text_windows):
    return text_windows[:2]


@pytest.fixture(scope="module")
def text_windows():
    text = slr.data.corpus("calibration")[:40_000]
    return slr.data.windows(text, slr.load_tokenizer("tiny"), 64, limit=16)


def test_bfloat16_logits_stay_within_rounding(tiny_ids):
    exact = outputs(slr.load("tiny", dtype=torch.float32), tiny_ids)
    model = slr.load("tiny")
    assert model.dtype == torch.bfloat16
    rounding = (outputs(model, tiny_ids).float() - exact).norm()  # what bfloat16 does anyway
    for block in decoder_blocks(model):
        absorb(block, random_scales(block))
    error = (outputs(model, tiny_ids).float() - exact).norm()
    assert 0 < error < 3 * rounding


def test_powers_of_two_are_absorbed_bit_for_bit(tiny_ids):
    model = slr.load("tiny")
    before = outputs(model, tiny_ids)
    old = decoder_blocks(model)[0].mlp.down_proj.weight.clone()
    for block in decoder_blocks(model):
        absorb(block, random_scales(block).powers_of_two())
    assert torch.equal(outputs(model, tiny_ids), before)
    assert not torch.equal(decoder_blocks(model)[0].mlp.down_proj.weight, old)


def masks(block, inputs, method, pattern):
    """Mask of each linear, with norms taken of the block as it is."""
    linears = dense_linears(block)
    with observe(linears, NormStatistic) as found:
        inputs.run(0, block, keep=False)
    return {
        name: slr.prune(
            layer.weight.data, method, pattern, activation_norm=found[name].norm().double()
        ).mask
        for name, layer in linears.items()
    }


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_scaling_cannot_change_wandas_mask_but_magnitudes(pattern):
    model = random_model()
    inputs, block = first_inputs(model, torch.randint(300, (4, 32))), decoder_blocks(model)[0]
    before = {m: masks(block, inputs, m, pattern) for m in ("wanda", "magnitude")}
    absorb(block, random_scales(block, shift=False).powers_of_two())
    after = {m: masks(block, inputs, m, pattern) for m in ("wanda", "magnitude")}
    for name, mask in before["wanda"].items():
        assert torch.equal(after["wanda"][name], mask), name
        assert not torch.equal(after["magnitude"][name], before["magnitude"][name]), name


def test_scaled_by_its_norms_magnitude_is_wanda():
    model = random_model(num_key_value_heads=6)  # with groups, heads share a scale
    inputs, block = first_inputs(model, torch.randint(300, (4, 32))), decoder_blocks(model)[0]
    wanda = masks(block, inputs, "wanda", "2:4")
    assert any(
        not torch.equal(m, wanda[k]) for k, m in masks(block, inputs, "magnitude", "2:4").items()
    )
    absorb(block, starting_scales(block, inputs, 0, 1.0)[0])
    for name, mask in masks(block, inputs, "magnitude", "2:4").items():
        assert float((mask == wanda[name]).float().mean()) > 0.999, name  # but for rounded ties


def pruned_error(block, inputs, dense, pattern):
    """‖pruned block - dense‖² / ‖dense - inputs‖² over all windows, by the plain pruner."""
    block = copy.deepcopy(block)
    for layer in dense_linears(block).values():
        mask = slr.prune(layer.weight.data, "magnitude", parse(pattern)).mask
        layer.weight.data.mul_(mask)
    with torch.no_grad():
        found = [block(x, **inputs.arguments[len(x)][0]) for x in inputs.hidden.split(inputs.rows)]
    return float((torch.cat(found) - dense).norm() ** 2 / (dense - inputs.hidden).norm() ** 2)


@pytest.mark.parametrize(("pattern", "start"), [("2:4", 0), ("0.5", 1), ("0.6 by matrix", 0)])
def test_trained_scales_lower_the_pruned_blocks_error(text_windows, pattern, start):
    model = slr.load("tiny", dtype=torch.float32)
    block, inputs = decoder_blocks(model)[0], first_inputs(model, text_windows, rows=4)
    with torch.no_grad():
        parts = inputs.hidden.split(4)
        dense = torch.cat([block(x, **inputs.arguments[len(x)][0]) for x in parts])
    plain = pruned_error(block, inputs, dense, pattern)
    weights = {k: v.clone() for k, v in block.state_dict().items()}
    options = Induction(pattern, start=start, spectral=0, epochs=3, rate=0.1)
    found = train_scales(block, inputs, 0, options)
    assert all(torch.equal(v, weights[k]) for k, v in block.state_dict().items())
    assert all(p.grad is None for p in block.parameters())
    absorb(block, found.scales)
    error = pruned_error(block, inputs, dense, pattern)
    assert error < 0.99 * plain  # three epochs on few windows; 0.971 by matrix on spread windows
    # The loss, computed without absorbing, is what the absorbed and pruned block shows.
    assert error == pytest.approx(min(loss for loss, _ in found.trace), rel=0.02)
    assert min(loss for loss, _ in found.trace) < found.trace[0][0]
    for log in found.scales.logs().values():
        assert abs(float(log.mean())) < 1e-4


def stable_rank(block, inputs, scales):
    """Mean log of ‖Z‖_F² / ‖Z‖₂² over what the linears of the scaled block are given, by SVD."""
    block, seen = copy.deepcopy(block), {}
    absorb(block, scales)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        layer = block.get_submodule(name)
        layer.register_forward_pre_hook(lambda m, x, name=name: seen.setdefault(name, []).append(x))
    inputs.run(0, block, keep=False)
    ranks = []
    for parts in seen.values():
        sigma = torch.linalg.svdvals(torch.cat([x.flatten(0, 1) for (x,) in parts]))
        ranks.append(float((sigma.square().sum() / sigma[0] ** 2).log()))
    return sum(ranks) / 4


def test_the_spectral_loss_alone_lowers_the_stable_rank(text_windows):
    model = slr.load("tiny", dtype=torch.float32)
    block, inputs = decoder_blocks(model)[0], first_inputs(model, text_windows)
    options = Induction(output=0, spectral=1, epochs=3, rate=0.1)
    found = train_scales(block, inputs, 0, options)
    before = stable_rank(block, inputs, starting_scales(block, inputs, 0, options.start)[0])
    after = stable_rank(block, inputs, found.scales)
    assert after < before - 0.05
    assert found.trace[0][1] == pytest.approx(before, abs=0.02)
    assert found.trace[-1][1] == pytest.approx(after, abs=0.02)
    again = train_scales(block, inputs, 0, options)
    assert torch.equal(again.scales.mlp, found.scales.mlp)


def test_the_stable_rank_is_that_of_the_scaled_inputs():
    model = random_model()
    inputs, block = first_inputs(model, torch.randint(300, (4, 32))), decoder_blocks(model)[0]
    _, grams = starting_scales(block, inputs, 0, 0.0)
    scales = random_scales(block, shift=False)
    loss = BlockLoss(block, inputs, 0, grams, NM(2, 4), 0.3)
    for _ in range(50):  # the power iteration goes on from call to call
        value = float(loss.spectral(scales))
    assert value == pytest.approx(stable_rank(block, inputs, scales), abs=1e-3)


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.3), Unstructured(0.3, "matrix")])
def test_soft_mask_is_the_mask_and_has_the_sigmoids_slope(pattern):
    scores = torch.randn(6, 16, dtype=torch.float64, requires_grad=True)
    mask = soft_mask(scores, pattern, 0.5)
    assert torch.equal(mask.bool(), pattern.select(scores.detach()))
    assert set(mask.detach().unique().tolist()) == {0.0, 1.0}
    weights = torch.randn_like(scores)
    slope = torch.autograd.grad((mask * weights).sum(), scores)[0]
    assert abs(float(slope.sum())) < 1e-12  # a common factor of the scores does nothing
    step, group = 1e-6 * torch.randn_like(scores), 4 if isinstance(pattern, NM) else 16
    group = 96 if str(pattern).endswith("matrix") else group

    def surrogate(s):
        s, kept = s.view(-1, group), pattern.select(scores.detach()).view(-1, group)
        low = torch.where(kept, s, torch.inf).amin(1, keepdim=True)
        high = torch.where(kept, -torch.inf, s).amax(1, keepdim=True)
        return (torch.sigmoid((s - (low + high) / 2) / 0.5).view(6, 16) * weights).sum()

    base = scores.detach()
    numeric = float(surrogate(base + step) - surrogate(base - step)) / 2
    assert numeric == pytest.approx(float((slope * step).sum()), rel=1e-4)


def test_nothing_is_pruned_has_no_slope():
    scores = torch.randn(2, 3, requires_grad=True)
    assert torch.equal(soft_mask(scores, Unstructured(0.1), 0.5), torch.ones(2, 3))


def test_induced_model_is_equivalent_and_prunes_better_by_magnitude(text_windows):
    model, plain = (slr.load("tiny", dtype=torch.float32) for _ in range(2))
    before = outputs(model, text_windows[:2])
    found = induce(model, text_windows, Induction(epochs=1))
    assert len(found) == 6
    assert torch.allclose(outputs(model, text_windows[:2]), before, atol=1e-3)
    recipe = slr.Recipe(prune="magnitude", pattern="2:4", refine="none")
    for each in (plain, model):
        slr.compress_model(each, recipe)
    held_out = slr.data.windows(
        slr.data.corpus("validation")[:60_000], slr.load_tokenizer("tiny"), 64, limit=64
    )
    assert slr.perplexity(model, held_out) < slr.perplexity(plain, held_out)


def test_a_step_before_pruning_a_block_on_inputs_of_pruned_blocks(small, text_windows):
    """As a pipeline runs it: induce, compress, store, go on; and take the block from storage."""
    recipe = slr.Recipe(prune="wanda", pattern="2:4", refine="weights", rank=4).resolved(64)
    stream = Stream(small, dtype=torch.float32)
    plan = plan_layers(stream.model, recipe, 64)
    stream.fill_outside()
    inputs = first_inputs(stream.model, text_windows[:8])
    options = Induction("2:4", rate=0.1)
    for index in range(2):
        name, block = stream.block(index)
        stream.fill(name, block)
        dense, seen = copy.deepcopy(block), inputs.hidden.clone()
        with torch.no_grad():  # as in compress_model
            found = induce_block(block, index, inputs, options)
        assert torch.equal(inputs.hidden, seen)  # still those of the pruned block before
        again = train_scales(dense, inputs, index, options)
        assert all(torch.equal(v, again.scales.logs()[k]) for k, v in found.scales.logs().items())
        assert found.trace == again.trace
        reports = compress_block(name, block, index, plan[index], inputs)
        stored = hf.state_dict(block)
        for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            assert not torch.equal(stored[norm], dense.state_dict()[norm])
        assert not torch.equal(stored["self_attn.v_proj.bias"], dense.self_attn.v_proj.bias)
        # A resumed run fills the block from what is stored, and nothing else.
        other = Stream(small, dtype=torch.float32)
        refilled = other.block(index)[1]
        layers = {r.name.removeprefix(f"{name}."): r.stored() for r in reports}
        hf.place(refilled, layers, torch.float32)
        other.put(refilled, stored, {k: k for k in stored})
        inputs.run(index, block, keep=True)
        with torch.no_grad():
            out = [refilled(x, **inputs.arguments[len(x)][index]) for x in seen.split(inputs.rows)]
        assert torch.equal(torch.cat(out), inputs.hidden)


def test_a_diverging_loss_warns_and_the_block_keeps_its_scales(text_windows):
    model = slr.load("tiny", dtype=torch.float32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    says = r"block \d: the loss became nan in epoch 1 of induction, whose rate is 1e\+06"
    with pytest.warns(UserWarning, match=says) as caught:
        induce(model, text_windows[:4], Induction(rate=1e6), rows=1)
    assert len(caught) == 6  # one for each block
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_training_that_does_not_help_keeps_the_start(text_windows):
    model = slr.load("tiny", dtype=torch.float32)
    block, inputs = decoder_blocks(model)[0], first_inputs(model, text_windows[:4], rows=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = train_scales(block, inputs, 0, Induction(rate=1e6, spectral=0))
    assert min(loss for loss, _ in found.trace[1:]) > found.trace[0][0]
    start = starting_scales(block, inputs, 0, 1.0)[0].logs()
    assert all(torch.allclose(v, start[k], atol=1e-5) for k, v in found.scales.logs().items())


def test_more_than_one_process_is_refused(monkeypatch):
    model = random_model()
    inputs = first_inputs(model, torch.randint(300, (2, 8)))
    monkeypatch.setattr("slr.model.distributed.world", lambda: 2)
    with pytest.raises(ValueError, match="induction trains in one process, not in 2"):
        induce_block(decoder_blocks(model)[0], 0, inputs)


def test_induced_by_powers_of_two_is_the_same_model(text_windows):
    model = slr.load("tiny")
    before = outputs(model, text_windows[:2])
    induce(model, text_windows[:4], Induction(epochs=0, powers_of_two=True))
    assert torch.equal(outputs(model, text_windows[:2]), before)


def test_fixed_scales_stay_and_rows_with_them(text_windows):
    """Else SparseGPT, which for a fraction compares rows, takes the loudest for the least."""
    model = slr.load("tiny", dtype=torch.float32)
    block, inputs = decoder_blocks(model)[0], first_inputs(model, text_windows, rows=4)
    found = train_scales(block, inputs, 0, Induction("0.5", rate=0.1, epochs=1, fixed=ROWS))
    for name, log in found.scales.logs().items():
        assert bool(log.any()) == (name not in ROWS)
    recipe = slr.Recipe(prune="sparsegpt", pattern="0.5", refine="none")
    found = []
    for fixed in (None, ROWS, ()):
        induced = copy.deepcopy(model)
        if fixed is not None:
            induce(induced, text_windows, Induction("0.5", epochs=0, fixed=fixed))
        slr.compress_model(induced, recipe, text_windows)
        found.append(slr.perplexity(induced, text_windows))
    plain, columns, rows = found
    assert columns < 1.05 * plain
    assert rows > 1.3 * plain


@pytest.mark.parametrize(
    ("prune", "pattern", "across"),
    [
        ("sparsegpt", "0.5", True), ("magnitude", "0.5 by matrix", True),
        ("sparsegpt", "2:4", False), ("magnitude", "0.5", False),
    ],
)  # fmt: skip
def test_rows_are_fixed_before_what_compares_rows(prune, pattern, across):
    assert Induction.before(prune, pattern).fixed == (ROWS if across else ())


def test_a_fixed_shift_stays(text_windows):
    model = random_model()
    inputs, block = first_inputs(model, torch.randint(300, (4, 32))), decoder_blocks(model)[0]
    for fixed in ((), ("shift",)):
        found = train_scales(block, inputs, 0, Induction(rate=0.1, spectral=0, fixed=fixed))
        assert bool(found.scales.shift.any()) == (fixed == ())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"start": 1.5}, "start is 1.5"),
        ({"spectral": -1}, "spectral is -1"),
        ({"rate": 0}, "rate is 0; it must be above 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"pattern": "3:2"}, "3:2"),
        ({"fixed": ("gate",)}, "fixed names 'gate'; it may name attention, mlp, hidden"),
        ({"output": 0, "spectral": 0}, "output and spectral are both 0"),
    ],
)
def test_bad_options_are_named(options, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        Induction(**options)


def test_blocks_and_scales_that_do_not_fit_are_named():
    model = random_model()
    block, ids = decoder_blocks(model)[0], torch.randint(300, (2, 8))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    wrong = Scales.ones(block)
    with pytest.raises(ValueError, match=r"scales.mlp has shape \(3,\); it must be \(48,\)"):
        absorb(block, Scales(**{**wrong.logs(), "mlp": torch.zeros(3)}))
    wrong.value[0] = float("inf")
    with pytest.raises(ValueError, match=r"scales.value holds 1 non-finite"):
        absorb(block, wrong)
    with pytest.raises(
        ValueError, match=r"model type None; scales can be moved exactly in .*llama"
    ):
        Scales.ones(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="pattern 1:7 does not divide the 48 inputs"):
        induce(model, ids, Induction("1:7"))
    qwen = random_model("qwen2")
    shifted = Scales(**Scales.ones(decoder_blocks(qwen)[0]).logs(), shift=torch.zeros(16))
    with pytest.raises(ValueError, match=r"scales.shift has shape \(16,\); it must be None"):
        absorb(decoder_blocks(qwen)[0], shifted)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    slr.compress_model(model, slr.Recipe(prune="magnitude", refine="none", skip=["*.0.*"]))
    with pytest.raises(ValueError, match=r"self_attn.q_proj is a SLRLinear"):
        induce(model, ids)
    assert all(torch.equal(p, before[f"model.layers.0.{k}"]) for k, p in block.named_parameters())


def opt_problem():
    """The first block of a float64 OPT whose channels are unlike and have means, and its inputs."""
    model = random_model("opt")
    inputs, block = first_inputs(model, torch.randint(300, (8, 32)), rows=4), decoder_blocks(model)
    return block[0], inputs


@pytest.mark.parametrize(("trained", "least"), [("scales", 0.97), ("shifts", 0.8)])
def test_trained_scales_or_shifts_of_opt_lower_the_pruned_blocks_error(trained, least):
    block, inputs = opt_problem()
    with torch.no_grad():
        parts = inputs.hidden.split(4)
        dense = torch.cat([block(x, **inputs.arguments[len(x)][0]) for x in parts])
    plain = pruned_error(block, inputs, dense, "2:4")
    fixed = tuple({"scales": SHIFTS, "shifts": Scales.ones(block).logs()}[trained])
    options = Induction(start=0, spectral=0, epochs=20, rate=0.05, fixed=fixed)
    found = train_scales(block, inputs, 0, options)
    for name, shift in found.scales.shifts().items():
        assert bool(shift.any()) == (trained == "shifts"), name
    absorb(block, found.scales)
    error = pruned_error(block, inputs, dense, "2:4")
    assert error < least * plain
    assert error == pytest.approx(min(loss for loss, _ in found.trace), rel=1e-3)


def test_shifts_change_wandas_mask_and_lower_its_error():
    """As scales cannot."""
    block, inputs = opt_problem()

    def put_out(block):
        with torch.no_grad():
            return torch.cat([block(x, **inputs.arguments[4][0]) for x in inputs.hidden.split(4)])

    dense = put_out(block)

    def wanda(block):
        pruned, chosen = copy.deepcopy(block), masks(block, inputs, "wanda", "2:4")
        for name, layer in dense_linears(pruned).items():
            layer.weight.data.mul_(chosen[name])
        return chosen, float((put_out(pruned) - dense).norm())

    before, plain = wanda(block)
    options = Induction(spectral=0, epochs=20, rate=0.05, fixed=tuple(Scales.ones(block).logs()))
    absorb(block, train_scales(block, inputs, 0, options).scales)
    after, error = wanda(block)
    assert not torch.equal(after["fc1"], before["fc1"])
    assert torch.equal(after["fc2"], before["fc2"])  # after ReLU nothing is shifted
    assert error < 0.95 * plain


@pytest.mark.parametrize("prune", ["magnitude", "wanda"])
def test_an_opt_is_induced_and_compressed_by_a_recipe(tmp_path, prune):
    """In memory and from a folder alike; the folder loads, and its norms are the rescaled ones."""
    from transformers import AutoModelForCausalLM

    model, ids = random_model("opt").float(), torch.randint(300, (4, 32))
    model.save_pretrained(tmp_path / "dense")
    norm = decoder_blocks(model)[1].final_layer_norm.weight.detach().clone()
    recipe = slr.Recipe(prune, "2:4", refine="svd", rank=2, prepare="induction", seqlen=32)
    slr.compress(str(tmp_path / "dense"), recipe, calibration=ids, out=tmp_path / "small")
    slr.compress_model(model, recipe, ids)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.allclose(outputs(again, ids), outputs(model, ids), atol=1e-5)
    for each in (model, again):
        assert not torch.equal(decoder_blocks(each)[1].final_layer_norm.weight, norm)


def test_unusable_inputs_are_named():
    model = random_model(attention_bias=False)
    inputs, block = first_inputs(model, torch.randint(300, (2, 8))), decoder_blocks(model)[0]
    block.input_layernorm.weight.data.zero_()
    with pytest.raises(ValueError, match=r"inputs of self_attn.q_proj are all zero"):
        train_scales(block, inputs)
    inputs.hidden[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"inputs of self_attn.q_proj holds .* non-finite"):
        train_scales(block, inputs)
