"""What the text says was measured is what the files say, and they say where it comes from."""

import itertools
import json
import math
import statistics
from pathlib import Path

import pytest

from slr.chapters.measured import of_systems
from slr.chapters.records import recorded
from slr.evaluate.reproduction import grid
from slr.evaluate.tables import Spec

RESULTS = Path(__file__).parent.parent / "results"
MEASURED = RESULTS / "measured"
FILES = [
    f for f in sorted(RESULTS.glob("*/**/*.json")) if f.parts[-2] not in ("published", "specs")
]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(RESULTS).as_posix())
def test_every_measurement_has_a_command_a_date_and_versions(file):
    found = json.loads(file.read_text(encoding="utf-8"))
    if "what" in found:  # a cell of `slr reproduce`
        found = {"command": "python benchmarks/", **found["about"]}
        assert found["commit"]
    assert found["command"].startswith(("python benchmarks/", "slr "))
    assert found["date"] >= "2026-11-01"
    assert found.get("versions") or found.get("torch")


def test_gram_refinement_has_the_lowest_output_error_in_every_kind_of_layer():
    tables = json.loads((MEASURED / "tiny" / "metrics.json").read_text())["tables"]
    for table in tables.values():  # on the calibration text, and on held-out text
        assert len(table["Gram"]) == 8  # seven kinds and their mean
        for kind, ours in table["Gram"].items():
            for other in ("EoRA", "SparseGPT+SVD", "paper", "diagonal", "SVD", "pruned"):
                assert ours < table[other][kind], (kind, other)
            assert table["Gram, mask updated"][kind] < ours


def test_the_fast_solver_reaches_the_error_of_literal_algorithm_1():
    rows = json.loads((MEASURED / "refine" / "literal.json").read_text())["rows"]
    literal = {row["size"]: row["error"] for row in rows}
    compared = []
    for name in ("table", "llama-7b", "memory"):
        rows = json.loads((MEASURED / "refine" / f"{name}.json").read_text())["rows"]
        compared += [row for row in rows if row.get("size") in literal and row["way"] != "literal"]
    assert {row["size"] for row in compared} == set(literal)
    for row in compared:
        assert row["error"] <= 1.001 * literal[row["size"]], row
    memory = json.loads((MEASURED / "refine" / "memory.json").read_text())["rows"]
    assert len(memory) == 2
    for row in memory:
        assert row["memory"] <= 1.5, row


def test_the_large_run_fits_where_it_should():
    rows = json.loads((MEASURED / "pipeline" / "llama-7b.json").read_text())["rows"]
    assert rows["layers"] == 224
    assert rows["peak resident, GB"] <= 4
    assert rows["linear layers, result / source"] <= 0.64


def test_refining_the_outputs_has_the_lowest_perplexity_in_every_mask_and_pattern():
    found = grid(Spec.read("tiny"), MEASURED / "tiny")
    masks, patterns = ("magnitude", "wanda", "sparsegpt"), ("0.5", "0.6", "0.7", "2:4", "4:8")
    for mask, pattern in itertools.product(masks, patterns):
        cell = {r.removeprefix(f"{mask}/"): v[pattern] for r, v in found.items() if mask in r}
        outputs = cell["refined-activations"]
        for other in ("pruned", "svd", "eora", "refined", "diagonal"):
            assert cell["refined-activations-mask"] < outputs < cell[other], (mask, pattern, other)


def rows(name):
    return json.loads((MEASURED / "tiny" / f"{name}.json").read_text())["rows"]


def test_losparse_is_below_both_of_its_halves_at_every_ratio():
    found = {(r["mode"], r["remaining asked"]): r for r in rows("losparse")}
    ratios = {ratio for mode, ratio in found if mode == "losparse"}
    assert ratios == {0.5, 0.3, 0.2, 0.1}
    for ratio in ratios:
        mine = found["losparse", ratio]
        assert mine["remaining"] <= ratio
        for other in ("itp", "lowrank"):
            theirs = found[other, ratio]
            assert mine["perplexity, reported"] < theirs["perplexity, reported"]


