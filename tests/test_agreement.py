import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import slr
from slr.evaluate.agree import agreement, bootstrap


class Fixed(nn.Module):
    """A "model" that predicts the same distribution in every position."""

    def __init__(self, *probabilities):
        super().__init__()
        self.logits = torch.tensor(probabilities).log() + 3  # any constant, it is no matter
        text = SimpleNamespace(vocab_size=len(probabilities))
        self.config = SimpleNamespace(get_text_config=lambda: text)
        self.device = torch.device("cpu")

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def test_two_tokens_by_hand():
    windows = torch.tensor([[0, 0, 0, 1, 1], [1, 0, 0, 0, 0]])
    found = agreement(Fixed(0.25, 0.75), Fixed(0.75, 0.25), windows)
    assert found.kl.tolist() == pytest.approx([math.log(3) / 2] * 2, rel=1e-6)
    assert found.same_choice.tolist() == [0, 0]
    few, many = -math.log(0.25), -math.log(0.75)  # the first token is not predicted
    assert found.loss.tolist() == pytest.approx([(few + many) / 2, few], rel=1e-6)
    assert found.reference_loss.tolist() == pytest.approx([(few + many) / 2, many], rel=1e-6)
    skewed = agreement(Fixed(0.5, 0.5), Fixed(0.75, 0.25), windows)  # not symmetric
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert skewed.kl.tolist() == pytest.approx([expected] * 2, rel=1e-6)


def test_with_itself_and_with_another(small):
    model = slr.load(small, dtype=torch.float32)
    other = slr.load(small, dtype=torch.float32)
    slr.compress_model(other, slr.Recipe(prune="magnitude", refine="none"))
    windows = torch.randint(4096, (5, 16))
    itself = agreement(model, model, windows)
    assert not itself.kl.any()
    assert (itself.same_choice == 1).all()
    found = agreement(other, model, windows)
    assert (found.kl > 0).all()
    for loss, which in ((found.loss, other), (found.reference_loss, model)):
        assert math.exp(loss.mean()) == pytest.approx(slr.perplexity(which, windows), rel=1e-6)
    with torch.no_grad():
        p, q = (m(input_ids=windows).logits[:, :-1].double().softmax(-1) for m in (model, other))
    kl = (p * (p / q).log()).sum(-1).mean(1)
    assert torch.allclose(found.kl, kl, rtol=1e-4)
    assert torch.equal(found.same_choice, (p.argmax(-1) == q.argmax(-1)).double().mean(1))


def test_batches_do_not_change_it(small, monkeypatch):
    model, other = slr.load(small, dtype=torch.float32), Fixed(*[1 / 4096] * 4096)
    windows = torch.randint(4096, (5, 16))
    whole = agreement(other, model, windows)
    monkeypatch.setattr("slr.evaluate.agree.TOKENS_AT_ONCE", 32)
    for a, b in zip(agreement(other, model, windows), whole, strict=True):
        assert torch.allclose(a, b, rtol=1e-5)


def test_bad_windows_are_named():
    two, three = Fixed(0.5, 0.5), Fixed(0.5, 0.25, 0.25)
    with pytest.raises(ValueError, match=r"windows have shape \(3,\)"):
        agreement(two, two, torch.tensor([0, 1, 0]))
    with pytest.raises(ValueError, match="vocabularies have 2 and 3 tokens"):
        agreement(two, three, torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match="token 7, but the model has 2"):
        agreement(two, two, torch.tensor([[0, 7]]))


def test_intervals_cover_as_often_as_they_say():
    """Of 400 samples with a known mean, 95% intervals cover it in 91% to 98%."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        low, high = bootstrap(
            torch.randn(60, generator=generator) + 2, resamples=400, generator=generator
        )
        covered += low <= 2 <= high
    assert 0.91 <= covered / 400 <= 0.98


def test_interval_of_a_mean_is_that_of_the_normal_distribution():
    values = torch.randn(400, dtype=torch.float64)
    low, high = bootstrap(values, resamples=4000, level=0.9)
    assert (high - low) / 2 == pytest.approx(float(1.645 * values.std() / 20), rel=0.05)
    assert bootstrap(values) == bootstrap(values)
    other = torch.Generator().manual_seed(7)
    assert bootstrap(values, generator=other) != bootstrap(values)


def test_any_statistic_of_rows():
    pairs = torch.stack([torch.arange(1.0, 9), 2 * torch.arange(1.0, 9)], 1)
    low, high = bootstrap(pairs, lambda s: s[..., 1].sum(1) / s[..., 0].sum(1))
    assert low == high == 2


@pytest.mark.parametrize(
    ("values", "options", "says"),
    [
        ([1.0], {}, "two or more finite"),
        ([1.0, math.nan], {}, "two or more finite"),
        ([1.0, 2.0], {"level": 95}, "level 95 must be between 0 and 1"),
        ([1.0, 2.0], {"resamples": 0}, "resamples 0 positive"),
        ([1.0, 2.0], {"statistic": torch.mean}, "the statistic has shape"),
    ],
)
def test_bad_values_are_named(values, options, says):
    with pytest.raises(ValueError, match=says):
        bootstrap(torch.tensor(values), **options)
