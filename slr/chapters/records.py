"""Results that were recorded, for chapters to read, in a repository and where only the package is.

A wheel holds the JSON files of ``results/`` as ``slr.results``; in a repository they are read where
they are, so that what was just measured is seen.

Book: chapters 7 to 12, 14 to 19.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

__all__ = ["folder", "how", "recorded", "runs"]

REPOSITORY = Path(__file__).parents[2]


def folder(name: str = "") -> Path:
    """Where ``results/NAME`` is: in the repository, else in the installed package.

    Args:
        name: of the folder, as ``"measured/tiny"``.  It need not be there: nobody may have measured
            what it is for.

    >>> (folder("measured/tiny") / "cap.json").is_file()
    True
    """
    if (REPOSITORY / "pyproject.toml").is_file():
        return REPOSITORY / "results" / name
    return Path(str(resources.files("slr.results"))) / name


def recorded(name: str) -> dict:
    """What a benchmark measured, and the command, date and versions of it.

    Args:
        name: of a file under ``results/measured``, as ``"tiny/cap"``.

    Raises:
        ValueError: there is no such record.

    >>> recorded("tiny/induction")["command"].split()[:2]
    ['python', 'benchmarks/induction.py']
    """
    file = folder("measured") / f"{name}.json"
    if not file.is_file():
        raise ValueError(f"record {name!r} is not there; it must be a file of results/measured")
    return json.loads(file.read_text(encoding="utf-8"))


def runs(name: str) -> Iterator[tuple[str, dict]]:
    """The records of a benchmark that leaves one for each machine, ``results/MACHINE/NAME.json``.

    Args:
        name: of the benchmark, as ``"linear"``.

    Yields:
        Name of the machine and what was measured there, in the order of names; nothing if nobody
        has run it.

    >>> "cpu" in dict(runs("linear"))
    True
    """
    for file in sorted(folder().glob(f"*/{name}.json")):
        yield file.parent.name, json.loads(file.read_text(encoding="utf-8"))


def how(record: dict) -> str:
    """Date and commands of a record, folded to the width of a page; they stay fit for a shell.

    Args:
        record: with ``date`` and ``commands``, as :func:`recorded` gives them.

    >>> command = "slr compress tiny --out small" + 10 * " --quiet"
    >>> print(how({"date": "2026-01-31", "commands": [command]}))
    2026-01-31
    slr compress tiny --out small --quiet --quiet --quiet --quiet --quiet \\
        --quiet --quiet --quiet --quiet --quiet
    """
    lines = [record["date"]]
    for command in record["commands"]:
        folded = textwrap.wrap(
            command, 72, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
        )
        lines.append((" \\\n" if command.startswith("slr ") else "\n").join(folded))
    return "\n".join(lines)
