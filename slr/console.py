"""What the ``slr`` command prints: every fault is one line on standard error, JSON is strict.

Exit codes: 2 for what was given, 1 for a failure in work, 130 when stopped.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from slr.model.edges import first_line

__all__ = ["Commands", "as_json", "fail", "measured_rows", "say", "table"]

TRACEBACK = "SLR_TRACEBACK"  # set in the environment, shows where a fault arose
GOES_ON = ("compress", "export", "league", "reproduce")  # commands that take up what they left
UsageError: Any = typer.BadParameter.__base__  # of any wrong option or argument
PACKAGE = str(Path(__file__).parent)


def fail(message: object, code: int) -> NoReturn:
    """Leave with a line on standard error."""
    print("slr: " + " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(code)


def say(text: str) -> None:
    """A line on standard error, beside the results."""
    typer.echo(text, err=True)


def table(rows: list[tuple[str, str]]) -> str:
    """Two columns.

    >>> print(table([("a", "1"), ("long", "2")]))
    a     1
    long  2
    """
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def measured_rows(measured: dict | None) -> list[tuple[str, str]]:
    """Rows of a :func:`table` with what was measured on held-out text."""
    if measured is None:
        return []
    values = ", ".join(
        f"{kind} {'not finite' if value is None else format(value, '.2f')}"
        for kind, value in measured["perplexity"].items()
    )
    rows = [("perplexity, held-out text", f"{values}")]
    for kind, text in (measured["sample"] or {}).items():
        rows.append((f"sample, {kind}", " ".join(text.split())))
    return rows


def as_json(value: Any) -> str:
    """JSON as the standard has it: a number that is not finite is ``null``.

    >>> as_json({"perplexity": float("nan"), "layers": [1.5, float("inf")]})
    '{"perplexity": null, "layers": [1.5, null]}'
    """

    def plain(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: plain(each) for key, each in part.items()}
        if isinstance(part, list | tuple):
            return [plain(each) for each in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(plain(value), allow_nan=False, default=str)


@contextmanager
def _in_lines() -> Iterator[None]:
    """While open, errors and this package's warnings are one line each."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def told(message, category, filename, lineno, file=None, line=None) -> None:
            if filename.startswith(PACKAGE):
                say("slr: warning: " + " ".join(str(message).split()))
            else:
                show(message, category, filename, lineno, file, line)

        warnings.showwarning = told
        try:
            yield
        except Exception as error:
            if os.environ.get(TRACEBACK):
                traceback.print_exc()
            fail(*_told(error))


def _told(error: Exception) -> tuple[str, int]:
    """What to say of an error, and the exit code."""
    if isinstance(error, UsageError):
        return f"{error.format_message()} (see --help)", 2
    if isinstance(error, typer.Abort):
        return "stopped", 130
    if isinstance(error, MemoryError):
        return "out of memory", 1
    if isinstance(error, ValueError | TypeError) and str(error):
        return str(error), 2
    if isinstance(error, OSError | RuntimeError | ImportError) and str(error):
        return re.sub(r"^\[Errno -?\d+\] ", "", str(error)), 1
    return f"unexpected {first_line(error)}; set {TRACEBACK}=1 to see where", 1


class Commands(TyperGroup):
    """A group of commands whose every end is an exit code and, if it failed, one line."""

    def main(  # type: ignore[override]
        self, args: Any = None, prog_name: str | None = None, **options: Any
    ) -> Any:
        """As click's; it leaves by SystemExit, but for ``standalone_mode=False``."""
        if not options.pop("standalone_mode", True):
            return super().main(args, prog_name, standalone_mode=False, **options)
        with _in_lines():
            code = super().main(args, prog_name, standalone_mode=False, **options)
        if code == 130:
            name = next(iter(sys.argv[1:] if args is None else args), None)
            again = "stopped; the same command, given again, goes on"
            if "--fresh" in (sys.argv[1:] if args is None else args):
                again = "stopped; the same command, given again without --fresh, goes on"
            fail(again if name in GOES_ON else "stopped", 130)
        raise SystemExit(code or 0)
