"""CAP, LoSparse and sparsity induction on the real model, beside what refinement makes of it.

    python benchmarks/systems.py --text FILE [--systems cap losparse induction]
                                 [--out results/measured/smollm2/systems.json]

CAP and LoSparse keep half of the parameters of the linear layers of the first ``BLOCKS`` blocks;
the others stay dense.  Beside them, on the same blocks with as many parameters: magnitude pruning,
Algorithm 1 and the default's repair, and rounding to int8 (half of the bytes) and to int4.
LoSparse trains these blocks, and no other; the dense model is fine-tuned alike, to tell what
pruning costs from what training brings.  Each mode's rate is the best of ``--rates`` after a short
training, on held-out windows of the text that it trains on.  Induction is given all blocks, for
2:4: scales by the norms of the inputs, and trained from there; without scales the table of ``slr
reproduce smollm2`` has the same cells.

All calibrate on the windows, and are measured on the windows, of that table.  With ``--out`` each
row is written as it is done, and a run that was stopped goes on; candidates of CAP are kept in
``--work`` meanwhile.  An hour and a half of a core with bfloat16 products.
"""

import argparse
import copy
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import slr
from slr.checkpoint.atomic import write_text
from slr.evaluate.origin import provenance
from slr.evaluate.tables import Spec
from slr.matrix.accounting import stored_bytes
from slr.methods import cap, losparse
from slr.methods.induction import Induction, induce
from slr.model.blocks import blocks_name, decoder_blocks, in_mode
from slr.model.losses import window_losses
from slr.model.plain import round_linears

sys.path.insert(0, str(Path(__file__).parent))  # however this file is run
from cap import equal_parameters

SPEC = Spec.read("smollm2")
BUDGET, SEED = 0.5, 0
BLOCKS = 10  # that CAP and LoSparse are given
STEPS, BATCH, SHORT = 80, 4, 256  # of LoSparse: windows in a step, tokens in a window
SHARE = 0.8  # of LoSparse's parameters, in U and V: the best for the embedded model at one half
TRIED = 2  # windows that CAP tries a mask on
PROBE = 20  # steps of a training that a rate is chosen by
RECIPES: tuple[tuple[str, tuple[str, str], dict], ...] = (
    ("magnitude", ("magnitude", "none"), {}),
    ("magnitude, Algorithm 1", ("magnitude", "weights"), {}),
    ("default", ("wanda", "activations"), {"update_mask": "admm", "asymmetric": True}),
)
Made = tuple[nn.Module, dict]


@functools.lru_cache(maxsize=1)
def calibration() -> Tensor:
    """The windows that the table calibrates on."""
    return slr.data.calibration(
        SPEC.calibration, slr.load_tokenizer("smollm2"), SPEC.recipe["seqlen"],
        SPEC.recipe["samples"],
    )  # fmt: skip


def dense() -> nn.Module:
    """The real model, in float32."""
    return slr.load("smollm2", dtype=torch.float32)


def others(model: nn.Module) -> list[str]:
    """Patterns of the layers of all blocks after the first ones."""
    count = len(decoder_blocks(model))
    return [f"{blocks_name(model)}.{index}.*" for index in range(BLOCKS, count)]


def spent(reports: list) -> dict:
    """What is kept of the matrices that were compressed."""
    whole = sum(r.shape[0] * r.shape[1] for r in reports)
    kept = sum(r.kept + r.rank * sum(r.shape) for r in reports)
    size = sum(stored_bytes(r.shape, r.kept, r.rank, width=2) for r in reports)
    return {"parameters": kept / whole, "bytes": size / (2 * whole)}


