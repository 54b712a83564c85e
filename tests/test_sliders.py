"""The sliders of the page *Try it*: what is in the page is what was measured or follows from it."""

import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch

import slr
from benchmarks import sliders as measuring
from slr.chapters.measured import SHOWN, front_page
from slr.chapters.records import recorded
from slr.chapters.sliders import PICTURES, bound, explore, sparsity_and_rank
from slr.matrix.refinement import ramp as ramp_of

ROOT = Path(__file__).parent.parent


@pytest.fixture(params=PICTURES)
def page(request):
    return explore(request.param).data


def data_of(page):
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', page, re.S)[1])


def test_every_choice_has_its_line_and_every_point_its_words(page):
    data = data_of(page)
    *leading, last = (len(control["values"]) for control in data["controls"])
    places = [tuple(line["at"]) for line in data["lines"]]
    assert set(places) == set(itertools.product(*map(range, leading)))
    for line in data["lines"]:
        assert len(line["x"]) == len(line["y"]) == len(line["says"]) == last
        for axis, values in (("x", line["x"]), ("y", line["y"])):
            assert data[axis]["low"] <= min(values) <= max(values) <= data[axis]["high"]
    assert all(0 <= c["start"] < len(c["values"]) for c in data["controls"])


def test_asks_for_nothing_and_reads_without_a_script(page):
    assert not re.search(r"(src|href)=|https?:", page)
    assert page.count("<table") == 1
    assert "<details open>" in page


def test_the_page_says_what_the_record_holds():
    data = data_of(explore("sparsity-rank").data)
    record = recorded("tiny/sparsity_rank")
    values = [c["values"] for c in data["controls"]]
    for row in record["rows"]:
        line = data["lines"][values[0].index(f"{row['sparsity']:.0%}")]
        at = values[1].index(str(row["rank"]))
        rise = row["perplexity"] / record["dense"]["perplexity"] - 1
        assert math.isclose(line["y"][at], rise)
        assert f"perplexity {row['perplexity']:.2f}" in line["says"][at]


def test_no_two_lines_cross_as_the_page_says():
    data, _, _ = sparsity_and_rank()
    for less, more in itertools.combinations(data["lines"], 2):
        points = list(zip(less["x"], less["y"], strict=True))
        for x, y in zip(more["x"], more["y"], strict=True):
            for (x0, y0), (x1, y1) in itertools.pairwise(points):
                if x0 <= x <= x1:
                    assert y > y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    assert "no two lines cross" in (ROOT / "book" / "try-it.md").read_text().replace("\n", " ")


def test_what_the_page_says_of_the_schedules_holds():
    rows = {(r["rank"], r["schedule"]): r for r in recorded("smollm2/schedules")["rows"]}
    for rank in measuring.PATH_RANKS:
        ramp, fast = rows[rank, "paper"], rows[rank, "accelerated"]
        assert ramp["ranks"] == ramp_of(rank, measuring.ITERATIONS)
        assert all(f < r for f, r in zip(fast["errors"], ramp["errors"], strict=True))
        assert fast["errors"][19] < ramp["last"]
        assert fast["errors"] == sorted(fast["errors"], reverse=True)


def test_bound_is_that_of_chapter_17():
    m, n, k = 4096, 11008, 128
    peak, bandwidth = 100e12, 1e12
    for tokens in (1, 100, 10_000):
        moved = 9 / 8 * m * n + 2 * k * (m + n) + 2 * tokens * (m + n)
        work = (m * n + 2 * k * (m + n)) * tokens
        assert bound((m, n), tokens, k, peak, bandwidth) == max(moved / bandwidth, work / peak)
        dense = max((2 * m * n + 2 * tokens * (m + n)) / bandwidth, 2 * m * n * tokens / peak)
        assert bound((m, n), tokens, None, peak, bandwidth) == dense


def test_records_are_of_what_the_benchmark_measures():
    cell = next(
        row
        for row in recorded("tiny/sparsity_rank")["rows"]
        if (row["sparsity"], row["rank"]) == (0.5, 8)
    )
    model = slr.load("tiny", dtype=torch.float32)
    assert cell["bytes"] == measuring.in_layers(model, 0.5, 8)
    assert str(measuring.recipe(0.5, 0).as_dict()["refine"]) == "none"
    for name in ("tiny/sparsity_rank", "smollm2/schedules"):
        record = recorded(name)
        assert record["commit"]
        assert "dirty" not in record["commit"]
        assert record["command"].startswith("python benchmarks/sliders.py")


def test_front_page_is_the_league():
    shown = front_page()
    assert 8 <= len(shown) <= len(SHOWN)
    for file in (ROOT / "results" / "measured" / "league").glob("*/dense.json"):
        told = json.loads(file.read_text(encoding="utf-8"))
        name = SHOWN.get(told["row"].replace("rounded/", "plain "))
        if name is None or "also" not in told or "in_layers" not in told:
            continue
        row = shown.loc[name]
        assert row["perplexity"] == f"{told['also']['wikitext-2-test.txt']['perplexity']:.1f}"
        assert row["MB"] == f"{told['bytes'] / 1e6:.0f}"
        assert row["products"] == f"{told['products'] / told['weights']:.0%}"


def test_front_page_lists_every_chapter_with_its_question():
    from course import chapters

    page = (ROOT / "book" / "intro.md").read_text(encoding="utf-8")
    for file in chapters.CHAPTERS:
        notebook = chapters.read(file)
        row = f"| [{chapters.title(notebook)}](../notebooks/{file.stem}) | "
        assert row + chapters.question(notebook) + " |" in page
