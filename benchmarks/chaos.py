"""Break a compression on purpose: kill it, fill its disk, change what it reads, run it twice.

    OMP_NUM_THREADS=1 python benchmarks/chaos.py [--kills 300] [--only kills,disks,…] [--out FILE]

Every method compresses a small random model (and exports it), first undisturbed.  Then it is
disturbed, given the same command again as a user would, and every file of the end must have the
SHA-256 of the undisturbed one.  What must not go on has to be refused in one line, with nothing
lost.  One row a kind of disturbance: how often it was tried, how often the same command ended with
the right files, how often it was refused, and how often something was lost or wrong in silence.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

import slr
from slr.checkpoint import exporting, gguf_export, work
from slr.checkpoint.digests import sha256
from slr.evaluate.origin import provenance

OPERATIONS = ("fsync", "replace", "rename", "open", "unlink", "rmdir", "mkdir")
BRIEF = {"samples": 2, "seqlen": 32}
METHODS = {
    "magnitude": slr.Recipe(prune="magnitude", refine="none"),
    "wanda, weights": slr.Recipe(prune="wanda", rank=2, iterations=2, **BRIEF),
    "sparsegpt, outputs": slr.Recipe(
        prune="sparsegpt", refine="activations", rank=2, iterations=2, **BRIEF
    ),
    "induction": slr.Recipe(prune="magnitude", refine="none", prepare="induction", **BRIEF),
    "cap": slr.CAP(steps=2, **BRIEF),
    "losparse": slr.LoSparse(steps=2, **BRIEF),
    "peft": "peft",
    "dense": "dense",
    "gguf": "gguf",
}


class Row:
    """What became of one kind of disturbance."""

    def __init__(self, what: str) -> None:
        self.what, self.counts = what, dict.fromkeys(("tried", "survived", "refused", "wrong"), 0)
        self.wrong: list[str] = []

    def add(self, outcome: str, why: object = "") -> None:
        """Count one trial; `outcome` is "survived", "refused" or "wrong"."""
        self.counts["tried"] += 1
        self.counts[outcome] += 1
        if outcome == "wrong":
            self.wrong.append(str(why)[:300])

    def __str__(self) -> str:
        return f"{self.what:<44}" + "".join(f"{value:>10}" for value in self.counts.values())


def small_model(folder: Path) -> Path:
    """A random two-block LLaMA of half a million weights, with the embedded tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for file in slr.tiny.path().glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): sha256(file) for file in sorted(files)}