def candidates(model: nn.Module, work: Path | None) -> dict[str, cap.Candidates]:
    """CAP's; each block's are read if they were made before."""
    found: dict[str, cap.Candidates] = {}
    for index, block in enumerate(decoder_blocks(model)[:BLOCKS]):
        file = None if work is None else work / f"{index}.safetensors"
        if file is not None and file.is_file():
            found |= cap.unpack(load_file(file))
            continue
        name = f"{blocks_name(model)}.{index}"
        mine = dict(cap.block_candidates(name, block, balance_ratio=slr.CAP.balance_ratio))
        found |= mine
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(cap.pack(mine), file)
    return found


def by_cap(method: str, windows: Tensor, work: Path | None) -> Made:
    """The candidates that are kept where a policy, learned or not, says so."""
    model = dense()
    found = candidates(model, work)
    more = {"generator": torch.Generator().manual_seed(SEED)} if method == "learned" else {}
    reports = cap.allocate(
        model, windows, BUDGET, method=method, found=found, refit=slr.CAP.refit, batch=TRIED, **more
    )
    return model, spent(reports)


def by_recipe(prune: str, refine: str, windows: Tensor, **more) -> Made:
    """A recipe, of rank 18 where it repairs, with as many parameters as the others."""
    model = dense()
    rank = 0 if refine == "none" else 18
    recipe = slr.Recipe(
        prune=prune, pattern=BUDGET, refine=refine, rank=rank or None, skip=others(model),
        overrides=equal_parameters(decoder_blocks(model)[0], BUDGET, rank), **more,
    )  # fmt: skip
    return model, spent(slr.compress_model(model, recipe, windows))


def by_rounding(grid: str) -> Made:
    """Rounded to a grid."""
    model, one = dense(), slr.Grid.parse(grid)
    round_linears(decoder_blocks(model)[:BLOCKS], one)
    return model, {"parameters": 1.0, "bytes": one.bits_per_weight / 16}


