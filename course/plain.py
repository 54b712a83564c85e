"""What only the book understands, as Markdown that any notebook or deck shows.

In the book statements are directives, equations have labels and sources are cited by a key; links
lead to pages that a hand-out does not have.
"""

import re
from functools import cache
from pathlib import Path

from pybtex.database import parse_file
from pybtex.richtext import Text

BIBLIOGRAPHY = Path(__file__).resolve().parent.parent / "book" / "references.bib"
STATEMENT = re.compile(
    r"^:::\{prf:(\w+)\}(?: ([^\n]*))?\n((?::\w+:[^\n]*\n)*)\n*(.*?)\n*^:::$", re.M | re.S
)
EQUATION = re.compile(r"\s*\$\$ \(eq-(\d+)-(\d+)\)$", re.M)
CITATION = re.compile(r"\{cite(:t)?\}`([^`]+)`")
# To another page of the book, or to a place in one; links to chapters and to the web stay.
BOUND = re.compile(r"\[([^\]\n]+)\]\((?!https?:|\d\d_\w+\.ipynb\))[^)\s]*\)")
END = "<!-- end -->"  # of what is stated in several paragraphs


@cache
def sources() -> dict[str, tuple[str, str]]:
    """Authors and year of every entry of the bibliography."""
    found = {}
    for key, entry in parse_file(BIBLIOGRAPHY).entries.items():
        people = [person.prelast_names + person.last_names for person in entry.persons["author"]]
        names = [str(Text.from_latex(" ".join(family))) for family in people]
        others = " et al." if len(names) > 2 or "others" in names else ""
        if len(names) == 2 and not others:
            others = f" and {names[1]}"
        found[key] = f"{names[0]}{others}", entry.fields["year"]
    return found


def statement(found: re.Match) -> str:
    """A directive as a paragraph that begins with what it is."""
    kind, title, options, body = found.groups()
    if kind == "proof":
        return f"*Proof.* {body}"
    label = re.search(r":label: \w+-(\d+)-(\d+)", options)
    number = f" {label[1]}.{label[2]}" if label and ":nonumber:" not in options else ""
    called = f" ({title})" if title else ""
    end = f"\n\n{END}" if kind != "proposition" and "\n\n" in body else ""  # a proof ends the other
    return f"**{kind.title()}{number}{called}.** {body}{end}"


def citation(found: re.Match) -> str:
    """Authors and years, in brackets or as part of a sentence."""
    told = [sources()[key.strip()] for key in found[2].split(",")]
    if found[1]:
        return "; ".join(f"{who} ({year})" for who, year in told)
    return f"({'; '.join(f'{who}, {year}' for who, year in told)})"


def plain(markdown: str) -> str:
    """Markdown of the book without directives, roles and links that only the book has."""
    markdown = STATEMENT.sub(statement, markdown)
    markdown = EQUATION.sub(r" \\tag{\1.\2}\n$$", markdown)
    markdown = CITATION.sub(citation, markdown)
    return BOUND.sub(r"\1", markdown)
