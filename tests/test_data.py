import re

import pytest
import torch

import slr
from slr.model.data import SAMPLES, calibration, corpus, documents, held_out, load_text, windows
from slr.model.mixture import general, prose


@pytest.fixture(scope="module")
def tokenizer():
    from slr.checkpoint.folder import load_tokenizer

    return load_tokenizer(slr.tiny.path())


def test_the_two_corpora_share_no_document():
    validation, calibration = corpus("validation"), corpus("calibration")
    for name, text in documents().items():
        piece = text[:2000]
        if len(piece) > 400:
            assert not (piece in validation and piece in calibration), name
            assert (piece in validation) <= held_out(name), name


def test_general_text_is_prose_and_some_python_without_a_shared_document():
    text = {split: general(split) for split in ("validation", "calibration")}
    written = {split: [p for p in prose().values() if p in text[split]] for split in text}
    assert len(written["validation"]) + len(written["calibration"]) == len(prose())
    assert len(written["validation"]) > 10
    for split, part in text.items():
        share = sum(map(len, written[split])) / len(part)
        assert 0.8 < share < 0.92, split
        assert load_text("general", split) == part
    for name, source in documents().items():
        if len(source) > 2000:
            assert not (
                source[:2000] in text["validation"] and source[:2000] in text["calibration"]
            )
            if source[:2000] in text["validation"]:
                assert held_out(name), name
    with pytest.raises(ValueError, match="split is 'train'"):
        general("train")


def test_validation_was_not_trained_on():
    """Training drops held-out documents and, from all others, the long lines of held-out ones."""
    train = pytest.importorskip("examples.train_tiny")
    sources, about = train.gather([])
    seen = {line.strip() for docs, _ in sources for text in docs for line in text.splitlines()}
    lines = {line.strip() for line in corpus("validation").splitlines()}
    assert not {line for line in lines if len(line) >= 40} & seen
    assert about["library documents"]["held out"] > 40


def test_corpus_is_deterministic():
    first = corpus("validation")
    documents.cache_clear()
    assert corpus("validation") == first


def test_windows_are_consecutive_and_whole(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    rows = windows(text, tokenizer, 100)
    assert rows.shape == (len(ids) // 100, 100)
    assert rows.flatten().tolist() == ids[: rows.numel()]
    assert torch.equal(windows(text, tokenizer, 100, limit=2), rows[[0, len(rows) // 2]])


def test_text_from_a_file(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("héllo", encoding="utf-8")
    assert load_text(str(file)) == "héllo"
    assert load_text("embedded", "calibration") == corpus("calibration")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_text(str(file))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda t: corpus("test"), "split is 'test'"),
        (
            lambda t: load_text("no/such/file"),
            "neither 'general', 'embedded', 'wikitext2' nor a text file",
        ),
        (lambda t: windows("short", t, 512), "fewer than one window of seqlen 512"),
        (lambda t: windows("short", t, 1), "seqlen is 1"),
        (lambda t: windows("short", t, 2, limit=0), "limit is 0"),
    ],
)
def test_bad_input_is_named(call, says, tokenizer):
    with pytest.raises(ValueError, match=re.escape(says)):
        call(tokenizer)


def test_calibration_is_spread_over_a_text_but_every_tenth_window(tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text(corpus("calibration")[:9000])
    found = calibration(str(tmp_path / "text.txt"), tokenizer, 64, 5)
    every = windows(corpus("calibration")[:9000], tokenizer, 64)
    seen = [i for i in range(len(every)) if i % 10 != 9]
    assert torch.equal(found, every[[seen[i * len(seen) // 5] for i in range(5)]])
    assert len(calibration(str(tmp_path / "text.txt"), tokenizer, 64)) == min(SAMPLES, len(seen))
    with pytest.raises(ValueError, match="fewer than the 500 samples"):
        calibration(str(tmp_path / "text.txt"), tokenizer, 64, 500)


@pytest.mark.parametrize("source", ["embedded", "general"])
def test_another_seed_calibrates_on_other_windows(source, tokenizer):
    sets = [
        {tuple(row) for row in calibration(source, tokenizer, 64, 16, seed=seed).tolist()}
        for seed in range(3)
    ]
    assert all(len(each) == 16 for each in sets)
    assert len(set.union(*sets)) == 48


class Rows(list):
    """What `datasets` streams."""

    def shuffle(self, seed, buffer_size):
        import random

        assert buffer_size == 10_000
        return random.Random(seed).sample(self, len(self))


def test_c4_windows_are_of_long_documents_and_follow_the_seed(tokenizer, monkeypatch):
    texts = [text[:3000] for text in list(documents().values())[:40]] + ["short"] * 40
    rows = Rows({"text": text} for text in texts)

    def dataset(name, part, split, streaming):
        assert (name, part, split, streaming) == ("allenai/c4", "en", "train", True)
        return rows

    monkeypatch.setattr("slr.data.hub_dataset", dataset)
    found = calibration("c4", tokenizer, 128, 7, seed=3)
    assert found.shape == (7, 128)
    assert torch.equal(found, calibration("c4", tokenizer, 128, 7, seed=3))
    assert not torch.equal(found, calibration("c4", tokenizer, 128, 7, seed=4))
    for window in found:
        inside = tokenizer.decode(window[8:-8])
        assert any(inside in text for text in texts)
    with pytest.raises(ValueError, match="fewer than the 41 samples"):
        calibration("c4", tokenizer, 128, 41)


def test_wikitext_is_joined_as_everybody_does(monkeypatch):
    seen = []

    def dataset(name, part, split):
        seen.append((name, part, split))
        return [{"text": " = A = \n"}, {"text": ""}, {"text": "words"}]

    monkeypatch.setattr("slr.data.hub_dataset", dataset)
    assert load_text("wikitext2") == " = A = \n\n\n\n\nwords"
    load_text("wikitext2", "calibration")
    assert [s[2] for s in seen] == ["test", "train"]


def test_a_data_set_that_cannot_be_had_is_one_line(tokenizer):
    with pytest.raises(
        RuntimeError, match=r"data set allenai/c4 cannot be had .+ give a text file"
    ) as error:
        calibration("c4", tokenizer, 16, 2)
    assert "\n" not in str(error.value)
