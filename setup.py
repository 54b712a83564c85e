"""What pyproject.toml cannot say of the wheel: all its folders, and the README as PyPI shows it.

Every folder that Python could import is a package, those of recorded results included; otherwise
setuptools warns of each.  Links of the README lead to files of the repository: on PyPI, to these
files at the address that pyproject.toml names.
"""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
# Benchmarks (`slr bench`), tables to reproduce, published and measured numbers go wherever slr is
# installed.
HOMES = {
    "slr": "slr",
    "slr.benchmarks": "benchmarks",
    "slr.published": "results/published",
    "slr.results": "results",
    "slr.specs": "results/specs",
}


def packages() -> list[str]:
    """The names of all packages."""
    found = []
    for name, home in HOMES.items():
        top = ROOT / home
        for folder in [top, *sorted(p for p in top.rglob("*") if p.is_dir())]:
            place, parts = folder.relative_to(ROOT).as_posix(), folder.relative_to(top).parts
            elsewhere = place != home and place in HOMES.values()
            named = all(part.isidentifier() for part in parts) and "__pycache__" not in parts
            if named and not elsewhere:
                found.append(".".join([name, *parts]))
    return found


def long_description() -> str:
    """The README with absolute links."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    address = re.search(r'^Repository = "(.*?)/?"$', project, re.M)[1]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    raw = address.replace("github.com", "raw.githubusercontent.com")
    relative = r"\]\((?!https?:|mailto:|#)([^)\s]+)\)"
    readme = re.sub(rf"(!\[[^\]]*){relative}", rf"\1]({raw}/main/\2)", readme)
    return re.sub(relative, rf"]({address}/blob/main/\1)", readme)


setup(
    packages=packages(),
    package_dir=HOMES,
    long_description=long_description(),
    long_description_content_type="text/markdown",
)