def fine_tuned(mode: str, lr: float, steps: int) -> Made:
    """LoSparse, or nothing but its training."""
    model = dense().requires_grad_(False)
    decoder_blocks(model)[:BLOCKS].requires_grad_(True)
    text = slr.data.windows(
        slr.data.load_text("general", "calibration"), slr.load_tokenizer("smollm2"), SHORT
    )
    generator = torch.Generator().manual_seed(SEED)
    passes = -(-steps * BATCH // len(text))
    order = torch.cat([torch.randperm(len(text), generator=generator) for _ in range(passes)])
    seen = text[order[: steps * BATCH]]
    if mode == "dense":
        batches = [{"input_ids": ids, "labels": ids, "use_cache": False} for ids in
                   seen.split(BATCH)]  # fmt: skip
        losparse.fit(model, batches, lr=lr, dtype=torch.bfloat16)
        return model, {"parameters": 1.0, "bytes": 1.0, "lr": lr}
    losparse.train(
        model, seen, remaining=BUDGET, mode=mode, share=SHARE, batch=BATCH, lr=lr,
        skip=others(model), dtype=torch.bfloat16,
    )  # fmt: skip
    account = losparse.account(model)
    told = {"parameters": account.nonzero / account.parameters,
            "bytes": account.bytes / (4 * account.parameters)}  # fmt: skip
    return model, {**told, "lr": lr}


@functools.lru_cache(maxsize=1)
def scaled(scales: str) -> nn.Module:
    """The dense model, rescaled: by the norms of its inputs, or trained from there."""
    model = dense()
    options = Induction("2:4", epochs=0 if scales == "norms" else Induction.epochs)
    induce(model, calibration(), options, rows=BATCH)
    return model


def induced(prune: str, refine: str, scales: str, windows: Tensor) -> Made:
    """Scaled, pruned 2:4, and perhaps repaired."""
    model = copy.deepcopy(scaled(scales))
    recipe = slr.Recipe(prune=prune, pattern="2:4", refine=refine)
    return model, spent(slr.compress_model(model, recipe, windows))


def rows(systems: list[str], work: Path | None, rate: Callable[[str], float]) -> Iterator:
    """System, row, and how it is made, in the order of the table."""
    windows = calibration()
    yield "dense", "dense", lambda: (dense(), {"parameters": 1.0, "bytes": 1.0})
    if "cap" in systems:
        for method in ("uniform", "greedy", "learned"):
            yield "cap", method, functools.partial(by_cap, method, windows, work)
        for row, steps, more in RECIPES:
            yield "recipe", row, functools.partial(by_recipe, *steps, windows, **more)
        for grid in ("int8", "int4 by 32"):
            yield "rounded", grid, functools.partial(by_rounding, grid)
    if "losparse" in systems:
        for mode in ("dense", *losparse.MODES):
            yield "losparse", mode, lambda mode=mode: fine_tuned(mode, rate(mode), STEPS)
    if "induction" in systems:
        for scales in ("norms", "trained"):
            for steps in (("magnitude", "none"), ("magnitude", "weights"), ("wanda", "weights")):
                row = f"{scales}: {'/'.join(steps)}"
                yield "induction", row, functools.partial(induced, *steps, scales, windows)


@torch.no_grad()
def losses(model: nn.Module, windows: Tensor) -> Tensor:
    """Of each window, in nats a token."""
    with in_mode(model, False):
        return torch.cat([window_losses(model, part) for part in windows.split(2)])


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--systems", nargs="+", default=["cap", "losparse", "induction"])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4])
    parser.add_argument("--text", help="a second text to measure on, by path")
    parser.add_argument("--work", type=Path, help="folder for the candidates of CAP")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    tokenizer = slr.load_tokenizer("smollm2")
    texts = {
        Path(name).name: slr.data.windows(
            slr.data.load_text(name), tokenizer, SPEC.seqlen, SPEC.limit
        )
        for name in (SPEC.text, *([args.text] if args.text else []))
    }
    held = slr.data.windows(slr.data.load_text("general"), tokenizer, SHORT)
    about = {
        "model": "smollm2", "blocks": BLOCKS, "budget": BUDGET, "steps": STEPS,
        "batch": BATCH, "seqlen": SHORT, "share": SHARE, "windows": SPEC.limit,
    }  # fmt: skip
    found: dict = {"rates": [], "rows": []}
    if args.out and args.out.is_file():
        found = json.loads(args.out.read_text(encoding="utf-8"))
        for key, value in about.items():
            if found[key] != value:
                sys.exit(f"{args.out} was measured with {key} {found[key]}; give another --out")

    def keep(part: str, line: dict) -> None:
        found[part].append(line)
        print(json.dumps({k: v for k, v in line.items() if k != "losses"}), flush=True)
        if args.out:
            told = {**about, "command": "python " + " ".join(sys.argv), **provenance()}
            told |= {"rates": found["rates"], "rows": found["rows"]}
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_text(args.out, json.dumps(told, indent=1) + "\n")

    def rate(mode: str) -> float:
        """The best of the rates that were asked for, for a mode; tried ones are not tried again."""
        tried = {r["lr"]: r["loss"] for r in found["rates"] if r["mode"] == mode}
        for lr in args.rates:
            if lr not in tried:
                model, _ = fine_tuned(mode, lr, PROBE)
                tried[lr] = losses(model, held).mean().item()
                keep("rates", {"mode": mode, "lr": lr, "loss": tried[lr]})
        return min(tried, key=tried.__getitem__)

    for system, row, make in rows(args.systems, args.work, rate):
        if any((r["system"], r["row"]) == (system, row) for r in found["rows"]):
            continue
        started = time.perf_counter()
        model, told = make()
        seconds = round(time.perf_counter() - started)
        each = {name: losses(model, ids) for name, ids in texts.items()}
        keep("rows", {
            "system": system, "row": row, **told, "seconds": seconds,
            "perplexity": {name: math.exp(value.mean()) for name, value in each.items()},
            "losses": {k: [round(x, 6) for x in v.tolist()] for k, v in each.items()},
        })  # fmt: skip


if __name__ == "__main__":
    main()
