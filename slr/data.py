"""Text in, token windows out: the embedded corpus and any text file.

The embedded corpus ships no text.  It is read at run time from the Python
installation itself: the standard library's sources and the language reference
that ``help()`` prints (``pydoc_data.topics``).  A document belongs to the
held-out tenth or not by a hash of its *name*, so the split is the same on every
machine and for every Python version, and no text of a held-out document was
seen when the embedded model was trained.

Book: "How to use this book" and chapter 1.
"""

import functools
import hashlib
import importlib
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import torch

__all__ = ["corpus", "documents", "held_out", "load_text", "windows"]

# Missing from some installations (Debian splits them off, newer Pythons drop them), generated
# tables, or code of somebody else: never part of the validation or calibration text.
_NOT_EVERYWHERE = frozenset(
    {
        "distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test",
        "tkinter", "turtledemo", "turtle.py", "site-packages", "dist-packages", "__pycache__",
        "sitecustomize.py", "usercustomize.py",
    }
)  # fmt: skip
_NEVER = frozenset({"site-packages", "dist-packages", "encodings", "pydoc_data", "ensurepip"})
_LONGEST = 20_000  # characters of one document in a corpus: no module may dominate it


def held_out(name: str) -> bool:
    """Whether the document `name` is in the tenth that training never sees.

    Args:
        name: document name, as in :func:`documents`.

    >>> held_out("topics/lambda"), held_out("topics/truth")
    (False, True)
    """
    return _bucket(name) == 0


def _bucket(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 10


@functools.lru_cache(maxsize=2)
def documents(everywhere: bool = True) -> Mapping[str, str]:
    """Documents of this Python installation by name, in a fixed order.

    Args:
        everywhere: only those that every CPython installation has; ``False`` adds the
            packages that some lack (``test``, ``tkinter``, …), for training.

    Returns:
        ``{"json/decoder.py": source, "topics/lambda": text, …}``, ordered by a hash of
        the name so that any prefix is a fair sample.

    Cost: reads 13 MB of files (31 MB with ``everywhere=False``), 0.2 s; cached.
    """
    found: dict[str, str] = {}
    root = Path(sysconfig.get_path("stdlib"))
    for file in root.rglob("*.py"):
        name = file.relative_to(root).as_posix()
        parts = set(name.split("/"))
        private_build = name.startswith(("_sysconfigdata", "config-"))
        if parts & _NEVER or private_build or (everywhere and parts & _NOT_EVERYWHERE):
            continue
        try:
            found[name] = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # a few test files are broken on purpose
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        topics = {}
    found |= {f"topics/{name}": text for name, text in topics.items()}
    return dict(sorted(found.items(), key=lambda item: hashlib.sha256(item[0].encode()).digest()))


def corpus(split: str) -> str:
    """The embedded corpus: text for evaluation or for calibration.

    Args:
        split: ``"validation"``, held-out documents that the embedded model never saw, or
            ``"calibration"``, other documents (the model was trained on them, as a large
            model was on the web text that it is calibrated with).

    Returns:
        One text, documents separated by blank lines; the same for a given Python version.

    Raises:
        ValueError: `split` is neither name.

    >>> text = corpus("validation")
    >>> len(text) > 200_000 and text != corpus("calibration")
    True
    """
    buckets = {"validation": 0, "calibration": 1}
    if split not in buckets:
        raise ValueError(f"split is {split!r}; it must be 'validation' or 'calibration'")
    chosen = [t[:_LONGEST] for n, t in documents().items() if _bucket(n) == buckets[split]]
    return "\n\n".join(chosen)


def load_text(source: str, split: str = "validation") -> str:
    """Text by name: ``"embedded"`` or the path of a UTF-8 text file.

    Args:
        source: ``"embedded"`` or a path.
        split: which part of the embedded corpus; ignored for a file.

    Raises:
        ValueError: no such file, or it is not UTF-8 text.
    """
    if source == "embedded":
        return corpus(split)
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"text {source!r} is neither 'embedded' nor a text file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 text (byte {error.start})") from None


def windows(text: str, tokenizer, seqlen: int, limit: int | None = None) -> torch.Tensor:
    """Consecutive token windows of a text, tokenised once and in one piece.

    Args:
        text: any text.
        tokenizer: a Hugging Face tokenizer; no special tokens are added.
        seqlen: tokens in a window, at least 2 (the first is only ever context).
        limit: at most this many windows; ``None`` keeps all whole windows.

    Returns:
        int64 tensor (windows, seqlen); what remains after the last whole window is dropped.

    Raises:
        ValueError: the text is shorter than one window, or `seqlen` or `limit` too small.

    Source: the perplexity protocol of GPTQ, SparseGPT and Wanda.
    """
    if seqlen < 2:
        raise ValueError(f"seqlen is {seqlen}; a window needs at least 2 tokens")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1")
    if limit is not None:
        # A byte-level tokenizer never merges more than some tens of characters into a token.
        text = text[: 32 * limit * seqlen]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(ids) // seqlen
    if count == 0:
        raise ValueError(
            f"the text has {len(ids)} tokens, fewer than one window of seqlen {seqlen}; "
            "give more text or a smaller seqlen"
        )
    count = count if limit is None else min(count, limit)
    return torch.tensor(ids[: count * seqlen], dtype=torch.int64).view(count, seqlen)
