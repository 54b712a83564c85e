"""The options of the ``slr`` command: their types and help, and the recipe that they ask for."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from slr.checkpoint.gguf_export import OUTTYPES
from slr.checkpoint.recipes import read_config
from slr.matrix.checks import check_choice
from slr.matrix.pruners import PRUNERS
from slr.matrix.refinement import SCHEDULES
from slr.matrix.steps import REPAIRS
from slr.methods.cap.system import CAP
from slr.methods.losparse.system import LoSparse
from slr.methods.system import System
from slr.model.recipe import PRESETS, Recipe

__all__ = [
    "DTYPES",
    "MODEL",
    "SYSTEMS",
    "device_of",
    "dtype_of",
    "given",
    "mask_anew",
    "overrides_of",
    "parse_override",
    "recipe_of",
    "refuse",
]

SYSTEMS: dict[str, type[System]] = {"cap": CAP, "losparse": LoSparse}
DTYPES = ("float32", "bfloat16", "float16")
MODEL = "'tiny', 'smollm2', a checkpoint folder, a GGUF file, or OWNER/NAME on the Hugging Face hub"

WINDOWS, LONGEST = 20, 1024  # of the embedded text in `slr eval`, if not told: windows and tokens

Option = typer.Option
Model = Annotated[str, typer.Argument(help=MODEL)]
Folder = Annotated[str, typer.Argument(help="a compressed folder, or any checkpoint")]
Out = Annotated[Path, Option(help="folder to make")]
Device = Annotated[str, Option(help="auto | cpu | cuda")]
Verify = Annotated[
    bool, Option("--verify", help="first compare every byte with the digests of the folder")
]
Outtype = Annotated[
    str | None,
    Option(help=f"with --to gguf: {' | '.join(OUTTYPES)} (default: f16; of 32-bit models f32)"),
]
Json = Annotated[bool, Option("--json", help="print JSON")]
Fresh = Annotated[bool, Option("--fresh", help="start over instead of going on")]
DryRun = Annotated[
    bool, Option("--dry-run", help="only estimate time, memory and disk, from one block")
]
Preset = Annotated[
    str | None,
    Option(
        help=f"{' | '.join(PRESETS)}: options that those given here are added to; best takes a "
        "mask, int4 codes of four bits instead, paper what the paper does"
    ),
]
Stored = Annotated[str, Option(help=f"of the weights to write: {' | '.join(DTYPES)}")]
Config = Annotated[
    Path | None, Option(help="YAML file of a recipe's options; those given here win")
]
MethodName = Annotated[
    str | None, Option(help="instead of pruning and repairing: cap | losparse; or induction+PRUNE")
]
Budget = Annotated[
    float | None,
    Option(help="with cap and losparse: share of the parameters to keep (0.5)"),
]
Steps = Annotated[
    int | None,
    Option(help="with cap and losparse: masks to try, or steps of training (200)"),
]
Prune = Annotated[
    str | None, Option(help=f"{' | '.join(PRUNERS)} FOLDER, a pruned model (default: wanda)")
]
PatternName = Annotated[
    str | None,
    Option(help="2:4 (semi-structured), a fraction to prune, 0.5, or dense (default: 2:4)"),
]
Group = Annotated[str | None, Option(help="for a fraction: row | matrix (default: row)")]
Refine = Annotated[
    str | None,
    Option(
        help=f"{' | '.join(REPAIRS)} (default: activations with --admm "
        "and --asymmetric, or weights with --schedule accelerated where the pruner reads no data)"
    ),
]
Rank = Annotated[int | None, Option(help="rank of the repair")]
RankRatio = Annotated[float | None, Option(help="rank over hidden size (default: 1/32)")]
Iterations = Annotated[
    int | None,
    Option(help="of the refinement (default: 50; of oats 80, hassle 20, 3basil at most 400)"),
]
Schedule = Annotated[str | None, Option(help=f"{' | '.join(SCHEDULES)} (default: paper)")]
Tolerance = Annotated[
    float | None, Option(help="stop refining when an iteration gains less, as 0.001 (default: 0)")
]
UpdateMask = Annotated[
    bool | None,
    Option("--update-mask", help="with --refine activations: choose the mask anew, by a score"),
]
Admm = Annotated[
    bool | None, Option("--admm", help="with --refine activations: choose the mask anew, by ADMM")
]
Asymmetric = Annotated[
    bool | None,
    Option(
        "--asymmetric",
        help="with --refine activations: ask each layer for what the dense model puts out there",
    ),
]
Values = Annotated[
    str | None,
    Option(
        help="round what is kept to a grid, in one alternation with the repair: 'int4 by 64', "
        "int8 (default: values stay as they are); with --pattern dense nothing is pruned"
    ),
]
Factors = Annotated[
    str | None, Option(help="with --values: grid of B and A, or float (default: int8)")
]
Tune = Annotated[
    int | None,
    Option(
        help="passes over the calibration text in which each block learns to put out what the "
        "dense model does (default: 0)"
    ),
]
Skip = Annotated[
    list[str] | None, Option(help="layers to leave dense, as '*.down_proj'; repeatable")
]
Override = Annotated[
    list[str] | None,
    Option(help="options of some layers, as '*.o_proj:rank=64,pattern=0.4'; repeatable"),
]
Calibration = Annotated[
    str | None,
    Option(
        help="general | embedded | wikitext2 | c4 | a text file (default: general; "
        "of tiny, embedded)"
    ),
]
Samples = Annotated[
    int | None, Option(help="calibration windows (default: 24, or all that there are)")
]
Seqlen = Annotated[
    int | None,
    Option(help="tokens in a window (default: the longest, to 1024; to 2048 in slr eval)"),
]
Seed = Annotated[
    int | None, Option(help="of calibration windows, random masks and starts (default: 0)")
]
Text = Annotated[
    str | None, Option(help="general | embedded | wikitext2 | a text file (default: embedded)")
]
Limit = Annotated[
    int | None,
    Option(
        help="at most this many windows, spread over the text, or examples of a task (default: "
        "all; without --text 20 windows of up to 1024 tokens)"
    ),
]
Compare = Annotated[
    bool | None,
    Option(
        help="also the dense source and its pruned, unrepaired form (default: if the folder was "
        "made here and its source is as it was)"
    ),
]
Source = Annotated[
    str | None, Option(help="where the dense source is now: a folder, or OWNER/NAME on the hub")
]
Streamed = Annotated[
    bool | None, Option("--stream", help="one block at a time, for models larger than memory")
]
Tasks = Annotated[str | None, Option(help="lm-eval tasks a,b instead of perplexity")]
TaskFolder = Annotated[
    Path | None,
    Option(
        help="with --tasks: folder of task YAML files, instead of lm-eval's own; a task can run "
        "Python code, so read those of others first"
    ),
]
Dtype = Annotated[str, Option(help=" | ".join(DTYPES))]


def given(**options: Any) -> dict:
    """Those that were given."""
    return {name: value for name, value in options.items() if value not in (None, [])}


def mask_anew(score: bool | None, admm: bool | None) -> bool | str | None:
    """How the mask is chosen anew, by the two flags; ``None`` if none was given.

    Raises:
        ValueError: both were.
    """
    if score and admm:
        raise ValueError("--update-mask and --admm both say how the mask is chosen; give one")
    return "admm" if admm else score


def refuse(options: dict, why: str) -> None:
    """Raise if an option was given that has no effect."""
    for name, value in options.items():
        if name == "update_mask" and value == "admm":
            name = "admm"
        told = {"overrides": "override"}.get(name, name).replace("_", "-")
        raise ValueError(f"option --{told} has no effect {why}; leave it out")


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a name.

    Raises:
        ValueError: none of :data:`DTYPES`.
    """
    check_choice("dtype", name, DTYPES)
    return getattr(torch, name)


