"""A recipe in a YAML file.

Book: how to use, and chapter 19.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import yaml

from slr.checkpoint.atomic import write_text
from slr.model.recipe import Recipe

__all__ = ["check_new", "read_config", "write_config"]


def check_new(file: Path) -> None:
    """Raise ValueError unless a recipe can be written there, and nothing is there yet."""
    if file.suffix not in (".yaml", ".yml"):
        raise ValueError(f"recipe {str(file)!r} must end with .yaml")
    if file.exists():
        raise ValueError(f"recipe {file} is there already; give another name, or remove it")
    if not file.parent.is_dir():
        raise ValueError(f"recipe {file}: there is no folder {file.parent}")


def write_config(file: Path, recipe: Recipe) -> None:
    """Write a recipe as :func:`read_config` reads it."""
    told = {k: v for k, v in recipe.as_dict().items() if v not in (None, [], {})}
    write_text(file, yaml.safe_dump(told, sort_keys=False))


class _Plain(yaml.SafeLoader):
    """YAML in which 2:4 is text, not a number to the base of 60."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in each if not tag.endswith((":int", ":float"))]
        for first, each in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Plain.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?\d+$"), list("-+0123456789")
)
_Plain.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+(\.\d*)?[eE][-+]?\d+|\.\d+[eE][-+]?\d+)$"),
    list("-+.0123456789"),
)


def read_config(file: str | Path) -> dict:
    """Options of a recipe from a YAML or JSON file: the arguments of :class:`Recipe`.

    Raises:
        ValueError: no such file, or one that does not hold a mapping of them.
    """
    try:
        found = yaml.load(Path(file).read_text(encoding="utf-8"), _Plain)
    except OSError as error:
        raise ValueError(f"config {str(file)!r} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config {file} is not YAML: {error}") from None
    known = list(inspect.signature(Recipe).parameters)
    if not isinstance(found, dict):
        raise ValueError(f"config {file} holds no options; it must say, say, 'prune: wanda'")
    for name in found:
        if name not in known:
            raise ValueError(
                f"config {file}: {name!r} is no option; it must be one of {', '.join(known)}"
            )
    return found
