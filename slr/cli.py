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
from typing import Annotated, NoReturn

import typer

import slr
from slr.compress import REPAIRS, Recipe
from slr.prune import METHODS
from slr.refine import SCHEDULES

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Sparse + low-rank language models: compress one, evaluate it.",
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
        except (OSError, RuntimeError) as error:
            _fail(error, 1)

    return guarded


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


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
    model: Annotated[str, typer.Argument(help="'tiny' or a checkpoint folder")],
    out: Annotated[Path, typer.Option(help="folder to make")],
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
    calibration: Annotated[str, typer.Option(help="embedded | a text file")] = "embedded",
    samples: Annotated[int, typer.Option(help="calibration windows")] = 128,
    seqlen: Annotated[int | None, typer.Option(help="tokens in each")] = None,
    device: Annotated[str, typer.Option(help="auto | cpu | cuda")] = "auto",
    seed: Annotated[int, typer.Option()] = 0,
    json_output: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Compress a model into a new folder."""
    import torch

    recipe = Recipe(
        prune=prune, pattern=pattern, group=group, refine=refine, rank=rank,
        rank_ratio=rank_ratio, iterations=iterations, schedule=schedule, samples=samples,
        seqlen=seqlen, seed=seed,
    )  # fmt: skip
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device {device!r} is not there; it must be auto, cpu or cuda")
    from slr import checkpoint

    source = checkpoint.resolve(model)
    repair = {"none": "no repair", "svd": "SVD repair"}.get(refine, f"refined by {refine}")
    _say(f"{model} -> {out}: {prune} {recipe.pattern}, {repair}, on {device}")
    started = time.perf_counter()
    layers = slr.compress(model, out, recipe, calibration=calibration, device=device, progress=True)
    seconds = time.perf_counter() - started
    mean = {
        key: sum(getattr(layer, key) for layer in layers) / len(layers)
        for key in ("pruned_error", "error")
    }
    sizes = {"dense_MB": _megabytes(source), "compressed_MB": _megabytes(out)}
    if json_output:
        print(json.dumps({"layers": len(layers), "seconds": seconds, **mean, **sizes}))
        return
    print(
        _table(
            [
                ("layers", str(len(layers))),
                ("mean relative error, pruned", f"{mean['pruned_error']:.4f}"),
                ("mean relative error, result", f"{mean['error']:.4f}"),
                ("weights on disk", "{dense_MB:.1f} -> {compressed_MB:.1f} MB".format(**sizes)),
                ("seconds", f"{seconds:.1f}"),
            ]
        )
    )


@app.command("eval")
@_one_line_errors
def evaluate(
    model: Annotated[str, typer.Argument(help="'tiny' or a checkpoint folder")],
    text: Annotated[str, typer.Option(help="embedded | a text file")] = "embedded",
    seqlen: Annotated[int | None, typer.Option(help="tokens in a window")] = None,
    limit: Annotated[int | None, typer.Option(help="at most this many windows")] = None,
    compare: Annotated[
        bool, typer.Option(help="also the dense source and its pruned, unrepaired form")
    ] = True,
    json_output: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Perplexity of a model; of a compressed one, beside its source's, dense and pruned."""
    import torch

    from slr import checkpoint, data
    from slr.compress import pruned_source

    folder = checkpoint.resolve(model)
    content = data.load_text(text)
    seqlen = seqlen or checkpoint.context(folder)
    windows = data.windows(content, checkpoint.load_tokenizer(folder), seqlen, limit)
    _say(f"{model}: perplexity on {text}, {windows.shape[0]} windows of {seqlen} tokens")
    loaded = slr.load(folder, dtype=torch.float32)
    notes = checkpoint.about(folder)
    values = {}
    if notes is not None and compare:
        try:
            dense = slr.load(notes["source"], dtype=torch.float32)
        except ValueError:
            _say(f"(its source {notes['source']!r} is not here, so there is nothing to compare)")
        else:
            values["dense"] = slr.perplexity(dense, windows, progress="dense")
            if notes["recipe"]["refine"] != "none":
                pruned_source(dense, loaded)
                values["pruned"] = slr.perplexity(dense, windows, progress="pruned")
    name = "dense" if notes is None else _name(notes["recipe"]["refine"])
    values[name] = slr.perplexity(loaded, windows, progress=name)
    if json_output:
        print(json.dumps({"windows": windows.shape[0], "seqlen": seqlen, "perplexity": values}))
        return
    print(_table([(key, f"{value:.3f}") for key, value in values.items()]))


def _name(repair: str) -> str:
    return {"none": "pruned", "svd": "SVD repair"}.get(repair, "refined")


def main() -> None:
    """Entry point of the ``slr`` command."""
    app()


if __name__ == "__main__":
    main()