def test_rows_that_may_return_hardly_do_and_do_not_help():
    found = {(r["remaining asked"], r["order"], r["regrow"]): r for r in rows("regrowth")}
    cells = {key[:2] for key in found}
    assert cells == {(ratio, order) for ratio in (0.5, 0.3, 0.2, 0.1) for order in (0, 1)}
    for cell in cells:
        held, free = found[(*cell, None)], found[(*cell, 10)]
        assert held["perplexity"] < free["perplexity"]
        assert held["rows returned"] == 0
        assert free["rows returned"] < free["rows kept"] / 500
        assert free["remaining"] <= cell[0]


@pytest.mark.parametrize("name", ["cap", "cap-refit"])
def test_what_cap_learned_is_below_uniform_for_every_seed(name):
    found = rows(name)
    uniform = next(r for r in found if r["choice"] == "uniform")
    learned = [r for r in found if r["choice"] == "learned"]
    assert {r["seed"] for r in learned} == {0, 1, 2}
    for row in learned:
        assert row["loss"] < uniform["loss"]
        assert row["parameters"] == uniform["parameters"]


def test_induction_helps_magnitude_and_cannot_change_wanda():
    found = {(r["pattern"], r["scales"]): r for r in rows("induction")}
    assert len({round(r["dense"], 3) for r in found.values()}) == 1
    for pattern in ("0.5", "2:4"):
        before, after = found[pattern, "none"], found[pattern, "both, start 1"]
        assert after["magnitude/none"] < before["magnitude/none"]
        assert after["wanda/none"] == pytest.approx(before["wanda/none"], rel=1e-3)


def test_llama_cpp_computed_what_slr_does():
    found = json.loads((MEASURED / "smollm2" / "llama_cpp.json").read_text())
    rows = found["rows"]
    assert all(row["texts of equal tokens"] == 6 for row in rows.values())
    for outtype, most in (("f32", 1e-4), ("f16", 0.007)):
        assert rows[outtype]["equal greedy"] == found["prompts"] == 8
        assert rows[outtype]["log p"] < most
    assert round(rows["q8_0"]["KL"], 3) == 0.004
    assert round(rows["q4_0"]["KL"], 2) == 0.30
    told = {"f32": 56.16, "f16": 56.16, "q8_0": 56.30, "q4_0": 67.42}  # in format.md
    assert {name: round(row["perplexity, file"], 2) for name, row in rows.items()} == told
    assert round(found["perplexity"], 2) == 56.16
    for outtype in ("q8_0", "q4_0"):  # llama.cpp's own part
        assert round(rows[outtype]["KL, file"], 3) == 0.003


def test_other_systems_are_told_beside_a_row_of_the_same_windows():
    told = recorded("smollm2/systems")
    losses = {(r["system"], r["row"]): r["losses"]["embedded"] for r in told["rows"]}
    found = of_systems("losparse", text="embedded", beside="itp")
    assert found.index[0] == ("dense", "dense")
    for key, row in found.iterrows():
        assert row["perplexity"] == pytest.approx(math.exp(statistics.mean(losses[key])), rel=1e-4)
        assert bool(row["95%"]) == (key != ("losparse", "itp"))
    over = math.exp(statistics.mean(losses["losparse", "losparse"]))
    over /= math.exp(statistics.mean(losses["losparse", "itp"]))
    assert found.loc[("losparse", "losparse"), "over itp"] == pytest.approx(over)
    low, high = found.loc[("losparse", "losparse"), "95%"].split("\u00a0to\u00a0")
    assert float(low) < over < float(high)
    assert [*dict.fromkeys(s for s, _ in of_systems("rounded", "cap").index)] == [
        "dense", "rounded", "cap",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="beside is 'no such'; it must be one of 'dense'"):
        of_systems("losparse", beside="no such")
