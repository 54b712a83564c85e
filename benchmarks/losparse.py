"""LoSparse and its two baselines on the embedded model: perplexity at every remaining ratio.

    python benchmarks/losparse.py [--out results/measured/tiny/losparse.json]

For every ratio and mode: fine-tunes the embedded model for ``--tune-steps`` with each learning
rate of ``--rates`` (and, for LoSparse, each share of ``--shares``: of the remaining parameters,
what goes to U and V), measures on tuning windows, and with the best fine-tunes for ``--steps`` and
measures on other held-out windows.  Windows, their order, steps and schedule are the same for all.
With ``--out`` each cell is written as it is done, and a run that was stopped goes on.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch

import slr
from slr.methods import losparse
from slr.provenance import provenance

SEQLEN, BATCH, TUNING, REPORTED = 128, 4, 64, 256
WARMUP, COOLDOWN = 0.1, 1 / 3  # of the steps


def training_windows(count: int) -> torch.Tensor:
    """The first `count` windows of the documents that are not held out, shuffled."""
    texts, length = [], 0
    for name, text in slr.data.documents().items():
        if not slr.data.held_out(name):
            texts.append(text[: slr.data.LONGEST])
            length += len(texts[-1])
        if length > 8 * count * SEQLEN:
            break
    found = slr.data.windows("\n\n".join(texts), slr.load_tokenizer("tiny"), SEQLEN, count)
    if len(found) < count:
        sys.exit(f"the text has {len(found)} windows, fewer than {count}; give fewer steps")
    return found[torch.randperm(count, generator=torch.Generator().manual_seed(0))]


def cell(
    mode: str, ratio: float, lr: float, share: float, steps: int, train: torch.Tensor,
    text: dict[str, torch.Tensor],
) -> dict:  # fmt: skip
    """Convert, fine-tune, make compact, measure the perplexity of each text."""
    model = slr.load("tiny", dtype=torch.float32)
    started, windows = time.perf_counter(), train[: steps * BATCH]
    row = {"mode": mode, "remaining asked": ratio, "lr": lr, "share": share, "steps": steps}
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


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.3, 0.2, 0.1])
    parser.add_argument("--modes", nargs="+", default=[*losparse.MODES])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tune-steps", type=int, default=80)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    settings = {"seqlen": SEQLEN, "batch": BATCH, "warm-up": WARMUP, "cool-down": COOLDOWN}
    settings |= {"tuning windows": TUNING, "reported windows": REPORTED}
    rows: list[dict] = []
    if args.out and args.out.is_file():
        before = json.loads(args.out.read_text(encoding="utf-8"))
        if before["settings"] != settings:
            sys.exit(f"{args.out} was measured with {before['settings']}; give another --out")
        rows = before["tuning"] + before["rows"]
    most = max(args.steps, args.tune_steps)
    held = slr.data.windows(
        slr.data.corpus("validation"), slr.load_tokenizer("tiny"), SEQLEN, TUNING + REPORTED
    )
    text = {"tuning": held[:TUNING], "reported": held[TUNING:]}
    train = training_windows(most * BATCH)
    untrained = slr.perplexity(slr.load("tiny", dtype=torch.float32), text["reported"])

    def measured(steps: int, **given) -> dict:
        for row in rows:
            if row["steps"] == steps and all(row[key] == value for key, value in given.items()):
                return row
        kind = "tuning" if steps == args.tune_steps else "reported"
        row = cell(*given.values(), steps, train, {kind: text[kind]})
        rows.append(row)
        print(json.dumps({k: v for k, v in row.items() if k != "loss"}), flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            about = {"model": "slr/tiny/model", "untrained": untrained, "settings": settings}
            about["tuning"] = [row for row in rows if row["steps"] == args.tune_steps]
            about["rows"] = [row for row in rows if row["steps"] != args.tune_steps]
            about |= {"command": "python " + " ".join(sys.argv), **provenance()}
            part = args.out.with_suffix(".part")
            part.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
            part.rename(args.out)
        return row

    final = []
    cells = [("dense", 1.0)] if "dense" in args.modes else []
    cells += [(m, r) for r in args.ratios for m in args.modes if m != "dense"]
    best = {}
    for mode, ratio in cells:
        shares = args.shares if mode == "losparse" else [{"lowrank": 1.0}.get(mode, 0.0)]
        tried = [
            measured(
                args.tune_steps, **{"mode": mode, "remaining asked": ratio, "lr": lr, "share": s}
            )
            for s in shares
            for lr in args.rates
        ]
        best[mode, ratio] = min(tried, key=lambda row: row["perplexity, tuning"])
    for (mode, ratio), row in best.items():
        if args.steps:
            given = {"mode": mode, "remaining asked": ratio, "lr": row["lr"], "share": row["share"]}
            final.append(measured(args.steps, **given))
    print(f"dense, as it is: {untrained:.3f}")
    for row in final:
        if row["mode"] == "dense":
            print(f"dense, fine-tuned alike: {row['perplexity, reported']:.3f}")
    if any(row["mode"] != "dense" for row in final):
        print(table(final).round(4).to_string())


if __name__ == "__main__":
    main()
