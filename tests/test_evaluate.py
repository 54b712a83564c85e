import math

import pytest
import torch

import slr


@pytest.fixture(scope="module")
def loaded(small):
    return slr.load(small, dtype=torch.float32)


def test_equals_the_definition(loaded):
    windows = torch.randint(4096, (3, 10))
    total = 0.0
    for row in windows:
        with torch.no_grad():
            logits = loaded(input_ids=row[None]).logits[0].double()
        for position in range(9):
            total -= float(logits[position].log_softmax(-1)[row[position + 1]])
    assert slr.perplexity(loaded, windows) == pytest.approx(math.exp(total / 27), rel=1e-5)


def test_batches_and_limit_do_not_change_it(loaded, monkeypatch):
    windows = torch.randint(4096, (5, 16))
    whole = slr.perplexity(loaded, windows)
    monkeypatch.setattr("slr.evaluate.likelihood.TOKENS_AT_ONCE", 16)
    assert slr.perplexity(loaded, windows) == pytest.approx(whole, rel=1e-5)
    assert slr.perplexity(loaded, windows, limit=2) == pytest.approx(
        slr.perplexity(loaded, windows[[0, 2]])
    )


def test_from_a_folder_and_a_text(small, text, loaded):
    from slr.checkpoint.folder import load_tokenizer

    windows = slr.data.windows(text, load_tokenizer(small), 32, limit=4)
    assert slr.perplexity(small, text, seqlen=32, limit=4) == pytest.approx(
        slr.perplexity(loaded, windows)
    )


def test_the_embedded_model_was_trained(text):
    # Uniform guessing gives 4096, the best fixed distribution over tokens several hundred.
    assert slr.perplexity("tiny", text, limit=4) < 60


def test_bad_input_is_named(loaded, small):
    with pytest.raises(ValueError, match="token 5000, but the model has 4096"):
        slr.perplexity(loaded, torch.tensor([[1, 5000]]))
    with pytest.raises(ValueError, match="windows have shape"):
        slr.perplexity(loaded, torch.tensor([1, 2]))
    with pytest.raises(TypeError, match="only a folder has a tokenizer"):
        slr.perplexity(loaded, "some text")
    with pytest.raises(ValueError, match="fewer than one window"):
        slr.perplexity(small, "short")
