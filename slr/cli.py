"""The ``slr`` command: a thin skin over :mod:`slr.compress` and :mod:`slr.evaluate`.

A wrong argument is one line on standard error and exit code 2; a failure in work is one line
and exit code 1.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

import slr
from slr.export import FORMS
from slr.provenance import provenance
from slr.prune import METHODS
from slr.recipe import REPAIRS, Recipe, parse_override
from slr.refine import SCHEDULES

__all__ = ["app", "main"]

MODEL = "'tiny', a checkpoint folder, or OWNER/NAME on the Hugging Face hub"
DEVICE = "auto | cpu | cuda"
JSON = "print JSON"

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Sparse + low-rank language models: compress, evaluate, inspect, export.",
)


def _fail(message: object, code: int) -> NoReturn:
    print("slr: " + " ".join(str(message).split()), file=sys.stderr)
    raise typer.Exit(code)


def _one_line_errors(command: Callable) -> Callable:
    @wraps(command)
    def guarded(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except (ValueError, TypeError) as error:
            _fail(error, 2)
        except (OSError, RuntimeError, ImportError) as error:
            _fail(error, 1)
        except KeyboardInterrupt:
            _fail("stopped", 130)

    return guarded


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _table(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6


@app.callback()
def _root() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@app.command()
@_one_line_errors
def compress(
    model: Annotated[str, typer.Argument(help=MODEL)],
    out: Annotated[Path, typer.Option(help="folder to make")],
    context: typer.Context,
    method: Annotated[
        str | None,
        typer.Option(help="instead of pruning and repairing: cap | losparse; or induction+PRUNE"),
    ] = None,
    budget: Annotated[
        float, typer.Option(help="with cap and losparse: share of the parameters to keep")
    ] = 0.5,
    steps: Annotated[
        int, typer.Option(help="with cap and losparse: masks to try, or steps of training")
    ] = 200,
    prune: Annotated[str, typer.Option(help=" | ".join(METHODS))] = "wanda",
    pattern: Annotated[str, typer.Option(help="2:4, or a fraction to prune such as 0.5")] = "2:4",
    group: Annotated[str, typer.Option(help="for a fraction: row | matrix")] = "row",
    refine: Annotated[str, typer.Option(help=" | ".join(REPAIRS))] = "weights",
    rank: Annotated[int | None, typer.Option(help="rank of the repair")] = None,
    rank_ratio: Annotated[
        float | None, typer.Option(help="rank over hidden size  [default: 1/32]")
    ] = None,
    iterations: Annotated[int, typer.Option(help="of the refinement")] = 50,
    schedule: Annotated[str, typer.Option(help=" | ".join(SCHEDULES))] = "paper",
    tolerance: Annotated[
        float, typer.Option(help="stop refining when an iteration gains less, as 0.001")
    ] = 0.0,
    update_mask: Annotated[
        bool, typer.Option(help="with --refine activations: choose the mask anew")
    ] = False,
    skip: Annotated[
        list[str] | None, typer.Option(help="layers to leave dense, as '*.down_proj'; repeatable")
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(help="options of some layers, as '*.o_proj:rank=64,pattern=0.4'; repeatable"),
    ] = None,
    calibration: Annotated[
        str, typer.Option(help="embedded | wikitext2 | c4 | a text file")
    ] = "embedded",
    samples: Annotated[int, typer.Option(help="calibration windows")] = 128,
    seqlen: Annotated[int | None, typer.Option(help="tokens in each")] = None,
    device: Annotated[str, typer.Option(help=DEVICE)] = "auto",
    seed: Annotated[int, typer.Option(help="of random masks and starts")] = 0,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="start over instead of going on where a run stopped")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help=JSON)] = False,
) -> None:
    """Compress a model into a new folder; a stopped run goes on when called again."""
    whole, prepare, prune = _method(context, method, prune)
    recipe = Recipe(
        prune=prune, prepare=prepare, pattern=pattern, group=group, refine=refine, rank=rank,
        rank_ratio=rank_ratio, iterations=iterations, schedule=schedule, samples=samples,
        seqlen=seqlen, seed=seed, update_mask=update_mask, tolerance=tolerance, skip=skip or [],
        overrides=dict(map(parse_override, override or [])),
    )  # fmt: skip
    device = _device(device)
    from slr import checkpoint, ranks

    source = checkpoint.resolve(model)
    repair = {"none": "no repair", "svd": "SVD repair", "eora": "EoRA repair"}.get(
        refine, f"refined by {refine}"
    )
    started = time.perf_counter()
    stages: dict[str, float] = {}
    options: dict[str, Any] = {
        "calibration": calibration, "device": device, "progress": True, "resume": not fresh
    }  # fmt: skip
    if whole is not None:
        from slr.methods.whole import compress_whole

        _say(f"{model} -> {out}: {whole}, {budget:g} of the parameters, on {device}")
        layers = compress_whole(
            model, out, whole, budget=budget, steps=steps, samples=samples, seqlen=seqlen,
            seed=seed, **options,
        )  # fmt: skip
    else:
        before = "" if prepare == "none" else f"{prepare}, "
        _say(f"{model} -> {out}: {before}{prune} {recipe.pattern}, {repair}, on {device}")
        layers = slr.compress(model, out, recipe, stages=stages, **options)
    if ranks.rank():
        return
    seconds = time.perf_counter() - started
    mean = {
        key: sum(getattr(layer, key) for layer in layers) / len(layers)
        for key in ("pruned_error", "error")
    }
    sizes = {"dense_MB": _megabytes(source), "compressed_MB": _megabytes(out)}
    if json_output:
        times = {"seconds": seconds, **stages}
        print(json.dumps({"layers": len(layers), **times, **mean, **sizes, **provenance()}))
        return
    print(
        _table(
            [
                ("layers", str(len(layers))),
                ("mean relative error, pruned", f"{mean['pruned_error']:.4f}"),
                ("mean relative error, result", f"{mean['error']:.4f}"),
                *_output_error(layers),
                ("weights on disk", "{dense_MB:.1f} -> {compressed_MB:.1f} MB".format(**sizes)),
                ("seconds", f"{seconds:.1f}"),
            ]
        )
    )


WHOLE = ("cap", "losparse")
EITHER = {"model", "out", "method", "calibration", "samples", "seqlen", "device", "seed", "fresh",
          "json_output"}  # fmt: skip


def _method(context: typer.Context, method: str | None, prune: str) -> tuple[str | None, str, str]:
    """The method for a whole model, if it is one; else how to prepare blocks, and how to prune."""
    sources = {k: context.get_parameter_source(k) for k in context.params}
    given = {k for k, source in sources.items() if source and source.name != "DEFAULT"}
    whole = method if method in WHOLE else None
    mine = {"budget", "steps"}
    wrong = given - EITHER - mine if whole else given & mine
    if wrong:
        name = sorted(wrong)[0].replace("_", "-")
        raise ValueError(f"option --{name} has no meaning with --method {method or 'left out'}")
    if whole or method is None:
        return whole, "none", prune
    prepare, _, pruner = method.partition("+")
    if prepare != "induction":
        raise ValueError(
            f"method {method!r} is unknown; it must be {', '.join(WHOLE)} or induction+PRUNE"
        )
    if pruner and "prune" in given:
        raise ValueError(f"--prune {prune} and --method {method} both name a pruner; give one")
    return None, prepare, pruner or prune


def _output_error(layers: list[slr.LayerReport]) -> list[tuple[str, str]]:
    known = [layer.output_error for layer in layers if layer.output_error is not None]
    return [("mean output error, result", f"{sum(known) / len(known):.4f}")] if known else []


def _device(device: str) -> str:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device {device!r} is not there; it must be auto, cpu or cuda")
    return device


@app.command("eval")
@_one_line_errors
def evaluate(
    model: Annotated[str, typer.Argument(help=MODEL)],
    text: Annotated[str, typer.Option(help="embedded | wikitext2 | a text file")] = "embedded",
    seqlen: Annotated[int | None, typer.Option(help="tokens in a window")] = None,
    limit: Annotated[
        int | None, typer.Option(help="at most this many windows, or examples of a task")
    ] = None,
    compare: Annotated[
        bool, typer.Option(help="also the dense source and its pruned, unrepaired form")
    ] = True,
    stream: Annotated[
        bool, typer.Option(help="one decoder block at a time, for models larger than memory")
    ] = False,
    tasks: Annotated[
        str | None, typer.Option(help="lm-eval tasks a,b instead of perplexity")
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option(help="folder of task YAML files, instead of lm-eval's own")
    ] = None,
    device: Annotated[str, typer.Option(help=DEVICE)] = "auto",
    dtype: Annotated[str, typer.Option(help="float32 | bfloat16 | float16")] = "float32",
    json_output: Annotated[bool, typer.Option("--json", help=JSON)] = False,
) -> None:
    """Perplexity of a model, of a compressed one beside its source's; or its scores on tasks."""
    import torch

    from slr import checkpoint, data

    folder, device = checkpoint.resolve(model), _device(device)
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype {dtype!r} is unknown; it must be float32, bfloat16 or float16")
    if tasks is not None:
        _tasks(model, folder, tasks.split(","), limit, task_folder, device, dtype, json_output)
        return
    content = data.load_text(text)
    seqlen = seqlen or checkpoint.context(folder)
    windows = data.windows(content, checkpoint.load_tokenizer(folder), seqlen, limit)
    _say(f"{model}: perplexity on {text}, {windows.shape[0]} windows of {seqlen} tokens")
    notes = checkpoint.about(folder)
    values = slr.evaluate.compare(
        folder, windows, source=compare, stream=stream, device=device,
        dtype=getattr(torch, dtype), progress=True,
    )  # fmt: skip
    if notes is not None and compare and "dense" not in values:
        _say(f"(its source {notes['source']!r} is not here, so there is nothing to compare)")
    if json_output:
        about = {"model": model, "text": text, "windows": windows.shape[0], "seqlen": seqlen}
        print(json.dumps({**about, "dtype": dtype, "perplexity": values, **provenance()}))
        return
    print(_table([(key, f"{value:.3f}") for key, value in values.items()]))