def device_of(device: str) -> str:
    """The device of a name; of ``auto`` a GPU if there is one.

    Raises:
        ValueError: it is not there.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device {device!r} is not there; it must be auto, cpu or cuda")
    return device


def recipe_of(
    method: str | None, system: dict, options: dict, config: Path | None,
    preset: str | None = None,
) -> Recipe | System:  # fmt: skip
    """What the options of ``slr compress`` ask for.

    Args:
        method: of ``--method``.
        system: options of a system, those that were given.
        options: of a recipe, those that were given.
        config: YAML file of more of them.
        preset: name of more of them.

    Raises:
        ValueError: an unknown method, or an option without effect.
    """
    if method in SYSTEMS:
        common = {k: options.pop(k) for k in ("samples", "seqlen", "seed") if k in options}
        refuse({**options, **given(config=config, preset=preset)}, f"with --method {method}")
        return SYSTEMS[method](**system, **common)
    refuse(system, "but with --method cap or losparse")
    if method is not None:
        prepare, _, pruner = method.partition("+")
        if prepare != "induction":
            raise ValueError(
                f"method {method!r} is unknown; it must be {', '.join(SYSTEMS)} or induction+PRUNE"
            )
        if pruner and "prune" in options:
            raise ValueError(
                f"--prune {options['prune']} and --method {method} both name a pruner; give one"
            )
        options = {"prepare": prepare, **given(prune=pruner or None), **options}
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is unknown; it must be one of {', '.join(PRESETS)}")
    more = read_config(config) if config else {}
    if "overrides" not in options:
        own = {name for each in (more.get("overrides") or {}).values() for name in each}
        for name in sorted(own & set(options)):
            warnings.warn(
                f"{name}={options[name]!r} is for the layers that the overrides of {config} leave "
                "as they are; they say it themselves for others",
                UserWarning,
                stacklevel=2,
            )
    return Recipe(**{**PRESETS[preset or "best"], **more, **options})


def parse_override(text: str) -> tuple[str, dict]:
    """A name and its options from their short form.

    Raises:
        ValueError: it is not of that form.

    >>> parse_override("*.o_proj:rank=64,pattern=2:4")
    ('*.o_proj', {'rank': 64, 'pattern': '2:4'})
    """
    name, _, options = text.partition(":")
    found: dict = {}
    for option in filter(None, options.split(",")):
        key, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"override {text!r} is not NAME:option=value,option=value")
        kinds = {"rank": int, "iterations": int, "rank_ratio": float, "tolerance": float}
        try:
            found[key.strip()] = kinds.get(key.strip(), _word)(value)
        except ValueError:
            raise ValueError(f"override {text!r}: {key} is {value!r}, which is no number") from None
    if not name or not found:
        raise ValueError(f"override {text!r} is not NAME:option=value,option=value")
    return name, found


def overrides_of(texts: list[str]) -> dict[str, dict]:
    """The overrides of some short forms; those of one name together, of which the later count.

    >>> overrides_of(["*.o_proj:rank=3", "*.o_proj:pattern=1:4"])
    {'*.o_proj': {'rank': 3, 'pattern': '1:4'}}
    """
    found: dict[str, dict] = {}
    for name, options in map(parse_override, texts):
        found[name] = {**found.pop(name, {}), **options}
    return found


def _word(value: str) -> str | bool:
    return {"true": True, "false": False}.get(value, value)
