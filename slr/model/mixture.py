"""General text: what a model is calibrated on if nothing is said.

Three quarters are prose that a small language model wrote, SmolLM2-135M-Instruct, when it was
asked for articles, explanations, stories, reports, letters and advice on some two hundred subjects
(``examples/write_prose.py``); one quarter is documentation and sources of this Python installation.
What such prose says is often wrong; how it is put is what calibration needs.

Book: "How to use this book".
"""

import hashlib
import json
from functools import lru_cache
from importlib import resources

from slr.model.embedded import documents, held_out, in_split

__all__ = ["general", "prose"]

EXCERPT = 2_000  # characters of a document of Python, as long as those of prose


@lru_cache(maxsize=1)
def prose() -> dict[str, str]:
    """The written documents by name, in a fixed order.

    Cost: reads a file of 0.3 MB, once.

    >>> len(prose()) > 150, all(prose().values())
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
    room = sum(map(len, chosen.values())) // 3
    for name, text in python.items():
        if room <= 0:
            break
        chosen[name] = text
        room -= len(text)
    mixed = sorted(chosen.items(), key=lambda item: hashlib.sha256(item[0].encode()).digest())
    return "\n\n".join(text for _, text in mixed)
