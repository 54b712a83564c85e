"""Tuning a whole model: it comes nearer to the dense one, and what must stay stays."""

import pytest
import torch
from typer.testing import CliRunner

import slr
from slr.checkpoint.folder import about
from slr.cli import app
from slr.layer.linear import SLRLinear
from slr.layer.rounded import RoundedLinear
from slr.model import heads
from slr.model.blocks import decoder_blocks
from slr.model.distillation import _divergence, distil
from slr.model.tuning import trainable
from slr.model.writing import written

WINDOWS = torch.randint(0, 60, (9, 24), generator=torch.Generator().manual_seed(3))


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, SLRLinear)}


@pytest.fixture(scope="module")
def folders(small, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned")
    slr.compress(small, slr.Recipe("magnitude", "0.7", refine="svd", rank=2), out=out / "sparse")
    recipe = slr.Recipe(pattern="dense", values="int2 by 16", iterations=2)
    slr.compress(small, recipe, out=out / "codes", calibration=WINDOWS)
    return out


RECIPES = {
    "sparse": slr.Recipe("magnitude", "2:4", refine="svd", rank=8),
    "codes": slr.Recipe(
        "magnitude", "dense", refine="weights", rank=8, values="int2 by 32", iterations=1
    ),
}


@pytest.mark.parametrize("kind", RECIPES)
def test_it_comes_nearer_and_the_sparse_part_stays(kind):
    """On the embedded model, whose predictions say something."""
    text, tokenizer = slr.data.corpus("calibration"), slr.load_tokenizer("tiny")
    windows = slr.data.windows(text, tokenizer, 96, 9)
    teacher = slr.load("tiny", dtype=torch.float32)
    student = slr.load("tiny", dtype=torch.float32)
    slr.compress(student, RECIPES[kind])
    before = {n: p.clone() for n, p in teacher.state_dict().items()}
    was = {n: (m.mask, m.weight, m.B.clone()) for n, m in layers(student).items()}
    embedding = student.get_input_embeddings().weight.clone()
    trace = distil(student, teacher, windows, 2)
    assert len(trace) == 3
    assert min(trace) < 0.93 * trace[0]
    for name, layer in layers(student).items():
        assert torch.equal(layer.mask, was[name][0])
        assert torch.equal(layer.weight, was[name][1])
        assert isinstance(layer, RoundedLinear) == (kind == "codes")
    assert any(not torch.equal(m.B, was[n][2]) for n, m in layers(student).items())
    assert torch.equal(student.get_input_embeddings().weight, embedding)
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(p.grad is not None for p in student.parameters())
    with torch.no_grad():
        logits = student(windows[-1:]).logits[0].log_softmax(-1)
        wanted = teacher(windows[-1:]).logits[0].log_softmax(-1)
    again = float((wanted.exp() * (wanted - logits)).sum(-1).mean())
    assert again == pytest.approx(min(trace), rel=1e-3)  # what was measured is what is stored


@pytest.mark.parametrize("kind", RECIPES)
def test_the_gradient_is_that_of_the_whole_divergence(kind, monkeypatch):
    """Logits a few tokens at a time, S apart from B A: the same number, and the same gradients."""
    monkeypatch.setattr(heads, "LOGITS_AT_ONCE", 7 * 4096)
    teacher = slr.load("tiny", dtype=torch.float32)
    student = slr.load("tiny", dtype=torch.float32).requires_grad_(False)
    slr.compress(student, RECIPES[kind])
    ids = torch.arange(100, 124)
    with trainable(decoder_blocks(student), torch.float32) as parameters:
        value = _divergence(student, teacher, ids, torch.float32, learn=True)
        mine = [p.grad.clone() for p in parameters]
        for module in student.modules():
            if hasattr(module, "fixed"):
                module.fixed = None  # S + B A as one matrix
        student.zero_grad()
        found, wanted = (model(ids[None]).logits[0].log_softmax(-1) for model in (student, teacher))
        whole = (wanted.exp() * (wanted - found)).sum(-1).mean()
        whole.backward()
        theirs = [p.grad for p in parameters]
    assert float(value) == pytest.approx(whole.item(), rel=1e-4)
    size = max(float(g.norm()) for g in mine)
    for grad, other in zip(mine, theirs, strict=True):
        assert float((grad - other).norm()) <= 1e-3 * float(grad.norm()) + 1e-5 * size


def test_what_serves_held_out_windows_best_is_kept(small, folders):
    teacher = slr.load(small, dtype=torch.float32)
    student = slr.load(folders / "sparse", dtype=torch.float32)
    first = {n: p.clone() for n, p in student.state_dict().items()}
    trace = distil(student, teacher, WINDOWS, 2, rate=30.0)
    assert min(trace) == trace[0]
    for name, value in student.state_dict().items():
        assert torch.equal(value, first[name])


@pytest.mark.parametrize("kind", ["sparse", "codes"])
def test_a_folder_becomes_another(folders, tmp_path, kind):
    out = tmp_path / "out"
    trace = slr.tune(folders / kind, out, passes=1, calibration=WINDOWS, rate=1e-3)
    slr.verify(out)
    notes = about(out)
    assert notes["tuned"]["divergence"] == trace
    assert notes["recipe"] == about(folders / kind)["recipe"]
    sizes = [sum(f.stat().st_size for f in d.glob("*.safetensors")) for d in (folders / kind, out)]
    assert abs(sizes[0] - sizes[1]) < 0.01 * sizes[0]
    assert slr.load(out).dtype == torch.bfloat16
    assert "Then tuned as a whole" in (out / "README.md").read_text()
    assert not (tmp_path / "out.partial").exists()


def test_the_command_and_what_is_measured(small, tmp_path):
    made = tmp_path / "made"
    options = {"samples": 4, "seqlen": 32}
    slr.compress(small, slr.Recipe(pattern="0.7", refine="svd", rank=2, **options), out=made)
    before = about(made)["measured"]["perplexity"]
    done = CliRunner().invoke(
        app, ["tune", str(made), "--out", str(tmp_path / "out"), "--passes", "2", "--rate", "0.001"]
    )
    assert done.exit_code == 0, done.output
    assert "divergence from the dense model" in done.stdout
    after = about(tmp_path / "out")["measured"]
    assert after["perplexity"]["dense"] == before["dense"]
    assert set(after["perplexity"]) == set(before)
    tuned, (count, seqlen) = slr.load(tmp_path / "out"), (after["windows"], after["seqlen"])
    windows = slr.data.unseen("general", slr.load_tokenizer(small), seqlen, count)
    assert slr.perplexity(tuned, windows) == pytest.approx(after["perplexity"]["result"], rel=0.02)


def test_as_many_windows_are_written_at_a_time_as_their_cache_has_room_for(small, monkeypatch):
    from slr.model import writing

    teacher = slr.load(small, dtype=torch.float32)
    config, seen = teacher.config, []
    each = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4 * 24
    real = teacher.generate
    monkeypatch.setattr(
        teacher, "generate", lambda ids, **more: seen.append(len(ids)) or real(ids, **more)
    )
    monkeypatch.setattr(writing, "CACHE", 3 * each)
    assert written(teacher, WINDOWS, 7).shape == (7, 24)
    monkeypatch.setattr(writing, "CACHE", each // 2)  # one has to have room
    written(teacher, WINDOWS, 2)
    assert seen == [3, 3, 1, 1, 1]


def test_what_is_refused(small, folders, tmp_path):
    out = tmp_path / "out"
    for folder, options, message in (
        (small, {}, "is not compressed"),
        (folders / "sparse", {"passes": 0}, "passes is 0"),
        (folders / "sparse", {"rate": 0.0}, "rate is 0"),
        (folders / "sparse", {"calibration": WINDOWS[:1]}, "one to hold out"),
        (folders / "sparse", {"source": tmp_path / "nothing"}, "nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            slr.tune(folder, out, **{"calibration": WINDOWS, **options})
        assert not out.exists()
        assert not (tmp_path / "out.partial").exists()


def test_the_dense_model_writes_more_text_to_learn_from():
    """What it writes is the same for the same seed, begins as asked, and helps unseen text."""
    text, tokenizer = slr.data.corpus("calibration"), slr.load_tokenizer("tiny")
    windows = slr.data.windows(text, tokenizer, 96, 4)
    teacher = slr.load("tiny", dtype=torch.float32)
    before = torch.random.get_rng_state()
    made = written(teacher, windows[:3], 5, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert made.shape == (5, 96)
    assert torch.equal(made[:3, :32], windows[:3, :32])
    assert torch.equal(made[3:, :32], windows[:2, 32:64])  # asked for again: from further on
    assert torch.equal(made, written(teacher, windows[:3], 5, seed=1))
    assert not torch.equal(made, written(teacher, windows[:3], 5, seed=2))
    # Drawn from its own distribution: it finds them about as likely as it thinks they should be.
    with torch.no_grad():
        logits = teacher(made).logits[:, 31:-1].log_softmax(-1)
    said = logits.gather(-1, made[:, 32:, None])[..., 0]
    entropy = -(logits.exp() * logits).sum(-1)
    assert float(-said.mean()) == pytest.approx(float(entropy.mean()), rel=0.15)
    traces = []
    for more in (0, 12):
        student = slr.load("tiny", dtype=torch.float32)
        slr.compress(student, RECIPES["sparse"])
        traces.append(distil(student, teacher, windows, 2, more=more))
    assert min(traces[1]) < min(traces[0])


def test_a_downloaded_folder_names_no_text_to_tune_on(small, folders, tmp_path):
    text = tmp_path / "own.txt"
    text.write_text(slr.data.corpus("calibration")[:20000])
    recipe = slr.Recipe("wanda", "2:4", refine="none", samples=2, seqlen=16)
    slr.compress(small, recipe, out=tmp_path / "own", calibration=str(text))
    (tmp_path / "own" / ".git").mkdir()
    with pytest.raises(ValueError, match="name the text to tune it on, by --calibration"):
        slr.tune(tmp_path / "own", tmp_path / "tuned", source=small, passes=1)


def test_a_folder_that_transformers_saved_is_tuned_too(small, tmp_path):
    model = slr.load(small)
    slr.compress(model, slr.Recipe("magnitude", "2:4", refine="svd", rank=2))
    model.save_pretrained(tmp_path / "saved")
    slr.load_tokenizer(small).save_pretrained(tmp_path / "saved")
    trace = slr.tune(
        tmp_path / "saved", tmp_path / "tuned", source=small, passes=1, calibration="embedded"
    )
    assert len(trace) == 2
    assert about(tmp_path / "tuned")["source"] == str(small)
