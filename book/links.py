"""Where links lead: those within the built book always, the others where a network is there.

    python -m book.links               of _build/html, in seconds
    python -m book.links --external    and ask the servers of the others: ``make linkcheck``

A page, a picture or an anchor that is not there is a fault, and so is an id that a page has twice.
Of other servers only a clear no is one: 404, 410, or a host without an address.  Many turn
programs away (403, 429) or are down for an hour; these are told, and forgiven.
"""

import os
import re
import socket
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

BUILT = Path("_build") / "html"
TEMPLATES = "_static"  # pages of the theme's, which are none of the book's
WAIT = 30.0  # seconds


class Page(HTMLParser):
    """The ids of a page, and what it refers to."""

    def __init__(self, text: str):
        super().__init__()
        self.ids: Counter[str] = Counter()
        self.links: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name == "id" or (name == "name" and tag == "a"):
                self.ids[value] += 1
            elif name in ("href", "src", "xlink:href") and value:
                self.links.add(value.strip())


def internal(pages: dict[str, Page], exists: Callable[[str], bool]) -> list[str]:
    """What is wrong with links between `pages`, by path, and to other files of the same folder."""
    wrong = []
    for path, page in pages.items():
        wrong += [f"{path}: id {name!r} {n} times" for name, n in page.ids.items() if n > 1]
        for link in sorted(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            to = path
            if parts.path:
                to = os.path.normpath(os.path.join(os.path.dirname(path), unquote(parts.path)))
            if to not in pages and not exists(to):
                wrong.append(f"{path}: {link} is not there")
            elif parts.fragment and to in pages and unquote(parts.fragment) not in pages[to].ids:
                wrong.append(f"{path}: {link} has no such anchor")
    return wrong


def built(folder: Path) -> dict[str, Page]:
    """The pages of a built book by their paths."""
    files = (file.relative_to(folder) for file in sorted(folder.rglob("*.html")))
    return {
        file.as_posix(): Page((folder / file).read_text(encoding="utf-8"))
        for file in files
        if file.parts[0] != TEMPLATES
    }


def elsewhere(pages: Iterable[Page], own: str) -> list[str]:
    """Links to other servers, without anchors; none to `own` if that is a placeholder."""
    found = {link.partition("#")[0] for page in pages for link in page.links}
    found = {link for link in found if re.match(r"https?://", link)}
    name = own.removeprefix("https://github.com/")
    if name.isupper():
        found = {link for link in found if name not in unquote(link)}
    return sorted(found)


def answer(link: str) -> tuple[str, str]:
    """(``ok``, ``dead`` or ``unknown``; what the server said)."""
    said = ""
    for method in ("HEAD", "GET"):  # some know only the second
        request = urllib.request.Request(link, method=method)
        request.add_header("User-Agent", "Mozilla/5.0 (compatible; slr linkcheck)")
        try:
            with urllib.request.urlopen(request, timeout=WAIT) as response:
                return "ok", str(response.status)
        except urllib.error.HTTPError as error:
            said = str(error.code)
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            return "dead" if isinstance(reason, socket.gaierror) else "unknown", str(reason)
    return "dead" if said in ("404", "410") else "unknown", said


def external(links: list[str]) -> list[str]:
    """Links that are dead; says which gave no clear answer, and if there is no network at all."""
    with ThreadPoolExecutor(8) as pool:
        answers = dict(zip(links, pool.map(answer, links), strict=True))
    if links and not any(said.isdigit() for _, said in answers.values()):
        print(f"no network: {len(links)} links to other servers were not checked")
        return []
    for link, (what, said) in answers.items():
        if what == "unknown":
            print(f"no clear answer: {link}: {said}")
    print(f"{len(links)} links to other servers")
    return [f"{link}: {said}" for link, (what, said) in answers.items() if what == "dead"]


def main(arguments: list[str]) -> int:
    """The exit code: 1 if a link is dead."""
    pages = built(BUILT)
    if not pages:
        print("no book yet: run 'make book' first", file=sys.stderr)
        return 2
    wrong = internal(pages, lambda path: (BUILT / path).exists())
    print(f"{len(pages)} pages, {sum(len(page.links) for page in pages.values())} links")
    if "--external" in arguments:
        config = yaml.safe_load(Path("_config.yml").read_text(encoding="utf-8"))
        wrong += external(elsewhere(pages.values(), config["repository"]["url"]))
    for line in wrong:
        print(line, file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
