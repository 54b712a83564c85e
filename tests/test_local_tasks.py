"""The tasks made from the held-out text, and lm-eval's scores on them against ours by hand."""

import json
import os

import pytest
import torch
import yaml

import slr
from slr.chapters import local_tasks
from slr.chapters.choices import log_likelihoods
from slr.evaluate.harness import tasks

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    names = local_tasks.build(folder, 12)
    rows = {n: [json.loads(x) for x in (folder / f"{n}.jsonl").open()] for n in names}
    return folder, rows


def by_hand(model, tokenizer, context, choice):
    """ln p(" " + choice | context), from the logits of one sequence."""
    start = len(tokenizer(context)["input_ids"])
    ids = torch.tensor([tokenizer(f"{context} {choice}")["input_ids"]])
    with torch.no_grad():
        log_p = model(input_ids=ids).logits[0].double().log_softmax(-1)
    return sum(float(log_p[i - 1, ids[0, i]]) for i in range(start, ids.shape[1]))


def test_lm_eval_gives_what_the_logits_give(built, small):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder, rows = built
    model, tokenizer = slr.load(small, dtype=torch.float32), slr.load_tokenizer(small)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, max_length=512)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=wrapped, tasks=list(rows), task_manager=manager, log_samples=True, bootstrap_iters=0
    )
    short = tasks(model, tokenizer, list(rows), folder=folder, seqlen=512, limit=5)
    for name, questions in rows.items():
        hand = torch.tensor(
            [
                [by_hand(model, tokenizer, row["context"], choice) for choice in row["choices"]]
                for row in questions
            ]
        )
        samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        theirs = torch.tensor([[float(r[0]) for r in s["filtered_resps"]] for s in samples])
        ours = log_likelihoods(model, tokenizer, questions, batch_size=5)
        assert (theirs - hand).abs().max() < 1e-4
        assert (ours - hand).abs().max() < 1e-4
        gold = torch.tensor([row["gold"] for row in questions])
        length = torch.tensor([[len(c) for c in row["choices"]] for row in questions])
        for metric, scores in (("acc", hand), ("acc_norm", hand / length)):
            right = (scores.argmax(1) == gold).double()
            assert found["results"][name][f"{metric},none"] == pytest.approx(float(right.mean()))
            assert short[name][f"{metric},none"] == pytest.approx(float(right[:5].mean()))


def test_the_right_choice_is_what_the_text_says(built):
    documents = slr.data.documents()
    for row in (row for rows in built[1].values() for row in rows):
        assert slr.data.held_out(row["document"])
        assert len(set(row["choices"])) == 4
        assert f"{row['context']} {row['choices'][row['gold']]}" in documents[row["document"]]
        assert row["context"] == row["context"].rstrip()
    for row in built[1]["slr_cloze"]:
        assert all(choice in documents[row["document"]] for choice in row["choices"])
        assert len({local_tasks._kind(choice) for choice in row["choices"]}) == 1
    golds = [row["gold"] for row in local_tasks.cloze(100)]
    assert {golds.count(i) > 10 for i in range(4)} == {True}


def test_twice_the_same_and_another_seed_another(built, tmp_path):
    local_tasks.build(tmp_path / "a", 12)
    local_tasks.build(tmp_path / "b", 12, seed=1)
    for name in built[1]:
        first = (built[0] / f"{name}.jsonl").read_bytes()
        assert (tmp_path / "a" / f"{name}.jsonl").read_bytes() == first
        assert (tmp_path / "b" / f"{name}.jsonl").read_bytes() != first
        made = yaml.safe_load((tmp_path / "a" / f"{name}.yaml").read_text(encoding="utf-8"))
        assert made["dataset_kwargs"]["data_files"]["test"] == str(tmp_path / "a" / f"{name}.jsonl")


def test_bad_folders_and_too_little_text_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to .*file/tasks: Not a directory"):
        local_tasks.build(tmp_path / "file" / "tasks", 4)
    long = {"a": "one two three four " * 20}
    for documents in ({}, {"a": "short"}, long):
        with pytest.raises(ValueError, match=r"examples is 300, but \d documents give \d+"):
            local_tasks.build(tmp_path / "new", 300, documents=documents)
    with pytest.raises(ValueError, match="examples is 0"):
        local_tasks.cloze(0)
    assert not (tmp_path / "new").exists()


def test_questions_to_score_must_have_equally_many_choices(small):
    model, tokenizer = slr.load(small), slr.load_tokenizer(small)
    two, three = ({"context": "a", "choices": list("bcd")[:n]} for n in (2, 3))
    for questions, counts in (([], r"\[\]"), ([two, three], r"\[2, 3\]")):
        with pytest.raises(ValueError, match=f"numbers of choices are {counts}"):
            log_likelihoods(model, tokenizer, questions)


def test_from_the_command_line(built, small, capsys):
    from typer.testing import CliRunner

    from slr.cli import app

    arguments = ["eval", str(small), "--tasks", "slr_cloze", "--task-folder", str(built[0])]
    done = CliRunner().invoke(app, [*arguments, "--limit", "2", "--json"])
    assert done.exit_code == 0, done.output
    assert '"slr_cloze"' in done.output