class Lab:
    """A small model, its compressed form, and what every method makes of them undisturbed."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.source = small_model(work / "source")
        self.draw = random.Random(0)
        self.calm: dict[str, dict[str, str]] = {}
        self.cost: dict[str, tuple[int, float]] = {}  # file operations, seconds

    def run(self, method: str, out: Path, source: Path | None = None) -> None:
        """Compress or export, in this process."""
        how = METHODS[method]
        if isinstance(how, str):
            slr.export(source or self.work / "packed", out, how)
        else:
            slr.compress(source or self.source, how, out=out)

    def calm_of(self, method: str) -> dict[str, str]:
        """Hashes of the undisturbed result, made when first asked for."""
        if method not in self.calm:
            if isinstance(METHODS[method], str) and not (self.work / "packed").exists():
                self.run("wanda, weights", self.work / "packed")
            out, report = self.work / "calm", self.work / "operations"
            code = self.fork(method, out, count=report)
            assert code == 0, f"{method}, undisturbed: {code}"
            self.calm[method] = hashes(out)
            operations, seconds = report.read_text().split()
            self.cost[method] = int(operations), float(seconds)
            shutil.rmtree(out)
        return self.calm[method]

    def fork(
        self, method: str, out: Path, kill_at: int = 0, count: Path | None = None,
        wait: bool = True, **more: object,
    ) -> int:  # fmt: skip
        """Run a method in a child; its exit code (-9 killed, 2 refused), or its number."""
        child = os.fork()
        if child:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if wait else child
        done, null = 0, os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)

        def trap(real: Callable) -> Callable:
            def call(*args, **kwargs):
                nonlocal done
                done += 1
                if done == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return call

        started, real_open = time.perf_counter(), os.open
        for name in OPERATIONS:
            setattr(os, name, trap(getattr(os, name)))
        try:
            self.run(method, out, **more)
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
            (self.work / "error").write_text(text)
            os._exit(2 if isinstance(error, ValueError | OSError) and "\n" not in text else 1)
        if count is not None:
            os.open = real_open
            count.write_text(f"{done} {time.perf_counter() - started}")
        os._exit(0)

    def error(self) -> str:
        """What the last child that failed said."""
        return (self.work / "error").read_text()

    def judge(self, row: Row, method: str, out: Path) -> None:
        """Is the finished folder the undisturbed one, with nothing left beside it?"""
        left = out.with_name(f"{out.name}.partial")
        if hashes(out) != self.calm_of(method):
            row.add("wrong", f"{method}: a file differs")
        elif left.exists():
            row.add("wrong", f"{method}: {left} is left")
        else:
            row.add("survived")
        shutil.rmtree(out)


def whole(out: Path) -> bool:
    """Is the finished folder there?"""
    return (out / "config.json").exists() or (out / "base.gguf").exists()


def finish(lab: Lab, row: Row, method: str, out: Path) -> None:
    """Give the command again after a kill, and judge."""
    complete = whole(out)  # killed after the last rename
    code = lab.fork(method, out)
    if code != (2 if complete else 0):
        row.add("wrong", f"{method}: exit {code}, {lab.error()}")
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(out.with_name(f"{out.name}.partial"), ignore_errors=True)
    else:
        lab.judge(row, method, out)


def kills(lab: Lab, count: int) -> Iterator[Row]:
    """SIGKILL at every file operation of two runs, and at random moments of all methods."""
    out = lab.work / "out"
    for method, name in (("magnitude", ""), ("gguf", ": gguf")):  # two ways to go on
        lab.calm_of(method)
        row = Row(f"killed at every file operation{name}")
        last = lab.cost[method][0]
        for moment in range(1, last + 1, max(1, last // count)):
            if lab.fork(method, out, kill_at=moment) != -signal.SIGKILL:
                row.add("wrong", f"{method}: no kill at {moment}")
            else:
                finish(lab, row, method, out)
        yield row
    for method in METHODS:
        lab.calm_of(method)
        operations, seconds = lab.cost[method]
        row = Row(f"killed at random: {method}")
        while row.counts["tried"] < -(-count // len(METHODS)):
            for _ in range(lab.draw.randint(1, 3)):  # several times before it can end
                if lab.draw.random() < 0.5:
                    lab.fork(method, out, kill_at=lab.draw.randint(1, operations))
                else:
                    child = lab.fork(method, out, wait=False)
                    time.sleep(lab.draw.uniform(0, seconds))
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                if whole(out):
                    break
            finish(lab, row, method, out)
        yield row


def pairs(lab: Lab, count: int) -> Iterator[Row]:
    """Two processes make the same folder at once: one does, the other is refused."""
    out, row = lab.work / "out", Row("two processes at once")
    lab.calm_of("magnitude")
    for _ in range(max(2, count // 15)):
        children = []
        for _ in range(2):
            children.append(lab.fork("magnitude", out, wait=False))
            time.sleep(lab.draw.uniform(0, lab.cost["magnitude"][1]))
        codes = sorted(os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children)
        if codes != [0, 2]:
            row.add("wrong", f"exit codes {codes}")
        else:
            lab.judge(row, "magnitude", out)
    yield row


@contextmanager
def disk(at: Path, kilobytes: int) -> Iterator[bool]:
    """A disk of its own, in memory; False if this process may not make one."""
    at.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(at)]
    done = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield done
    finally:
        if done:
            subprocess.run(["umount", str(at)], check=True)


def disks(lab: Lab, count: int) -> Iterator[Row]:
    """The disk is full before the end: said in one line, and with more room the run goes on."""
    methods = ["magnitude", "wanda, weights", "cap", "peft", "gguf"]
    row, at = Row("disk full"), lab.work / "disk"
    check = work.check_space  # it would say so before anything is written
    work.check_space = exporting.check_space = gguf_export.check_space = lambda *_: None
    for trial in range(max(4, count // 10)):
        method = methods[trial % len(methods)]
        lab.calm_of(method)
        with disk(at, lab.draw.randint(100, 1500)) as made:
            if not made:
                print("(no disk of its own can be mounted here: not tried)", file=sys.stderr)
                break
            code = lab.fork(method, at / "out")
            if code == 2 and "no space left" in lab.error() and not (at / "out").exists():
                subprocess.run(["mount", "-o", "remount,size=64m", str(at)], check=True)
                code = lab.fork(method, at / "out")
            if code != 0:
                row.add("wrong", f"{method}: exit {code}, {lab.error()}")
            else:
                lab.judge(row, method, at / "out")
    work.check_space = exporting.check_space = gguf_export.check_space = check
    yield row


def begin(lab: Lab, out: Path, source: Path) -> Path:
    """A run of magnitude pruning that was killed when its first block was there."""
    journal = out.with_name(f"{out.name}.partial") / "journal.json"
    moment = 20
    while not (journal.exists() and json.loads(journal.read_text())["entries"]):
        moment += 3
        lab.fork("magnitude", out, kill_at=moment, source=source)
    return journal


def sources(lab: Lab, count: int) -> Iterator[Row]:
    """One bit of the source changes between two runs, or a file of it comes or goes."""
    out, row = lab.work / "out", Row("source changed before resuming")
    for _ in range(max(4, count // 10)):
        source = lab.work / "changing"
        shutil.copytree(lab.source, source)
        begin(lab, out, source)
        file = source / lab.draw.choice(["config.json", "model.safetensors", "tokenizer.json"])
        held = bytearray(file.read_bytes())
        bit = lab.draw.randrange(8 * len(held))
        held[bit // 8] ^= 1 << bit % 8
        file.write_bytes(held)
        code = lab.fork("magnitude", out, source=source)
        if file.name == "tokenizer.json":  # copied at the end, as it is then
            row.add("survived" if code == 0 else "wrong", code)
        else:
            row.add("refused" if code == 2 else "wrong", f"{file.name}, bit {bit}: exit {code}")
        for folder in (source, out, out.with_name("out.partial")):
            shutil.rmtree(folder, ignore_errors=True)
    yield row


def _edit(told: dict, draw: random.Random) -> None:
    """One random change somewhere in nested JSON."""
    spot = told
    while True:
        key = draw.choice(list(spot) if isinstance(spot, dict) else range(len(spot)))
        if isinstance(spot[key], dict | list) and spot[key] and draw.random() < 0.8:
            spot = spot[key]
            continue
        if draw.random() < 0.3:
            del spot[key]
        else:
            spot[key] = draw.choice([None, -1, "x", [], {}, 1e9, "../../x", True])
        return


def journals(lab: Lab, count: int) -> Iterator[Row]:
    """Somebody edits the journal of a stopped run, or a bit of it flips."""
    out, row = lab.work / "out", Row("journal edited")
    for trial in range(max(8, count // 3)):
        file = begin(lab, out, lab.source)
        if trial % 2:
            told = json.loads(file.read_text())
            _edit(told, lab.draw)
            file.write_text(json.dumps(told))
        else:
            held = bytearray(file.read_bytes())
            held[lab.draw.randrange(len(held))] ^= 1 << lab.draw.randrange(8)
            file.write_bytes(held)
        code = lab.fork("magnitude", out)
        if code == 2:
            row.add("refused")
        elif code == 0:
            lab.judge(row, "magnitude", out)
        else:
            row.add("wrong", f"exit {code}, {lab.error()}")
        for folder in (out, out.with_name("out.partial")):
            shutil.rmtree(folder, ignore_errors=True)
    yield row


KINDS = {f.__name__: f for f in (kills, pairs, disks, sources, journals)}


def table(rows: Iterable[Row], out: Path | None) -> int:
    """Print rows as they are made, and write them to a file; 1 if anything was wrong."""
    print(f"{'':<44}{'tried':>10}{'survived':>10}{'refused':>10}{'wrong':>10}")
    made = []
    for row in rows:
        made.append(row)
        print(row, flush=True)
        for why in row.wrong[:9]:
            print(f"    {why}")
    if out is not None:
        about = {"command": "python " + " ".join(sys.argv), **provenance()}
        told = {row.what: row.counts for row in made}
        out.write_text(json.dumps({**about, "rows": told}, indent=1) + "\n")
    return int(any(row.wrong for row in made))


def main() -> None:
    """The table; exit code 1 if anything was lost or wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--only", default=",".join(KINDS))
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1":
        raise SystemExit("give it OMP_NUM_THREADS=1: a fork has the one thread that called it")
    tqdm.set_lock(threading.RLock())  # its own is shared by forks, and a killed one keeps it
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder))
        rows = (row for name in args.only.split(",") for row in KINDS[name](lab, args.kills))
        sys.exit(table(rows, args.out))


if __name__ == "__main__":
    main()
