"""Text in, token windows out: texts of the package, known data sets, and any text file.

Book: "How to use this book" and chapter 1.
"""

import math
import random
import warnings
from pathlib import Path

import torch

from slr.matrix.checks import check_count
from slr.model.checks import check_seqlen
from slr.model.embedded import corpus, documents, held_out
from slr.model.mixture import general

__all__ = [
    "calibration", "check_positions", "check_windows", "corpus", "documents", "held_out",
    "load_text", "spread", "unseen", "windows",
]  # fmt: skip

OURS = {"general": general, "embedded": corpus}  # texts of the package
SPLIT = (*OURS, "wikitext2")  # texts that have a held-out part of their own
SAMPLES = 24  # calibration windows if not told: a third more lower held-out errors by 0.6%


def load_text(source: str, split: str = "validation") -> str:
    """Text by name.

    Args:
        source: ``"general"`` (:mod:`slr.model.mixture`), ``"embedded"``
            (:mod:`slr.model.embedded`), ``"wikitext2"`` (needs ``datasets`` and the network or
            its cache), or the path of a UTF-8 text file.
        split: ``"validation"`` or ``"calibration"``; for WikiText-2 its test and train split;
            ignored for a file.

    Raises:
        ValueError: no such file, or it is not UTF-8 text.
        RuntimeError: the data set cannot be had.
    """
    if source in OURS:
        return OURS[source](split)
    if source == "wikitext2":
        part = "test" if split == "validation" else "train"
        rows = hub_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=part)
        return "\n\n".join(row["text"] for row in rows)
    path = Path(source)
    if not path.is_file():
        raise ValueError(
            f"text {source!r} is neither 'general', 'embedded', 'wikitext2' nor a text file (nor, "
            "to calibrate on, 'c4')"
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ValueError(f"text {source!r} cannot be read: {error.strerror}") from None


def hub_dataset(*args, **options):
    """``datasets.load_dataset``, whose failures become one line that says what to do.

    Raises:
        RuntimeError: the package is missing, or the data set cannot be had.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise RuntimeError("this text needs `datasets`: pip install 'slr[eval]'") from None
    try:
        return load_dataset(*args, **options, trust_remote_code=False)
    except Exception as error:  # whatever the network, the hub or the cache may say
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RuntimeError(
            f"data set {args[0]} cannot be had ({first}); it needs the network once, "
            "or give a text file"
        ) from None


def calibration(
    source: str, tokenizer, seqlen: int, samples: int | None = None, seed: int = 0
) -> torch.Tensor:
    """Token windows to calibrate on, spread over the text.

    Args:
        source: ``"c4"``, or as for :func:`load_text`; of a file every tenth window is held out.
        tokenizer: a Hugging Face tokenizer.
        seqlen: tokens in a window.
        samples: number of windows; when ``None`` :data:`SAMPLES`, or all if there are fewer.
        seed: which windows, of those that there are.

    Returns:
        int64 (samples, seqlen).

    Raises:
        ValueError: not enough text.
        RuntimeError: the data set cannot be had.

    Source: the protocol of SparseGPT and Wanda for C4: one window at a random place of each of
        `samples` random documents that are longer than a window.  They draw documents from the
        first file of the training set; here the stream is shuffled with a buffer of 10,000, so
        that nothing is downloaded that is not used.
    """
    wanted = SAMPLES if samples is None else samples
    if source == "c4":
        found = _of_c4("train", tokenizer, seqlen, wanted, seed)
    else:
        found = windows(load_text(source, "calibration"), tokenizer, seqlen)
        found = spread(found if source in SPLIT else _parted(found)[0], wanted, seed)
    if samples is not None and len(found) < samples:
        raise ValueError(
            f"text {source!r} has {len(found)} windows of {seqlen} tokens to calibrate on, fewer "
            f"than the {samples} samples asked for; give more text, or fewer or shorter samples"
        )
    return found


def unseen(source: str, tokenizer, seqlen: int, count: int, seed: int = 0) -> torch.Tensor | None:
    """Held-out windows of a calibration text, that :func:`calibration` never gives.

    Args:
        source, tokenizer, seqlen: as for :func:`calibration`.
        count: at most so many.
        seed: for ``"c4"``; of a text the same windows are held out whatever it is.

    Returns:
        int64 (count, seqlen); ``None`` if the text is too short to hold any of it out.

    Raises:
        ValueError: the text is shorter than one window.
    """
    if source == "c4":
        return _of_c4("validation", tokenizer, seqlen, count, seed)
    found = windows(load_text(source), tokenizer, seqlen)
    if source not in SPLIT:
        found = _parted(found)[1]
    return spread(found, count) if len(found) else None


def _parted(windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All windows of a file but every tenth, and those."""
    held = torch.arange(len(windows)) % 10 == 9
    return windows[~held], windows[held]


def _of_c4(split: str, tokenizer, seqlen: int, count: int, seed: int) -> torch.Tensor:
    rows = hub_dataset("allenai/c4", "en", split=split, streaming=True)
    draw, chosen = random.Random(seed), []
    for row in rows.shuffle(seed=seed, buffer_size=10_000):
        ids = tokenizer(row["text"], add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) > seqlen:
            start = draw.randrange(len(ids) - seqlen)
            chosen.append(ids[start : start + seqlen])
            if len(chosen) == count:
                break
    return torch.tensor(chosen, dtype=torch.int64).view(len(chosen), seqlen)


def windows(text: str, tokenizer, seqlen: int, limit: int | None = None) -> torch.Tensor:
    """Consecutive token windows of a text, tokenised once and in one piece.

    Args:
        text: any text.
        tokenizer: a Hugging Face tokenizer; no special tokens are added.
        seqlen: tokens in a window, at least 2 (the first is only ever context).
        limit: at most this many windows, spread evenly over the text (:func:`spread`); ``None``
            keeps all whole windows.

    Returns:
        int64 tensor (windows, seqlen); what remains after the last whole window is dropped.

    Raises:
        ValueError: the text is shorter than one window, or `seqlen` or `limit` too small.

    Source: the perplexity protocol of GPTQ, SparseGPT and Wanda.
    """
    check_seqlen(seqlen)
    if limit is not None:
        check_count("limit", limit)
    ids = _tokens(text, tokenizer)
    count = len(ids) // seqlen
    if count == 0:
        raise ValueError(
            f"the text has {len(ids)} tokens, fewer than one window of seqlen {seqlen}; "
            "give more text or a smaller seqlen"
        )
    found = ids[: count * seqlen].clone().view(count, seqlen)
    return found if limit is None else spread(found, limit)


_READ: dict[tuple, torch.Tensor] = {}  # the last texts, tokenised


def _tokens(text: str, tokenizer) -> torch.Tensor:
    """All tokens of a text, int64; those of the last few texts are kept, for they are asked for
    again and again."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    key = (len(text), hash(text), None if backend is None else hash(backend.to_str()))
    if key not in _READ or backend is None:
        found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(_READ) >= 8:
            _READ.pop(next(iter(_READ)))
        _READ[key] = torch.tensor(found, dtype=torch.int64)
    return _READ[key]


def spread(windows: torch.Tensor, limit: int, seed: int = 0) -> torch.Tensor:
    """At most `limit` windows, evenly spread over all of them: a prefix would be a few documents.

    Args:
        windows: (count, ...).
        limit: how many.
        seed: where in its stride the first one lies: at its start for 0, for others as far from
            those of other seeds as multiples of the golden ratio are.

    >>> spread(torch.arange(10), 4).tolist(), spread(torch.arange(3), 4).tolist()
    ([0, 2, 5, 7], [0, 1, 2])
    >>> spread(torch.arange(10), 4, seed=1).tolist()
    [1, 4, 6, 9]
    """
    count = len(windows)
    if limit >= count:
        return windows
    first = int(count * (seed * (math.sqrt(5) - 1) / 2 % 1))
    return windows[[(i * count + first) // limit for i in range(limit)]]


def check_windows(windows: torch.Tensor, config) -> None:
    """Raise unless a model with this configuration can read these token windows.

    More tokens than a rotary model was made for can be read, and bring a warning; a model with
    an embedding of positions (OPT) has no more than those.

    Args:
        windows: (count, seqlen).
        config: of the model, of transformers.

    Raises:
        ValueError: another shape, no window, too long ones, or a token that is not in the
            vocabulary.
        TypeError: no integers.
    """
    if windows.ndim != 2 or windows.shape[1] < 2 or not len(windows):
        raise ValueError(f"windows have shape {tuple(windows.shape)}; they must be (count, seqlen)")
    if windows.is_floating_point() or windows.is_complex() or windows.dtype == torch.bool:
        raise TypeError(f"windows have dtype {windows.dtype}; they must be token numbers (int64)")
    check_positions(windows.shape[1], config)
    low, high = (int(value) for value in windows.aminmax())
    vocabulary = config.get_text_config().vocab_size
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"the windows hold token {high if low >= 0 else low}, but the model has "
            f"{vocabulary}; was the text tokenised for another model?"
        )


def check_positions(seqlen: int, config) -> None:
    """Raise ValueError if a model has fewer positions, or warn if it was made for fewer.

    Args:
        seqlen: tokens in a window.
        config: of the model, of transformers.
    """
    config = config.get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    if most is None or seqlen <= most:
        return
    if not hasattr(config, "rope_parameters"):
        raise ValueError(
            f"seqlen is {seqlen}, but the model has {most} positions; it must be at most {most}"
        )
    warnings.warn(
        f"seqlen is {seqlen}, but the model was made for {most} tokens; its predictions beyond "
        "them may be poor",
        stacklevel=2,
    )
