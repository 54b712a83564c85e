"""Kill -9 a compression at random moments, resume it every time, and compare every file.

    python benchmarks/kill.py [--kills 20] [--model tiny] [-- options of slr compress]

Runs once undisturbed; then again and again until so many kills have been survived.  Every finished
folder must have the same SHA-256 for every file as the undisturbed one.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from slr.checkpoint.digests import sha256
from slr.evaluate.origin import provenance


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    return {file.name: sha256(file) for file in sorted(folder.iterdir())}


def main() -> None:
    """Run, kill, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--work", type=Path, default=Path("build/kill"))
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("options", nargs="*", help="of slr compress, after --")
    args = parser.parse_args()
    options = args.options or ["--prune", "magnitude", "--pattern", "2:4"]
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    out = args.work / "out"
    command = [sys.executable, "-m", "slr.cli", "compress", args.model, "--out", str(out), *options]

    def start() -> subprocess.Popen:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    started = time.perf_counter()
    if start().wait():
        raise SystemExit("the undisturbed run failed")
    whole = time.perf_counter() - started
    calm = hashes(out)
    shutil.rmtree(out)
    draw, moments, finished = random.Random(0), [], 0
    while len(moments) < args.kills:
        process, moment = start(), draw.uniform(0, whole)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            moments.append(round(moment, 2))
            if out.exists():  # killed after the last rename
                assert hashes(out) == calm
                finished += 1
                shutil.rmtree(out)
            continue
        assert process.returncode == 0, process.returncode
        assert hashes(out) == calm, "a file differs"
        finished += 1
        shutil.rmtree(out)
    if not out.exists() and start().wait():
        raise SystemExit("the last run failed")
    assert hashes(out) == calm, "a file differs"
    finished += 1
    print(f"{len(moments)} kills at {moments} s of {whole:.1f} s")
    print(f"{finished} finished folders, {len(calm)} files each: every SHA-256 as undisturbed")
    if args.out:
        rows = {"seconds": whole, "kills": moments, "finished": finished, "sha256": calm}
        about = {"command": "python " + " ".join(sys.argv), "options": options, **provenance()}
        args.out.write_text(json.dumps({**about, **rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
