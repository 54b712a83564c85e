"""Where a measurement comes from: versions, machine, date."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

__all__ = ["provenance"]

CPUINFO = Path("/proc/cpuinfo")

PACKAGES = ("torch", "transformers", "safetensors", "lm_eval", "datasets", "peft")


def _processor() -> str:
    """Its name, as far as the system tells."""
    if CPUINFO.is_file():
        for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Of the working tree that this package runs from, marked if it has changes; else None."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        ask = subprocess.run(
            [*git, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"],
            capture_output=True, text=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ask.stdout.strip() or None


def provenance() -> dict:
    """Versions of slr and what it stands on, commit, processor, threads, GPU and UTC date.

    >>> sorted(provenance())
    ['commit', 'date', 'gpu', 'processor', 'python', 'threads', 'versions']
    """
    import slr

    versions = {"slr": slr.__version__}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "commit": _commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "python": platform.python_version(),
        "versions": versions,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }
