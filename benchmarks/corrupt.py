"""Give slr what it must not take: flipped bits, folders that do not fit, odd calls and commands.

    python benchmarks/corrupt.py [--scale 1.0] [--only flips,folders,calls,commands] [--out FILE]

One row a kind of input: how often it was tried, how often the result was the right one all the
same (survived), how often it was refused in one line, and how often it was wrong: a wrong result
without a word, an error that is not one line, or a file that was left behind.
"""

import argparse
import json
import math
import random
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from slr.benchmarks.chaos import Row, small_model, table

import slr
from slr.checkpoint import finish

RECIPE = slr.Recipe(prune="wanda", rank=2, iterations=2, samples=2, seqlen=32)
SHARD = "model-00001-of-00003.safetensors"
LAYER = "model.layers.0.mlp.up_proj"
IDS = torch.randint(4096, (2, 16), generator=torch.Generator().manual_seed(0))


def judged(row: Row, what: object, call: Callable[[], Any], right: Callable[[Any], bool]) -> None:
    """Call, and say what became of it."""
    try:
        found = call()
    except (ValueError, TypeError, OSError) as error:
        one_line = str(error) and "\n" not in str(error).strip()
        row.add("refused" if one_line else "wrong", f"{what}: {error!r}")
    except Exception as error:
        row.add("wrong", f"{what}: {error!r}")
    else:
        row.add("survived" if right(found) else "wrong", f"{what}: wrong without a word")


def packed(work: Path) -> Path:
    """A compressed folder, made when first asked for."""
    if not (work / "packed").exists():
        slr.compress(small_model(work / "source"), RECIPE, out=work / "packed")
    return work / "packed"


def flips(work: Path, scale: float, draw: random.Random) -> Iterator[Row]:
    """One bit of any file of a compressed folder, under slr.verify."""
    whole, row = packed(work), Row("bits flipped, slr.verify")
    shutil.copytree(whole, work / "flipped")
    files = sorted((work / "flipped").iterdir())
    for turn in range(math.ceil(440 * scale)):
        file = files[turn % len(files)]
        held = bytearray(file.read_bytes())
        bit = draw.randrange(8 * len(held))
        held[bit // 8] ^= 1 << bit % 8
        file.write_bytes(held)
        judged(
            row, f"{file.name}, bit {bit}", lambda: slr.verify(work / "flipped"), lambda _: False
        )
        shutil.copyfile(whole / file.name, file)
    yield row


def tensors(edit: Callable[[dict], Any]) -> Callable[[Path], None]:
    """A corruption of the tensors of one block."""

    def change(folder: Path) -> None:
        held = load_file(folder / SHARD)
        edit(held)
        save_file({k: v.contiguous() for k, v in held.items()}, folder / SHARD, {"format": "pt"})

    return change


def config(edit: Callable[[dict], Any]) -> Callable[[Path], None]:
    """A corruption of config.json."""

    def change(folder: Path) -> None:
        told = json.loads((folder / "config.json").read_text())
        edit(told)
        (folder / "config.json").write_text(json.dumps(told))

    return change


def corruptions() -> dict[str, Callable[[Path], None]]:
    """By name; each makes a folder that does not fit, or fits as before."""
    found: dict[str, Callable[[Path], None]] = {}
    for part in ("values", "bitmask", "B", "A"):
        name = f"{LAYER}.{part}"
        found |= {
            f"{part} missing": tensors(lambda t, n=name: t.pop(n)),
            f"{part} renamed": tensors(lambda t, n=name: t.update({f"{n}_": t.pop(n)})),
            f"{part} too long": tensors(lambda t, n=name: t.update({n: torch.cat([t[n], t[n]])})),
            f"{part} empty": tensors(lambda t, n=name: t.update({n: t[n][:0].clone()})),
            f"{part} cut": tensors(lambda t, n=name: t.update({n: t[n][:-1].clone()})),
            f"{part} flat": tensors(lambda t, n=name: t.update({n: t[n][None].clone()})),
            f"{part} int64": tensors(lambda t, n=name: t.update({n: t[n].long()})),
            f"{part} bool": tensors(lambda t, n=name: t.update({n: t[n].bool()})),
        }
        if part == "bitmask":
            found["bitmask zero"] = tensors(lambda t, n=name: t[n].zero_())
            found["bitmask full"] = tensors(lambda t, n=name: t[n].fill_(255))
            found["bitmask rolled"] = tensors(lambda t, n=name: t[n].bitwise_right_shift_(1))
        else:
            for value in ("nan", "inf", "-inf"):
                found[f"{part} {value}"] = tensors(
                    lambda t, n=name, v=value: t[n].view(-1)[0].fill_(float(v))
                )
    norm = "model.layers.0.input_layernorm.weight"
    found |= {
        "norm missing": tensors(lambda t: t.pop(norm)),
        "norm nan": tensors(lambda t: t[norm].fill_(float("nan"))),
        "norm wide": tensors(lambda t: t.update({norm: torch.ones(65)})),
        "dense beside": tensors(lambda t: t.update({f"{LAYER}.weight": torch.ones(128, 64)})),
        "adapter beside": tensors(
            lambda t: t.update({f"{LAYER}.lora_A.weight": torch.ones(2, 64)})
        ),
        "a block more": tensors(lambda t: t.update({"model.layers.9.mlp.x": torch.ones(2)})),
        "block file cut": lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:-9]),
        "block file gone": lambda f: (f / SHARD).unlink(),
        "block file empty": lambda f: (f / SHARD).write_bytes(b""),
        "index gone": lambda f: (f / "model.safetensors.index.json").unlink(),
        "index cut": lambda f: (f / "model.safetensors.index.json").write_text("{"),
        "index list": lambda f: (f / "model.safetensors.index.json").write_text("[]"),
        "config cut": lambda f: (f / "config.json").write_text("{"),
        "config list": lambda f: (f / "config.json").write_text("[1]"),
        "config gone": lambda f: (f / "config.json").unlink(),
        "slr gone": config(lambda c: c.pop("slr")),
        "slr text": config(lambda c: c.update(slr="x")),
        "format": config(lambda c: c["slr"].update(format=9)),
        "dense gone": config(lambda c: c["slr"].pop("dense")),
        "dense family": config(lambda c: c["slr"]["dense"].update(model_type="mamba")),
        "layers gone": config(lambda c: c["slr"].pop("layers")),
        "layers empty": config(lambda c: c["slr"].update(layers={})),
        "layers list": config(lambda c: c["slr"].update(layers=[1])),
        "layer gone": config(lambda c: c["slr"]["layers"].pop(LAYER)),
        "layer text": config(lambda c: c["slr"]["layers"].update({LAYER: "x"})),
        "layer renamed": config(
            lambda c: c["slr"]["layers"].update({f"{LAYER}_": c["slr"]["layers"].pop(LAYER)})
        ),
        "blocks fewer": config(lambda c: c["slr"]["dense"].update(num_hidden_layers=1)),
        "blocks more": config(lambda c: c["slr"]["dense"].update(num_hidden_layers=3)),
        "width": config(lambda c: c.update(intermediate_size=96)),
        "heads": config(lambda c: c.update(num_key_value_heads=4)),
    }
    for key, values in {
        "rank": (0, 3, -1, "x", None), "kept": (0, 7, "x"), "shape": ([64, 128], [1], "x"),
        "pattern": ("7:3", 7, "x"), "bias": (True, "x"),
    }.items():  # fmt: skip
        for value in values:
            found[f"layer {key} {value}"] = config(
                lambda c, k=key, v=value: c["slr"]["layers"][LAYER].update({k: v})
            )
        found[f"layer {key} gone"] = config(lambda c, k=key: c["slr"]["layers"][LAYER].pop(k))
    return found


def folders(work: Path, scale: float, draw: random.Random) -> Iterator[Row]:
    """Structured corruptions under three loaders."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity(logging.CRITICAL)
    whole, bad = packed(work), work / "bad"
    with torch.no_grad():
        right = slr.load(whole)(IDS).logits
    wanted = slr.perplexity(whole, IDS, stream=True)
    every = corruptions()
    some = draw.sample(sorted(every), math.ceil(len(every) * min(1, scale)))

    def same(model: torch.nn.Module) -> bool:
        with torch.no_grad():
            return torch.equal(model(IDS).logits, right)

    loaders: dict[str, tuple[Callable[[], Any], Callable[[Any], bool]]] = {
        "slr.load": (lambda: slr.load(bad), same),
        "stream": (lambda: slr.perplexity(bad, IDS, stream=True), lambda p: p == wanted),
        "from_pretrained": (lambda: AutoModelForCausalLM.from_pretrained(bad).eval(), same),
    }
    for loader, (call, check) in loaders.items():
        row = Row(f"folders that do not fit, {loader}")
        for name in some:
            shutil.copytree(whole, bad)
            every[name](bad)
            if loader == "from_pretrained":  # transformers' own errors have many lines
                try:
                    row.add("survived" if check(call()) else "wrong", f"{name}: without a word")
                except Exception:
                    row.add("refused")
            else:
                judged(row, name, call, check)
            shutil.rmtree(bad)
        yield row


def odd_matrix(draw: random.Random) -> torch.Tensor:
    """A matrix, mostly good."""
    shape = [draw.choice([1, 2, 3, 4, 8, 16, 20]) for _ in range(2)]
    weight = torch.randn(*shape) * draw.choice([1e-30, 1e-3, 1, 1e4, 1e18])
    how = draw.random()
    if how < 0.05:
        weight.view(-1)[0] = draw.choice([math.nan, math.inf, -math.inf])
    elif how < 0.1:
        weight = weight * 0
    elif how < 0.15:
        weight = weight.to(draw.choice([torch.float16, torch.bfloat16, torch.float64, torch.int32]))
    elif how < 0.18:
        weight = draw.choice([weight[0], weight[None], weight[:0], weight[:, :0], weight.T])
    elif how < 0.2:
        weight = weight.requires_grad_()
    return weight


def odd(draw: random.Random, good: list, bad: list) -> Any:
    """A good value, or one in twelve a bad one."""
    return draw.choice(bad if draw.random() < 1 / 12 else good)


PATTERNS = ["2:4", "1:2", "0.5", 0.25, "4:8"]
BAD_PATTERNS = ["0:4", "5:4", "2:3", "1.5", -0.1, "x", "", None, math.nan, True, "2:4:8", "-1:4"]
RANKS, BAD_RANKS = [1, 2, 3], [0, -1, 99, 1.5, "2", None, True, math.nan]


def one_matrix(draw: random.Random) -> tuple[Callable[[], Any], Callable[[Any], bool]]:
    """A call that prunes and refines, and what must hold of its result."""
    weight = odd_matrix(draw)
    pattern, rank = odd(draw, PATTERNS, BAD_PATTERNS), odd(draw, RANKS, BAD_RANKS)
    method = odd(draw, ["magnitude", "random"], ["wanda", "sparsegpt", "x", None, 7])
    options = {
        "iterations": odd(draw, [1, 2, 9], [0, -1, 1.5, "x", None, math.inf]),
        "schedule": odd(draw, ["paper", "constant", "accelerated"], ["x", None]),
        "solver": odd(draw, ["fast", "exact"], ["x", None]),
        "tolerance": odd(draw, [0.0], [0.5, -1, math.nan, "x", 2]),
    }

    def call() -> tuple:
        pruned = slr.prune(weight, method, pattern)
        once = slr.svd_repair(weight, pruned.mask, rank)
        return pruned, once, slr.refine(weight, pruned.mask, rank, **options)

    def right(found: tuple) -> bool:
        pruned, once, refined = found
        finite = all(bool(torch.isfinite(part).all()) for part in refined[:3])
        inside = not bool(refined.sparse[~refined.mask].any())
        slack = 1e-3 if weight.dtype == torch.float32 else 0.1
        size = float(weight.detach().double().norm())
        better = refined.error <= once.error * (1 + slack) + slack * size
        return finite and inside and better and bool((pruned.mask == refined.mask).all())

    return call, right


def one_recipe(draw: random.Random) -> tuple[Callable[[], Any], Callable[[Any], bool]]:
    """A recipe of random options, which must survive JSON."""
    options = {
        "prune": odd(draw, ["magnitude", "wanda", "sparsegpt", "random"], ["x", None, 3]),
        "pattern": odd(draw, PATTERNS, BAD_PATTERNS),
        "refine": odd(draw, ["weights", "svd", "eora", "none", "activations"], ["x", 3]),
        "rank": odd(draw, RANKS, BAD_RANKS),
        "rank_ratio": odd(draw, [0.1], [0, 2, -1, "x", math.nan]),
        "iterations": odd(draw, [1, 9], [0, -1, 1.5, "x"]),
        "schedule": odd(draw, ["paper", "accelerated"], ["x"]),
        "samples": odd(draw, [1, 128], [0, -1, 1.5, "x"]),
        "seqlen": odd(draw, [16, 64], [0, 1, -1, 1.5, "x"]),
        "seed": odd(draw, [0, 1], [-1, 1.5, "x"]),
        "group": odd(draw, ["row", "matrix"], ["x"]),
        "skip": odd(draw, [["*.q_proj"]], ["x", [3], 3]),
        "overrides": odd(draw, [{"*.q_proj": {"rank": 1}}], [{"x": {"y": 1}}, [1], {"x": 3}]),
    }
    some = draw.sample(sorted(options), draw.randint(0, 5))

    def call() -> slr.Recipe:
        return slr.Recipe(**{name: options[name] for name in some})

    def right(recipe: slr.Recipe) -> bool:
        told = json.loads(json.dumps(recipe.as_dict(), allow_nan=False))
        return slr.Recipe.from_dict(told).as_dict() == told

    return call, right


def one_layer(draw: random.Random) -> tuple[Callable[[], Any], Callable[[Any], bool]]:
    """A layer made from a dense one, which must compute S x + B (A x)."""
    linear = torch.nn.Linear(*(draw.choice([4, 8, 16]) for _ in range(2)), bias=draw.random() < 0.5)
    if draw.random() < 0.1:
        linear.weight.data[0, 0] = math.nan
    options = {
        "prune": odd(draw, ["magnitude", "random"], ["wanda", "x", 3]),
        "pattern": odd(draw, PATTERNS, BAD_PATTERNS),
        "refine": odd(draw, ["weights", "svd", "none"], ["eora", "x", 3]),
        "rank": odd(draw, RANKS, BAD_RANKS),
    }
    x = torch.randn(3, odd(draw, [linear.in_features], [0, 5]))

    def call() -> tuple:
        layer = slr.SLRLinear.from_linear(linear, **options)
        return layer, layer(x)

    def right(found: tuple) -> bool:
        layer, y = found
        wanted = torch.nn.functional.linear(x, layer.dense(), layer.bias)
        return torch.allclose(y, wanted, atol=1e-4)

    return call, right


def calls(work: Path, scale: float, draw: random.Random) -> Iterator[Row]:
    """Random arguments of the functions and classes for matrices, layers and recipes."""
    for make in (one_matrix, one_recipe, one_layer):
        row = Row(f"random calls, {make.__name__.removeprefix('one_')}")
        for trial in range(math.ceil(1500 * scale)):
            torch.manual_seed(trial)
            call, right = make(draw)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                judged(row, f"trial {trial}", call, right)
        yield row


def command(draw: random.Random, work: Path) -> list[str]:
    """A random command."""
    source, small = str(work / "source"), str(work / "packed")
    where = odd(draw, [source, small], [str(work), str(work / "nowhere"), "a/b/c", "", "/"])
    name = odd(draw, ["compress", "eval", "info", "export", "verify"], ["x", "--x", ""])
    flags = {
        "--prune": odd(draw, ["magnitude", "wanda"], ["x", ""]),
        "--pattern": str(odd(draw, PATTERNS, BAD_PATTERNS)),
        "--refine": odd(draw, ["none", "weights", "svd"], ["x"]),
        "--rank": str(odd(draw, RANKS, BAD_RANKS)),
        "--iterations": odd(draw, ["2"], ["0", "x", "-1"]),
        "--samples": odd(draw, ["2"], ["0", "x"]),
        "--seqlen": odd(draw, ["32"], ["0", "1", "99999", "x"]),
        "--limit": odd(draw, ["1"], ["0", "x"]),
        "--text": odd(draw, ["embedded"], ["nowhere.txt", str(work)]),
        "--calibration": odd(draw, ["embedded"], ["nowhere.txt", str(work)]),
        "--to": odd(draw, ["peft", "dense"], ["x"]),
        "--method": odd(draw, ["induction+magnitude"], ["x", "cap+x"]),
        "--budget": odd(draw, ["0.5"], ["0", "2", "x"]),
        "--device": odd(draw, ["cpu"], ["x"]),
        "--dtype": odd(draw, ["float32", "bfloat16"], ["x"]),
        "--skip": odd(draw, ["*.q_proj"], ["x"]),
        "--override": odd(draw, ["*.q_proj:rank=1"], ["x", "x:", "*:rank=x"]),
        "--config": odd(draw, [str(work / "recipe.yaml")], [str(work), "nowhere.yaml"]),
        "--tasks": odd(draw, ["x"], ["", ","]),
    }
    fitting = {
        "compress": ["--prune", "--pattern", "--refine", "--rank", "--iterations", "--samples",
                     "--seqlen", "--skip", "--override", "--calibration", "--method", "--budget",
                     "--config", "--device"],
        "eval": ["--text", "--seqlen", "--limit", "--device", "--dtype", "--tasks"],
        "export": ["--to"],
    }.get(name, [])  # fmt: skip
    some = draw.sample(fitting, min(len(fitting), draw.choice([1, 1, 2, 3])))
    if draw.random() < 0.1:
        some.append(draw.choice(sorted(flags)))
    given = [part for flag in some for part in (flag, flags[flag])]
    if name == "compress" and "--samples" not in some and draw.random() < 0.7:
        given += ["--samples", "2", "--seqlen", "32"]
    if name == "eval" and "--limit" not in some:
        given += ["--limit", "2"]
    out = ["--out", str(work / "out")] if name in ("compress", "export") else []
    more = ["--json"] if draw.random() < 0.2 else []
    return [name, where, *given, *out, *more]


def commands(work: Path, scale: float, draw: random.Random) -> Iterator[Row]:
    """Random commands: exit code 0, or one line on standard error and 1 or 2, nothing left."""
    from typer.testing import CliRunner

    from slr.cli import app

    packed(work)
    (work / "recipe.yaml").write_text("prune: magnitude\nrefine: none\n")
    row, runner, kept = Row("random commands"), CliRunner(), {"source", "packed", "recipe.yaml"}
    for _ in range(math.ceil(300 * scale)):
        args = command(draw, work)
        done = runner.invoke(app, args)
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        left = {path.name for path in work.iterdir()} - kept - {"out", "flipped"}
        odd_end = done.exception is not None and not isinstance(done.exception, SystemExit)
        if odd_end or "Traceback" in done.output or left:
            row.add("wrong", f"{args}: {done.exception!r} {left}")
        elif done.exit_code == 0:
            row.add("survived")
        elif done.exit_code in (1, 2) and last and last[0].startswith("slr: "):
            row.add("refused")
        else:
            row.add("wrong", f"{args}: exit {done.exit_code}, {done.output[-200:]!r}")
        for path in work.iterdir():
            if path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)
    yield row


KINDS = {f.__name__: f for f in (flips, folders, calls, commands)}


def main() -> None:
    """The table; exit code 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of trials")
    parser.add_argument("--only", default=",".join(KINDS))
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args()
    finish.SMALL = 0  # several tensor files, as large models have
    with tempfile.TemporaryDirectory() as folder:
        rows = (
            row
            for name in args.only.split(",")
            for row in KINDS[name](Path(folder), args.scale, random.Random(0))
        )
        sys.exit(table(rows, args.out))


if __name__ == "__main__":
    main()
