import math
import re
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from slr.methods import losparse
from slr.methods.losparse import LoSparseLinear, Pruner, cubic, keep_rows

LLAMA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def llama(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, tie_word_embeddings=True,
        **options,
    )  # fmt: skip
    torch.manual_seed(3)
    return LlamaForCausalLM(config)


def deberta():
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    config = DebertaV2Config(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=32, relative_attention=True,
        pos_att_type=["p2c", "c2p"], position_buckets=8, share_att_key=True,
        norm_rel_ebd="layer_norm", num_labels=3,
    )  # fmt: skip
    return DebertaV2ForSequenceClassification(config)


def bart():
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=50, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48,
        decoder_ffn_dim=48, encoder_attention_heads=4, decoder_attention_heads=4,
        max_position_embeddings=32,
    )  # fmt: skip
    return BartForConditionalGeneration(config)


def net(*widths, bias=True):
    return nn.ModuleList([nn.Sequential(*[
        nn.Linear(a, b, bias=bias) for a, b in pairwise(widths)
    ])])  # fmt: skip


def fit(model, pruner, steps, lr=0.02, after=lambda: None):
    """Train a net to imitate another, with an optimiser that has momentum and decay."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    first, last = model[0][0], model[0][-1]
    for _ in range(steps):
        x = torch.randn(16, first.in_features)
        target = x.sum(1, keepdim=True).sin().expand(-1, last.out_features)
        (model[0](x) - target).square().mean().backward()
        pruner.observe()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
        after()


shapes = st.tuples(st.integers(1, 17), st.integers(1, 17))


@given(shape=shapes, percent=st.integers(1, 99), bias=st.booleans(), seed=st.integers(0, 99))
def test_initialisation_is_the_dense_layer(shape, percent, bias, seed):
    torch.manual_seed(seed)
    (m, n), ratio = shape, percent / 100
    dense = nn.Linear(n, m, bias=bias)
    before = dense.weight.clone()
    layer = LoSparseLinear.from_linear(dense, ratio)
    r = math.ceil(Fraction(percent, 100) * m * n / (m + n))
    assert layer.rank == r
    assert (layer.U.shape, layer.V.shape, layer.S.shape) == ((m, r), (r, n), (m, n))
    # U V is as near as rank r can be (Eckart–Young).  The nearest matrix itself is not compared:
    # where σ_r and σ_{r+1} are nearly equal, rounding decides which one it is.
    W = dense.weight.detach().double()
    s = torch.linalg.svdvals(W)
    left = float((W - (layer.U @ layer.V).detach().double()).norm())
    assert left == pytest.approx(float(s[r:].norm()), abs=1e-5 * float(s.norm()))
    # √Σ on both sides: UᵀU = Σ = V Vᵀ.
    for gram in (layer.U.T @ layer.U, layer.V @ layer.V.T):
        assert torch.allclose(gram.double(), s[:r].diag(), atol=1e-5)
    assert torch.equal(layer.S, dense.weight - layer.U @ layer.V)
    x = torch.randn(2, 3, n)
    assert torch.allclose(layer(x), dense(x), atol=1e-5)
    assert torch.allclose(layer.dense(), dense.weight, atol=1e-6)
    assert torch.equal(dense.weight, before)
    assert (layer.bias is None) == (not bias)


def test_rank_is_counted_exactly():
    # 0.07 · 100 is 7.000000000000001 in floating point, whose ceiling is 8.
    assert LoSparseLinear.from_linear(nn.Linear(200, 200), 0.07).rank == 7


def test_half_precision_makes_up_for_the_rounding_of_the_factors():
    dense = nn.Linear(64, 64, dtype=torch.bfloat16)
    layer = LoSparseLinear.from_linear(dense, 0.5)
    assert layer.U.dtype == layer.S.dtype == torch.bfloat16
    W, low = dense.weight.double(), layer.U.double() @ layer.V.double()
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    r = layer.rank
    uncompensated = W - U[:, :r] * s[:r] @ Vh[:r]  # S of the factors before they were rounded
    assert (W - low - layer.S.double()).norm() < 0.6 * (W - low - uncompensated).norm()


def test_baselines():
    dense = nn.Linear(12, 8)
    itp = LoSparseLinear.from_linear(dense, 0.5, "itp")
    low = LoSparseLinear.from_linear(dense, 0.5, "lowrank")
    both = LoSparseLinear.from_linear(dense, 0.5, "losparse")
    x = torch.randn(5, 12)
    assert torch.allclose(itp(x), dense(x), atol=1e-6)
    assert torch.equal(itp.S, dense.weight)
    assert itp.rank == 0
    assert low.S.shape == (0, 12)
    assert torch.allclose(low(x), x @ (both.U @ both.V).T + dense.bias, atol=1e-6)
    for layer in (itp, low):  # empty factors train like any other
        layer(x).square().sum().backward()
        torch.optim.AdamW(layer.parameters()).step()
        assert layer(x).isfinite().all()


def test_schedule_by_hand():
    # T = 20, t_i = 4, t_f = 6: ten steps of pruning.
    expected = {0: 1, 4: 1, 5: 0.1 + 0.9 * 0.729, 9: 0.1 + 0.9 / 8, 13: 0.1 + 0.9 / 1000}
    expected |= {14: 0.1, 15: 0.1, 20: 0.1, 99: 0.1}
    for t, p in expected.items():
        assert cubic(t, 20, 0.1, warmup=4, cooldown=6) == pytest.approx(p, abs=1e-12)


rows = st.lists(
    st.tuples(st.lists(st.integers(0, 6), min_size=1, max_size=8), st.integers(1, 9)),
    min_size=1, max_size=4,
)  # fmt: skip


@given(matrices=rows, share=st.integers(0, 10))
def test_one_threshold_over_all_matrices(matrices, share):
    total = sum(len(scores) * width for scores, width in matrices)
    budget = total * share // 10
    tensors = [torch.tensor(scores, dtype=torch.float32) for scores, _ in matrices]
    kept = keep_rows(tensors, [width for _, width in matrices], budget)
    # By hand: take rows from the best down until one does not fit.
    flat = [
        (-score, i, j, width)
        for i, (scores, width) in enumerate(matrices)
        for j, score in enumerate(scores)
    ]
    expected, spent = set(), 0
    for _score, i, j, width in sorted(flat):
        if spent + width > budget:
            break
        expected.add((i, j))
        spent += width
    found = {(i, j) for i, mask in enumerate(kept) for j in mask.nonzero().flatten().tolist()}
    assert found == expected


@pytest.mark.parametrize("beta2", [None, 0.7])
def test_scores_by_hand(beta2):
    model = net(5, 4)
    losparse.convert(model, rank_ratio=0.3)
    layer = model[0][0]
    pruner = Pruner(model, remaining=0.8, steps=100, beta1=0.85, beta2=beta2)
    mean = spread = torch.zeros(4, 5)
    for _ in range(3):
        layer.zero_grad()
        layer(torch.randn(6, 5)).square().sum().backward()
        now = (layer.S * layer.S.grad).abs().detach()
        mean = 0.85 * mean + (1 - 0.85) * now
        if beta2 is not None:
            spread = beta2 * spread + (1 - beta2) * (now - mean).abs()
        pruner.observe()
        with torch.no_grad():
            layer.S.add_(0.1)
    expected = mean.mean(1) if beta2 is None else (mean * spread).mean(1)
    assert torch.allclose(pruner.scores()["0.0"], expected, rtol=1e-5)


@pytest.mark.parametrize("mode", ["losparse", "itp"])
@pytest.mark.parametrize("bias", [True, False])
def test_pruned_rows_never_grow_again(mode, bias):
    model = net(10, 24, 16, bias=bias)
    losparse.convert(model, rank_ratio=0.1, mode=mode)
    pruner = Pruner(model, remaining=0.4, steps=30, warmup=5, cooldown=8)
    masks, counts = [], []

    def look():
        now = [layer.kept.clone() for layer in pruner.layers.values()]
        if masks:
            assert all(bool((b <= a).all()) for a, b in zip(masks[-1], now, strict=True))
        masks.append(now)
        for layer in pruner.layers.values():
            assert not layer.S[~layer.kept].any()
        counts.append(sum(int(m.sum()) * w for m, w in zip(now, (10, 24), strict=True)))

    fit(model, pruner, 30, after=look)
    whole = 10 * 24 + 24 * 16
    assert counts[4] == whole  # warm-up
    for t, count in enumerate(counts, 1):
        allowed = round(cubic(t, 30, pruner.final, warmup=5, cooldown=8) * whole)
        assert allowed - 24 < count <= allowed
    assert counts[21] == counts[-1]
    assert 0.4 - 24 / whole < losparse.remaining_ratio(model) <= 0.4


def test_without_the_pruners_step_momentum_would_move_them_but_they_do_not_count():
    model = net(10, 8)
    losparse.convert(model, mode="itp")
    layer = model[0][0]
    pruner = Pruner(model, remaining=0.5, steps=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    x = torch.randn(16, 10)
    for _ in range(4):
        layer(x).square().sum().backward()
        pruner.observe()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    pruned, held = ~layer.kept, layer(x).detach()
    assert pruned.sum() == 4
    layer(x).square().sum().backward()
    assert not layer.S.grad[pruned].any()
    optimizer.step()
    assert layer.S[pruned].abs().min() > 1e-4  # momentum
    moved = layer(x).detach()
    assert torch.equal(moved[:, pruned], layer.bias[pruned].expand(16, -1))
    assert not torch.equal(moved, held)
    layer(x).sum().backward()
    pruner.observe()
    pruner.step()
    assert not layer.S[pruned].any()


@pytest.mark.parametrize("mode", ["losparse", "itp"])
def test_pruned_rows_grow_again_and_compete_if_they_may(mode):
    """What the published code does, followed row by row."""
    model = net(10, 24, 16)
    losparse.convert(model, rank_ratio=0.1, mode=mode)
    pruner = Pruner(model, remaining=0.4, steps=30, warmup=5, cooldown=8, regrow=3)
    nonzero, whole = [], 10 * 24 + 24 * 16

    def look():
        nonzero.append([layer.S.any(1) for layer in pruner.layers.values()])
        assert all(bool(layer.kept.all()) for layer in pruner.layers.values()) or pruner.done == 30

    fit(model, pruner, 30, after=look)
    counts = [sum(int(m.sum()) * w for m, w in zip(n, (10, 24), strict=True)) for n in nonzero]
    assert counts[5] > counts[8] > counts[11]
    for t, count in enumerate(counts, 1):
        allowed = round(cubic(t, 30, pruner.final, warmup=5, cooldown=8) * whole)
        assert (count <= allowed) == (t <= 5 or t % 3 == 0 or t >= 22), t  # in between all grow
    for layer, last in zip(pruner.layers.values(), nonzero[-1], strict=True):
        assert torch.equal(layer.kept, last)  # what is stored is what was trained
    assert 0.4 - 24 / whole < losparse.remaining_ratio(model) <= 0.4
    held = [layer.kept.clone() for layer in pruner.layers.values()]
    for score, kept in zip(pruner.importance.values(), held, strict=True):
        score[~kept] = 1e9
    fit(model, pruner, 3)  # after the last step they stay, whatever the scores
    for layer, kept in zip(pruner.layers.values(), held, strict=True):
        assert torch.equal(layer.kept, kept)
        assert torch.equal(layer.S.any(1), kept)


@pytest.mark.parametrize(("regrow", "final"), [(2, {0}), (None, {1})])
def test_a_pruned_row_returns_if_it_may_and_its_score_is_higher(regrow, final):
    model = nn.ModuleList([nn.Linear(2, 2, bias=False)])
    losparse.convert(model, mode="itp", include=["0"])
    layer, pruner = model[0], Pruner(model, remaining=0.5, steps=4, beta1=0.0, regrow=regrow)
    loud = [1, 1, 0, 0]  # row 0 is pruned at step 2 at the latest; then it is the louder
    for row in loud:
        layer.S.grad = torch.full((2, 2), 0.1)
        layer.S.grad[row] = 10.0
        pruner.observe()
        with torch.no_grad():
            layer.S += 1.0  # the optimiser's step
        pruner.step()
        if pruner.done == 2:
            assert not layer.S[0].any()
            assert layer.S[1].all()
    assert set(layer.kept.nonzero().flatten().tolist()) == final
    assert set(layer.S.any(1).nonzero().flatten().tolist()) == final


def test_rows_that_may_grow_are_scored_by_the_weights_after_the_step():
    model = net(6, 8)
    losparse.convert(model, mode="itp")
    layer, pruner = model[0][0], Pruner(model, remaining=0.5, steps=9, beta1=0.5, regrow=2)
    layer(torch.randn(4, 6)).square().sum().backward()
    pruner.observe()
    with torch.no_grad():
        layer.S *= 3  # the optimiser's step
    pruner.step()
    expected = 0.5 * (layer.S * layer.S.grad).abs().mean(1)
    assert torch.allclose(pruner.scores()["0.0"], expected)
    pruner.patience = 1
    layer.S.grad[0, 0] = torch.inf
    pruner.observe()
    pruner.step()
    assert torch.allclose(pruner.scores()["0.0"], expected)


def pruned_llama(mode="losparse", **options):
    """A LLaMA with some rows gone, as training leaves it."""
    model = llama(**options)
    losparse.convert(model, rank_ratio=0.1, mode=mode)
    if mode != "lowrank":
        pruner = Pruner(model, remaining=0.3, steps=1)
        ids = torch.randint(50, (4, 16))
        model(input_ids=ids, labels=ids).loss.backward()
        pruner.observe()
        pruner.step()
    return model.eval()


@pytest.mark.parametrize("mode", losparse.MODES)
@pytest.mark.parametrize("biases", [True, False])
def test_compact_is_the_same_function(mode, biases, tmp_path):
    model = pruned_llama(mode, attention_bias=biases, mlp_bias=biases).double()
    ids = torch.randint(50, (2, 16))
    with torch.no_grad():
        masked = model(input_ids=ids).logits
        dense = {name: layer.dense() for name, layer in losparse.layers(model).items()}
        account = losparse.account(model)
        assert losparse.compact(model) == account
        assert torch.allclose(model(input_ids=ids).logits, masked, rtol=0, atol=1e-13)
    for name, layer in losparse.layers(model).items():
        assert torch.allclose(layer.dense(), dense[name], rtol=0, atol=1e-15)
        assert len(layer.S) == len(layer.rows)
        assert layer.kept is None


@pytest.mark.parametrize("mode", losparse.MODES)
@pytest.mark.parametrize("compact", [True, False])
def test_saved_and_loaded_bit_for_bit(mode, compact, tmp_path):
    model = pruned_llama(mode, attention_bias=True)
    if compact:
        losparse.compact(model)
    losparse.save(model, tmp_path / "a.safetensors")
    again = losparse.load(llama(attention_bias=True).eval(), tmp_path / "a.safetensors")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    ids = torch.randint(50, (2, 16))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)


@pytest.mark.parametrize("mode", losparse.MODES)
def test_bytes_and_flops_fall_as_computed(mode, tmp_path):
    dense, model = llama().eval(), pruned_llama(mode)
    m_n = sum(layer.weight.numel() for layer in dense.modules() if type(layer) is nn.Linear)
    m_n -= dense.lm_head.weight.numel()
    ids = torch.randint(50, (1, 16))

    def flops(model):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=ids)
        return counter.get_total_flops()

    def size(model):
        file = tmp_path / "a.safetensors"
        save_model(model, str(file))
        return file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")

    account = losparse.compact(model)
    kept = sum(len(layer.S) for layer in losparse.layers(model).values())
    assert account.parameters == m_n
    assert account.bytes == 4 * account.nonzero + 8 * kept
    assert size(model) == size(dense) - 4 * m_n + account.bytes
    assert flops(model) == flops(dense) - 16 * (2 * m_n - account.flops)
    assert account.nonzero / m_n == losparse.remaining_ratio(model)
    if mode != "lowrank":
        assert 0.28 < losparse.remaining_ratio(model) <= 0.3
        assert size(model) < 0.6 * size(dense)


def test_every_layer_of_a_block_and_no_head():
    for model, heads in ((llama(), 1), (deberta(), 2), (bart(), 1)):
        names = losparse.convert(model, rank_ratio=0.2)
        left = [name for name, m in model.named_modules() if type(m) is nn.Linear]
        assert len(left) == heads, left
        assert not any(".layers." in name or ".layer." in name for name in left)
        assert names == list(losparse.layers(model))
    names = losparse.convert(llama(), rank_ratio=0.2)
    assert sorted(name.rsplit(".", 1)[1] for name in names) == sorted(2 * LLAMA_LAYERS)
    names = losparse.convert(llama(), rank_ratio=0.2, include=["*.mlp.*"], skip=["*.0.*"])
    assert names == [f"model.layers.1.mlp.{k}" for k in ("gate_proj", "up_proj", "down_proj")]


def examples(kind):
    torch.manual_seed(5)
    ids = torch.randint(3, 50, (24, 12))
    labels = torch.arange(24) % 3 if kind is deberta else ids
    return [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]


def trainer(kind, folder, mode="losparse", steps=6, planned=6, **options):
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(4)
    model = kind()
    losparse.convert(model, rank_ratio=0.2, mode=mode)
    pruner = Pruner(model, remaining=0.4, steps=planned, warmup=1, cooldown=1, beta2=0.9)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, use_cpu=True,
        learning_rate=1e-2, lr_scheduler_type="constant", report_to=[], disable_tqdm=True,
        save_strategy="steps", save_steps=3, save_only_model=False, **options,
    )  # fmt: skip
    data = examples(kind)
    made = Trainer(model, arguments, train_dataset=data, callbacks=[losparse.callback(pruner)])
    return made, model, pruner


@pytest.mark.parametrize("kind", [llama, deberta, bart])
def test_trainer_prunes(kind, tmp_path):
    run, model, pruner = trainer(kind, tmp_path)
    run.train()
    assert pruner.done == 6
    assert 0.38 < losparse.remaining_ratio(model) <= 0.4
    for layer in pruner.layers.values():
        assert not layer.S[~layer.kept].any()
    account = losparse.compact(model)
    assert account.nonzero / account.parameters == losparse.remaining_ratio(model)
    batch = {"input_ids": torch.randint(3, 50, (2, 12))}
    if kind is bart:
        batch["decoder_input_ids"] = batch["input_ids"]
    with torch.no_grad():
        assert model.eval()(**batch).logits.isfinite().all()


def test_trainer_goes_on_from_a_checkpoint(tmp_path):
    run, whole, _ = trainer(llama, tmp_path)
    run.train()
    run, again, pruner = trainer(llama, tmp_path)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert pruner.done == 6
    for name, layer in losparse.layers(whole).items():
        other = losparse.layers(again)[name]
        assert torch.equal(layer.kept, other.kept)
        assert torch.allclose(layer.S, other.S, atol=1e-6)
    (tmp_path / "checkpoint-3" / "losparse_pruner.safetensors").unlink()
    run, _, _ = trainer(llama, tmp_path)
    with pytest.raises(ValueError, match="to go on from"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_trainer_that_is_too_short_is_refused(tmp_path):
    run, _, _ = trainer(llama, tmp_path, planned=9)
    with pytest.raises(ValueError, match="6 steps, fewer than the pruner's 9"):
        run.train()


def test_distillation_by_hand():
    student = torch.tensor([[1.0, 0.0, -1.0], [0.5, 0.5, 3.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]], requires_grad=True)
    T, kl = 2.0, []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        ps, pt = ([math.exp(x / T) for x in v] for v in (s, t))
        pairs = zip([x / sum(ps) for x in ps], [x / sum(pt) for x in pt], strict=True)
        kl.append(sum(b * math.log(b / a) for a, b in pairs))
    loss = losparse.distillation_loss(student, teacher, temperature=T)
    assert loss.item() == pytest.approx(T * T * sum(kl) / 2, rel=1e-5)
    mask = torch.tensor([0, 1])
    hidden = [(torch.tensor([[9.0, 9.0], [1.0, 2.0]]), torch.tensor([[0.0, 0.0], [0.0, 0.0]]))]
    loss = losparse.distillation_loss(
        student, teacher, temperature=T, mask=mask, hidden=hidden, hidden_weight=0.1
    )
    assert loss.item() == pytest.approx(T * T * kl[1] + 0.1 * (1 + 4) / 2, rel=1e-5)
    loss.backward()
    assert teacher.grad is None
    assert not student.grad[0].any()
    assert student.grad[1].any()


def test_steps_with_gradients_that_are_not_finite_do_not_count():
    model = net(6, 5)
    losparse.convert(model, mode="itp")
    pruner = Pruner(model, remaining=0.4, steps=3, patience=1)
    layer = model[0][0]
    layer.S.grad = torch.full_like(layer.S, float("inf"))
    pruner.observe()
    pruner.step()
    assert pruner.skipped == 1
    assert layer.kept.all()
    layer.S.grad = torch.ones_like(layer.S)
    pruner.observe()
    pruner.step()
    assert not layer.kept.all()


@pytest.mark.parametrize("patience", [0, 3])
def test_gradients_that_stay_infinite_are_a_diverging_loss(patience):
    model = net(6, 5)
    losparse.convert(model, mode="itp")
    pruner = Pruner(model, remaining=0.4, steps=9, patience=patience)
    layer = model[0][0]
    for _ in range(patience):
        layer.S.grad = torch.full_like(layer.S, float("nan"))
        pruner.observe()
        pruner.step()
    layer.S.grad = torch.full_like(layer.S, float("nan"))
    with pytest.raises(ValueError, match=f"not finite at step {patience + 1} of 9"):
        pruner.observe()
    assert layer.kept.all()


def test_a_layer_that_took_no_part_has_no_importance():
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    losparse.convert(model, mode="itp", include=["0", "1"])
    pruner = Pruner(model, remaining=0.5, steps=1)
    model[1](torch.randn(3, 4)).square().sum().backward()
    pruner.observe()
    pruner.step()
    assert [int(layer.kept.sum()) for layer in model] == [0, 4]


def test_autocast_and_a_state_that_comes_back():
    model = net(6, 8, 5)
    losparse.convert(model, rank_ratio=0.2)
    pruner = Pruner(model, remaining=0.5, steps=2, beta2=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model[0](torch.randn(3, 6)).float().square().sum().backward()
    pruner.observe()
    pruner.step()
    losparse.compact(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model[0](torch.randn(3, 6)).isfinite().all()

    other = net(6, 8, 5)
    losparse.convert(other, rank_ratio=0.2)
    again = Pruner(other, remaining=0.5, steps=2, beta2=0.5)
    again.load_state_dict(pruner.state_dict())
    assert again.done == 1
    assert all(torch.equal(v, again.scores()[k]) for k, v in pruner.scores().items())
    plain = Pruner(other, remaining=0.5, steps=2)
    with pytest.raises(ValueError, match=r"another pruner: 'uncertainty\.0\.0' differs"):
        plain.load_state_dict(pruner.state_dict())


def converted(mode="losparse", ratio=0.2):
    model = net(6, 5)
    losparse.convert(model, mode=mode, rank_ratio=ratio)
    return model


def tied():
    model = net(4, 4, 4)
    model[0][1].weight = model[0][0].weight
    return model


def broken():
    model = net(4, 4)
    model[0][0].weight.data[0, 0] = float("nan")
    return model


def stepped():
    pruner = Pruner(converted(), remaining=0.5, steps=2)
    pruner.step()


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (lambda: losparse.convert(net(4, 4), mode="dense"), "mode 'dense' is unknown"),
        (lambda: losparse.convert(net(4, 4), rank_ratio=0.0), "rank_ratio is 0.0"),
        (lambda: losparse.convert(net(4, 4), rank_ratio=1.0), "rank_ratio is 1.0"),
        (lambda: losparse.convert(converted()), "converted already"),
        (lambda: losparse.convert(nn.Sequential(nn.Linear(4, 4))), "name them by include"),
        (lambda: losparse.convert(net(4, 4), skip=["*.fc1"]), "'*.fc1' fits no linear layer"),
        (lambda: losparse.convert(tied()), "'0.0' is shared"),
        (lambda: losparse.convert(broken()), "1 non-finite"),
        (lambda: losparse.account(net(4, 4)), "no LoSparseLinear"),
        (lambda: losparse.compact(net(4, 4)), "no LoSparseLinear"),
        (lambda: LoSparseLinear(*torch.zeros(3, 2, 2)), "either kept"),
        (lambda: cubic(0, 5, 0.5, warmup=3, cooldown=2), "below steps, 5"),
        (lambda: cubic(0, 5, 1.5), "final is 1.5"),
        (lambda: keep_rows([torch.ones(2)], [1, 2], 3), "1 scores and 2 widths"),
        (lambda: keep_rows([torch.tensor([math.nan])], [1], 3), "1 non-finite"),
        (lambda: Pruner(net(4, 4), remaining=0.5, steps=9), "convert(model) first"),
        (lambda: Pruner(converted("lowrank"), remaining=0.5, steps=9), "no rows to prune"),
        (lambda: Pruner(converted(), remaining=0.0, steps=9), "remaining is 0.0"),
        (lambda: Pruner(converted(), remaining=0.1, steps=9), "U and V alone take 0.3667"),
        (lambda: Pruner(converted(), remaining=0.5, steps=0), "below steps, 0"),
        (lambda: Pruner(converted(), remaining=0.5, steps=9, beta1=1.0), "beta1 is 1.0"),
        (lambda: Pruner(converted(), remaining=0.5, steps=9, regrow=0), "regrow is 0; it must be"),
        (lambda: Pruner(converted(), remaining=0.5, steps=9, beta2=-1), "beta2 is -1"),
        (lambda: Pruner(converted(), remaining=0.5, steps=9).observe(), "no S has a gradient"),
        (stepped, "observe() was not called"),
        (
            lambda: losparse.distillation_loss(torch.ones(2, 3), torch.ones(2, 4)),
            "student has shape (2, 3) and teacher (2, 4)",
        ),
        (
            lambda: losparse.distillation_loss(*torch.ones(2, 2, 3), temperature=0),
            "temperature is 0",
        ),
        (
            lambda: losparse.distillation_loss(*torch.ones(2, 2, 3), mask=torch.zeros(2)),
            "0 positions that count",
        ),
    ],
)
def test_bad_input_is_named(bad, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        bad()


def test_a_failed_conversion_changes_nothing():
    model = net(4, 6, 4)
    model[0][1].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="non-finite"):
        losparse.convert(model)
    assert all(type(layer) is nn.Linear for layer in model[0])


def test_files_that_do_not_fit_are_named(tmp_path):
    file = tmp_path / "a.safetensors"
    losparse.save(converted(), file)
    with pytest.raises(ValueError, match=r"0\.0 has shape \(5, 6\), but in the model \(4, 6\)"):
        losparse.load(net(6, 4), file)
    with pytest.raises(ValueError, match=r"is torch\.float32, but in the model torch\.float64"):
        losparse.load(net(6, 5).double(), file)
    with pytest.raises(ValueError, match="does not fit the model"):
        losparse.load(nn.ModuleList([*net(6, 5), nn.LayerNorm(3)]), file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        losparse.load(net(6, 5), file)
