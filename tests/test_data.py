import re

import pytest
import torch

import slr
from slr.data import corpus, documents, held_out, load_text, windows


@pytest.fixture(scope="module")
def tokenizer():
    from slr.checkpoint import load_tokenizer

    return load_tokenizer(slr.tiny.path())


def test_the_two_corpora_share_no_document():
    validation, calibration = corpus("validation"), corpus("calibration")
    for name, text in documents().items():
        piece = text[:2000]
        if len(piece) > 400:
            assert not (piece in validation and piece in calibration), name
            assert (piece in validation) <= held_out(name), name


def test_validation_was_not_trained_on():
    """Training drops held-out documents and, from all others, the long lines of held-out ones."""
    train = pytest.importorskip("slr.tiny.train")
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
    assert torch.equal(windows(text, tokenizer, 100, limit=2), rows[:2])


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
        (lambda t: load_text("no/such/file"), "neither 'embedded' nor a text file"),
        (lambda t: windows("short", t, 512), "fewer than one window of seqlen 512"),
        (lambda t: windows("short", t, 1), "seqlen is 1"),
        (lambda t: windows("short", t, 2, limit=0), "limit is 0"),
    ],
)
def test_bad_input_is_named(call, says, tokenizer):
    with pytest.raises(ValueError, match=re.escape(says)):
        call(tokenizer)
