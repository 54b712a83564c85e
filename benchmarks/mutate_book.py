"""Plant faults in slr while a chapter of the book runs: does some cell of the chapter notice?

    OMP_NUM_THREADS=1 python benchmarks/mutate_book.py [--only 4,5] [--fresh] [--out FILE]

A chapter claims to show that the library is right.  Here it runs with a copy of the library in
which one thing that it teaches is wrong (``benchmarks/_faults.py``), up to the first cell that
fails.  A fault that no cell fails on is *missed*, even if printed numbers would differ: who runs a
chapter elsewhere compares no numbers.  Then the chapter runs with an unchanged copy, as far as a
fault let it come, and must not fail.  Every result is kept at once; what is there is not run again
unless the fault has changed or the cell that failed on it; ``--fresh`` runs all again.  Needs the
repository.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slr.checkpoint.atomic import write_text
from slr.evaluate.origin import provenance

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks._faults import FAULTS, Fault  # noqa: E402

OUT = ROOT / "results" / "measured" / "pipeline" / "mutations.json"
NOTHING = Fault("nothing", (), "__init__.py", ())
DATA = {"published": "results/published", "specs": "results/specs", "results": "results"}
LONGEST = 1800  # seconds of a cell


def chapters() -> dict[int, Path]:
    """The notebooks by the number of their chapter."""
    return {int(file.name[:2]): file for file in sorted(ROOT.glob("notebooks/*.ipynb"))}


def pairs(only: list[int]) -> Iterator[tuple[int, Fault]]:
    """What is run: a chapter with each fault that it has to notice, then with nothing planted."""
    for chapter in only:
        yield from ((chapter, fault) for fault in FAULTS if chapter in fault.chapters)
        yield chapter, NOTHING


def code_of(notebook: dict) -> list[tuple[str, str]]:
    """Id and source of each code cell."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [(cell["id"], "".join(cell["source"])) for cell in cells]


def digest(chapter: int, fault: Fault, cells: set[str]) -> str:
    """Of what a result rests on.

    Args:
        chapter: its number.
        fault: that is planted.
        cells: ids of those that failed on it, or (of nothing) on the others; all if there are none.
    """
    code = code_of(json.loads(chapters()[chapter].read_text(encoding="utf-8")))
    told = json.dumps([[cell for cell in code if cell[0] in cells or not cells], fault.changes])
    return hashlib.sha256(told.encode()).hexdigest()


@contextmanager
def copied() -> Iterator[Path]:
    """A folder with a copy of the library, and what chapters read beside it."""
    with tempfile.TemporaryDirectory(prefix="slr-mutants-") as name:
        folder = Path(name)
        leave = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "slr", folder / "slr", ignore=leave)
        for package, where in DATA.items():
            (folder / "slr" / package).symlink_to(ROOT / where)
        for beside in ("results", "pyproject.toml"):
            (folder / beside).symlink_to(ROOT / beside)
        yield folder


@contextmanager
def planted(folder: Path, fault: Fault) -> Iterator[None]:
    """While open, the copy has the fault."""
    file = folder / "slr" / fault.file
    right = file.read_text(encoding="utf-8")
    file.write_text(fault.planted(right), encoding="utf-8")
    try:
        yield
    finally:
        file.write_text(right, encoding="utf-8")


