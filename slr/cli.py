"""The ``slr`` command: a thin skin.  Options become a recipe, and a recipe one call.

A wrong argument is one line on standard error and exit code 2; a failure in work is one line
and exit code 1.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import slr
import slr.options as opt
from slr import measurements, reports
from slr.checkpoint import conversion
from slr.checkpoint.exporting import FORMS
from slr.checkpoint.folder import about, context, load_tokenizer, resolve
from slr.checkpoint.recipes import check_new, write_config
from slr.checkpoint.sizes import Summary, megabytes
from slr.console import Commands, as_json, measured_rows, say, table
from slr.evaluate.origin import provenance
from slr.methods.system import System
from slr.model import data, distributed
from slr.model.recipe import Recipe

if TYPE_CHECKING:
    import torch

__all__ = ["app", "main"]

app = typer.Typer(
    cls=Commands,
    pretty_exceptions_enable=False,
    help="Sparse + low-rank language models: compress, evaluate, inspect, export.",
)


def _version(asked: bool) -> None:
    if asked:
        print(f"slr {slr.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print it and stop")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@app.command()
def compress(
    model: opt.Model,
    out: opt.Out,
    preset: opt.Preset = None,
    config: opt.Config = None,
    method: opt.MethodName = None,
    budget: opt.Budget = None,
    steps: opt.Steps = None,
    prune: opt.Prune = None,
    pattern: opt.PatternName = None,
    group: opt.Group = None,
    refine: opt.Refine = None,
    rank: opt.Rank = None,
    rank_ratio: opt.RankRatio = None,
    iterations: opt.Iterations = None,
    schedule: opt.Schedule = None,
    tolerance: opt.Tolerance = None,
    update_mask: opt.UpdateMask = None,
    admm: opt.Admm = None,
    asymmetric: opt.Asymmetric = None,
    values: opt.Values = None,
    factors: opt.Factors = None,
    tune: opt.Tune = None,
    skip: opt.Skip = None,
    override: opt.Override = None,
    calibration: opt.Calibration = None,
    samples: opt.Samples = None,
    seqlen: opt.Seqlen = None,
    device: opt.Device = "auto",
    seed: opt.Seed = None,
    fresh: opt.Fresh = False,
    dry_run: opt.DryRun = False,
    json_output: opt.Json = False,
) -> None:
    """Compress a model into a new folder; a stopped run goes on when called again.

    With no option but --out: 2:4, its mask by ADMM, and a low-rank part, calibrated on the text
    that comes along.
    """
    options = opt.given(
        prune=prune, pattern=pattern, group=group, refine=refine, rank=rank, rank_ratio=rank_ratio,
        iterations=iterations, schedule=schedule, tolerance=tolerance,
        update_mask=opt.mask_anew(update_mask, admm), asymmetric=asymmetric, tune=tune,
        values=values, factors=factors, skip=skip, samples=samples, seqlen=seqlen, seed=seed,
        overrides=opt.overrides_of(override or []) or None,
    )  # fmt: skip
    recipe = opt.recipe_of(method, opt.given(budget=budget, steps=steps), options, config, preset)
    where, source = opt.device_of(device), reports.folder_of(model)
    say(f"{model} -> {out}: {reports.told(recipe)}, on {where}")
    if reports.foretold(dry_run, source, recipe, json_output, model, out, calibration, where):
        return
    started, stages = time.perf_counter(), dict[str, float]()
    layers = slr.compress(
        model, recipe, out=out, calibration=calibration, device=where, progress=True,
        resume=not fresh, stages=None if isinstance(recipe, System) else stages,
    )  # fmt: skip
    if distributed.rank() == 0:
        times = {"seconds": time.perf_counter() - started, **stages}
        reports.report(layers, times, source, out, json_output)


@app.command("allocate")
def allocate_(
    model: opt.Model,
    out: Annotated[Path, typer.Option(help="YAML file to write, for slr compress --config")],
    by: Annotated[
        str, typer.Option(help="owl (sparsity by block, of a fraction) | energy (rank by layer)")
    ] = "owl",
    preset: opt.Preset = None,
    config: opt.Config = None,
    prune: opt.Prune = None,
    pattern: opt.PatternName = None,
    refine: opt.Refine = None,
    rank: opt.Rank = None,
    values: opt.Values = None,
    calibration: opt.Calibration = None,
    samples: opt.Samples = None,
    seqlen: opt.Seqlen = None,
    device: opt.Device = "auto",
) -> None:
    """Write a recipe that keeps as much in all, and more in the layers that need it."""
    options = opt.given(
        prune=prune, pattern=pattern, refine=refine, rank=rank, values=values, samples=samples,
        seqlen=seqlen,
    )  # fmt: skip
    recipe, where = opt.recipe_of(None, {}, options, config, preset), opt.device_of(device)
    assert isinstance(recipe, Recipe)
    check_new(out)
    reports.folder_of(model)
    say(f"{model} -> {out}: {by}, on {where}")
    found = slr.allocate(model, recipe, by, calibration=calibration, device=where)
    if distributed.rank() == 0:
        write_config(out, found)
        print(table(reports.allotted(found.overrides)))


@app.command("eval")
def evaluate(
    model: opt.Model,
    text: opt.Text = None,
    seqlen: opt.Seqlen = None,
    limit: opt.Limit = None,
    compare: opt.Compare = None,
    source: opt.Source = None,
    stream: opt.Streamed = None,
    tasks: opt.Tasks = None,
    task_folder: opt.TaskFolder = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "float32",
    verify: opt.Verify = False,
    json_output: opt.Json = False,
) -> None:
    """Perplexity of a model, of a compressed one beside its source's; or its scores on tasks."""
    from slr.evaluate import comparison

    kind, where = opt.dtype_of(dtype), opt.device_of(device)
    if verify:
        slr.verify(model)
    if tasks is not None:
        unused = opt.given(text=text, compare=compare, source=source, stream=stream)
        opt.refuse(unused, "with --tasks")
        _tasks(model, tasks, limit, task_folder, seqlen, where, kind, json_output)
        return
    opt.refuse(opt.given(task_folder=task_folder), "without --tasks")
    if compare is False:
        opt.refuse(opt.given(source=source), "with --no-compare")
    folder = reports.folder_of(model)
    if about(folder) is None:
        opt.refuse(opt.given(compare=compare or None), f"on {model}, which is not compressed")
    if text is None:  # a text for a first look; others are read whole
        text, limit = "embedded", opt.WINDOWS if limit is None else limit
        seqlen = context(folder, opt.LONGEST) if seqlen is None else seqlen
    seqlen = context(folder) if seqlen is None else seqlen
    windows = data.windows(data.load_text(text), load_tokenizer(folder), seqlen, limit)
    say(f"{model}: perplexity on {text}, {windows.shape[0]} windows of {seqlen} tokens")
    values, why = comparison.comparison_of(
        folder, windows, source=source or compare, stream=bool(stream), device=where, dtype=kind,
        progress=True,
    )  # fmt: skip
    if why and compare is not False:
        say(f"(without its source: {why})")
    if distributed.alone()[0] == 0:
        told = {"model": model, "text": text, "windows": windows.shape[0], "seqlen": seqlen}
        told |= {"dtype": dtype, "perplexity": values}
        rows = [(key, f"{value:.3f}") for key, value in values.items()]
        print(as_json({**told, **provenance()}) if json_output else table(rows))
    if not math.isfinite(list(values.values())[-1]):
        raise RuntimeError(f"{model} has no finite perplexity on {text}")


