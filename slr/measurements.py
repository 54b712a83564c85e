"""Commands that measure: published tables, the league, and benchmarks."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

import slr.options as opt
from slr import reports
from slr.checkpoint.named import default_text
from slr.console import as_json, say
from slr.console import table as columns_of
from slr.matrix.checks import check_choice

__all__ = ["PASSED_ON", "bench", "benchmarks", "league", "reproduce"]

FIGURES = (".svg", ".png", ".pdf")
# `slr bench NAME …` hands on what it does not know.
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def reproduce(
    table: Annotated[str, typer.Argument(help="a published table by name, or a JSON spec")],
    rows: Annotated[str, typer.Option(help="rows a,b of it, as 'dense,wanda/*'")] = "*",
    columns: Annotated[str | None, typer.Option(help="columns a,b, as '0.5,2:4', or tasks")] = None,
    model: Annotated[str | None, typer.Option(help=f"instead of its own: {opt.MODEL}")] = None,
    text: Annotated[
        str | None, typer.Option(help="a second text to evaluate on: wikitext2 | a text file")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder of the cells  [default: results/measured/TABLE]")
    ] = None,
    device: opt.Device = "auto",
    fresh: opt.Fresh = False,
    json_output: opt.Json = False,
) -> None:
    """Measure a published table, cell by cell; a stopped run goes on when called again."""
    from slr.evaluate import benchmarks as tasks_of
    from slr.evaluate import reproduction

    spec = tasks_of.spec_of(table)
    name = spec.name if model is None else model.strip("/").replace("/", "-")
    if model is not None and isinstance(spec, tasks_of.Benchmarks):
        name += "-benchmarks"
    out = out or Path("results") / "measured" / name
    where, wanted = opt.device_of(device), columns.split(",") if columns else []
    say(f"{spec.title}: {model or spec.model} -> {out}, on {where}")
    if isinstance(spec, tasks_of.Benchmarks):
        scores = tasks_of.reproduce(
            spec, out, model=model, rows=rows.split(","), columns=wanted, device=where,
            fresh=fresh, progress=True,
        )  # fmt: skip
        told = {"table": spec.name, "measured": scores}
        print(as_json(told) if json_output else tasks_of.as_text(scores, spec.rows))
        return
    measured = reproduction.reproduce(
        spec, out, model=model, rows=rows.split(","), columns=wanted, text=text, device=where,
        fresh=fresh, progress=True,
    )  # fmt: skip
    known = reproduction.published(spec) if model is None else {}
    if json_output:
        print(as_json({"table": spec.name, "measured": measured, "published": known}))
        return
    print(reproduction.as_text(measured, known, wanted or spec.columns))
    if text is not None:
        other = reproduction.grid(spec, out, Path(text).name)
        print(f"\non {text}:\n{reproduction.as_text(other, {}, wanted or spec.columns)}")


def league(
    model: Annotated[str, typer.Argument(help=opt.MODEL)] = "smollm2",
    rows: Annotated[str, typer.Option(help="rows a,b of it, as 'rounded/*,ours*'")] = "*",
    text: Annotated[
        str | None, typer.Option(help="a second text to evaluate on: wikitext2 | a text file")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder of the cells  [default: results/measured/league]")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="draw other calibration windows; the table tells mean and spread"),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="a figure to draw, as league.svg or league.png")
    ] = None,
    device: opt.Device = "auto",
    fresh: opt.Fresh = False,
    json_output: opt.Json = False,
) -> None:
    """Every method on one model, at the bytes that it takes; a stopped run goes on."""
    from slr.evaluate import league as places_of
    from slr.evaluate import reproduction

    if plot is not None:
        _check_figure(plot)
    spec, where = reproduction.Spec.read("league"), opt.device_of(device)
    name = "league" if model == spec.model else f"league-{Path(model).name}"
    out = out or Path("results") / "measured" / name
    say(f"{spec.title}: {model} -> {out}, on {where}")
    spec = replace(spec, calibration=default_text(reports.folder_of(model)))
    drawn, into = (spec, out) if seed is None else places_of.seeded(spec, out, seed)
    reproduction.reproduce(
        drawn, into, model=model, rows=rows.split(","), text=text, device=where, fresh=fresh,
        progress=True,
    )  # fmt: skip
    second = None if text is None else Path(text).name
    found = places_of.places(spec, out, second)
    if plot is not None:
        from slr.chapters.plots import league_panels

        league_panels(found).savefig(plot)
    if json_output:
        print(as_json({"model": model, "league": [place._asdict() for place in found]}))
        return
    print(places_of.as_table(found, second))


def _check_figure(file: Path) -> None:
    """Raise unless a figure can be drawn into a file.

    Raises:
        ValueError: its name has no suffix of a figure, or its folder is not there.
        ModuleNotFoundError: matplotlib is not.
    """
    if file.suffix not in FIGURES:
        raise ValueError(f"figure {file} must end with one of {', '.join(FIGURES)}")
    if not file.parent.is_dir():
        raise ValueError(f"figure {file}: there is no folder {file.parent}")
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError("figures need matplotlib: pip install matplotlib")


def benchmarks() -> dict[str, str]:
    """The benchmarks of ``slr bench`` by name, each with its first line."""
    import ast
    import pkgutil
    from importlib import resources

    import slr.benchmarks

    found = {}
    for module in pkgutil.iter_modules(slr.benchmarks.__path__):
        if module.name.startswith("_"):  # a part of another
            continue
        file = resources.files("slr.benchmarks") / f"{module.name}.py"
        told = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        found[module.name] = told.partition("\n")[0]
    return dict(sorted(found.items()))


def bench(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="which; all are listed without one")] = None,
) -> None:
    """Run a benchmark, which prints a table; without a name, list them.

    What follows its name are its own options; --help shows them.
    """
    import runpy

    names = benchmarks()
    if name in (None, "--help"):
        print("slr bench NAME [its own options; --help shows them]\n")
        print(columns_of(list(names.items())))
        return
    check_choice("benchmark", name, names)
    sys.argv = [f"benchmarks/{name}.py", *context.args]
    runpy.run_module(f"slr.benchmarks.{name}", run_name="__main__")
