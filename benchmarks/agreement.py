"""How far a real model's compressions are from it: KL, agreement, and questions.

    slr compress smollm2 --out small
    python benchmarks/agreement.py --default small [--out results/measured/smollm2]

The folder is what the default makes; the other models are compressed in memory.  Each is compared
with the dense one on windows of held-out general text and on the questions of chapter 13; with
``--out`` also writes ``agreement.json`` there, row by row, with the values of every window and
question, which intervals need; a run that was stopped goes on.  A quarter of an hour on two cores.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import slr
from slr.chapters import local_tasks
from slr.chapters.choices import log_likelihoods
from slr.checkpoint.atomic import write_text
from slr.checkpoint.folder import about, resolve
from slr.checkpoint.work import calibration_windows
from slr.evaluate.agree import agreement
from slr.evaluate.origin import provenance
from slr.matrix.rounding import Grid
from slr.model import data
from slr.model.plain import round_linears
from slr.model.recipe import Recipe

QUESTIONS, WINDOWS, SEQLEN = 128, 32, 128
MODELS: dict[str, Recipe | Grid] = {
    "int8": Grid(8),
    "int4 by 32": Grid(4, 32),
    "magnitude, pruned": Recipe("magnitude", refine="none"),
    "magnitude, SVD": Recipe("magnitude", refine="svd"),
    "magnitude, refined": Recipe("magnitude", refine="weights"),
    "wanda, pruned": Recipe("wanda", refine="none"),
}
DEFAULT = "the default"


def changed(name: str, recipe: Recipe | Grid) -> nn.Module:
    """The model of a recipe."""
    model = slr.load(name, dtype=torch.float32)
    if isinstance(recipe, Grid):
        round_linears(model.model.layers, recipe)
        return model
    windows = None
    if recipe.needs_data:
        windows, _ = calibration_windows(resolve(name), recipe, "general")
    slr.compress_model(model, recipe, windows)
    return model


@torch.no_grad()
def measure(name: str, default: str, file: Path | None) -> dict:
    """Every model against the dense one; rows that `file` holds already are not measured again."""
    tokenizer, dense = slr.load_tokenizer(name), slr.load(name, dtype=torch.float32)
    windows = data.windows(data.load_text("general"), tokenizer, SEQLEN, WINDOWS)
    with tempfile.TemporaryDirectory() as scratch:
        tasks = {}
        for task in local_tasks.build(Path(scratch), examples=QUESTIONS):
            lines = (Path(scratch) / f"{task}.jsonl").read_text("utf-8").splitlines()
            tasks[task] = [json.loads(line) for line in lines]
    rows = {}
    if file is not None and file.is_file():
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    result = {
        "model": name, "text": "held-out general text", "windows": WINDOWS, "seqlen": SEQLEN,
        "gold": {task: [row["gold"] for row in asked] for task, asked in tasks.items()},
        "rows": rows, "command": "python " + " ".join(sys.argv), **provenance(),
    }  # fmt: skip
    for label in ("dense", *MODELS, DEFAULT):
        if label in rows:
            continue
        if label == "dense":
            model, recipe = dense, None
        elif label == DEFAULT:
            model = slr.load(default, dtype=torch.float32)
            recipe = (about(Path(default)) or {})["recipe"]
        else:
            model, step = changed(name, MODELS[label]), MODELS[label]
            recipe = str(step) if isinstance(step, Grid) else step.as_dict()
        found = agreement(model, dense, windows)
        answers = {task: log_likelihoods(model, tokenizer, asked) for task, asked in tasks.items()}
        rows[label] = {
            "recipe": recipe,
            **{field: rounded(values) for field, values in found._asdict().items()},
            "log-likelihoods": {task: rounded(values) for task, values in answers.items()},
        }
        kl, same = float(found.kl.mean()), float(found.same_choice.mean())
        print(f"{label:20} KL {kl:.3f} nats, same first choice {same:.1%}", flush=True)
        if file is not None:
            write_text(file, json.dumps(result) + "\n")
    return result


def rounded(values: torch.Tensor) -> list:
    """To JSON, six digits after the point."""
    return torch.round(values.double(), decimals=6).tolist()


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--default", required=True, help="a folder that the default made")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    measure(args.model, args.default, args.out and args.out / "agreement.json")


if __name__ == "__main__":
    main()