def _tasks(
    model: str, names: str, limit: int | None, task_folder: Path | None, seqlen: int | None,
    device: str, dtype: torch.dtype, json_output: bool,
) -> None:  # fmt: skip
    from torch import nn

    from slr.evaluate import harness

    say(f"{model}: lm-eval tasks {names}")
    loaded = slr.load(model, dtype=dtype)
    nn.Module.to(loaded, device)  # transformers' own has no types
    each = [name.strip() for name in names.split(",")]
    found = harness.tasks(
        loaded, load_tokenizer(model), each, limit=limit, folder=task_folder, seqlen=seqlen
    )
    if json_output:
        print(as_json({"model": model, "tasks": found, **provenance()}))
        return
    print(table(harness.rows(found)))


@app.command()
def info(model: opt.Folder, json_output: opt.Json = False) -> None:
    """What is in a checkpoint: recipe, sizes, errors by kind of layer."""
    folder = resolve(model)
    notes, size = about(folder), megabytes(folder)
    if notes is None:
        if json_output:
            print(as_json({"model": model, "compressed": False, "MB": size}))
        else:
            print(table([("model", f"{model} (dense)"), ("weights", f"{size:.1f} MB")]))
        return
    found = Summary.of(notes["layers"])
    if json_output:
        sizes = {"MB": size, "parameters_before": found.dense, "parameters": found.kept}
        print(as_json({"model": model, "compressed": True, **sizes, **notes}))
        return
    reports.describe(notes, found, size)


