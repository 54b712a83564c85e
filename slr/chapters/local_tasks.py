"""Multiple-choice tasks from the held-out text, for lm-eval without a network.

A tiny model knows nothing that real benchmarks ask.  These two ask about text like that which the
embedded model was trained on: which word ends a passage, and which piece of text follows it.

Book: chapter 13.
"""

from __future__ import annotations

import json
import keyword
import random
import re
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path

from slr.model import data
from slr.model.embedded import LONGEST

__all__ = ["NAMES", "build", "cloze", "continuation"]

CONTEXT, LENGTH = 160, 24  # characters of a passage and of a continuation
CHOICES = 4
# One space before it, so that passage + " " + choice is the text again.
WORD = re.compile(r"(?<=\S )[A-Za-z_]\w{2,}")
PLACE = re.compile(r"(?<=\S) (?=\S)")


def _kind(word: str) -> str:
    """What a wrong choice must have in common with the right one."""
    if keyword.iskeyword(word):
        return "keyword"
    if word.isupper():
        return "CONSTANT"
    return "Class" if word.lstrip("_")[:1].isupper() else "name"


def _held_out() -> dict[str, str]:
    named = data.documents().items()
    return {name: text[:LONGEST] for name, text in named if data.held_out(name)}


def _in_turn(places: Mapping[str, list], draw: random.Random) -> Iterator[tuple[str, re.Match]]:
    """A random place of each document, then another of each, and so on."""
    rows = [[(name, at) for at in draw.sample(found, len(found))] for name, found in places.items()]
    draw.shuffle(rows)
    for turn in range(max(map(len, rows), default=0)):
        yield from (row[turn] for row in rows if turn < len(row))


def _question(name: str, context: str, right: str, wrong: list[str], draw: random.Random) -> dict:
    choices = [right, *wrong]
    draw.shuffle(choices)
    context = context[context.find(" ") + 1 :]  # no half word at its beginning
    return {
        "document": name, "context": context, "choices": choices, "gold": choices.index(right)
    }  # fmt: skip


def cloze(
    examples: int = 200, *, seed: int = 0, documents: Mapping[str, str] | None = None
) -> list[dict]:
    """Questions for the last word of a passage.

    The wrong choices are words of the same document and the same kind (keyword, constant, class
    or other name), drawn as often as they occur there.

    Args:
        examples: number of questions.
        seed: of all choices.
        documents: name -> text; the held-out documents of this Python by default.

    Returns:
        ``{"document", "context", "choices", "gold"}`` for each question: the text goes on with
        a space and ``choices[gold]``.  The same for the same Python version and seed.

    Raises:
        ValueError: the documents do not give so many questions.

    >>> question = cloze(1)[0]
    >>> len(question["choices"]), question["context"] == question["context"].rstrip()
    (4, True)
    """
    draw = random.Random(seed)
    documents = _held_out() if documents is None else documents
    words = {name: list(WORD.finditer(text)) for name, text in documents.items()}
    places = {name: [at for at in found if at.start() > CONTEXT] for name, found in words.items()}
    questions: list[dict] = []
    for name, at in _in_turn(places, draw):
        if len(questions) == examples:
            break
        right = at[0]
        pool = [w[0] for w in words[name] if _kind(w[0]) == _kind(right) and w[0] != right]
        if len(set(pool)) < CHOICES - 1:
            continue
        wrong = list(dict.fromkeys(draw.sample(pool, len(pool))))[: CHOICES - 1]
        context = documents[name][at.start() - 1 - CONTEXT : at.start() - 1]
        questions.append(_question(name, context, right, wrong, draw))
    return _enough(questions, examples, documents)


def continuation(
    examples: int = 200, *, seed: int = 0, documents: Mapping[str, str] | None = None
) -> list[dict]:
    """Questions for the text after a passage, as for :func:`cloze`.

    All choices have 24 characters; the wrong ones are from random places of random documents.

    >>> {len(choice) for choice in continuation(1)[0]["choices"]}
    {24}
    """
    draw = random.Random(seed)
    documents = _held_out() if documents is None else documents
    places = {name: list(PLACE.finditer(text, CONTEXT, len(text) - LENGTH))
              for name, text in documents.items()}  # fmt: skip
    some = [name for name, found in places.items() if found]

    def piece(name: str, at: re.Match) -> str:
        return documents[name][at.end() : at.end() + LENGTH]

    questions: list[dict] = []
    for name, at in _in_turn(places, draw):
        if len(questions) == examples:
            break
        drawn = (draw.choice(some) for _ in range(8 * CHOICES))
        others = dict.fromkeys(piece(other, draw.choice(places[other])) for other in drawn)
        others.pop(right := piece(name, at), None)
        if len(others) >= CHOICES - 1:
            context = documents[name][at.start() - CONTEXT : at.start()]
            questions.append(_question(name, context, right, list(others)[: CHOICES - 1], draw))
    return _enough(questions, examples, documents)


def _enough(questions: list[dict], examples: int, documents: Mapping[str, str]) -> list[dict]:
    if examples < 1 or len(questions) < examples:
        raise ValueError(
            f"examples is {examples}, but {len(documents)} documents give {len(questions)}; "
            "ask for at least 1 and at most as many, or give more text"
        )
    return questions


NAMES: dict[str, Callable[..., list[dict]]] = {"slr_cloze": cloze, "slr_continuation": continuation}


def build(
    folder: str | Path,
    examples: int = 200,
    *,
    seed: int = 0,
    documents: Mapping[str, str] | None = None,
) -> list[str]:
    """Write both tasks for lm-eval: a JSONL and a YAML file each.

    Args:
        folder: to write to; made if it is not there.  The YAML files name it absolutely.
        examples: questions of each task.
        seed: of all choices.
        documents: as for :func:`cloze`.

    Returns:
        Names for ``tasks(model, tokenizer, names, folder=folder)``.

    Raises:
        ValueError: too few documents, or a folder that cannot be written.
    """
    files, where = {}, Path(folder).absolute()
    for name, make in NAMES.items():
        rows = make(examples, seed=seed, documents=documents)
        template = (
            resources.files("slr.chapters").joinpath("tasks", f"{name}.yaml").read_text("utf-8")
        )
        path = json.dumps(str(where / f"{name}.jsonl"))
        files[f"{name}.yaml"] = template.replace(f'"{name}.jsonl"', path)
        files[f"{name}.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows)
    try:
        where.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            (where / file).write_text(content, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}") from None
    return list(NAMES)
