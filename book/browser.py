"""A page in headless Chromium or Chrome, served from this machine: what it tells, and its print."""

import functools
import http.server
import json
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
TYPES = {"html": "text/html", "xhtml": "application/xhtml+xml", "css": "text/css"}


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, pages of our own under /-/, and what a page posts to /-/told."""

    pages: dict[str, str]
    told: list[dict]

    def do_GET(self):
        if not self.path.startswith("/-/"):
            return super().do_GET()
        text = self.pages.get(self.path[3:])
        if text is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Type", f"{TYPES[self.path.rpartition('.')[2]]}; charset=utf-8")
        self.end_headers()
        self.wfile.write(text.encode())

    def do_POST(self):
        self.told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass


@contextmanager
def served(folder: Path, pages: dict[str, str]) -> Iterator[tuple[str, list[dict]]]:
    """The address of a server of `folder` and of `pages` under ``-/``, and what pages tell it."""
    told: list[dict] = []
    handler = type("Served", (Handler,), {"pages": pages, "told": told})
    serve = functools.partial(handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("localhost", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_address[1]}", told
        server.shutdown()


def browse(*arguments: str) -> str:
    """Run the browser to its end; what it says on stderr.  SystemExit if there is none."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"no browser: install one of {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, *QUIET, f"--user-data-dir={profile}", *arguments]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return done.stderr


def ask(folder: Path, page: str) -> dict:
    """What the page, given as HTML, posts to /-/told when it is loaded."""
    with served(folder, {"page.html": page}) as (address, told):
        said = browse(
            "--virtual-time-budget=600000", "--window-size=1000,1000", "--dump-dom",
            f"{address}/-/page.html",
        )  # fmt: skip
    if not told:
        raise SystemExit(f"the browser told nothing: {said[-500:]}")
    return told[0]


def print_pdf(folder: Path, page: str, out: Path) -> None:
    """Print the page, given as XHTML, with an outline of its headings."""
    out.unlink(missing_ok=True)
    with served(folder, {"page.xhtml": page}) as (address, _):
        said = browse(
            f"--print-to-pdf={out}", "--no-pdf-header-footer", "--generate-pdf-document-outline",
            "--virtual-time-budget=600000", f"{address}/-/page.xhtml",
        )  # fmt: skip
    if not out.is_file():
        raise SystemExit(f"the browser printed nothing: {said[-500:]}")
