"""Run the chapters that have changed, several at a time, and render the book: ``make book``.

    python book/build.py notebooks/*.ipynb                from the repository's root
    python book/build.py --checked notebooks/*.ipynb      render what the notebooks hold

What a chapter printed is kept in a cache, and it is run again only if its code has changed; if
anything has changed that chapters import or read, all of them are.  A chapter that fails is named
in the end, and the other pages are rendered all the same.

Where `make test` has just run every chapter and found its outputs to be those that its notebook
holds, running it once more would show nothing new: ``--checked`` takes them from there.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import nbformat
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from nbclient import NotebookClient

BUILD = Path("_build")
CACHE = BUILD / ".jupyter_cache"  # where Jupyter Book looks for it
STAMP = CACHE / "stamp"
LOGS = BUILD / "failed"
DAY = 24 * 60 * 60
# What chapters import and read.  The texts are those of the Python that runs them.
USED = ("slr", "benchmarks", "results", "constraints.txt")


def state() -> str:
    """SHA-256 of all that every chapter depends on."""
    digest = hashlib.sha256(sys.version.encode())
    for top in map(Path, USED):
        for file in sorted([top, *top.rglob("*")]):
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(f"{file} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def run(file: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs."""
    notebook = nbformat.read(file, as_version=4)
    NotebookClient(
        notebook,
        resources={"metadata": {"path": str(file.parent)}},
        record_timing=False,  # it would be stored in the cells, which then are others
        timeout=None,  # a slow machine is only slow
        startup_timeout=DAY,
        iopub_timeout=DAY,
    ).execute()
    return notebook


def stored(file: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs that it holds; ValueError if there are none."""
    notebook = nbformat.read(file, as_version=4)
    if not any(cell.get("outputs") for cell in notebook.cells):
        raise ValueError(f"{file} holds no outputs; run it first")
    return notebook


def run_changed(chapters: list[Path], run: Callable = run) -> list[Path]:
    """Put the outputs of every chapter into the cache; returns those that failed."""
    now = state()
    if not STAMP.is_file() or STAMP.read_text() != now:
        shutil.rmtree(CACHE, ignore_errors=True)
        CACHE.mkdir(parents=True)
        STAMP.write_text(now)
    shutil.rmtree(LOGS, ignore_errors=True)
    cache, changed, failed = get_cache(str(CACHE)), [], []
    for file in chapters:
        try:
            cache.match_cache_notebook(nbformat.read(file, as_version=4))
        except KeyError:
            changed.append(file)
    print(f"{len(changed)} of {len(chapters)} chapters to run", flush=True)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        runs = {pool.submit(run, file): file for file in changed}
        for done in as_completed(runs):
            file = runs[done]
            try:
                bundle = CacheBundleIn(done.result(), str(file.absolute()))
                cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)
                print(f"{file}: done", flush=True)
            except Exception:
                LOGS.mkdir(exist_ok=True)
                (LOGS / f"{file.stem}.log").write_text(traceback.format_exc(), encoding="utf-8")
                print(f"{file}: FAILED", flush=True)
                failed.append(file)
    return sorted(failed)


def remove_old(html: Path, since: float) -> None:
    """Delete the pages that were not rendered since then: their chapters have other names now.

    Only the front page, which leads to the first one, is written once for all.
    """
    for page in html.rglob("*.html"):
        kept = "_static" in page.parts or page == html / "index.html"
        if not kept and page.stat().st_mtime < since:
            page.unlink()


def main() -> int:
    """The exit code: 0 if every chapter ran and no page has a warning."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a chapter on each core, not all on all
    checked = sys.argv[1:2] == ["--checked"]
    chapters = [Path(name) for name in sys.argv[1 + checked :]]
    failed = run_changed(chapters, stored if checked else run)
    book = Path(sys.executable).with_name("jupyter-book")
    render = [str(book), "build", "--all", "-W", "--keep-going", "."]
    started = time.time() - 2  # what a coarse clock of files may be behind
    code = subprocess.run(render).returncode
    if not code:
        remove_old(BUILD / "html", started)  # all are rendered anew
    for file in failed:
        print(f"{file} failed: {LOGS / file.stem}.log", file=sys.stderr)
    if code and not failed:
        print("The book has warnings, which are above.", file=sys.stderr)
    if not code and not failed:
        print(f"The book is at {(BUILD / 'html' / 'index.html').absolute().as_uri()}")
    return 1 if code or failed else 0


if __name__ == "__main__":
    sys.exit(main())