@app.command("convert")
def convert_(
    model: Annotated[str, typer.Argument(help="a GGUF file")],
    out: opt.Out,
    dtype: opt.Stored = "bfloat16",
) -> None:
    """Write a GGUF file as an ordinary checkpoint of safetensors, dequantised."""
    say(f"{model} -> {out}: {dtype}")
    conversion.convert(model, out, dtype=opt.dtype_of(dtype))
    print(table([("weights", f"{megabytes(out):.1f} MB")]))


@app.command("verify")
def verify_(model: opt.Folder) -> None:
    """Is a compressed folder whole, and bit for bit what was written?"""
    files = slr.verify(model)
    size = sum(file.stat().st_size for file in files) / 1e6
    print(f"{model} is what was written: {len(files)} files, {size:.1f} MB")


@app.command("tune")
def tune_(
    model: opt.Folder,
    out: opt.Out,
    passes: Annotated[int, typer.Option(help="over the calibration text")] = 4,
    rate: Annotated[float | None, typer.Option(help="of Adam (default: 0.0003)")] = None,
    more: Annotated[
        int, typer.Option(help="windows that the dense model writes, to learn from besides")
    ] = 0,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="general | embedded | wikitext2 | c4 | a text file "
            "(default: the one that the model was calibrated on)"
        ),
    ] = None,
    source: opt.Source = None,
    device: opt.Device = "auto",
) -> None:
    """Tune a compressed folder as a whole, to predict what its dense source predicts."""
    where = opt.device_of(device)
    say(f"{model} -> {out}: {passes} passes, on {where}")
    trace = slr.tune(
        model, out, passes=passes, more=more, calibration=calibration, source=source, device=where,
        progress=True, **opt.given(rate=rate),
    )  # fmt: skip
    if distributed.rank() == 0:
        rows = [
            ("divergence from the dense model", f"{trace[0]:.4f} -> {min(trace):.4f} nats a token")
        ]
        print(table([*rows, *measured_rows((about(resolve(str(out))) or {}).get("measured"))]))


@app.command("export")
def export_(
    model: opt.Folder,
    to: Annotated[str, typer.Option(help=" | ".join(FORMS))],
    out: opt.Out,
    outtype: opt.Outtype = None,
    verify: opt.Verify = False,
) -> None:
    """Write a compressed model for other programs: base + LoRA adapter, or dense."""
    say(f"{model} -> {out}: {to}")
    slr.export(model, out, to, outtype=outtype, verify=verify)
    print(table(reports.exported(out)))


app.command("reproduce")(measurements.reproduce)
app.command("league")(measurements.league)
app.command("bench", context_settings=measurements.PASSED_ON)(measurements.bench)


def main() -> None:
    """Entry point of the ``slr`` command."""
    app()


if __name__ == "__main__":
    main()
