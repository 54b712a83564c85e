"""LoSparse and its two baselines on the embedded model: perplexity at every remaining ratio.

    python benchmarks/losparse.py [--out results/measured/tiny/losparse.json]

Tuning, at every ratio, by trainings of ``--tune-steps`` measured on tuning windows: each mode's
learning rate is doubled or halved until that is worse, and LoSparse takes the best share of
``--shares`` (of the remaining parameters, what goes to U and V).  Then each mode is fine-tuned for
``--steps`` with what was best, and measured on other held-out windows.
Training windows, their order, steps and schedule are the same for all.

With ``--out`` each cell is written as it is done; a run that was stopped goes on, and several runs
(``--modes`` apart) may share one file.

    python benchmarks/losparse.py --regrow 10 [--out results/measured/tiny/regrowth.json]

trains LoSparse with pruned rows held at zero, and with rows that may return every 10 steps, as in
the published code; both in float32, and with what was tuned for rows held (``--tuned``).
"""

import argparse
import fcntl
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch

import slr
from slr.evaluate.origin import provenance
from slr.methods import losparse
from slr.model.embedded import LONGEST

SEQLEN, BATCH, TRAIN, TUNING, REPORTED = 128, 4, 1200, 64, 128
WARMUP, COOLDOWN = 0.05, 0.65  # of the steps
SETTINGS = {
    "seqlen": SEQLEN, "batch": BATCH, "training windows": TRAIN, "tuning windows": TUNING,
    "reported windows": REPORTED, "warm-up": WARMUP, "cool-down": COOLDOWN,
}  # fmt: skip
TUNED = Path(__file__).parents[1] / "results" / "measured" / "tiny" / "losparse.json"
KEYS = ("mode", "remaining asked", "lr", "share", "steps")


def training_windows() -> torch.Tensor:
    """Windows of the documents that are not held out, shuffled."""
    texts, length = [], 0
    for name, text in slr.data.documents().items():
        if not slr.data.held_out(name):
            texts.append(text[:LONGEST])
            length += len(texts[-1])
        if length > 8 * TRAIN * SEQLEN:
            break
    found = slr.data.windows("\n\n".join(texts), slr.load_tokenizer("tiny"), SEQLEN, TRAIN)
    return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(0))]


def cell(
    mode: str, ratio: float, lr: float, share: float, steps: int, train: torch.Tensor,
    text: dict[str, torch.Tensor],
) -> dict:  # fmt: skip
    """Convert, fine-tune, make compact, measure the perplexity of each text."""
    model = slr.load("tiny", dtype=torch.float32)
    started, windows = time.perf_counter(), train[: steps * BATCH]
    row: dict = dict(zip(KEYS, (mode, ratio, lr, share, steps), strict=True))
    options = {"lr": lr, "dtype": torch.bfloat16}
    if mode == "dense":
        batches = [{"input_ids": ids, "labels": ids} for ids in windows.split(BATCH)]
        losses = losparse.fit(model, batches, **options)
    else:
        losses = losparse.train(
            model, windows, remaining=ratio, mode=mode, share=share, batch=BATCH,
            warmup=WARMUP, cooldown=COOLDOWN, **options,
        )  # fmt: skip
    row["loss"] = [round(sum(losses[i : i + 10]) / 10, 4) for i in range(0, steps - 9, 10)]
    row["seconds"] = round(time.perf_counter() - started)
    if mode != "dense":
        account = losparse.account(model)
        with tempfile.TemporaryDirectory() as folder:
            losparse.save(model, f"{folder}/model.safetensors")
            row["file bytes"] = Path(f"{folder}/model.safetensors").stat().st_size
        row |= {
            "remaining": account.nonzero / account.parameters,
            "matrix bytes": account.bytes,
            "matrix flops": account.flops,
            "rows kept": sum(len(m.rows) for m in losparse.layers(model).values()),
        }
    return row | {f"perplexity, {k}": slr.perplexity(model, ids) for k, ids in text.items()}


def table(rows: list[dict]) -> pd.DataFrame:
    """Ratios down, perplexity and what remains of each mode across."""
    frame = pd.DataFrame([row for row in rows if row["mode"] != "dense"])
    frame = frame.pivot(index="remaining asked", columns="mode")
    modes = [mode for mode in losparse.MODES if mode in set(frame.columns.get_level_values(1))]
    shown = ["perplexity, reported", "lr", "share", "remaining", "file bytes"]
    return frame[shown].reindex(columns=modes, level="mode").sort_index(ascending=False)


