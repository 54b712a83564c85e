"""The published recipes on tiny random models of the same architectures, with data made here."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from examples.losparse_recipes import RECIPES, TEACHING, distil, encode, fine_tune, load, main
from slr.methods import losparse

WORDS = [f"w{i}" for i in range(40)]


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    ids = {word: i for i, word in enumerate([*special, *WORDS])}
    plain = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    plain.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        unk_token="[UNK]", bos_token="[CLS]", eos_token="[SEP]",
    )  # fmt: skip


def network(kind, labels):
    from transformers import (
        BartConfig,
        BartForConditionalGeneration,
        DebertaV2Config,
        DebertaV2ForQuestionAnswering,
        DebertaV2ForSequenceClassification,
    )

    torch.manual_seed(0)
    if kind == "summaries":
        config = BartConfig(
            vocab_size=44, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32,
            decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2,
            max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=2, forced_eos_token_id=2,
        )  # fmt: skip
        return BartForConditionalGeneration(config)
    config = DebertaV2Config(
        vocab_size=44, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, relative_attention=True,
        pos_att_type=["p2c", "c2p"], position_buckets=8, share_att_key=True, pad_token_id=0,
        norm_rel_ebd="layer_norm", type_vocab_size=0, num_labels=labels,
    )  # fmt: skip
    if kind == "answers":
        return DebertaV2ForQuestionAnswering(config)
    return DebertaV2ForSequenceClassification(config)


def rows(recipe, count=16):
    made = []
    for i in range(count):
        words = [WORDS[(7 * i + 3 * j) % 40] for j in range(12)]
        row = {column: " ".join(words[k : k + 9]) for k, column in enumerate(recipe.columns)}
        if recipe.kind == "answers":
            text = " ".join(words[3:5])
            start = row["context"].index(text)
            row["answers"] = {"text": [text], "answer_start": [start]}
        made.append({**row, "label": 0.1 * i if recipe.labels == 1 else i % recipe.labels})
    return made


@pytest.fixture
def local(tmp_path):
    """A folder with a tiny model, and one with data, for a recipe."""

    def make(recipe):
        source, data = tmp_path / "model", tmp_path / "data"
        network(recipe.kind, recipe.labels).save_pretrained(source)
        tokenizer().save_pretrained(source)
        data.mkdir()
        for split in ("train", "validation"):
            lines = "\n".join(map(json.dumps, rows(recipe)))
            (data / f"{split}.jsonl").write_text(lines)
        return {"model": source, "data": data}

    return make


def small(name):
    return replace(RECIPES[name], epochs=2, batch=4, accumulation=2, lr=1e-3, length=24, target=16)


@pytest.mark.parametrize("name", ["mnli", "stsb", "cola", "squad", "xsum"])
def test_recipes_run_on_tiny_models(name, local, tmp_path):
    recipe, out = small(name), tmp_path / "out"
    found = fine_tune(recipe, out, **local(recipe), use_cpu=True, disable_tqdm=True)
    assert found["steps"] == 2 * 16 // 8
    asked = recipe.rank_ratio + recipe.rows
    # Ranks of matrices this small are rounded up coarsely, and rows are few.
    assert asked - 0.05 < found["remaining"] <= asked
    assert found["eval_loss"] > 0
    assert ("eval_score" in found) == (recipe.kind != "summaries")
    again = load(out)
    assert losparse.remaining_ratio(again) == found["remaining"]
    stored = load_file(out / "model.safetensors")
    for key, value in again.state_dict().items():
        if key in stored:
            assert torch.equal(value, stored[key]), key
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == []
    with pytest.raises(ValueError, match="complete already"):
        fine_tune(recipe, out)


@pytest.mark.parametrize("mode", ["itp", "lowrank"])
def test_baselines_keep_as_much(mode, local, tmp_path):
    recipe = small("mnli")
    found = fine_tune(
        recipe, tmp_path / "out", **local(recipe), mode=mode, use_cpu=True, disable_tqdm=True
    )
    if mode == "itp":
        assert 0.15 < found["remaining"] <= 0.2
    else:
        assert 0.2 <= found["remaining"] < 0.4  # ceil, at rank 3 of 16


def test_a_stopped_training_goes_on(local, tmp_path, monkeypatch):
    recipe, out = small("mnli"), tmp_path / "out"
    folders, options = local(recipe), {"use_cpu": True, "disable_tqdm": True, "save_steps": 1}
    whole = fine_tune(recipe, tmp_path / "whole", **folders, **options)
    step, seen = losparse.Pruner.step, []

    def stop(self):
        step(self)
        seen.append(self.done)
        if len(seen) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(losparse.Pruner, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(recipe, out, **folders, **options)
    assert not (out / "model.safetensors").exists()
    found = fine_tune(recipe, out, **folders, **options)
    assert seen[3:] == [3, 4]
    assert found["remaining"] == whole["remaining"]
    a, b = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "out"))
    assert all(torch.allclose(a[key], b[key], atol=1e-5) for key in a)


def test_settings_are_those_of_the_public_scripts():
    mnli, squad, xsum = RECIPES["mnli"], RECIPES["squad"], RECIPES["xsum"]
    steps = 8 * -(-392_702 // 256)
    assert [round(x * steps) for x in (mnli.lr_warmup, mnli.warmup, mnli.cooldown)] == [
        480, 675, 3375,
    ]  # fmt: skip
    assert [(r.lr, r.epochs, r.batch * r.accumulation, r.rank_ratio, r.rows, r.seed)
            for r in (mnli, squad, xsum)] == [
        (9e-5, 8, 256, 0.05, 0.15, 7), (5e-5, 10, 16, 0.05, 0.45, 7),
        (6e-5, 12, 32, 0.35, 0.05, 42),
    ]  # fmt: skip
    # 6,400 steps are about an epoch of XSum's 204,045 examples.
    assert 12 * xsum.warmup * 204_045 / 32 == pytest.approx(2 * 6400, rel=0.01)
    assert 12 * xsum.cooldown * 204_045 / 32 == pytest.approx(8 * 6400, rel=0.01)


def test_distillation_is_that_of_the_public_script():
    assert losparse.Distillation() == losparse.Distillation(output=0, hidden=15, temperature=2)
    recipe = replace(RECIPES["mnli"], **TEACHING)
    settings = (recipe.lr, recipe.batch, recipe.accumulation, recipe.epochs, recipe.seed)
    assert settings == (9e-5, 32, 1, 50, 7)
    assert recipe.lr_warmup == 0


def test_answers_are_found_in_the_window_that_holds_them():
    recipe = replace(RECIPES["squad"], length=16, stride=4)
    context = " ".join(WORDS).replace("w19 w20 w21 w22", "w19.w20 w21.w22")  # tokens that touch
    start = context.index("w20 w21")
    row = {"question": "w1 w2", "context": context}
    row["answers"] = {"text": ["w20 w21"], "answer_start": [start]}
    words = tokenizer()
    items = encode(row, words, recipe)
    assert len(items) > 3
    found = 0
    for item in items:
        tokens = words.convert_ids_to_tokens(item["input_ids"])
        assert len(tokens) <= 16
        first, last = item["start_positions"], item["end_positions"]
        if first:
            found += 1
            assert tokens[first : last + 1] == ["w20", "w21"]
        else:
            assert last == 0
            assert not {"w20", "w21"} <= set(tokens)
    assert found >= 1


QUIET = {"use_cpu": True, "disable_tqdm": True}


def apart(one, other):
    """Mean squared difference of all hidden states."""
    ids = torch.arange(4, 40).view(3, 12)
    with torch.no_grad():
        a, b = (m.eval()(input_ids=ids, output_hidden_states=True) for m in (one, other))
    pairs = zip(a.hidden_states, b.hidden_states, strict=True)
    return sum(float((x - y).square().mean()) for x, y in pairs)


def test_a_stored_student_learns_from_a_dense_teacher(local, tmp_path):
    """Both phases; in the second no row comes or goes, and the student comes nearer."""
    recipe, student, out = small("mnli"), tmp_path / "student", tmp_path / "out"
    folders = local(recipe)
    first = fine_tune(recipe, student, **folders, **QUIET)
    teacher = network(recipe.kind, recipe.labels)
    second = replace(recipe, epochs=20, accumulation=1)
    found = distil(
        second, out, student=student, teacher=folders["model"], data=folders["data"], **QUIET
    )
    assert found["steps"] == 20 * 4
    assert found["distillation"] == {"output": 0.0, "hidden": 15.0, "temperature": 2.0}
    assert found["remaining"] == first["remaining"]
    before, after = load(student), load(out)
    for name, layer in losparse.layers(after).items():
        old = losparse.layers(before)[name]
        assert torch.equal(layer.rows, old.rows)
        assert layer.S.shape == old.S.shape
    moved = [name for name, layer in losparse.layers(after).items() if len(layer.rows)]
    name = moved[0]
    assert not torch.equal(losparse.layers(after)[name].S, losparse.layers(before)[name].S)
    assert apart(after, teacher) < 0.8 * apart(before, teacher)
    assert 0 < found["eval_loss"] < 3  # the task's alone
    with pytest.raises(ValueError, match="complete already"):
        distil(second, out, student=student, teacher=folders["model"], data=folders["data"])


def test_a_stopped_distillation_goes_on(local, tmp_path, monkeypatch):
    recipe, student = small("mnli"), tmp_path / "student"
    folders = local(recipe)
    fine_tune(recipe, student, **folders, **QUIET)
    given = {"student": student, "teacher": folders["model"], "data": folders["data"]}
    distil(recipe, tmp_path / "whole", **given, **QUIET, save_steps=1)
    learn, seen = losparse.Distillation.learn, []

    def stop(self, *args):
        seen.append(1)
        if len(seen) == 6:  # two passes in a step
            raise KeyboardInterrupt
        return learn(self, *args)

    monkeypatch.setattr(losparse.Distillation, "learn", stop)
    with pytest.raises(KeyboardInterrupt):
        distil(recipe, tmp_path / "out", **given, **QUIET, save_steps=1)
    distil(recipe, tmp_path / "out", **given, **QUIET, save_steps=1)
    assert len(seen) == 6 + 4
    a, b = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "out"))
    assert all(torch.allclose(a[key], b[key], atol=1e-5) for key in a)


def test_accumulated_passes_of_a_distillation_are_one_batch(local, tmp_path):
    recipe, student = small("mnli"), tmp_path / "student"
    folders = local(recipe)
    fine_tune(recipe, student, **folders, **QUIET)
    config = json.loads((student / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (student / "config.json").write_text(json.dumps(config))
    given = {"student": student, "teacher": folders["model"], "data": folders["data"]}
    made = []
    for batch, accumulation in ((4, 2), (8, 1)):
        out, mine = (
            tmp_path / str(batch),
            replace(recipe, batch=batch, accumulation=accumulation, lr=0.01),
        )
        distil(mine, out, **given, **QUIET, optim="sgd")  # Adam would hide a factor
        made.append(load_file(out / "model.safetensors"))
    before, (a, b) = load_file(student / "model.safetensors"), made
    trained = [key for key in before if before[key].is_floating_point()]
    moved, error = (
        sum(float((a[key] - other[key]).square().sum()) for key in trained) for other in (before, b)
    )
    assert moved > 0
    assert error < 0.01 * moved


def test_what_cannot_be_distilled_is_named(local, tmp_path):
    recipe, student = small("mnli"), tmp_path / "student"
    folders = local(recipe)
    given = {"student": student, "teacher": folders["model"], "data": folders["data"]}
    with pytest.raises(ValueError, match=r"no losparse\.json: it is not of a finished training"):
        distil("mnli", tmp_path / "out", **given)
    with pytest.raises(ValueError, match="recipe is of answers; only a classification"):
        distil("squad", tmp_path / "out", **given)
    fine_tune(recipe, student, **folders, **QUIET)
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    config = DebertaV2Config.from_pretrained(folders["model"], num_hidden_layers=1, num_labels=3)
    DebertaV2ForSequenceClassification(config).save_pretrained(tmp_path / "teacher")
    tokenizer().save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="student has 3 hidden states and teacher 2"):
        distil(recipe, tmp_path / "out", **{**given, "teacher": tmp_path / "teacher"}, **QUIET)


def test_both_phases_by_the_command(tmp_path, local, monkeypatch, capsys):
    monkeypatch.setitem(RECIPES, "mnli", small("mnli"))
    monkeypatch.setitem(TEACHING, "epochs", 3)
    folders = local(RECIPES["mnli"])
    start = ["losparse", "mnli", "--cpu", f"--data={folders['data']}"]
    first = [*start, f"--model={folders['model']}", f"--out={tmp_path / 'a'}"]
    second = [*start, f"--student={tmp_path / 'a'}", f"--out={tmp_path / 'b'}"]
    for arguments in (first, [*second, f"--teacher={folders['model']}"]):
        monkeypatch.setattr("sys.argv", arguments)
        main()
    told = json.loads((tmp_path / "b" / "losparse.json").read_text())
    assert told["recipe"] == {**told["recipe"], **TEACHING}
    assert told["steps"] == 3 * 4
    for more, says in (
        ([], "--student and --teacher go together"),
        ([f"--teacher={folders['model']}", "--mode=itp"], "--mode have no effect with --student"),
    ):
        monkeypatch.setattr("sys.argv", [*second, *more])
        with pytest.raises(SystemExit):
            main()
        assert says in capsys.readouterr().err


def test_bad_input_is_named(tmp_path, local):
    with pytest.raises(ValueError, match="recipe 'mnly' is unknown; there are mnli, rte"):
        fine_tune("mnly", tmp_path)
    with pytest.raises(ValueError, match=r"no losparse\.json"):
        load(tmp_path)
    recipe = small("mnli")
    folders = local(recipe)
    (folders["data"] / "validation.jsonl").unlink()
    with pytest.raises(ValueError, match=r"there is no .*validation\.jsonl"):
        fine_tune(recipe, tmp_path / "out", **folders, use_cpu=True)


def test_a_diverging_loss_writes_no_model(tmp_path, local):
    recipe = replace(small("mnli"), lr=1e30)
    with pytest.raises(ValueError, match="the loss diverges"):
        fine_tune(recipe, tmp_path / "out", **local(recipe), use_cpu=True, disable_tqdm=True)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_command_line(tmp_path, local, monkeypatch, capsys):
    recipe = small("mnli")
    monkeypatch.setitem(RECIPES, "mnli", recipe)
    folders = local(recipe)
    arguments = ["losparse", "mnli", "--cpu", "--out", str(tmp_path / "out")]
    arguments += [f"--{k}={v}" for k, v in folders.items()]
    monkeypatch.setattr("sys.argv", arguments)
    main()
    told = capsys.readouterr().out
    assert json.loads(told[told.index('{\n "recipe"') :])["steps"] == 4
    with pytest.raises(SystemExit):
        main()
    assert "complete already" in capsys.readouterr().err