def _tasks(
    model: str, folder: Path, names: list[str], limit: int | None, task_folder: Path | None,
    device: str, dtype: str, json_output: bool,
) -> None:  # fmt: skip
    import torch

    from slr import checkpoint
    from slr.evaluate import tasks

    _say(f"{model}: lm-eval tasks {', '.join(names)}")
    loaded = slr.load(folder, dtype=getattr(torch, dtype))
    _move(loaded, device)
    tokenizer = checkpoint.load_tokenizer(folder)
    found = tasks(
        loaded, tokenizer, names, limit=limit, folder=task_folder, seqlen=checkpoint.context(folder)
    )
    if json_output:
        print(json.dumps({"model": model, "tasks": found, **provenance()}, default=str))
        return
    rows = [
        (f"{task} {metric.removesuffix(',none')}", f"{value:.4f}")
        for task, scores in found.items()
        for metric, value in scores.items()
        if isinstance(value, float)
    ]
    print(_table(rows))


def _move(model: Any, device: str) -> None:
    """Move a model; transformers' own `to` refuses what it takes for quantised models."""
    from torch import nn

    nn.Module.to(model, device)


@app.command()
@_one_line_errors
def info(
    model: Annotated[str, typer.Argument(help="a compressed folder, or any checkpoint")],
    json_output: Annotated[bool, typer.Option("--json", help=JSON)] = False,
) -> None:
    """What is in a checkpoint: recipe, sizes, errors by kind of layer."""
    from slr import checkpoint
    from slr.card import by_kind

    folder = checkpoint.resolve(model)
    notes, megabytes = checkpoint.about(folder), _megabytes(folder)
    if notes is None:
        if json_output:
            print(json.dumps({"model": model, "compressed": False, "MB": megabytes}))
        else:
            print(_table([("model", f"{model} (dense)"), ("weights", f"{megabytes:.1f} MB")]))
        return
    layers = notes["layers"]
    dense = sum(layer["shape"][0] * layer["shape"][1] for layer in layers.values())
    now = sum(la["kept"] + la["rank"] * sum(la["shape"]) for la in layers.values())
    if json_output:
        sizes = {"MB": megabytes, "parameters_before": dense, "parameters": now}
        print(json.dumps({"model": model, "compressed": True, **sizes, **notes}))
        return
    recipe = {k: v for k, v in notes["recipe"].items() if v not in (None, [], {}, False)}
    rows = [
        ("source", notes["source"]),
        ("recipe", ", ".join(f"{k} {v}" for k, v in recipe.items())),
        ("weights", f"{megabytes:.1f} MB"),
        ("parameters of compressed layers", f"{dense:,} -> {now:,} ({now / dense:.3f})"),
    ]
    print(_table(rows) + "\n")
    print(f"{'layers':<12} {'number':>6} {'rank':>9} {'pruned':>8} {'error':>8} {'output':>8}")
    for kind, row in by_kind(layers).items():
        low, high = row["ranks"][0], row["ranks"][-1]
        span = str(low) if low == high else f"{low}-{high}"
        output = "" if row["output_error"] is None else f"{row['output_error']:.4f}"
        print(
            f"{kind:<12} {row['number']:>6} {span:>9} {row['pruned_error']:>8.4f} "
            f"{row['error']:>8.4f} {output:>8}"
        )


