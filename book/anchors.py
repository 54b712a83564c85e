"""Numbers by chapter and link targets, for Sphinx.

Statements, equations and figures of chapter 5 are 5.1, 5.2, …, each kind by itself; those of other
pages are 1, 2, ….  And a plain link reaches everything that has a name, so that notebooks need no
roles, which look broken where there is no Sphinx: `05_….ipynb#prop-5-2` is a statement,
`05_….ipynb#ex-5-3` an exercise, `05_….ipynb#eq-5-1` an equation, `../book/glossary.md#term-mask` a
term.  Within its own page `#prop-5-2` is enough.  A name that does not exist is a warning, hence
an error.
"""

import re

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms import SphinxTransform

CHAPTER = re.compile(r"notebooks/(\d\d)_")
EXERCISE = re.compile(r"Exercise (\d+)\.(\d+) ·")


def chapter(docname: str) -> tuple[int, ...]:
    """What its numbers begin with: the chapter, or nothing on other pages."""
    found = CHAPTER.match(docname)
    return (int(found[1]),) if found else ()


class Exercises(SphinxTransform):
    """The heading of Exercise 5.3 gets the name ex-5-3."""

    default_priority = 500  # before labels are collected

    def apply(self, **_: object) -> None:
        for section in self.document.findall(nodes.section):
            found = EXERCISE.match(section[0].astext()) if len(section) else None
            if found:
                name = f"ex-{found[1]}-{found[2]}"
                section["ids"].insert(0, name)
                section["names"].append(name)
                self.document.note_explicit_target(section, section)


class Names(SphinxTransform):
    """Every statement and term can be reached by its id, by links of either form."""

    default_priority = 870  # the next to look are MyST's own links and Sphinx's labels

    def apply(self, **_: object) -> None:
        slugs = dict(self.env.metadata[self.env.docname].get("myst_slugs", {}))
        labels = self.env.get_domain("std").anonlabels  # type: ignore[attr-defined]
        for name, explicit in self.document.nametypes.items():
            if explicit and self.document.nameids[name]:
                slugs[name] = (0, self.document.nameids[name], name)
        for place, node in enumerate(self.document.findall(nodes.Element)):
            if node.get("ids") in (["proof"], ["proof-content"]):
                node["classes"].append(node["ids"][0])
                node["ids"][0] += f"-{place}"  # an id has to be the only one of its name
            for name in node.get("ids", []):
                if name.startswith(("prop-", "def-", "alg-", "ex-", "term-")):
                    slugs[name] = (0, name, name)
                    labels[name] = (self.env.docname, name)
            if isinstance(node, nodes.math_block) and node.get("label"):
                # Sphinx makes an id of its own from the label, and finds it by itself on one page.
                name = node["label"]
                slugs[name] = (0, nodes.make_id(f"equation-{name}"), name)
        self.env.metadata[self.env.docname]["myst_slugs"] = slugs


def number(app: Sphinx, env: BuildEnvironment) -> list[str]:
    """Replaces numbers that run through the book by those of the chapter."""
    others: dict[str, int] = {}
    for docname in env.toc_fignumbers:
        for kind, found in env.toc_fignumbers[docname].items():
            for place, name in enumerate(found, 1):
                if begin := chapter(docname):
                    found[name] = (*begin, place)
                else:
                    others[kind] = others.get(kind, 0) + 1
                    found[name] = (others[kind],)
    return []  # no page has to be read again


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_transform(Exercises)
    app.add_transform(Names)
    app.connect("env-get-updated", number, priority=900)  # after Sphinx has given its own
    return {"parallel_read_safe": True, "parallel_write_safe": True}
