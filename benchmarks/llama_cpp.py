"""Does llama.cpp compute what slr does?  Tokens and probabilities of an export to GGUF.

    npm install --prefix FOLDER -E node-llama-cpp@3.21.1
    slr compress smollm2 --out small
    python benchmarks/llama_cpp.py --node FOLDER --folder small [--out FILE]

Exports a compressed folder (without ``--folder`` one of the embedded model) with every type of
weights, and lets llama.cpp, as the package node-llama-cpp brings it, continue fixed prompts on the
CPU from base and adapter.  A row of the table is a type:

- ``greedy``: prompts whose greedy continuation is, token by token, that of ``slr.load`` in float32;
- ``log p``: largest difference of a log-probability, over tokens of probability 1e-6 and more in
  every position of prompts and continuations, and the mean KL divergence in nats;
- ``file``: the same difference from transformers on the file's own weights, dequantised: what is
  left is llama.cpp's arithmetic, which for 16 bits and fewer rounds activations too;
- ``perplexity``: of those weights on held-out text, beside that of ``slr.load``.

Minutes for a model of 135 M parameters.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

import slr
from slr.checkpoint.atomic import write_text
from slr.checkpoint.gguf_export import OUTTYPES
from slr.evaluate.origin import provenance
from slr.model import data

PROMPTS, LENGTH, STEPS = 8, 24, 24
WINDOWS, SEQLEN = 16, 512  # for perplexities, spread over the text
PROBABLE = 1e-6
TEXTS = (
    "The capital of France is", "  two  spaces,\n\n\tand tabs", "in 2024, 12345 and 3.14159",
    "def f(x):\n    return x ** 2  # naïve", "don't, it's 北京 — naïve café 🙂", "<|endoftext|>",
)  # fmt: skip
SCRIPT = Path(__file__).with_suffix(".mjs")


def ask(
    node: Path, folder: Path, texts: list[str], prompts: list[list[int]], steps: int, size: int
) -> tuple[list[list[int]], list[list[int]], list[Tensor]]:
    """What llama.cpp says of an exported folder.

    Args:
        node: folder with ``node_modules/node-llama-cpp``.
        folder: with ``base.gguf`` and perhaps ``adapter.gguf``.
        texts: to tokenise.
        prompts: token ids.
        steps: tokens to continue by.
        size: of the vocabulary.

    Returns:
        Ids of each text, greedy continuation of each prompt, and of each prompt the
        log-probabilities (length + steps, size) after every token, normalised again: the package
        sums probabilities in single precision.
    """
    base, adapter = folder / "base.gguf", folder / "adapter.gguf"
    with tempfile.TemporaryDirectory() as scratch:
        logs = Path(scratch) / "logs"
        asked = {
            "base": str(base), "adapter": str(adapter) if adapter.exists() else None,
            "texts": texts, "prompts": prompts, "steps": steps, "logs": str(logs),
        }  # fmt: skip
        command = [shutil.which("node") or "node", str(SCRIPT), str(node)]
        done = subprocess.run(
            command, input=json.dumps(asked), capture_output=True, text=True, encoding="utf-8"
        )
        if done.returncode:
            raise RuntimeError(f"node-llama-cpp failed: {done.stderr.strip()[-500:]}")
        answers = json.loads(done.stdout)
        found = torch.frombuffer(bytearray(logs.read_bytes()), dtype=torch.float32)
        found = found.view(-1, size).double().log_softmax(-1)
    rows = found.split([len(prompt) + steps for prompt in prompts])
    return answers["tokens"], answers["greedy"], list(rows)


@torch.no_grad()
def continued(model: nn.Module, prompt: list[int], steps: int) -> list[int]:
    """The greedy continuation by a model of transformers."""
    ids = torch.tensor([prompt])
    for _ in range(steps):
        ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), 1)
    return ids[0, len(prompt) :].tolist()


@torch.no_grad()
def difference(model: nn.Module, ids: list[list[int]], rows: list[Tensor]) -> tuple[float, float]:
    """Largest difference of log-probabilities, and mean KL divergence in nats, from a model."""
    most, divergences = 0.0, []
    for one, theirs in zip(ids, rows, strict=True):
        ours = model(torch.tensor([one])).logits[0].double().log_softmax(-1)
        likely = ours > torch.tensor(PROBABLE).log()
        most = max(most, float((ours - theirs)[likely].abs().max()))
        divergences.append((ours.exp() * (ours - theirs.clamp(min=-100))).sum(-1).mean())
    return most, float(torch.stack(divergences).mean())


@torch.no_grad()
def dequantised(folder: Path, ours: nn.Module) -> nn.Module:
    """The model of ``base.gguf`` as transformers reads it, in float32, with B A added."""
    from transformers import AutoModelForCausalLM

    read = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="base.gguf", dtype=torch.float32
    ).eval()
    for name, layer in ours.named_modules():
        if isinstance(layer, slr.SLRLinear):
            read.get_submodule(name).weight.addmm_(layer.B, layer.A)
    return read


def measure(node: Path, folder: Path, text: str, outtypes: list[str]) -> dict:
    """One row for each type."""
    ours, tokenizer = slr.load(folder, dtype=torch.float32), slr.load_tokenizer(folder)
    found = data.windows(data.load_text(text), tokenizer, LENGTH, PROMPTS)
    prompts, size = found.tolist(), ours.config.vocab_size
    held = data.windows(data.load_text(text), tokenizer, SEQLEN, WINDOWS)
    own = slr.perplexity(ours, held)
    wanted = [continued(ours, prompt, STEPS) for prompt in prompts]
    tokens = [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
    rows: dict[str, dict[str, Any]] = {}
    for outtype in outtypes:
        with tempfile.TemporaryDirectory() as scratch:
            out = slr.export(folder, Path(scratch) / "out", "gguf", outtype=outtype)
            ids, greedy, logs = ask(node, out, list(TEXTS), prompts, STEPS, size)
            whole = [prompt + more for prompt, more in zip(prompts, greedy, strict=True)]
            row: dict[str, Any] = {
                "MB": {f.stem: f.stat().st_size / 1e6 for f in sorted(out.glob("*.gguf"))},
                "texts of equal tokens": sum(map(list.__eq__, ids, tokens)),
                "equal greedy": sum(map(list.__eq__, greedy, wanted)),
            }
            row["log p"], row["KL"] = difference(ours, whole, logs)
            read = dequantised(out, ours)
            row["log p, file"], row["KL, file"] = difference(read, whole, logs)
            row["perplexity, file"] = slr.perplexity(read, held)
        rows[outtype] = row
        print(
            f"{outtype:5} {' + '.join(f'{mb:.1f}' for mb in row['MB'].values()):>13} MB  "
            f"tokens {row['texts of equal tokens']}/{len(TEXTS)}  "
            f"greedy {row['equal greedy']}/{PROMPTS}  "
            f"log p {row['log p']:.4f}, KL {row['KL']:.1e}  "
            f"file {row['log p, file']:.4f}, KL {row['KL, file']:.1e}  "
            f"perplexity {row['perplexity, file']:.2f} (ours {own:.2f})",
            flush=True,
        )  # fmt: skip
    told = {"folder": folder.name, "text": text, "prompts": PROMPTS, "length": LENGTH}
    command = "python " + " ".join(sys.argv)
    told |= {"windows": len(held), "seqlen": SEQLEN, "perplexity": own}
    return {**told, "steps": STEPS, "rows": rows, "command": command, **provenance()}


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--node", type=Path, required=True, help="holds node_modules")
    parser.add_argument("--folder", type=Path, default=None, help="a compressed folder")
    parser.add_argument("--text", default=None, help="general | embedded | a text file")
    parser.add_argument("--outtypes", default=",".join(OUTTYPES))
    parser.add_argument("--out", type=Path, default=None, help="JSON file of the rows")
    args = parser.parse_args()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        folder, text = args.folder, args.text or ("embedded" if args.folder is None else "general")
        if folder is None:
            folder = Path(scratch) / "tiny"
            slr.compress("tiny", slr.Recipe(prune="wanda", refine="activations"), out=folder)
        found = measure(args.node, folder, text, args.outtypes.split(","))
    if args.out:
        write_text(args.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
