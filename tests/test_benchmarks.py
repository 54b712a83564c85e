"""Tables of lm-eval scores: whose models, what is asked, kept, resumed and refused."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import slr
from slr.chapters import local_tasks
from slr.cli import app
from slr.evaluate import benchmarks, harness
from slr.evaluate.benchmarks import Benchmarks, spec_of
from slr.evaluate.tables import Spec

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

ROWS = ["dense", "magnitude/pruned", "magnitude/svd", "magnitude/refined"]
TASKS = ["slr_cloze", "slr_continuation"]


@pytest.fixture
def told(small, tmp_path):
    """What a small table says, with the perplexity table that it names; two local tasks."""
    local_tasks.build(tmp_path / "tasks", 24)
    perplexities = {
        "title": "a small table", "model": str(small), "dtype": "float32", "text": "embedded",
        "seqlen": 48, "limit": 3, "calibration": "embedded",
        "recipe": {"rank": 2, "iterations": 3, "samples": 2, "seqlen": 32, "seed": 0},
        "masks": ["magnitude", "wanda"], "repairs": ["none", "svd", "weights"],
        "columns": ["0.5", "2:4"], "published": None,
    }  # fmt: skip
    (tmp_path / "table.json").write_text(json.dumps(perplexities))
    return {
        "title": "small benchmarks", "table": str(tmp_path / "table.json"), "pattern": "2:4",
        "rows": ROWS, "tasks": TASKS, "dtype": "float16", "batch_size": 6, "limit": 20,
        "task_folder": str(tmp_path / "tasks"), "source": "a test",
    }  # fmt: skip


@pytest.fixture
def read(told, tmp_path):
    """Writes the spec with some changes, and reads it."""

    def write(**changes):
        file = tmp_path / "small-benchmarks.json"
        file.write_text(json.dumps({**told, **changes}))
        return Benchmarks.read(str(file))

    return write


def test_the_specs_that_come_with_the_package_are_the_authors():
    for name, pattern in (("llama-7b", "0.5"), ("llama-2-13b", "2:4")):
        spec = spec_of(f"{name}-benchmarks")
        assert spec.tasks == ["truthfulqa", "gsm8k", "arc_challenge", "mmlu"]
        assert (spec.dtype, spec.batch_size, spec.limit) == ("float16", 6, None)
        assert spec.table == Spec.read(name)
        cells = list(spec.models())
        assert [cell.row for cell in cells] == spec.rows == ROWS
        assert cells[0].recipe is None
        assert {str(cell.recipe.pattern) for cell in cells[1:]} == {pattern}
        assert [cell.recipe.rank for cell in cells[1:]] == [None, 128, 128]
        assert cells[3].recipe.as_dict()["iterations"] == 50
        assert "eval_models_on_benchmark.sh" in spec.source


def probe(model, tokenizer, names, **options):
    """In place of the harness: a score that tells models and tasks apart."""
    with torch.no_grad():
        found = model(torch.arange(40)[None]).logits[0, -1, 5].item()
    return {"results": {name: {"acc,none": found + len(name)} for name in names}}


def test_a_score_is_that_of_the_model_that_the_row_says(read, small, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "report", probe)
    found = benchmarks.reproduce(read(), tmp_path / "out")
    seen = set()
    for row, refine in zip(ROWS, (None, "none", "svd", "weights"), strict=True):
        folder = small
        if refine:
            kinds = {"prune": "magnitude", "pattern": "2:4", "refine": refine}
            recipe, folder = slr.Recipe.fitting(**kinds, rank=2, iterations=3), tmp_path / refine
            slr.compress(small, recipe, out=folder)
        scores = probe(slr.load(folder, dtype=torch.float32), None, TASKS)["results"]
        for task in TASKS:
            assert found[f"{task} acc"][row] == (scores[task]["acc,none"], None)
            seen.add(scores[task]["acc,none"])
    assert len(seen) == 8
    cell = json.loads((tmp_path / "out/magnitude-svd/slr_cloze.json").read_text())
    assert cell["what"]["recipe"]["rank"] == 2
    assert cell["what"]["dtype"] == "float32"  # on a CPU
    assert {"seconds", "date", "versions", "processor", "commit"} <= set(cell["about"])
    assert slr.verify(tmp_path / "out/magnitude-refined/model")


def test_the_harness_is_asked_and_says_how(read, small, tmp_path):
    part = {"rows": ["dense"], "columns": ["slr_cloze"]}
    found = benchmarks.reproduce(read(), tmp_path / "out", **part)
    model, tokenizer = slr.load(small, dtype=torch.float32), slr.load_tokenizer(small)
    asked = {"folder": tmp_path / "tasks", "limit": 20}
    scores = harness.tasks(model, tokenizer, ["slr_cloze"], **asked)["slr_cloze"]
    for metric in ("acc", "acc_norm"):
        values = scores[f"{metric},none"], scores[f"{metric}_stderr,none"]
        assert found[f"slr_cloze {metric}"] == {"dense": values}
    cell = json.loads((tmp_path / "out/dense/slr_cloze.json").read_text())
    assert cell["n-shot"] == {"slr_cloze": 0}
    assert cell["n-samples"]["slr_cloze"]["effective"] == 20


def test_batches_and_dtype_are_those_of_the_spec(read, tmp_path, monkeypatch):
    seen = []

    def report(model, tokenizer, names, **options):
        seen.append((names, model.dtype, options))
        return {"results": {names[0]: {"acc,none": 0.5}}}

    monkeypatch.setattr(harness, "report", report)
    benchmarks.reproduce(read(), tmp_path / "out", rows=["dense"], columns=["slr_cloze"])
    options = {"limit": 20, "batch_size": 6, "folder": str(tmp_path / "tasks")}
    assert seen == [(["slr_cloze"], torch.float32, options)]


def test_stopped_at_will_and_never_asked_twice(read, tmp_path, monkeypatch):
    spec, out, asked, made = read(), tmp_path / "out", [], []
    compress = benchmarks.compress

    def stops(model, tokenizer, names, **options):
        asked.append(names[0])
        if len(asked) % 3 == 0:
            raise KeyboardInterrupt
        return probe(model, tokenizer, names, **options)

    def counts(source, recipe, **options):
        made.append(str(recipe.refine))
        return compress(source, recipe, **options)

    monkeypatch.setattr(harness, "report", stops)
    monkeypatch.setattr(benchmarks, "compress", counts)
    for _ in range(6):
        try:
            whole = benchmarks.reproduce(spec, out)
            break
        except KeyboardInterrupt:
            assert not list(out.rglob("*.tmp"))
    assert len(asked) == 8 + 3  # four models of two tasks, three of them stopped
    assert made == ["none", "svd", "weights"]
    monkeypatch.setattr(harness, "report", probe)
    assert benchmarks.reproduce(spec, tmp_path / "again") == whole
    assert list(whole["slr_cloze acc"]) == ROWS


def test_the_mask_of_a_row_may_need_data(read, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "report", probe)
    spec = read(rows=["wanda/svd"], tasks=["slr_cloze"])
    benchmarks.reproduce(spec, tmp_path / "out")
    cell = json.loads((tmp_path / "out/wanda-svd/slr_cloze.json").read_text())
    assert cell["what"]["calibration"]["windows"] == 2
    shutil.rmtree(tmp_path / "out/wanda-svd/model")  # its cells are there: it is not needed
    assert benchmarks.reproduce(spec, tmp_path / "out") == benchmarks.grid(spec, tmp_path / "out")


def test_what_was_made_differently_is_refused(read, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "report", probe)
    out, part = tmp_path / "out", {"rows": ["magnitude/svd"], "columns": ["slr_cloze"]}
    spec = read()
    benchmarks.reproduce(spec, out, **part)
    with pytest.raises(ValueError, match=r"slr_cloze.json was measured with another asked"):
        benchmarks.reproduce(replace(spec, limit=2), out, **part)
    table = replace(spec.table, recipe={**spec.table.recipe, "rank": 3})
    with pytest.raises(ValueError, match=r"slr_cloze.json was measured with another recipe"):
        benchmarks.reproduce(replace(spec, table=table), out, **part)
    with pytest.raises(ValueError, match=r"model was compressed with another recipe"):
        benchmarks.reproduce(replace(spec, table=table), out, fresh=True, **part)
    with pytest.raises(ValueError, match=r"model was compressed with another model"):
        benchmarks.reproduce(spec, out, model="tiny", fresh=True, **part)
    (tmp_path / "tasks/slr_cloze.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="another asked"):
        benchmarks.reproduce(spec, out, **part)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"colour": "blue"}, "'colour' is unknown"),
        ({"tasks": []}, "'tasks' is .* it must be a list of names"),
        ({"rows": ["magnitude/pcp"]}, "row 'magnitude/pcp' fits none of dense"),
        ({"pattern": "4:8"}, "column '4:8' is none of 0.5, 2:4"),
        ({"table": "nothing"}, "table 'nothing' is neither one of"),
        ({"batch_size": 0}, "'batch_size' is 0"),
        ({"limit": 0}, "'limit' is 0"),
    ],
    ids=str,
)
def test_a_spec_that_does_not_fit_is_one_line(read, changes, says):
    with pytest.raises(ValueError, match=f"table 'small-benchmarks': .*{says}"):
        read(**changes)


def test_a_group_with_a_score_of_its_own_stands_for_its_members(read, tmp_path):
    spec = read(tasks=["all", "tag"], rows=["dense"])
    both = {"a": {"alias": "a", "acc,none": 0.25}, "b": {"em,strict-match": 0.5}}
    group = {"all": {"acc,none": 0.4, "acc_stderr,none": 0.1}, **both}
    for task, scores in (("all", group), ("tag", both)):
        file = spec.file("dense", task, tmp_path)
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"scores": scores, "what": {}}))
    found = benchmarks.grid(spec, tmp_path)
    assert {name: row["dense"] for name, row in found.items()} == {
        "all acc": (0.4, 0.1),
        "a acc": (0.25, None),
        "b em (strict-match)": (0.5, None),
    }


def command(*arguments):
    return CliRunner().invoke(app, ["reproduce", *map(str, arguments)])


def test_from_the_command_line(read, tmp_path):
    read()
    table, out = tmp_path / "small-benchmarks.json", tmp_path / "out"
    part = ["--rows", "dense,magnitude/svd", "--columns", "slr_cloze"]
    done = command(table, "--out", out, *part)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].split()[-4:] == ROWS
    assert lines[1].startswith("slr_cloze acc ")
    assert lines[1].count("±") == 2
    done = command(table, "--out", out, *part, "--json")
    told = json.loads(done.stdout[done.stdout.index("{") :])
    assert set(told["measured"]["slr_cloze acc"]) == {"dense", "magnitude/svd"}
    for more, says in ((["--columns", "mmlu"], "column 'mmlu' is none of slr_cloze"),
                       (["--rows", "magic"], "row 'magic' fits none of dense")):  # fmt: skip
        done = command(table, "--out", tmp_path / "x", *more)
        assert done.exit_code == 2
        assert says in " ".join(done.output.split())
        assert not (tmp_path / "x").exists()
