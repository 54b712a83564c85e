"""A Sphinx extension: the commands' reference, and links to it from inline code.

- ``{slr-command}`` writes the entry of a command from the command itself: usage, arguments and
  options.
- Inline code that names something with an entry becomes a link to it, in pages, chapters and
  docstrings alike: `slr.refine`, `slr.Gram(H)`, `SLRLinear.from_refined`, `slr compress MODEL`,
  `--pattern`.  The texts stay as they are, so that a chapter reads well on Colab, too.

A Python name may be written by any of its paths: what is looked up is the thing.
"""

import inspect
import re
from importlib import import_module
from typing import Any

import typer
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

import slr
from slr.cli import app as commands

CALL = re.compile(r"([A-Za-z_][\w.]*\w)(?:\(.*\))?", re.S)
COMMAND = re.compile(r"(?:torchrun .*-m )?slr(?:\.cli)? ([a-z]+)\b")
OPTION = re.compile(r"--[a-z][a-z-]+")
NOTE = re.compile(r"(Book|Cost|Memory|Source): (.+)")
QUOTE = "'"
FIRST = "compress"  # whose options are meant where several commands have them


def thing(name: str) -> tuple[str, str] | None:
    """Where what a dotted name means was defined: its module, and its name there; else ``None``."""
    first, *rest = name.split(".")
    if first != "slr":
        return None
    found: Any = slr
    key = ("slr", "")
    for part in rest:
        inside = inspect.ismodule(found)
        try:
            found = getattr(found, part)
        except AttributeError:
            try:
                found = import_module(f"{found.__name__}.{part}") if inside else None
            except ImportError:
                found = None
        if found is None:
            return None
        if inspect.ismodule(found):
            key = (found.__name__, "")
        elif inside and hasattr(found, "__qualname__"):
            key = (found.__module__, found.__qualname__)
        else:
            key = (key[0], f"{key[1]}.{part}".lstrip("."))
    return key


def full(text: str) -> str | None:
    """The dotted name that a piece of code starts with, with ``slr.``; ``None`` if it has none.

    Without ``slr.`` in front, only public classes are taken for what they are: there is no other
    `Gram`, but many a `prune`.
    """
    match = CALL.fullmatch(text.strip())
    if match is None:
        return None
    name = match[1]
    first = name.partition(".")[0]
    if first == "slr":
        return name
    return f"slr.{name}" if first in slr.__all__ and first[0].isupper() else None


def entries(env: Any) -> dict[tuple[str, str], tuple[str, str]]:
    """Page and anchor of every Python entry, by what it is of; the shortest name wins."""
    objects = env.get_domain("py").objects
    found = {}
    for name in sorted(objects, key=len, reverse=True):
        key = thing(name)
        if key is not None:
            found[key] = (objects[name].docname, objects[name].node_id)
    return found


def place(env: Any, known: dict, text: str) -> tuple[str, str] | None:
    """Page and anchor of what a piece of inline code names, or ``None``."""
    standard = env.get_domain("std")
    command = COMMAND.match(text)
    if command:
        return standard.anonlabels.get(f"slr {command[1]}")
    option = OPTION.match(text)
    if option:
        where = {
            program: at for (program, name), at in standard.progoptions.items() if name == option[0]
        }
        if f"slr-{FIRST}" in where:
            return where[f"slr-{FIRST}"]
        return next(iter(where.values())) if len(where) == 1 else None
    name = full(text)
    return known.get(thing(name)) if name else None


class Links(SphinxPostTransform):
    """Inline code becomes a link, unless it stands in one already."""

    default_priority = 300

    def run(self, **options: Any) -> None:
        known = entries(self.env)
        page = self.env.docname
        for node in list(self.document.findall(nodes.literal)):
            inside, up = False, node.parent
            while up is not None:
                inside |= isinstance(up, nodes.reference | nodes.title)
                up = up.parent
            found = None if inside else place(self.env, known, node.astext())
            if found is not None:
                link = make_refnode(self.app.builder, page, *found, node.deepcopy())
                node.replace_self(link)


def from_docstring(app: Sphinx, env: Any, node: nodes.Element, content: nodes.Element) -> Any:
    """A reference in a docstring, by a name that is not the one of the entry."""
    if node.get("refdomain") != "py":
        return None
    target, module = node["reftarget"], node.get("py:module") or "slr"
    known = entries(env)
    for name in (target, f"{module}.{target}", f"slr.{target}"):
        key = thing(name)
        if key in known:
            return make_refnode(app.builder, env.docname, *known[key], content)
    return None


def with_notes(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list) -> None:
    """Let what follows a word like *Cost* in a docstring be a paragraph of its own."""
    found, inside = [], False
    for line in lines:
        note = NOTE.match(line)
        if note:
            found += ["", f"**{note[1]}.** {note[2]}"]
            inside = True
        else:
            inside = inside and line.startswith(" ")
            found.append(line.strip() if inside else line)
    lines[:] = found


def told(text: str) -> str:
    """Help in Markdown: options and what is in quotes as code, the rest as it is."""
    parts = re.split(r"(--[a-z][a-z-]+|'[^']+')", text)
    for i, part in enumerate(parts):
        code = f"`{part.strip(QUOTE)}`"
        parts[i] = code if i % 2 else re.sub(r"([\\`*_{}\[\]<>$|#])", r"\\\1", part)
    return "".join(parts)


class CommandEntry(SphinxDirective):
    """``{slr-command} NAME``: usage, what it does, arguments and options."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        command = typer.main.get_command(commands).commands[name]
        anchor = f"command-slr-{name}"
        self.env.get_domain("std").note_hyperlink_target(
            f"slr {name}", self.env.docname, anchor, f"slr {name}"
        )
        box = nodes.container(ids=[anchor])
        lines = self.lines(name, command)
        self.state.nested_parse(StringList(lines, f"slr {name}"), self.content_offset, box)
        return [box]

    @staticmethod
    def lines(name: str, command: Any) -> list[str]:
        """The entry in Markdown."""
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
        given = [p.name.upper() if p.required else f"[{p.name.upper()}]" for p in arguments]
        given += [f"{p.opts[0]} {p.name.upper()}" for p in options if p.required]
        given += ["[OPTIONS]"] if any(not p.required for p in options) else []
        lines = ["```text", " ".join(["slr", name, *given]), "```", ""]
        lines += [*told(inspect.cleandoc(command.help)).splitlines(), ""]
        lines += [f"- `{p.name.upper()}`: {told(p.help or '')}" for p in arguments]
        lines += ["", f":::{{program}} slr {name}", ":::", ""]
        for option in options:
            kind = "" if option.is_flag else f" {option.name.upper()}"
            both = [*option.opts, *option.secondary_opts]
            more = ""
            if option.required:
                more = " (required)"
            elif not (option.is_flag or option.default in (None, [], "")):
                more = f" (default: `{option.default}`)"
            lines += [
                "::::{option} " + ", ".join(f"{each}{kind}" for each in both),
                told(option.help or "") + more,
                "::::",
                "",
            ]
        return lines


def setup(app: Sphinx) -> dict:
    app.add_directive("slr-command", CommandEntry)
    app.add_post_transform(Links)
    app.connect("autodoc-process-docstring", with_notes, priority=400)  # before napoleon
    app.connect("missing-reference", from_docstring)
    return {"version": slr.__version__, "parallel_read_safe": True, "parallel_write_safe": True}
