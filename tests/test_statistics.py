import re

import pytest
import torch
from helpers import activations

from slr.matrix import statistics
from slr.matrix.statistics import GramStatistic, NormStatistic

X = activations(300, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tile", [3, 4, 256])  # 8 channels: the last tile short, whole, all one
def test_batches_add_up(dtype, tile, monkeypatch):
    monkeypatch.setattr(statistics, "TILE", tile)
    x = X.to(dtype)
    gram, norm = GramStatistic(8), NormStatistic(8)
    for part in x.view(3, 10, 10, 8):
        gram.update(part)
        norm.update(part)
    exact = x.double().T @ x.double() / 300
    assert torch.allclose(gram.gram().double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.allclose(norm.norm().double(), x.double().norm(dim=0), rtol=1e-5)
    assert torch.equal(gram.gram(), gram.gram().T)
    assert torch.allclose(gram.norm(), norm.norm(), rtol=1e-5)
    assert gram.tokens == norm.tokens == 300


def test_merging_is_as_if_one_had_seen_all():
    for kind in (GramStatistic, NormStatistic):
        whole, one, two = kind(8), kind(8), kind(8)
        whole.update(X)
        one.update(X[:100])
        two.update(X[100:])
        one.merge(two)
        loudest = float(whole.total.abs().max())  # float32 within a batch: errors of its size
        assert torch.allclose(one.total, whole.total, rtol=0, atol=1e-6 * loudest)
        assert one.tokens == 300


def test_float16_does_not_overflow():
    norm = NormStatistic(2)
    for _ in range(100):
        norm.update(torch.full((4, 50, 2), 300.0, dtype=torch.float16))
    assert norm.norm().tolist() == pytest.approx([300 * 20000**0.5] * 2)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: NormStatistic(3).update(X), "activations are 8 wide, not 3"),
        (lambda: NormStatistic(3).merge(NormStatistic(4)), "cannot merge"),
        (lambda: NormStatistic(3).merge(GramStatistic(3)), "cannot merge GramStatistic"),
        (lambda: GramStatistic(3).gram(), "no activations"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        call()


def _reduce(rank, folder, results):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    gram = GramStatistic(8)
    gram.update(X[rank * 150 : (rank + 1) * 150])
    gram.all_reduce()
    results.put((gram.tokens, gram.gram().tolist()))
    torch.distributed.destroy_process_group()


def test_all_reduce_over_two_processes(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_reduce, args=(r, tmp_path, results)) for r in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    answers = [results.get() for _ in workers]
    for tokens, gram in answers:
        assert tokens == 300
        assert torch.allclose(torch.tensor(gram), X.T @ X / 300, rtol=1e-4, atol=1e-4)
