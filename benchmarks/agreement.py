"""How far a real model's compressions are from it: KL, agreement, and questions, at stated bits.

    slr compress smollm2 --out small
    python benchmarks/agreement.py --default small [--out results/measured/smollm2]

The folder is what the default makes; the other models are compressed in memory.  Each is compared
with the dense one on windows of held-out general text and on the questions of chapter 11; with
``--out`` also writes ``agreement.json`` there, with the values of every window and question, which
intervals need.  A quarter of an hour on two cores.
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
from slr.checkpoint.folder import about, resolve
from slr.checkpoint.work import calibration_windows
from slr.evaluate.agree import agreement
from slr.evaluate.origin import provenance
from slr.matrix.rounding import Grid
from slr.model import data
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
        for layer in model.model.layers.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.data = recipe.nearest(layer.weight.data)
        return model
    windows = None
    if recipe.needs_data:
        windows, _ = calibration_windows(resolve(name), recipe, "general")
    slr.compress_model(model, recipe, windows)
    return model


@torch.no_grad()
def measure(name: str, default: str) -> dict:
    """Every model against the dense one."""
    tokenizer, dense = slr.load_tokenizer(name), slr.load(name, dtype=torch.float32)
    windows = data.windows(data.load_text("general"), tokenizer, SEQLEN, WINDOWS)
    with tempfile.TemporaryDirectory() as scratch:
        tasks = {}
        for task in local_tasks.build(Path(scratch), examples=QUESTIONS):
            lines = (Path(scratch) / f"{task}.jsonl").read_text("utf-8").splitlines()
            tasks[task] = [json.loads(line) for line in lines]
    asked = {task: [row["gold"] for row in rows] for task, rows in tasks.items()}

    def answers(model: nn.Module) -> dict:
        found = {task: log_likelihoods(model, tokenizer, rows) for task, rows in tasks.items()}
        return {task: rounded(values) for task, values in found.items()}

    rows = {"dense": {"log-likelihoods": answers(dense)}}
    for label, recipe in {**MODELS, DEFAULT: None}.items():
        if recipe is None:
            model, told = (
                slr.load(default, dtype=torch.float32),
                {"recipe": about(Path(default))["recipe"]},
            )
        else:
            model = changed(name, recipe)
            told = {"recipe": str(recipe) if isinstance(recipe, Grid) else recipe.as_dict()}
        found = agreement(model, dense, windows)
        told |= {field: rounded(values) for field, values in found._asdict().items()}
        rows[label] = {**told, "log-likelihoods": answers(model)}
        kl, same = float(found.kl.mean()), float(found.same_choice.mean())
        print(f"{label:20} KL {kl:.3f} nats, same first choice {same:.1%}", flush=True)
    return {
        "model": name, "text": "held-out general text", "windows": WINDOWS, "seqlen": SEQLEN,
        "gold": asked, "rows": rows, "command": "python " + " ".join(sys.argv), **provenance(),
    }  # fmt: skip


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
    result = measure(args.model, args.default)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        part = args.out / "agreement.json.part"
        part.write_text(json.dumps(result) + "\n", encoding="utf-8")
        part.rename(args.out / "agreement.json")


if __name__ == "__main__":
    main()
