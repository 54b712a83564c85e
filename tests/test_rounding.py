"""Rounding, the plain alternative: what a grid holds, how far it is, and what it costs."""

import json

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import slr
from slr.evaluate.reproduction import Spec, measure, reproduce
from slr.matrix.rounding import Grid


@given(
    bits=st.integers(2, 8), group=st.sampled_from([None, 2, 7, 32]), m=st.integers(1, 5),
    n=st.integers(1, 70), seed=st.integers(0, 99), size=st.sampled_from([1e-6, 1.0, 1e6]),
)  # fmt: skip
@example(8, 2, 1, 27, 0, 1.0)  # where a scale that is rounded down leaves an end off the grid
def test_nothing_is_farther_than_half_a_step(bits, group, m, n, seed, size):
    W = torch.randn(m, n, generator=torch.Generator().manual_seed(seed)) * size
    found = Grid(bits, group).nearest(W)
    assert found.shape == W.shape
    for row, near in zip(W, found, strict=True):
        for part, rounded in zip(row.split(group or n), near.split(group or n), strict=True):
            low, high = min(0.0, float(part.min())), max(0.0, float(part.max()))
            if group is None:
                high = max(high, -low)
                low, steps = -high, 2**bits - 2
            else:
                steps = 2**bits - 1
            assert len(rounded.unique()) <= steps + 1
            # An offset is rounded too, and a scale to bfloat16: a step at an end, not half of one.
            assert float((part - rounded).abs().max()) <= 1.02 * (high - low) / steps + 1e-30


def test_by_hand():
    W = torch.tensor([[0.0, 7.0, -7.0, 3.4], [0.0, 0.0, 0.0, 0.0]])
    assert Grid(4).nearest(W).tolist() == [[0, 7, -7, 3], [0, 0, 0, 0]]
    W = torch.tensor([[0.9, 6.0, -6.0, 3.0]])
    assert Grid(2, 2).nearest(W).tolist() == [[0, 6, -6, 3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_its_values_fit_the_dtype(dtype):
    W = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    for grid in (Grid(8), Grid(4, 32), Grid(3, 32)):
        found = grid.nearest(W)
        assert found.dtype == dtype
        assert torch.equal(grid.nearest(W), found)
    assert (Grid(8).nearest(W.float()) - W.float()).abs().max() < 0.02


def test_names():
    for text, bits in (("int8", 8), ("int4 by 32", 4.625), ("int3 by 64", 3.296875)):
        assert str(Grid.parse(text)) == text
        assert Grid.parse(text).bits_per_weight == bits
    for text in ("int9", "int4 by 1", "4", "int4/32"):
        with pytest.raises(ValueError, match=r"must be|unknown"):
            Grid.parse(text)


def test_a_table_has_it_beside(small, tmp_path):
    windows = torch.randint(0, 60, (3, 16), generator=torch.Generator().manual_seed(2))
    dense = measure(small, None, windows)[0]
    eight, two = (measure(small, Grid(b, g), windows)[0] for b, g in ((8, None), (2, 32)))
    assert 0 < (eight - dense).abs().max() < 0.2 * (two - dense).abs().max()
    model = slr.load(small, dtype=torch.float32)
    for layer in model.model.layers.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data = Grid(2, 32).nearest(layer.weight.data)
    with torch.no_grad():
        logits = model(windows).logits[:, :-1].flatten(0, 1)
    alone = torch.nn.functional.cross_entropy(logits, windows[:, 1:].flatten())
    assert float(alone) == pytest.approx(float(two.mean()), rel=1e-5)


def test_its_cells_are_kept(small, tmp_path):
    spec = {
        "title": "t", "model": str(small), "dtype": "float32", "text": "embedded", "seqlen": 16,
        "limit": 2, "calibration": "embedded", "recipe": {"rank": 2}, "masks": ["magnitude"],
        "repairs": ["none"], "columns": ["2:4"], "rounded": ["int8", "int4 by 32"],
    }  # fmt: skip
    (tmp_path / "own.json").write_text(json.dumps(spec))
    own = Spec.read(str(tmp_path / "own.json"))
    first = reproduce(own, tmp_path / "cells", rows=["rounded/*"])
    assert list(first) == ["rounded/int8", "rounded/int4 by 32"]
    file = tmp_path / "cells" / "rounded-int4-by-32" / "dense.json"
    told = json.loads(file.read_text())
    assert told["what"]["recipe"] == {"rounded": "int4 by 32"}
    stamp = file.stat().st_mtime_ns
    assert reproduce(own, tmp_path / "cells", rows=["rounded/*"]) == first
    assert file.stat().st_mtime_ns == stamp
    spec["rounded"] = ["int1"]
    (tmp_path / "own.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match="bits is 1"):
        Spec.read(str(tmp_path / "own.json"))


def test_a_grid_is_what_its_name_says_or_is_refused():
    with pytest.raises(ValueError, match="a grid of whole rows has no offset"):
        Grid(4, None, symmetric=False)
    for grid in (Grid(4), Grid(4, 32), Grid(4, 32, symmetric=True)):
        assert Grid.parse(str(grid)) == grid
    for bits, group in ((2.5, None), (4, 2.5), (True, None)):
        with pytest.raises(TypeError, match="it must be an integer"):
            Grid(bits, group)
    with pytest.raises(TypeError, match="a grid is 4; it must be a Grid or its name"):
        slr.refine(torch.randn(4, 4), None, 0, grid=4)
