"""What holds the book together, counted by chapter: ``python book/counts.py``.

Links within the book, citations, numbered statements and equations, exercises by kind; cells whose
input is folded, solutions, all cells but these and exercises, and the median of lines in the open;
and the minutes that reading takes, without the exercises, which each chapter states at its head.
With a folder it counts the book that is there: ``python book/counts.py ../older``.
"""

import re
import statistics
import sys
from pathlib import Path

import nbformat

KINDS = ("check", "derive", "extend", "open")
CODE = re.compile(r"```.*?```|(?<!`)`[^`\n]+`(?!`)", re.S)
LINK = re.compile(r"\]\((?![a-z]+:)[^)\s]+\)")
ROLE = re.compile(r"\{(?:ref|numref|prf:ref|eq|term|doc)\}`")
CITED = re.compile(r"\{cite(?::\w+)?\}`([^`]+)`")
STATEMENT = re.compile(r"^:::+\{prf:(?!proof)\w+\}", re.M)
EQUATION = re.compile(r"\$\$ \([\w-]+\)$", re.M)
EXERCISE = re.compile(r"^### Exercise \d+\.\d+ · (\w+) ·", re.M)
NOT_READ = re.compile(
    r"^\|[ :|-]+\|$|<[^>]+>|^:::.*$|^:label:.*$|\]\([^)]*\)|\{[\w:]+\}`[^`]*`", re.M
)
# Seconds that a reader takes: of a word, a formula in a line, one on its own, a line of open code,
# and a figure or table.
WORD, INLINE, DISPLAY, LINE, OUTPUT = 60 / 180, 2, 20, 2.5, 25
HIDDEN = {"hide-input", "hide-cell", "remove-input", "remove-cell"}


def of_text(text: str) -> dict[str, int]:
    """Counts in Markdown."""
    cited = [key for keys in CITED.findall(text) for key in keys.split(",")]
    prose = CODE.sub("`", text)
    kinds = EXERCISE.findall(text)
    return {
        "links": len(LINK.findall(prose)) + len(ROLE.findall(text)),
        "citations": len(cited),
        "statements": len(STATEMENT.findall(text)),
        "equations": len(EQUATION.findall(text)),
        **{kind: kinds.count(kind) for kind in KINDS},
    }


def of_code(cells: list) -> dict[str, float]:
    """Counts in code: folded cells without solutions, all cells, lines of the open ones."""
    cells = [(set(c.metadata.get("tags", [])), c.source) for c in cells if c.cell_type == "code"]
    cells = [(tags, source) for tags, source in cells if "remove-cell" not in tags]
    taught = [(tags, source) for tags, source in cells if not tags & {"solution", "exercise"}]
    open_ = [source for tags, source in taught if not tags & HIDDEN]
    return {
        "folded": len(taught) - len(open_),
        "solutions": sum("solution" in tags for tags, _ in cells),
        "cells": len(taught),
        "lines": statistics.median(len(source.splitlines()) for source in open_),
    }


def minutes(cells: list) -> float:
    """To read a chapter up to its exercises, by its words, formulas, code and figures."""
    seconds = 0.0
    for cell in cells:
        tags = set(cell.metadata.get("tags", []))
        if cell.cell_type == "code":
            shown = [
                o for o in cell.outputs if {"text/html", "image/svg+xml"} & set(o.get("data", {}))
            ]
            seconds += OUTPUT * len(shown)
            seconds += 0 if tags & HIDDEN else LINE * len(cell.source.splitlines())
            continue
        text, end, _ = cell.source.partition("## Exercises")
        displays = re.findall(r"\$\$.*?\$\$", text, re.S)
        text = re.sub(r"\$\$.*?\$\$", " ", text, flags=re.S)
        inline = re.findall(r"\$[^$\n]+\$", text)
        words = NOT_READ.sub(" ", re.sub(r"\$[^$\n]+\$", " ", text)).split()
        seconds += WORD * len(words) + INLINE * len(inline) + DISPLAY * len(displays)
        if end:
            break
    return seconds / 60


def counts(root: Path) -> dict[str, dict[str, float]]:
    """Of each chapter, of the other pages, and of the whole book."""
    rows, everything = {}, []
    for file in sorted(root.glob("notebooks/[0-9][0-9]_*.ipynb")):
        cells = nbformat.read(file, as_version=4).cells
        everything += cells
        text = "\n\n".join(c.source for c in cells if c.cell_type == "markdown")
        row = of_text(text) | of_code(cells) | {"minutes": round(minutes(cells))}
        rows[str(int(file.stem[:2]))] = row
    pages = [file.read_text(encoding="utf-8") for file in sorted(root.glob("book/*.md"))]
    rows["pages"] = of_text("\n\n".join(pages))
    total = {name: sum(row.get(name, 0) for row in rows.values()) for name in rows["1"]}
    rows["all"] = total | {"lines": of_code(everything)["lines"]}
    return rows


def table(rows: dict[str, dict[str, float]]) -> str:
    """Counts as Markdown."""
    names = list(rows["1"])
    lines = [f"| chapter | {' | '.join(names)} |", "| --- |" + " ---: |" * len(names)]
    for chapter, row in rows.items():
        values = [f"{row[name]:g}" if name in row else "" for name in names]
        lines.append(f"| {chapter} | {' | '.join(values)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(counts(Path(*sys.argv[1:2]))))
