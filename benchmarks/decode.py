"""Tokens a second of a whole model of LLaMA-7B's shape, random weights: dense against 2:4 + rank k.

    python benchmarks/decode.py [--rank 128] [--new 64] [--out DIR]    # on a CUDA GPU of 32 GB
    python benchmarks/decode.py --device cpu --out results/cpu         # a small model

One sequence is continued greedily with a static cache, eager and compiled (``generate`` compiles
on a GPU only).  The least of some runs counts, of the processor's time on a CPU (one thread); the
first is for warming up.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import slr
from slr.evaluate.origin import provenance

SHAPES = {
    "llama-7b": {},  # the defaults of LlamaConfig
    "small": {
        "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 8,
    },
}  # fmt: skip


def build(shape: str, device: str) -> LlamaForCausalLM:
    """A dense model with random weights in bfloat16."""
    config = LlamaConfig(**SHAPES[shape], eos_token_id=None)
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


@torch.no_grad()
def replace_(model: nn.Module, rank: int) -> nn.Module:
    """Each linear of a block becomes its 2:4 part by magnitude and random factors, in place."""
    pattern = slr.patterns.parse("2:4")
    for name, layer in list(model.model.layers.named_modules()):
        if isinstance(layer, nn.Linear):
            W = layer.weight.data
            mask = pattern.select(W.float().abs())
            (m, n), small = W.shape, W.std() / max(rank, 1) ** 0.5
            B, A = torch.randn(m, rank).to(W), torch.randn(rank, n).to(W) * small
            new = slr.SLRLinear(W * mask, B, A, mask=mask, pattern=pattern)
            model.model.layers.set_submodule(name, new)
    return model.requires_grad_(False)


@torch.no_grad()
def rate(model, new: int, runs: int, compiled: bool) -> float:
    """Tokens a second."""
    ids = torch.arange(1, 9, device=model.device)[None]
    options = {"cache_implementation": "static", "disable_compile": not compiled}
    seconds, on_gpu = [], model.device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    for _ in range(runs + 1):
        if on_gpu:
            torch.cuda.synchronize()
        started = clock()
        out = model.generate(
            ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, **options
        )
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(clock() - started)
        assert out.shape[1] == 8 + new
    return new / min(seconds[1:])


def linear_bytes(model: nn.Module) -> int:
    """Of all linear layers of the blocks."""
    kinds = (nn.Linear, slr.SLRLinear)
    layers = [m for m in model.model.layers.modules() if isinstance(m, kinds)]
    return sum(t.nbytes for m in layers for t in [*m.parameters(), *m.buffers()])


def main() -> int:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shape", choices=list(SHAPES))
    parser.add_argument("--rank", type=int)
    parser.add_argument("--new", type=int, default=64, help="tokens")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder for decode.json")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; --device cpu measures a small model", file=sys.stderr)
        return 2
    args.shape = args.shape or ("llama-7b" if args.device == "cuda" else "small")
    args.rank = args.rank or (128 if args.shape == "llama-7b" else 32)
    torch.manual_seed(0)
    if args.device == "cpu":
        torch.set_num_threads(1)
    model, rows = build(args.shape, args.device), []
    for way in ("dense", "slr", "slr, cached"):
        if way == "slr":
            replace_(model, args.rank)
        if way == "slr, cached":
            if args.device == "cuda":
                break
            for layer in model.modules():
                if isinstance(layer, slr.SLRLinear):
                    layer.cache_()
        row = {"way": way, "linear bytes": linear_bytes(model)}
        for compiled in [False, True] if args.device == "cuda" else [False]:
            key = "compiled, tokens/s" if compiled else "eager, tokens/s"
            row[key] = rate(model, args.new, args.runs, compiled)
        rows.append(row)
        print(row)
    if args.out:
        command = "python " + " ".join(["benchmarks/decode.py", *sys.argv[1:]])
        found = {"command": command, **provenance(), "shape": args.shape, "rank": args.rank}
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "decode.json").write_text(json.dumps({**found, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
