"""General text: what a model is calibrated on if nothing is said.

Seven eighths are prose that was written for this package by a large language model: articles of an
encyclopedia, news, stories, letters, essays, explanations, instructions, conversations.  Persons,
places and works in it are invented, so that nothing is said of anybody; science and history are
meant to be right.  One eighth is documentation and sources of this Python installation.

Calibration asks for text as people write it.  What SmolLM2-135M itself had written, which was here
before, said less: calibrated on it, its perplexity on WikiText-2 was 40.7, and is 38.5 on this (20
windows of 1024; 2:4, rank 18, 24 windows).  A text of one kind is better for that kind: 36.4 with
little but articles of an encyclopedia.

Book: "How to use this book".
"""

import hashlib
import json
from functools import lru_cache
from importlib import resources

from slr.model.embedded import documents, held_out, in_split

__all__ = ["general", "prose"]

EXCERPT = 2_000  # characters of a document of Python, not longer than those of prose
PYTHON = 1 / 7  # of the prose


@lru_cache(maxsize=1)
def prose() -> dict[str, str]:
    """The written documents by name, in a fixed order.

    Cost: reads a file of 0.3 MB, once.

    >>> len(prose()) > 90, all(prose().values())
    (True, True)
    """
    lines = resources.files("slr.model").joinpath("prose.jsonl").read_text(encoding="utf-8")
    told = [json.loads(line) for line in lines.splitlines()]
    return {f"prose/{document['name']}": document["text"] for document in told}


def general(split: str) -> str:
    """Prose and Python, for calibration or evaluation.

    Args:
        split: ``"calibration"``, or ``"validation"``, other documents.

    Returns:
        One text, documents mixed and separated by blank lines; its prose is the same everywhere.

    Raises:
        ValueError: `split` is neither name.

    >>> len(general("calibration")) > 200_000
    True
    """
    python = {n: text[:EXCERPT] for n, text in documents().items() if in_split(n, split)}
    held = split == "validation"
    chosen = {n: text for n, text in prose().items() if held_out(n) == held}
    room = PYTHON * sum(map(len, chosen.values()))
    for name, text in python.items():
        if room <= 0:
            break
        chosen[name] = text
        room -= len(text)
    mixed = sorted(chosen.items(), key=lambda item: hashlib.sha256(item[0].encode()).digest())
    return "\n\n".join(text for _, text in mixed)
