"""The league: what each row weighs, its order, and the command."""

import json
from itertools import combinations
from pathlib import Path

import pytest
import torch
from matplotlib.text import Text
from typer.testing import CliRunner

import slr
from slr.chapters.plots import league_panels
from slr.checkpoint.sizes import checkpoint_account
from slr.cli import app
from slr.evaluate import league
from slr.evaluate.league import Place, as_table, places, seeded
from slr.evaluate.reproduction import reproduce, sizes
from slr.evaluate.tables import Spec
from slr.matrix.rounding import Grid

SPEC = {
    "title": "t", "dtype": "float32", "text": "embedded", "seqlen": 16, "limit": 2,
    "calibration": "embedded", "recipe": {"rank": 2, "samples": 4, "seqlen": 16},
    "rounded": ["int8"],
    "entries": {
        "pruned": {"prune": "magnitude", "refine": "none"},
        "half": {"prune": "magnitude", "refine": "svd"},
        "codes": {"pattern": "dense", "values": "int4 by 16", "iterations": 2},
        "both": {"prune": "magnitude", "refine": "weights", "values": "int8", "iterations": 2},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def table(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("league")
    (folder / "own.json").write_text(json.dumps({**SPEC, "model": str(small)}))
    spec = Spec.read(str(folder / "own.json"))
    reproduce(spec, folder / "cells")
    return spec, folder / "cells"


def test_what_comes_with_the_package_is_sound():
    spec = Spec.read("league")
    cells = list(spec.cells())
    assert [cell.row for cell in cells] == spec.rows
    assert len({cell.file(Path()) for cell in cells}) == len(cells)
    assert not any("," in row for row in spec.rows)  # commas part the rows on the command line


@pytest.mark.parametrize("row", SPEC["entries"])
def test_a_cell_says_what_the_folder_weighs(small, table, row, tmp_path):
    spec, cells = table
    told = json.loads((cells / row / "dense.json").read_text())
    recipe = next(cell.recipe for cell in spec.cells([row]))
    windows = torch.randint(0, 60, (4, 16), generator=torch.Generator().manual_seed(1))
    slr.compress(
        small, recipe, out=tmp_path / "out", calibration=windows if recipe.needs_data else None
    )
    assert told["bytes"] == checkpoint_account(tmp_path / "out")["bytes"]


def test_plain_rows_weigh_their_codes_and_scales(small, table):
    told = sizes(small, Grid(4, 32), [])
    layers = [
        m.weight.shape
        for block in slr.load(small).model.layers
        for m in block.modules()
        if isinstance(m, torch.nn.Linear)
    ]
    want = sum(m * n // 2 + m * (n // 32) * 2 + m * (n // 32) // 2 for m, n in layers)
    assert (told["in_layers"], told["weights"]) == (want, sum(m * n for m, n in layers))
    assert sizes(small, None, [])["bytes"] == 2 * sum(
        p.numel() for p in slr.load(small).parameters()
    )


def test_the_league_is_in_order_and_stars_the_frontier(table):
    found = places(*table)
    assert {place.name for place in found} == {"dense", "plain int8", *SPEC["entries"]}
    bits = [place.bits for place in found]
    assert bits == sorted(bits)
    best = float("inf")
    for place in found:
        assert place.frontier == (place.perplexity < best)
        best = min(best, place.perplexity)
    by_name = {place.name: place for place in found}
    assert by_name["dense"].bits == 16
    assert by_name["pruned"].multiplications == 0.5
    assert by_name["codes"].multiplications > 1
    assert max(by_name["codes"].bits, by_name["both"].bits) < by_name["half"].bits
    text = as_table(found).splitlines()
    assert len({len(line) for line in text}) == 1
    assert text[0].split() == ["row", "bits", "MB", "arithmetic", "perplexity", "seconds"]


def test_of_equal_size_the_better_one_has_the_star():
    sizes = {"a": (4.0, 9.0), "b": (4.0, 8.0), "c": (5.0, 8.0), "d": (5.0, 7.0), "e": (6.0, 7.0)}
    found = [Place(n, bits, 1, 1.0, 99.0, value, 1.0) for n, (bits, value) in sizes.items()]
    shown = league._starred(found)
    assert [p.name for p in shown] == ["b", "a", "d", "c", "e"]
    assert [p.name for p in shown if p.frontier] == ["b", "d"]


def test_a_second_text_decides_where_it_is_there():
    one = Place("a", 4.0, 10, 1.0, 9.0, 5.0, 1.0)
    assert "on text" in as_table([one], "text")
    assert "5.00" in as_table([one], "text")


def test_the_command(small, tmp_path):
    options = ["--rows", "dense,rounded/int8", "--out", str(tmp_path / "cells")]
    done = CliRunner().invoke(app, ["league", str(small), *options, "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)["league"]
    assert [row["name"] for row in told] == ["plain int8", "dense"]
    done = CliRunner().invoke(app, ["league", str(small), *options])
    assert "plain int8" in done.stdout
    done = CliRunner().invoke(app, ["league", str(small), "--rows", "nothing"])
    assert "row 'nothing' fits none of dense" in done.output


def test_a_model_is_calibrated_on_the_text_that_it_is_compressed_on(tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(
        "slr.evaluate.reproduction.reproduce", lambda spec, out, **_: taken.append(spec.calibration)
    )
    for model in ("tiny", str(slr.tiny.path())):
        done = CliRunner().invoke(app, ["league", model, "--out", str(tmp_path / "cells")])
        assert done.exit_code == 0, done.output
    assert taken == ["embedded", "embedded"]  # the table's own is general text


def test_seeds_are_beside_one_another_and_their_spread_is_told(small, table, tmp_path):
    spec, _ = table
    cells = tmp_path / "cells"
    rows = ["dense", "pruned", "codes"]
    for seed in (0, 1, 2):
        reproduce(*seeded(spec, cells, seed), rows=rows)
    found = {place.name: place for place in places(spec, cells)}
    assert len(set(found["codes"].seeds)) == 3  # other windows, another model
    assert len(set(found["pruned"].seeds)) == 1  # reads no windows
    assert found["codes"].seeds[0] == found["codes"].perplexity
    told = as_table(list(found.values()))
    assert "over seeds" in told
    assert "± 0.00 of 3" in told
    assert seeded(spec, cells, 0) == (spec, cells)


def test_the_figure_is_drawn_and_a_wrong_name_is_refused_before(small, tmp_path):
    options = ["--rows", "dense,rounded/*", "--out", str(tmp_path / "cells")]
    figure = tmp_path / "league.svg"
    done = CliRunner().invoke(app, ["league", str(small), *options, "--plot", str(figure)])
    assert done.exit_code == 0, done.output
    assert figure.read_text().count("<svg") == 1
    for name, why in (("league.txt", "must end with"), ("none/league.svg", "there is no folder")):
        done = CliRunner().invoke(
            app, ["league", str(small), *options, "--plot", str(tmp_path / name)]
        )
        assert done.exit_code == 2
        assert why in " ".join(done.output.split())


def test_every_name_is_in_the_figure_however_near_the_points_are():
    rows = [Place(f"ours int{i}", 4 + i / 1e3, 1, 1.0, 20 + i / 1e3, None, 1.0) for i in range(18)]
    rows += [Place("dense", 16, 1, 1.0, 19.0, None, 1.0), Place("plain", 3, 1, 1.0, 60, None, 1.0)]
    axes = league_panels(rows).axes[0]
    texts = [text for text in axes.texts if text.get_text()]
    assert sorted(text.get_text() for text in texts) == sorted(row.name for row in rows)
    boxes = [Text.get_window_extent(text) for text in texts]
    assert all(axes.bbox.count_contains(box.corners()) == 4 for box in boxes)
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_a_row_may_be_allocated(small, tmp_path):
    entries = {"owl": {"pattern": "0.5", "refine": "none", "allocate": "owl"}}
    told = {**SPEC, "model": str(small), "entries": entries, "rounded": []}
    (tmp_path / "own.json").write_text(json.dumps(told))
    spec = Spec.read(str(tmp_path / "own.json"))
    first = reproduce(spec, tmp_path / "cells")
    told["entries"] = {"owl": {"pattern": "0.5", "refine": "none"}}
    (tmp_path / "even.json").write_text(json.dumps(told))
    assert first != reproduce(Spec.read(str(tmp_path / "even.json")), tmp_path / "others")
    file = tmp_path / "cells" / "owl" / "dense.json"
    assert json.loads(file.read_text())["what"]["recipe"]["allocate"] == "owl"
    before = file.stat().st_mtime_ns
    assert reproduce(spec, tmp_path / "cells") == first  # is there, and is not measured again
    assert file.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="with another recipe"):
        reproduce(Spec.read(str(tmp_path / "even.json")), tmp_path / "cells")
    told["entries"] = {"owl": {"allocate": "owl"}}
    (tmp_path / "wrong.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match="pattern 2:4 fixes it"):
        Spec.read(str(tmp_path / "wrong.json"))


def test_a_seed_alone_is_shown_and_texts_are_not_mixed(table, tmp_path):
    spec, _ = table
    drawn, into = seeded(spec, tmp_path, 5)
    reproduce(drawn, into, rows=["half"])
    assert [place.name for place in places(spec, tmp_path)] == ["half"]
    second = tmp_path / "second.txt"
    second.write_text("def f(x):\n    return x + 1\n" * 60)
    reproduce(spec, tmp_path, rows=["dense", "rounded/*"])
    reproduce(spec, tmp_path, rows=["dense"], text=str(second))
    found = places(spec, tmp_path, "second.txt")
    assert [p.name for p in found if p.frontier] == ["dense"]
    third = tmp_path / "third.txt"
    third.write_text("for i in range(3):\n    print(i)\n" * 60)
    reproduce(spec, tmp_path, rows=["dense"], text=str(third))
    told = json.loads((tmp_path / "dense" / "dense.json").read_text())
    assert sorted(told["also"]) == ["second.txt", "third.txt"]
    with pytest.raises(ValueError, match="is the table's own"):
        reproduce(spec, tmp_path, rows=["dense"], text="embedded")
    (tmp_path / "seed-5" / "half" / "dense.json").write_text("{")
    with pytest.raises(ValueError, match=r"half.dense\.json"):
        places(spec, tmp_path)


def test_each_row_has_its_own_windows(small, tmp_path):
    entries = {
        name: {"prune": "wanda", "refine": "none", "samples": samples, "seed": samples}
        for name, samples in (("few", 2), ("many", 4))
    }
    own = {**SPEC, "model": str(small), "rounded": [], "entries": entries}
    (tmp_path / "own.json").write_text(json.dumps(own))
    reproduce(Spec.read(str(tmp_path / "own.json")), tmp_path / "cells", rows=["few", "many"])
    for name, samples in (("few", 2), ("many", 4)):
        told = json.loads((tmp_path / "cells" / name / "dense.json").read_text())
        assert told["what"]["calibration"]["windows"] == samples


def test_a_folder_that_cannot_be_written_is_told_first(table, tmp_path, monkeypatch):
    spec, _ = table
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr("slr.evaluate.reproduction.measure", None)
    with pytest.raises(ValueError, match="Not a directory"):
        reproduce(spec, tmp_path / "file", rows=["dense"])
