"""What the ``slr`` command says of a compression, before and after."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping
from pathlib import Path

import torch

from slr.checkpoint import named
from slr.checkpoint.cards import beaten, far
from slr.checkpoint.estimates import Estimate, estimate
from slr.checkpoint.folder import about, resolve
from slr.checkpoint.sizes import Summary, megabytes, shown
from slr.checkpoint.work import look
from slr.console import as_json, measured_rows, say, table
from slr.evaluate.origin import provenance
from slr.layer import native
from slr.matrix.patterns import parse
from slr.methods.system import System
from slr.model import distributed
from slr.model.choices import CALLED
from slr.model.recipe import Recipe

LARGE = 50  # MB of a model whose compression is worth an estimate that is not asked for
__all__ = [
    "allotted",
    "describe",
    "exported",
    "folder_of",
    "foretell",
    "foretold",
    "report",
    "told",
]


def exported(out: Path) -> list[tuple[str, str]]:
    """The sizes of the files of an export, as rows of a table."""
    rows = [(f.name, f"{f.stat().st_size / 1e6:.1f} MB") for f in sorted(out.glob("*.gguf"))]
    if not rows:
        rows.append(("weights", f"{megabytes(out):.1f} MB"))
    adapter = out / "adapter"
    if adapter.is_dir():
        rows.append(("adapter", f"{megabytes(adapter):.1f} MB in {adapter}"))
    return rows


def allotted(overrides: Mapping[str, Mapping]) -> list[tuple[str, str]]:
    """The overrides of an allocation, as rows of a table: each block, or the ranks of each kind."""
    ranks: dict[str, list[int]] = {}
    rows = []
    for name, wanted in overrides.items():
        if "rank" in wanted:
            ranks.setdefault(name.rpartition(".")[2], []).append(wanted["rank"])
        else:
            rows.append((name, f"{1 - parse(wanted['pattern']).density:.1%} pruned"))
    for kind, each in ranks.items():
        middle = statistics.median(each)
        rows.append((kind, f"rank {min(each)} to {max(each)}, half of the layers up to {middle:g}"))
    return rows


def folder_of(model: str) -> Path:
    """The folder of a model; a word first if it has to be converted."""
    folder = named.pending(model)
    if folder is not None:
        say(f"{model}: converted once, to {folder} (some seconds)")
    return resolve(model)


def foretell(found: Estimate, json_output: bool) -> None:
    """What a compression will take."""
    if json_output:
        print(as_json(found._asdict()))
        return
    minutes = found.seconds / 60
    long = f"{found.seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min"
    say(
        f"about {long}, {found.memory / 1e9:.1f} GB of memory, {found.disk / 1e6:.1f} MB of disk "
        "(estimated by trying out one block)"
    )
    if (advice := _busy()) is not None:
        say(advice)


def _busy() -> str | None:
    """Advice where other programs want the cores, on which threads of torch would wait actively."""
    alone = torch.get_num_threads() == 1
    if alone or os.environ.get("OMP_WAIT_POLICY") or not hasattr(os, "getloadavg"):
        return None
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load < 1.25 * cores:  # what torch itself makes is 1
        return None
    return (
        f"other programs want the cores, too (load {load:.1f} on {cores}): with "
        "OMP_WAIT_POLICY=PASSIVE in the environment, or OMP_NUM_THREADS=1, it can be much faster"
    )


def foretold(
    dry_run: bool, source: Path, recipe: Recipe | System, json_output: bool, model: str, out: Path,
    calibration: str | None, device: str,
) -> bool:  # fmt: skip
    """Say what is to come, if that is asked for or may be long; whether that was all."""
    alone = isinstance(recipe, Recipe) and distributed.alone()[1] == 1
    if dry_run and not alone:
        raise ValueError("--dry-run is for a recipe, in one process")
    going_on = (out.parent / f"{out.name}.partial").exists()
    if dry_run or (alone and not going_on and megabytes(source) > LARGE):
        prospect = look(model, out, recipe, calibration=calibration, device=device)
        foretell(estimate(prospect), dry_run and json_output)
    return dry_run


def told(recipe: Recipe | System) -> str:
    """A recipe in a few words."""
    if isinstance(recipe, System):
        return f"{recipe.name}, {recipe.budget:g} of the parameters"
    after = {"none": "no repair", **CALLED}.get(str(recipe.refine), f"refined by {recipe.refine}")
    before = "" if recipe.prepare == "none" else f"{recipe.prepare}, "
    values = getattr(recipe.refine, "values", None)
    chosen = f"{recipe.prune} {recipe.pattern}" if recipe.pattern.density < 1 else "nothing pruned"
    return f"{before}{chosen}, {f'values in {values}, ' if values else ''}{after}"


def report(layers: list, times: dict, source: Path, out: Path, json_output: bool) -> None:
    """What a compression of a folder did."""
    sizes = {"dense_MB": megabytes(source), "compressed_MB": megabytes(out)}
    measured = (about(out) or {}).get("measured")
    summary = Summary.of({layer.name: layer.stored() for layer in layers})
    kinds = summary.kinds["all"]
    mean = {key: kinds[key] for key in ("pruned_error", "error")}
    if json_output:
        told = {"layers": len(layers), **times, **mean, **sizes, "measured": measured}
        print(as_json({**told, **provenance()}))
        return
    rows = [
        ("layers", str(len(layers))),
        ("mean relative error, pruned", f"{mean['pruned_error']:.4f}"),
        ("mean relative error, result", f"{mean['error']:.4f}"),
    ]
    if kinds["output_error"] is not None:
        rows.append(("mean output error, result", f"{kinds['output_error']:.4f}"))
    rows.append(("weights on disk", "{dense_MB:.1f} -> {compressed_MB:.1f} MB".format(**sizes)))
    rows += measured_rows(measured)
    print(table([*rows, ("seconds", f"{times['seconds']:.1f}")]))
    if measured is None:
        return
    warning, rival = far(measured), beaten(measured, summary.bits)
    if warning is not None:
        say(f"slr: warning: {warning}")
    if rival is not None:
        say(f"slr: {rival}")


def describe(notes: dict, found: Summary, size: float) -> None:
    """What a compressed folder says of itself.

    Args:
        notes: that.
        found: its layers in numbers.
        size: MB of its weights.
    """
    recipe = {k: v for k, v in notes["recipe"].items() if v not in (None, [], {}, False)}
    share = f"({found.kept / found.dense:.3f})"
    rows = [
        ("source", notes["source"]),
        ("recipe", ", ".join(f"{k} {v}" for k, v in recipe.items())),
        ("weights", f"{size:.1f} MB"),
        ("parameters of compressed layers", f"{found.dense:,} -> {found.kept:,} {share}"),
        ("bits a weight in them", f"{found.bits:.2f} (plain int8: 8, plain int4 by 32: 4.6)"),
        *measured_rows(notes.get("measured")),
        ("multiplied on this CPU by", native.in_use()),
    ]
    print(table(rows) + "\n")
    print(f"{'layers':<12} {'number':>6} {'rank':>9} {'pruned':>8} {'error':>8} {'output':>8}")
    for kind, row in found.kinds.items():
        low, high = row["ranks"][0], row["ranks"][-1]
        span = str(low) if low == high else f"{low}-{high}"
        errors = (f"{shown(row[key]):>8}" for key in ("pruned_error", "error", "output_error"))
        print(f"{kind:<12} {row['number']:>6} {span:>9} {' '.join(errors)}")
