"""Tokens a second of a whole model: dense against 2:4, 50% anywhere, and codes, + rank k.

    python benchmarks/decode.py [--rank 128] [--new 64] [--out DIR]    # on a CUDA GPU of 32 GB
    python benchmarks/decode.py --device cpu --out results/cpu         # smaller models

One sequence is continued greedily with a static cache, eager and compiled (on a CPU, where
``generate`` does not compile by itself and it takes minutes, with ``--compiled`` only), all threads
of a CPU at work.  The models take turns, and the best of some runs of
each counts; the first is for warming up.  The floor is the bytes that a token reads, over the rate
of bytes measured first.  The weights are random, but for ``smollm2``; those of the
factors always are, for a multiplication takes as long whatever is multiplied.
"""

import argparse
import copy
import json
import sys
import time
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, CompileConfig, LlamaConfig, LlamaForCausalLM

import slr
from slr.checkpoint.named import place
from slr.evaluate.origin import provenance
from slr.layer import native
from slr.layer.rounded import layer_of
from slr.matrix.result import Coded

sys.path.insert(0, str(Path(__file__).parent))  # however this file is run
from linear import rates

SHAPES = {  # as LlamaConfig wants them, whose defaults are LLaMA-7B's; and the rank, width / 32
    "llama-7b": ({}, 128),
    "tinyllama": (
        {
            "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
            "num_attention_heads": 32, "num_key_value_heads": 4,
        },
        64,
    ),
    "smollm2": (None, 18),
    "toy": (
        {
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "vocab_size": 128,
        },
        2,
    ),
}  # fmt: skip
WAYS = {"2:4": "2:4", "50%": "0.5"}  # patterns
CODES = {"int8": "int8", "int4": "int4 by 64"}  # grids; on a CPU, where codes have kernels


def build(shape: str, device: str) -> nn.Module:
    """A dense model in bfloat16."""
    if shape == "smollm2":
        folder = place(shape)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    config = LlamaConfig(**SHAPES[shape][0], eos_token_id=None)
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


@torch.no_grad()
def replace_(model: nn.Module, rank: int, pattern: str) -> nn.Module:
    """Each linear of a block becomes its sparse part by magnitude and random factors, in place."""
    for name, layer in list(model.model.layers.named_modules()):
        if isinstance(layer, nn.Linear):
            W = layer.weight.data
            mask = slr.patterns.parse(pattern).select(W.float().abs())
            (m, n), small = W.shape, W.std() / max(rank, 1) ** 0.5
            B, A = torch.randn(m, rank).to(W), torch.randn(rank, n).to(W) * small
            new = slr.SLRLinear(W * mask, B, A, mask=mask, pattern=pattern)
            model.model.layers.set_submodule(name, new)
    return model.requires_grad_(False)


@torch.no_grad()
def round_(model: nn.Module, rank: int, name: str) -> nn.Module:
    """The same with all entries, as codes, and factors in int8."""
    grid, int8 = slr.Grid.parse(name), slr.Grid(8)
    for layer_name, layer in list(model.model.layers.named_modules()):
        if isinstance(layer, nn.Linear):
            W = layer.weight.data
            (m, n), small = W.shape, W.std() / max(rank, 1) ** 0.5
            low = torch.randn(rank, m), torch.randn(rank, n) * small.float()
            coded = Coded(grid.rounded(W), *(int8.rounded(part) for part in low))
            B, A = (part.values().to(W) for part in coded[1:])
            S, every = coded.sparse.values().to(W), torch.ones_like(W, dtype=torch.bool)
            new = layer_of(slr.Refined(S, B.T, A, (), every, coded))
            model.model.layers.set_submodule(layer_name, new)
    return model.requires_grad_(False)


@torch.no_grad()
def seconds(model, new: int, compiled: bool) -> float:
    """Of one continuation."""
    ids = torch.arange(1, 9, device=model.device)[None]
    options = {"cache_implementation": "static", "disable_compile": not compiled}
    if compiled and model.device.type == "cpu":
        options["compile_config"] = everywhere()
    wait = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    out = model.generate(
        ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, **options
    )
    wait()
    assert out.shape[1] == 8 + new
    return time.perf_counter() - started


def everywhere() -> CompileConfig:
    """``generate`` compiles a step of one token on a CPU too, inputs read once."""
    options = slr.compile_options()
    config = CompileConfig(fullgraph=True, dynamic=None, mode=None, options=options)
    config._compile_all_devices = True
    return config


def linear_bytes(model: nn.Module) -> int:
    """Of all linear layers of the blocks."""
    kinds = (nn.Linear, slr.SLRLinear)
    layers = [m for m in model.model.layers.modules() if isinstance(m, kinds)]
    return sum(t.nbytes for m in layers for t in [*m.parameters(), *m.buffers()])


def token_bytes(model: nn.Module) -> int:
    """Of all that a token reads: the blocks, the norm behind them and the head."""
    parts = (model.model.layers, model.model.norm, model.lm_head)
    return sum(t.nbytes for part in parts for t in [*part.parameters(), *part.buffers()])


def main() -> int:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shapes", help=f"of {', '.join(SHAPES)}, separated by commas")
    parser.add_argument("--rank", type=int, help="default: 1/32 of the width")
    parser.add_argument("--new", type=int, default=64, help="tokens")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="on a CPU too")
    parser.add_argument("--rates", type=int, default=512, help="MiB copied for the rate of bytes")
    parser.add_argument("--out", type=Path, help="folder for decode.json")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; --device cpu measures smaller models", file=sys.stderr)
        return 2
    shapes = args.shapes or ("llama-7b" if args.device == "cuda" else "smollm2,tinyllama")
    torch.manual_seed(0)
    origin, rows = provenance(), []  # before what is stored changes the repository
    rate = rates(args.device, torch.bfloat16, args.rates << 20, 2048)
    for shape in shapes.split(","):
        rank = args.rank or SHAPES[shape][1]
        models = {"dense": build(shape, args.device)}
        for way, pattern in WAYS.items():
            models[way] = replace_(copy.deepcopy(models["dense"]), rank, pattern)
        for way, grid in CODES.items() if args.device == "cpu" else ():
            models[way] = round_(copy.deepcopy(models["dense"]), rank, grid)
        both = args.compiled or args.device == "cuda"
        for compiled in [False, True] if both else [False]:
            best: dict[str, float] = {}
            for run in range(args.runs + 1):
                for way, model in models.items():
                    took = seconds(model, args.new, compiled)
                    best[way] = min(best.get(way, took), took) if run > 1 else took
            for way, model in models.items():
                row = {"shape": shape, "rank": rank, "way": way, "compiled": compiled}
                row |= {"linear bytes": linear_bytes(model), "token bytes": token_bytes(model)}
                row |= {"tokens/s": args.new / best[way], "speed-up": best["dense"] / best[way]}
                floor = row["token bytes"] / rate["bytes GB/s"] / 1e9
                rows.append({**row, "over floor": best[way] / args.new / floor})
                print(rows[-1])
            store(args.out, {**origin, "rates": rate}, rows)
        del models
        torch.compiler.reset()  # it compiles so many programs of one function and no more
    return 0


def store(folder: Path | None, origin: dict, rows: list[dict]) -> None:
    """What there is so far, where it was measured and how."""
    if folder is None:
        return
    command = "python " + " ".join(["benchmarks/decode.py", *sys.argv[1:]])
    found = {"command": command, **origin, "native": native.in_use()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "decode.json").write_text(json.dumps({**found, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
