"""Train the embedded model, reproducibly, on the Python that runs this.

    python -m examples.train_tiny --out OUT [--text FILE …] [--heldout FILE …]

Training text: every document of the standard library that is not held out (see
:func:`slr.data.held_out`), and the files given (``.txt``, or ``.jsonl`` with
``question`` and ``answer``).  Lines of 40 characters or more that also stand in a
held-out document are removed from it.  Order, windows and initial weights depend only on
``--seed``; a run that was stopped goes on from its last checkpoint in OUT.

Writes OUT/model (the checkpoint), OUT/log.jsonl (loss by step) and OUT/training.json
(data with hashes, tokens seen, held-out perplexities, versions).
"""

import argparse
import hashlib
import json
import math
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from slr.evaluate.likelihood import perplexity
from slr.model import data

END = "<|endoftext|>"
WARMUP = 100  # steps
LONGEST = 100_000  # characters: tables of test data must not crowd out text
SHAPE: dict[str, Any] = dict(
    vocab_size=4096, hidden_size=256, intermediate_size=704, num_hidden_layers=6,
    num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512,
    rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    tie_word_embeddings=True, attention_bias=False, mlp_bias=False,
    bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip


def read_documents(file: Path) -> list[str]:
    """Documents of a text file: the whole of a ``.txt``, one a line of a ``.jsonl``."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".jsonl":
        return [text]
    rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    return [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows]


def gather(files: list[Path]) -> tuple[list[tuple[list[str], int]], dict]:
    """Training sources as (documents, repeats in an epoch), and what they were made of."""
    core = set(data.documents())
    everything = data.documents(everywhere=False)
    secret = {
        line.strip()
        for name, text in everything.items()
        if data.held_out(name)
        for line in text.splitlines()
        if len(line.strip()) >= 40
    }

    def clean(text: str) -> str:
        kept = (ln for ln in text[:LONGEST].splitlines() if ln.strip() not in secret)
        return "\n".join(kept)

    seen = {n: clean(t) for n, t in everything.items() if not data.held_out(n)}
    sources = [
        ([t for n, t in seen.items() if n in core], 2),
        ([t for n, t in seen.items() if n not in core], 1),
    ]
    about: dict[str, Any] = {
        "python": platform.python_version(),
        "library documents": {"trained on": len(seen), "held out": len(everything) - len(seen)},
        "files": {},
    }
    for file in files:
        sources.append((read_documents(file), 2))
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        about["files"][file.parent.name + "/" + file.name] = digest
    return sources, about


def train_tokenizer(sources) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the training text."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"], special_tokens=[END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    raw.train_from_iterator((d for docs, times in sources for d in docs * times), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=END, eos_token=END, pad_token=END,
        model_max_length=SHAPE["max_position_embeddings"],
    )  # fmt: skip


def encode(sources, tokenizer) -> list[tuple[np.ndarray, int]]:
    """Token streams, documents separated by the end token, with their repeats."""
    streams = []
    for docs, times in sources:
        rows = tokenizer(docs, add_special_tokens=False, verbose=False)["input_ids"]
        flat = np.concatenate([np.array([0, *row], dtype=np.uint16) for row in rows])
        streams.append((flat, times))
    return streams


def epoch_windows(streams, seqlen: int, seed: int, epoch: int) -> np.ndarray:
    """All windows of one epoch, shuffled; each pass over a stream starts at a new offset."""
    rng = np.random.default_rng([seed, epoch])
    rows = []
    for flat, times in streams:
        for _ in range(times):
            shift = int(rng.integers(seqlen))
            count = (len(flat) - shift) // seqlen
            rows.append(flat[shift : shift + count * seqlen].reshape(count, seqlen))
    stacked = np.concatenate(rows)
    return stacked[rng.permutation(len(stacked))]


def save_state(file: Path, model, optimizer, step: int) -> None:
    """Weights and optimiser moments as one safetensors file, written whole or not at all."""
    tensors = {}
    for name, p in model.named_parameters():
        tensors["weight/" + name] = p.detach()
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"{key}/{name}"] = optimizer.state[p][key]
    part = file.with_suffix(".part")
    save_file(tensors, part, metadata={"step": str(step)})
    os.replace(part, file)


def load_state(file: Path, model, optimizer) -> int:
    """Restore what :func:`save_state` wrote; returns the steps done."""
    with safe_open(file, "pt") as f, torch.no_grad():
        step = int(f.metadata()["step"])
        for name, p in model.named_parameters():
            p.copy_(f.get_tensor("weight/" + name))
            optimizer.state[p] = {
                "step": torch.tensor(float(step)),
                "exp_avg": f.get_tensor("exp_avg/" + name),
                "exp_avg_sq": f.get_tensor("exp_avg_sq/" + name),
            }
    return step


def initial_model(seed: int, device: str) -> LlamaForCausalLM:
    """The untrained model; residual branches start small, as in GPT-2."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, use_cache=False))
    torch.nn.Module.to(model, device)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                p.div_(math.sqrt(2 * SHAPE["num_hidden_layers"]))
    return model


def make_optimizer(model: LlamaForCausalLM, lr: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to 2%."""
    done = max(0.0, (step - WARMUP) / max(1, steps - WARMUP))
    return min((step + 1) / WARMUP, 0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)


def train(streams, args: argparse.Namespace) -> tuple[LlamaForCausalLM, int]:
    """Train from the last checkpoint in ``args.out``, or from nothing.

    Returns:
        The model and the number of steps in an epoch.
    """
    seqlen = SHAPE["max_position_embeddings"]
    model = initial_model(args.seed, args.device)
    optimizer = make_optimizer(model, args.lr)
    state, first = args.out / "state.safetensors", 0
    if state.is_file():
        first = load_state(state, model, optimizer)
        print(f"going on from step {first}", flush=True)

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast(args.device, dtype=torch.bfloat16):
            logits = model(input_ids=ids).logits
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten()
        )

    mean_loss = torch.compile(loss_of) if args.compile else loss_of
    started, log = time.time(), (args.out / "log.jsonl").open("a", encoding="utf-8")
    per_epoch = len(epoch_windows(streams, seqlen, args.seed, 0)) // args.batch - 1
    loaded, pool = -1, np.empty(0)
    until = min(args.steps, args.until or args.steps)
    for step in range(first, until):
        epoch, within = divmod(step, per_epoch)
        if epoch != loaded:
            loaded, pool = epoch, epoch_windows(streams, seqlen, args.seed, epoch)
        rows = pool[within * args.batch : (within + 1) * args.batch].astype(np.int64)
        ids = torch.from_numpy(rows).to(args.device)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * schedule(step, args.steps)
        loss = mean_loss(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        last = step + 1 == until
        if step % 25 == 0 or last:
            rate = (step + 1 - first) * ids.numel() / (time.time() - started)
            row = {"step": step, "loss": round(loss.item(), 4), "tokens_per_second": round(rate)}
            print(row, flush=True)
            log.write(json.dumps(row) + "\n")
            log.flush()
        if (step + 1) % args.save_every == 0 or last:
            save_state(state, model, optimizer, step + 1)
    log.close()
    return model, per_epoch


def save_model(model: LlamaForCausalLM, tokenizer, folder: Path) -> None:
    """The checkpoint as it is shipped: bfloat16, with its tokenizer."""
    model.config.use_cache = True
    torch.nn.Module.to(model, "cpu", torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)


def heldout_perplexities(folder: Path, tokenizer, files: list[Path]) -> dict[str, float]:
    """Perplexity in float32 on the held-out library and on each file, 400 windows at most."""
    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = {"library": data.corpus("validation")}
    for file in files:
        texts[file.parent.name + "/" + file.name] = "\n\n".join(read_documents(file))
    seqlen = SHAPE["max_position_embeddings"]
    return {
        name: perplexity(reference, data.windows(text, tokenizer, seqlen, limit=400))
        for name, text in texts.items()
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the embedded model.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="more training text")
    parser.add_argument("--heldout", type=Path, nargs="*", default=[], help="evaluated at the end")
    parser.add_argument("--steps", type=int, default=5200)
    parser.add_argument("--until", type=int, help="stop here, to go on with other --steps")
    parser.add_argument("--batch", type=int, default=8, help="windows in a step")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="at its peak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile the loss")
    parser.add_argument("--save-every", type=int, default=300, help="steps between checkpoints")
    return parser


def main() -> None:
    """Train, save, evaluate."""
    args = parser().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    sources, about = gather(args.text)
    tokenizer = train_tokenizer(sources)
    streams = encode(sources, tokenizer)
    print("tokens by source:", [(len(flat), times) for flat, times in streams], flush=True)
    model, per_epoch = train(streams, args)
    if args.until and args.until < args.steps:
        return
    save_model(model, tokenizer, args.out / "model")
    tokens = args.batch * SHAPE["max_position_embeddings"]
    about |= {
        "tokens seen": args.steps * tokens,
        "tokens in an epoch": per_epoch * tokens,
        "held-out perplexity": heldout_perplexities(args.out / "model", tokenizer, args.heldout),
        "seed": args.seed,
        "steps": args.steps,
        "windows in a step": args.batch,
        "learning rate": args.lr,
        "device": args.device,
        "torch": torch.__version__,
    }
    (args.out / "training.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(about, indent=1))


if __name__ == "__main__":
    main()
