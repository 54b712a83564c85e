"""The embedded corpus ships no text.  It is read at run time from the Python
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

__all__ = ["corpus", "documents", "held_out", "in_split"]

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
LONGEST = 20_000  # characters of one document in a corpus: no module may dominate it


def held_out(name: str) -> bool:
    """Whether the document `name` is in the tenth that training never sees.

    Args:
        name: document name, as in :func:`documents`.

    >>> held_out("topics/lambda"), held_out("topics/truth")
    (False, True)
    """
    return _bucket(name) == 0


def in_split(name: str, split: str) -> bool:
    """Whether a document is in the tenth that a text is made of; see :func:`corpus`.

    >>> in_split("topics/lambda", "validation"), in_split("topics/truth", "validation")
    (False, True)
    """
    buckets = {"validation": 0, "calibration": 1}
    if split not in buckets:
        raise ValueError(f"split is {split!r}; it must be 'validation' or 'calibration'")
    return _bucket(name) == buckets[split]


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
    chosen = [t[:LONGEST] for n, t in documents().items() if in_split(n, split)]
    return "\n\n".join(chosen)
