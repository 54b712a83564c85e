"""Tables cell by cell: what is measured, cached, resumed and refused."""

import json

import pytest
import torch
from typer.testing import CliRunner

import slr
from slr.cli import app
from slr.evaluate import reproduction
from slr.evaluate.reproduction import Spec

LIMIT = {"limit": 3, "seqlen": 48}


@pytest.fixture
def spec(small, tmp_path):
    """A small table in a file of its own."""
    told = {
        "title": "a small table", "model": str(small), "dtype": "float32", "text": "embedded",
        "seqlen": 48, "limit": 3, "calibration": "embedded",
        "recipe": {"rank": 2, "iterations": 3, "samples": 2, "seqlen": 32, "seed": 0},
        "masks": ["magnitude", "wanda"], "repairs": ["none", "svd", "weights", "activations"],
        "columns": ["0.5", "2:4"], "published": None,
    }  # fmt: skip
    file = tmp_path / "table.json"
    file.write_text(json.dumps(told))
    return Spec.read(str(file))


def test_the_specs_that_come_with_the_package():
    llama = ["llama-2-13b", "llama-2-13b-benchmarks", "llama-7b", "llama-7b-benchmarks"]
    assert reproduction.specs() == ["league", *llama, "smollm2", "tiny"]
    llama = Spec.read("llama-7b")
    assert (llama.seqlen, llama.dtype, llama.text) == (2048, "float16", "wikitext2")
    cells = list(llama.cells())
    assert len(cells) == 1 + 3 * 5 * 10
    assert all(
        cell.recipe.resolved(4096).rank == 128
        for cell in cells[1:]
        if str(cell.recipe.refine) != "none"
    )
    # Cheapest first: the dense model, then what needs no repair, then one SVD.
    assert [cell.row for cell in cells[:2]] == ["dense", "magnitude/pruned"]
    assert cells[31].row == "magnitude/svd"
    assert cells[-1].row == "sparsegpt/pcp"
    assert len({cell.file(slr.tiny.path()) for cell in cells}) == len(cells)


def test_both_headline_claims_follow_from_the_published_numbers():
    known = reproduction.published(Spec.read("llama-7b"))
    reduction = 1 - known["magnitude/refined"]["0.5"] / known["magnitude/pruned"]["0.5"]
    assert round(reduction, 3) == 0.539
    for mask in ("magnitude", "wanda"):
        for column, value in known[f"{mask}/refined"].items():
            if column != "0.8":  # where all are beyond use
                assert value < known[f"{mask}/svd"].get(column, float("inf"))
    assert reproduction.published(Spec.read("tiny")) == {}


def test_a_cell_is_the_perplexity_of_the_compressed_model(small, spec):
    tokenizer = slr.load_tokenizer(small)
    windows = slr.data.windows(slr.data.corpus("validation"), tokenizer, 48, 3)
    calibration = slr.data.windows(slr.data.corpus("calibration"), tokenizer, 32, 2)
    for repair in ("none", "pcp", "activations"):
        recipe = slr.Recipe.fitting(prune="wanda", refine=repair, rank=2, iterations=3)
        losses, reports = reproduction.measure(small, recipe, windows, calibration)
        value = float(losses.mean().exp())
        model = slr.load(small, dtype=torch.float32)
        expected = slr.compress_model(model, recipe, calibration)
        assert value == pytest.approx(slr.perplexity(model, windows), rel=1e-4)
        assert [r.error for r in reports] == pytest.approx([r.error for r in expected], rel=1e-5)
    with pytest.raises(ValueError, match="needs calibration windows"):
        reproduction.measure(small, recipe, windows)


def test_stopped_at_will_and_never_measured_twice(spec, tmp_path, monkeypatch):
    out, real, count = tmp_path / "cells", reproduction.measure, []

    def stops(*args, **kwargs):
        if len(count) % 5 == 4:
            count.append(0)
            raise KeyboardInterrupt
        count.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(reproduction, "measure", stops)
    for _ in range(10):
        try:
            whole = reproduction.reproduce(spec, out)
            break
        except KeyboardInterrupt:
            assert not list(out.rglob("*.tmp"))
    assert sum(count) == 17  # the dense model, and 2 masks of 4 repairs in 2 columns
    assert count.count(0) >= 3
    monkeypatch.setattr(reproduction, "measure", real)
    assert reproduction.reproduce(spec, tmp_path / "again") == whole
    assert list(whole) == spec.rows
    assert list(whole["wanda/svd"]) == ["0.5", "2:4"]
    cell = json.loads((out / "wanda-refined-activations" / "2-4.json").read_text())
    assert cell["perplexity"] == whole["wanda/refined-activations"]["2:4"]
    assert cell["what"]["calibration"]["windows"] == 2
    assert {"seconds", "date", "versions", "processor", "commit"} <= set(cell["about"])


