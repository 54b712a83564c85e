"""What to do when a package is imported, whoever imports it: plugins that cost nothing before."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable
from types import ModuleType

__all__ = ["when_imported"]


class _Loader(importlib.abc.Loader):
    """A module's own loader, which is put back in its place, and then `action`."""

    def __init__(self, loader: importlib.abc.Loader, action: Callable[[ModuleType], None]) -> None:
        self.loader, self.action = loader, action

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module) -> None:
        module.__loader__ = module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.action(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module, once."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self.name, self.action = name, action

    def find_spec(self, fullname, path, target=None):
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.action)
        return spec


def when_imported(name: str, action: Callable[[ModuleType], None]) -> None:
    """Call ``action(module)`` now if a module is imported already, or as soon as it is.

    Args:
        name: of the module, in full.
        action: what it does must bear being done again, if slr is reloaded.

    Cost: a look at the name of each module that is imported until then.

    >>> seen = []
    >>> when_imported("json", lambda module: seen.append(module.__name__))
    >>> seen
    ['json']
    """
    if name in sys.modules:
        action(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Finder(name, action))
