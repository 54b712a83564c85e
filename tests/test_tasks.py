"""``slr eval --tasks``: how long inputs may be, and tasks that are malformed or have bad data."""

import json
import os
import shutil

import pytest
import torch
import yaml
from typer.testing import CliRunner

import slr
from slr.cli import app
from slr.evaluate.harness import tasks

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

pytest.importorskip("lm_eval")

ROWS = [{"text": "a b", "choices": ["c", "d"], "gold": i % 2} for i in range(4)]


@pytest.fixture
def folder(tmp_path):
    """Writes a task ``w`` with some changes, and its data; returns their folder."""

    def write(rows=ROWS, **changes):
        where = tmp_path / "tasks"
        where.mkdir(exist_ok=True)
        data = rows if isinstance(rows, str) else "\n".join(map(json.dumps, rows))
        (where / "rows.jsonl").write_text(data)
        task = {
            "task": "w", "dataset_path": "json", "test_split": "test",
            "dataset_kwargs": {"data_files": {"test": str(where / "rows.jsonl")}},
            "output_type": "multiple_choice", "doc_to_text": "{{text}}",
            "doc_to_choice": "{{choices}}", "doc_to_target": "gold",
            "metric_list": [{"metric": "acc"}],
        }  # fmt: skip
        task = {k: v for k, v in {**task, **changes}.items() if v is not None}
        (where / "w.yaml").write_text(yaml.safe_dump(task))
        return where

    return write


def run(model, folder, *more, task="w"):
    arguments = ["eval", model, "--tasks", task, "--task-folder", folder, *more]
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def made(monkeypatch):
    """With what lm-eval's model was made."""
    from lm_eval.models.huggingface import HFLM

    seen, real = {}, HFLM.__init__

    def spy(self, **options):
        real(self, **options)
        seen.update(options, length=self.max_length, dtype=options["pretrained"].dtype)

    monkeypatch.setattr(HFLM, "__init__", spy)
    return seen


@pytest.mark.parametrize(
    ("more", "length", "dtype"),
    [
        ([], 4096, torch.float32),  # all positions of the model, beyond 2048
        (["--seqlen", 3000], 3000, torch.float32),
        (["--seqlen", 8, "--dtype", "bfloat16"], 8, torch.bfloat16),
    ],
)
def test_inputs_are_as_long_as_the_model_or_as_asked(
    small, tmp_path, folder, made, more, length, dtype
):
    model = shutil.copytree(small, tmp_path / "a")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    done = run(model, folder(), *more, "--json")
    assert done.exit_code == 0, done.output
    assert (made["length"], made["dtype"]) == (length, dtype)
    assert made["trust_remote_code"] is False
    assert 0 <= json.loads(done.stdout)["tasks"]["w"]["acc,none"] <= 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rows": "{not json\n"}, "task w cannot be used (DatasetGenerationError"),
        ({"rows": ""}, "task w cannot be used (StopIteration)"),
        ({"rows": [{"text": "a", "gold": 0}]}, "'choices' is undefined"),
        ({"rows": [{**ROWS[0], "gold": 7}]}, "task w cannot be used (IndexError"),
        ({"dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}}, "nowhere.jsonl"),
        ({"dataset_path": "no/such"}, "no/such"),
        ({"dataset_path": None}, "task w cannot be used"),
        ({"test_split": "other"}, "KeyError 'other'"),
        ({"output_type": "song"}, "invalid output_type 'song'"),
        ({"doc_to_text": "{{text"}, "task w cannot be used (TemplateSyntaxError"),
        ({"colour": "blue"}, "colour"),
    ],
    ids=str,
)
def test_a_malformed_task_is_one_line(small, folder, changes, says):
    one_line(run(small, folder(**changes)), says)


def one_line(done, *says):
    assert done.exit_code == 2, done.output
    lines = [line for line in done.stderr.splitlines() if line.startswith("slr: ")]
    assert len(lines) == 1, done.stderr
    for text in says:
        assert text in lines[0], lines[0]
    assert "Traceback" not in done.output


def test_unknown_tasks_files_and_folders(small, folder, tmp_path):
    where = folder()
    one_line(run(small, where, task="w,zz"), "task 'zz' is unknown to lm-eval", "tasks has w")
    one_line(run(small, tmp_path / "nowhere"), "nowhere' is no folder")
    one_line(run(small, where, "--seqlen", 1), "seqlen is 1")
    one_line(run(small, where, "--limit", 0), "limit is 0")
    for text, says in (("task: w\n  x: [1,\n", "w.yaml is not YAML"), ("- 1\n", "holds no task")):
        (where / "w.yaml").write_text(text)
        one_line(run(small, where), says)


def test_names_may_have_spaces(small, folder):
    assert run(small, folder(), task="w, w").exit_code == 0


def test_the_model_is_as_it_was(small, folder):
    model, tokenizer = slr.load(small), slr.load_tokenizer(small)
    before = tasks(model, tokenizer, ["w"], folder=folder(), seqlen=16)
    assert before == tasks(model, tokenizer, ["w"], folder=folder(), seqlen=16)