def test_a_part_of_the_table(spec, tmp_path):
    found = reproduction.reproduce(spec, tmp_path / "a", rows=["*/pruned"], columns=["2:4"])
    assert {row: list(cells) for row, cells in found.items()} == {
        "magnitude/pruned": ["2:4"],
        "wanda/pruned": ["2:4"],
    }
    with pytest.raises(ValueError, match="row 'wanda/lora' fits none of dense, magnitude/pruned"):
        list(spec.cells(["wanda/lora"]))
    with pytest.raises(ValueError, match="column '3:4' is none of"):
        list(spec.cells(columns=["3:4"]))


def test_a_cell_that_was_measured_differently_is_refused(spec, tmp_path):
    from dataclasses import replace

    out, part = tmp_path / "cells", {"rows": ["magnitude/pruned"], "columns": ["0.5"]}
    reproduction.reproduce(spec, out, **part)
    other = replace(spec, limit=2)
    with pytest.raises(ValueError, match="was measured with another text; give another folder"):
        reproduction.reproduce(other, out, **part)
    before = reproduction.grid(spec, out)
    assert reproduction.reproduce(other, out, fresh=True, **part) != before


def test_a_cell_from_before_an_option_is_still_the_cell(spec, tmp_path):
    part = {"rows": ["magnitude/pruned"], "columns": ["0.5"]}
    reproduction.reproduce(spec, tmp_path, **part)
    file = next(tmp_path.glob("*/*.json"))
    told = json.loads(file.read_text())
    del told["what"]["recipe"]["prepare"]
    file.write_text(json.dumps({**told, "perplexity": 1.0}))
    assert reproduction.reproduce(spec, tmp_path, **part)["magnitude/pruned"]["0.5"] == 1.0
    told["what"]["recipe"]["prune"] = "random"
    file.write_text(json.dumps(told))
    with pytest.raises(ValueError, match="measured with another recipe"):
        reproduction.reproduce(spec, tmp_path, **part)


def test_the_same_table_for_another_model(spec, small, tmp_path):
    found = reproduction.reproduce(spec, tmp_path / "a", model="tiny", rows=["dense"])
    windows = slr.data.windows(slr.data.corpus("validation"), slr.load_tokenizer("tiny"), 48, 3)
    assert found["dense"]["dense"] == pytest.approx(slr.perplexity("tiny", windows), rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing"], "table 'nothing' is neither one of league, llama-2-13b, llama-2"),
        (["tiny", "--rows", "magic/*"], "row 'magic/*' fits none of dense"),
        (["tiny", "--columns", "0.55"], "column '0.55' is none of 0.1"),
        (["llama-7b", "--rows", "dense"], "the hub did not give it"),
        (["tiny", "--model", "no/such/folder"], "neither 'tiny', 'smollm2', nor a folder"),
    ],
)
def test_bad_arguments_are_one_line(arguments, says, tmp_path):
    result = CliRunner().invoke(app, ["reproduce", *arguments, "--out", str(tmp_path / "x")])
    assert result.exit_code == 2
    assert says in " ".join(result.output.split())
    assert not (tmp_path / "x").exists()


def test_a_spec_that_says_something_unknown(tmp_path):
    file = tmp_path / "odd.json"
    file.write_text(json.dumps({"title": "t", "colour": "blue"}))
    with pytest.raises(ValueError, match=r"table 'odd'.*colour"):
        Spec.read(str(file))


def test_the_command_prints_the_table(spec, small, tmp_path):
    arguments = ["reproduce", str(tmp_path / "table.json"), "--out", str(tmp_path / "x"), "--json"]
    result = CliRunner().invoke(
        app, [*arguments, "--rows", "dense,magnitude/svd", "--columns", "2:4"]
    )
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout[result.stdout.index("{") :])
    assert set(told["measured"]) == {"dense", "magnitude/svd"}