def run(chapter: Path, folder: Path, cells: set[str] | None = None) -> dict:
    """The first cell of a chapter that fails with the library in a folder, if one does.

    Args:
        chapter: a notebook.
        folder: with ``slr``.
        cells: ids of those to come to, at least; all if there are none.

    Returns:
        The ``cell`` by number, its ``id``, its first ``line`` and the ``error``, all ``None`` if no
        cell fails; and the ``seconds`` that it took.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    notebook, started = nbformat.read(chapter, 4), time.perf_counter()
    if cells:
        last = max(number for number, cell in enumerate(notebook.cells) if cell["id"] in cells)
        del notebook.cells[last + 1 :]
    # No bytecode: a module that is changed and put back within a second looks the same.
    env = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    env |= {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    where = {"metadata": {"path": str(folder)}}
    quiet = {"extra_arguments": ["--log-level=40"], "resources": where}
    client = NotebookClient(notebook, timeout=LONGEST, kernel_name="python3", **quiet)
    found: dict = dict.fromkeys(("cell", "id", "line", "error"))
    try:
        client.execute(env=env)
    except CellExecutionError as error:
        found = _failed(notebook, error)
    return {**found, "seconds": round(time.perf_counter() - started, 1)}


def _failed(notebook: dict, error: Exception) -> dict:
    """Which cell, and why."""
    for number, cell in enumerate(notebook["cells"]):
        for output in cell.get("outputs", ()):
            if output["output_type"] == "error":
                told = f"{output['ename']}: {output['evalue']}".strip(": ").splitlines()[0]
                line = next(x for x in cell["source"].splitlines() if x.strip())
                return {"cell": number, "id": cell["id"], "line": line, "error": told[:160]}
    raise error


def measure(only: list[int], out: Path, fresh: bool) -> dict:
    """All runs of some chapters, kept in a file as they come; all that is there now."""
    told = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {"rows": []}
    wanted = {(c, f.name) for c, f in pairs(sorted(chapters())) if not (fresh and c in only)}
    known = {k: row for row in told["rows"] if (k := (row["chapter"], row["fault"])) in wanted}
    with copied() as folder:
        for chapter, fault in pairs(only):
            key, row = (chapter, fault.name), known.get((chapter, fault.name), {})
            cells = {row.get("id")} if fault is not NOTHING else failing(chapter, known)
            cells.discard(None)
            if row and row["digest"] == digest(chapter, fault, cells):
                continue
            with planted(folder, fault):
                found = run(chapters()[chapter], folder, cells if fault is NOTHING else set())
            cells = cells if fault is NOTHING else {found["id"]} - {None}
            code = digest(chapter, fault, cells)
            known[key] = {"chapter": chapter, "fault": fault.name, **found, "digest": code}
            print(line_of(known[key]), flush=True)
            told = {"command": "python benchmarks/mutate_book.py", **provenance()}
            rows = [known[k] for c, f in pairs(sorted(chapters())) if (k := (c, f.name)) in known]
            write_text(out, json.dumps({**told, "rows": rows}, indent=1) + "\n")
    return json.loads(out.read_text(encoding="utf-8"))


def failing(chapter: int, known: dict[tuple[int, str], dict]) -> set[str]:
    """Ids of the cells of a chapter that failed on some fault; empty if a fault was missed."""
    mine = [row for (number, _), row in known.items() if number == chapter]
    ids = {row["id"] for row in mine if row["fault"] != NOTHING.name}
    return set() if None in ids else ids


def line_of(row: dict) -> str:
    """One row in words."""
    seen = f"cell {row['cell']} ({row['id']}), {row['error']}" if row["error"] else "no cell"
    return f"{row['chapter']:>2}  {row['fault']:<52}  {seen[:90]}"


def wrong(rows: list[dict]) -> list[dict]:
    """Faults that are missed, and chapters that fail with nothing planted."""
    return [row for row in rows if bool(row["error"]) == (row["fault"] == NOTHING.name)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="chapters, as 4,5")
    parser.add_argument("--fresh", action="store_true", help="run again what is there")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    if not chapters():
        sys.exit("there are no notebooks beside benchmarks; run it in the repository")
    os.nice(5)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no kernel is left behind
    only = [int(number) for number in args.only.split(",") if number] or sorted(chapters())
    rows = measure(only, args.out, args.fresh)["rows"]
    faults = [row for row in rows if row["fault"] != NOTHING.name]
    for chapter in sorted({row["chapter"] for row in faults}):
        mine = [row for row in faults if row["chapter"] == chapter]
        caught = [row for row in mine if row["error"]]
        cells = sorted({row["cell"] for row in caught})
        print(f"chapter {chapter:>2}: {len(mine)} planted, {len(caught)} caught, by cells {cells}")
    for row in wrong(rows):
        print("WRONG", line_of(row))
    sys.exit(bool(wrong(rows)))


if __name__ == "__main__":
    main()