class Watched(losparse.Pruner):
    """Remembers which rows have been zero."""

    ever: dict[str, torch.Tensor]

    def step(self) -> None:
        """As the pruner's."""
        super().step()
        for name, layer in self.layers.items():
            self.ever[name] = self.ever[name] | ~layer.S.detach().any(1)


def regrown(
    tuned: dict, regrow: int | None, order: int, train: torch.Tensor, text: torch.Tensor
) -> dict:
    """The same, with rows that may return or not, and the windows in another order."""
    ratio, steps = tuned["remaining asked"], tuned["steps"]
    windows = train[: steps * BATCH]
    if order:
        shuffled = torch.randperm(len(windows), generator=torch.Generator().manual_seed(order))
        windows = windows[shuffled]
    model = slr.load("tiny", dtype=torch.float32)
    losparse.convert(model, rank_ratio=tuned["share"] * ratio)
    pruner = Watched(
        model, remaining=ratio, steps=steps, regrow=regrow,
        warmup=int(WARMUP * steps), cooldown=int(COOLDOWN * steps),
    )  # fmt: skip
    pruner.ever = {name: ~layer.S.detach().any(1) for name, layer in pruner.layers.items()}
    batches = [
        {"input_ids": ids, "labels": ids, "use_cache": False} for ids in windows.split(BATCH)
    ]
    losses = losparse.fit(model, batches, lr=tuned["lr"], pruner=pruner)
    kept = {name: layer.kept.clone() for name, layer in pruner.layers.items()}
    losparse.compact(model)
    return {
        "remaining asked": ratio, "regrow": regrow, "order": order,
        "lr": tuned["lr"], "share": tuned["share"], "steps": steps,
        "rows kept": sum(int(each.sum()) for each in kept.values()),
        "rows returned": sum(int((each & pruner.ever[name]).sum()) for name, each in kept.items()),
        "remaining": losparse.remaining_ratio(model), "last loss": sum(losses[-10:]) / 10,
        "perplexity": slr.perplexity(model, text),
    }  # fmt: skip


def regrowth(args: argparse.Namespace, train: torch.Tensor, text: torch.Tensor) -> None:
    """Measure rows held and rows free, print, and write if asked; what is there is not redone."""
    tuned = json.loads(args.tuned.read_text(encoding="utf-8"))
    if tuned["settings"] != SETTINGS:
        sys.exit(f"{args.tuned} was measured with {tuned['settings']}")
    best = {row["remaining asked"]: row for row in tuned["rows"] if row["mode"] == "losparse"}
    rows: list[dict] = []
    if args.out is not None and args.out.is_file():
        rows = json.loads(args.out.read_text(encoding="utf-8"))["rows"]
    done = {(r["remaining asked"], r["regrow"], r["order"]) for r in rows}
    about = {
        "model": "slr/tiny/model", "settings": SETTINGS, "dtype": "float32",
        "command": "python " + " ".join(sys.argv), **provenance(),
    }  # fmt: skip
    for key in itertools.product(args.ratios, (None, args.regrow), args.orders):
        if key in done:
            continue
        ratio, regrow, order = key
        rows.append(regrown(best[ratio], regrow, order, train, text))
        print(json.dumps(rows[-1]), flush=True)
        if args.out is not None:
            told = json.dumps({**about, "rows": rows}, indent=1) + "\n"
            args.out.write_text(told, encoding="utf-8")
    frame = pd.DataFrame(rows).fillna({"regrow": 0})
    shown = ["perplexity", "rows kept", "rows returned"]
    print(frame.pivot(index=["remaining asked", "order"], columns="regrow", values=shown))


