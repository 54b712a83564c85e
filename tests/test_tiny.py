"""The training program, at a size that fits a test; the embedded model itself."""

import json

import pytest
import torch

import slr
from examples import train_tiny as train


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    for key, value in {**small, "vocab_size": 300, "max_position_embeddings": 32}.items():
        monkeypatch.setitem(train.SHAPE, key, value)

    def make(name, *more):
        (tmp_path / name).mkdir(exist_ok=True)
        options = ["--out", str(tmp_path / name), "--device", "cpu", "--batch", "2", *more]
        return train.parser().parse_args(options)

    return make


@pytest.fixture
def streams(arguments):
    documents = [text[:3000] for text in list(slr.data.documents().values())[:6]]
    sources = [(documents, 2)]
    return train.encode(sources, train.train_tokenizer(sources))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_stopped_run_goes_on_to_the_same_weights(arguments, streams):
    straight, _ = train.train(streams, arguments("a", "--steps", "6"))
    train.train(streams, arguments("b", "--steps", "6", "--until", "4"))
    resumed, _ = train.train(streams, arguments("b", "--steps", "6"))
    other, _ = train.train(streams, arguments("c", "--steps", "6", "--seed", "1"))
    assert torch.equal(weights(straight), weights(resumed))
    assert not torch.equal(weights(straight), weights(other))


def test_windows_of_an_epoch_cover_the_streams_as_often_as_told(streams):
    first, second = (train.epoch_windows(streams, 32, seed=0, epoch=e) for e in (0, 1))
    total = sum(len(flat) * times for flat, times in streams)
    assert total - 2 * 64 * len(streams) <= first.size <= total
    assert first.shape[1] == 32
    assert (first[: len(second)] != second[: len(first)]).any()
    assert (train.epoch_windows(streams, 32, seed=0, epoch=0) == first).all()


def test_learning_rate_rises_then_falls():
    rates = [train.schedule(step, 1000) for step in range(1000)]
    assert max(rates) == pytest.approx(1.0)
    assert rates[0] == pytest.approx(0.01)
    assert rates[-1] == pytest.approx(0.02, abs=1e-3)
    assert rates.index(max(rates)) in (99, 100)


def test_card_and_record_are_there():
    folder = slr.tiny.path().parent
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"{record['tokens seen']:,} tokens" in card
    for value in record["held-out perplexity"].values():
        assert f"| {value:.2f} |" in card
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert steps[0] == 0
    assert steps[-1] == record["steps"] - 1