@app.command("export")
@_one_line_errors
def export_(
    model: Annotated[str, typer.Argument(help="a compressed folder")],
    to: Annotated[str, typer.Option(help=" | ".join(FORMS))],
    out: Annotated[Path, typer.Option(help="folder to make")],
) -> None:
    """Write a compressed model for other programs: base + LoRA adapter, or dense."""
    from slr.export import export

    _say(f"{model} -> {out}: {to}")
    export(model, out, to)
    rows = [("weights", f"{_megabytes(out):.1f} MB")]
    if to == "peft":
        rows.append(("adapter", f"{_megabytes(out / 'adapter'):.1f} MB in {out / 'adapter'}"))
    print(_table(rows))


@app.command("reproduce")
@_one_line_errors
def reproduce_(
    table: Annotated[str, typer.Argument(help="a published table by name, or a JSON spec")],
    rows: Annotated[str, typer.Option(help="rows a,b of it, as 'dense,wanda/*'")] = "*",
    columns: Annotated[str | None, typer.Option(help="columns a,b, as '0.5,2:4'")] = None,
    model: Annotated[str | None, typer.Option(help=f"instead of its own: {MODEL}")] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder of the cells  [default: results/measured/TABLE]")
    ] = None,
    device: Annotated[str, typer.Option(help=DEVICE)] = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="measure again what is there")] = False,
    json_output: Annotated[bool, typer.Option("--json", help=JSON)] = False,
) -> None:
    """Measure a published table, cell by cell; a stopped run goes on when called again."""
    from slr import reproduce

    spec = reproduce.Spec.read(table)
    name = spec.name if model is None else model.strip("/").replace("/", "-")
    out = out or Path("results") / "measured" / name
    device = _device(device)
    _say(f"{spec.title}: {model or spec.model} -> {out}, on {device}")
    measured = reproduce.reproduce(
        spec, out, model=model, rows=rows.split(","), columns=columns.split(",") if columns else (),
        device=device, fresh=fresh, progress=True,
    )  # fmt: skip
    known = reproduce.published(spec) if model is None else {}
    if json_output:
        print(json.dumps({"table": spec.name, "measured": measured, "published": known}))
        return
    print(reproduce.as_text(measured, known, columns.split(",") if columns else spec.columns))


@app.command("bench", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
@_one_line_errors
def bench(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="refine | linear | decode | pipeline | …")],
) -> None:
    """Run a benchmark, which prints a table; what follows its name are its own options."""
    import pkgutil
    import runpy

    import slr.benchmarks

    names = sorted(module.name for module in pkgutil.iter_modules(slr.benchmarks.__path__))
    if name not in names:
        raise ValueError(f"benchmark {name!r} is unknown; it must be one of {', '.join(names)}")
    sys.argv = [f"benchmarks/{name}.py", *context.args]
    runpy.run_module(f"slr.benchmarks.{name}", run_name="__main__")


def main() -> None:
    """Entry point of the ``slr`` command."""
    app()


if __name__ == "__main__":
    main()