class Record:
    """The cells that are done, in memory or in a file that several runs may share."""

    def __init__(self, out: Path | None, about: dict) -> None:
        self.out, self.about, self.rows = out, about, list[dict]()
        self.read()

    def read(self) -> None:
        if self.out is not None and self.out.is_file():
            before = json.loads(self.out.read_text(encoding="utf-8"))
            if before["settings"] != SETTINGS:
                sys.exit(f"{self.out} was measured with {before['settings']}; give another --out")
            self.rows = before["tuning"] + before["rows"]

    def find(self, **given) -> dict | None:
        return next((r for r in self.rows if all(r[k] == v for k, v in given.items())), None)

    def add(self, row: dict) -> dict:
        """Put a cell in place of what another run, or one with other settings, has measured."""
        print(json.dumps({k: v for k, v in row.items() if k != "loss"}), flush=True)
        self.write(row)
        return row

    def write(self, *new: dict) -> None:
        """Read what other runs have written since, add, and write."""
        with open(__file__) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.read()
            for row in new:
                keys = KEYS if "perplexity, tuning" in row else ("mode", "remaining asked")
                kind = list(row)[-1]
                same = [r for r in self.rows if kind in r and all(r[k] == row[k] for k in keys)]
                self.rows = [r for r in self.rows if r not in same] + [row]
            if self.out is None:
                return
            self.out.parent.mkdir(parents=True, exist_ok=True)
            order = sorted(self.rows, key=lambda r: (-r["remaining asked"], r["mode"], r["lr"]))
            parts = {
                "tuning": [r for r in order if "perplexity, tuning" in r],
                "rows": [r for r in order if "perplexity, reported" in r],
            }
            part = self.out.with_suffix(".part")
            part.write_text(json.dumps({**self.about, **parts}, indent=1) + "\n", encoding="utf-8")
            part.rename(self.out)


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.3, 0.2, 0.1])
    parser.add_argument("--modes", nargs="+", default=["dense", *losparse.MODES])
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 1e-3])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25, 0.8, 0.9])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--tune-steps", type=int, default=40)
    parser.add_argument("--regrow", type=int, default=None)
    parser.add_argument("--orders", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--tuned", type=Path, default=TUNED)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    if max(args.steps, args.tune_steps) * BATCH > TRAIN:
        sys.exit(f"{args.steps} steps need more than the {TRAIN} training windows")
    tokenizer = slr.load_tokenizer("tiny")
    text = slr.data.corpus("validation")
    held = slr.data.windows(text, tokenizer, SEQLEN, TUNING + REPORTED)
    text = {"tuning": held[:TUNING], "reported": held[TUNING:]}
    train = training_windows()
    if args.regrow is not None:
        return regrowth(args, train, text["reported"])
    untrained = slr.perplexity(slr.load("tiny", dtype=torch.float32), text["reported"])
    record = Record(args.out, {
        "model": "slr/tiny/model", "untrained": untrained, "settings": SETTINGS,
        "command": "python " + " ".join(sys.argv), **provenance(),
    })  # fmt: skip

    def measured(kind: str, steps: int, mode: str, ratio: float, lr: float, share: float) -> dict:
        given = dict(zip(KEYS, (mode, ratio, lr, share, steps), strict=True))
        row = record.find(**given)
        if row is None or f"perplexity, {kind}" not in row:
            row = record.add(cell(mode, ratio, lr, share, steps, train, {kind: text[kind]}))
        return row

    def tuned(mode: str, ratio: float) -> dict:
        """The best learning rate, doubled or halved until that is worse; then the best share."""
        shares = args.shares if mode == "losparse" else [{"lowrank": 1.0}.get(mode, 0.0)]

        def at(lr: float, share: float) -> float:
            row = measured("tuning", args.tune_steps, mode, ratio, lr, share)
            return row["perplexity, tuning"]

        tried = {lr: at(lr, shares[0]) for lr in args.rates}
        while (lr := min(tried, key=tried.__getitem__)) in (min(tried), max(tried)):
            lr = lr / 2 if lr == min(tried) else lr * 2
            tried[lr] = at(lr, shares[0])
        return {"lr": lr, "share": min(shares, key=lambda share: at(lr, share))}

    final = []
    for mode in args.modes:
        for ratio in args.ratios if mode != "dense" else [1.0]:
            final.append(measured("reported", args.steps, mode, ratio, **tuned(mode, ratio)))
    record.write()
    print(f"dense, as it is: {untrained:.3f}")
    for row in final:
        if row["mode"] == "dense":
            print(f"dense, fine-tuned alike: {row['perplexity, reported']:.3f}")
    if any(row["mode"] != "dense" for row in final):
        print(table(final).round(4).to_string())


if __name__ == "__main__":
    main()
