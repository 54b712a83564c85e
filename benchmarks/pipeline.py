"""A whole model through ``slr compress``: time by stage, peak memory, bytes read and written.

    python benchmarks/pipeline.py --model tinyllama-1.1b [--work DIR] [-- options of slr compress]
    python benchmarks/pipeline.py --model llama-7b --out results/measured/pipeline/llama-7b.json
    python benchmarks/pipeline.py --model llama-7b --evaluate 2

Makes a checkpoint of a published shape (random weights with a realistic spectrum: power law plus
heavy-tailed noise, bfloat16, one shard a block), compresses it in a process of its own, reads the
result back block by block, and prints the table.  Weights are random, so nothing is said of
perplexity.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import slr
from slr.evaluate.origin import provenance
from slr.model.stream import Stream

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    "vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2, "dtype": "bfloat16",
}  # fmt: skip
MODELS = {
    "tinyllama-1.1b": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
        "num_attention_heads": 32, "num_key_value_heads": 4,
    },
    "llama-7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32,
    },
}  # fmt: skip


def linears(config: dict) -> dict[str, tuple[int, int]]:
    """Shape of each linear of a block."""
    d, f = config["hidden_size"], config["intermediate_size"]
    kv = d * config["num_key_value_heads"] // config["num_attention_heads"]
    return {
        "self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, d), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
    }  # fmt: skip


def synthetic(name: str, folder: Path) -> None:
    """Write the checkpoint, unless it is there."""
    config = {**LLAMA, **MODELS[name]}
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    g = torch.Generator().manual_seed(0)
    smooth = {}
    for m, n in set(linears(config).values()):
        s = torch.arange(1, 257) ** -0.6
        smooth[m, n] = (torch.randn(m, 256, generator=g) * s) @ torch.randn(256, n, generator=g)
        smooth[m, n] /= smooth[m, n].std()

    def weight(m: int, n: int) -> torch.Tensor:
        noise = torch.randn(m, n, generator=g)
        noise *= noise.abs().sqrt_()
        return (0.02 * (smooth[m, n][torch.randperm(m, generator=g)] + noise)).bfloat16()

    total, where, d = config["num_hidden_layers"] + 1, {}, config["hidden_size"]
    ones = torch.ones(d, dtype=torch.bfloat16)
    for i in range(total):
        file = f"model-{i + 1:05d}-of-{total:05d}.safetensors"
        if i + 1 < total:
            prefix = f"model.layers.{i}."
            tensors = {
                f"{prefix}{k}.weight": weight(*shape) for k, shape in linears(config).items()
            }
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}{norm}.weight"] = ones.clone()
        else:
            shape = (config["vocab_size"], d)
            tensors = {
                "model.embed_tokens.weight": torch.randn(shape, generator=g).bfloat16(),
                "lm_head.weight": 0.02 * torch.randn(shape, generator=g).bfloat16(),
                "model.norm.weight": ones.clone(),
            }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in slr.tiny.path().glob("tokenizer*"):
        shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps(config))


class Watch(threading.Thread):
    """Peak resident memory of a process, looked at ten times a second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.anonymous, self.resident = pid, 0, 0

    def run(self) -> None:
        try:
            while True:
                status = Path(f"/proc/{self.pid}/status").read_text()
                fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
                self.resident = max(self.resident, int(fields["VmHWM"].split()[0]) * 1024)
                self.anonymous = max(self.anonymous, int(fields["RssAnon"].split()[0]) * 1024)
                time.sleep(0.1)
        except (OSError, KeyError, ValueError):
            return


def size(folder: Path, part: str = "") -> int:
    """Bytes of a folder's tensors whose name holds `part`."""
    from safetensors import safe_open

    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                if part in name:
                    total += handle.get_tensor(name).nbytes
    return total


def watched(*arguments: str) -> tuple[dict, Watch, float]:
    """Run the slr command; what it said as JSON, its memory, its seconds."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "slr.cli", *arguments, "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    watch = Watch(process.pid)
    watch.start()
    said, _ = process.communicate()
    if process.returncode:
        raise SystemExit(process.returncode)
    return json.loads(said), watch, time.perf_counter() - started


def evaluated(source: Path, windows: int) -> dict:
    """Streamed perplexity of the dense checkpoint: time and peak memory."""
    told, watch, seconds = watched(
        "eval", str(source), "--stream", "--limit", str(windows), "--seqlen", "2048",
        "--dtype", "bfloat16",
    )  # fmt: skip
    tokens = told["windows"] * told["seqlen"]
    return {
        "evaluate, s": seconds,
        "tokens": tokens,
        "tokens / s": tokens / seconds,
        "peak resident, GB": watch.resident / 1e9,
        "of it anonymous, GB": watch.anonymous / 1e9,
    }


def compressed(source: Path, target: Path, options: list[str]) -> dict:
    """Compress, and read the result back block by block."""
    told, watch, seconds = watched("compress", str(source), "--out", str(target), *options)
    rows = {"compress, s": seconds}
    for stage in ("read", "calibrate", "layer", "write"):
        rows[f"of it {stage}, s"] = told[f"{stage}_seconds"]
    rows["tensors read, GB"] = told["bytes_read"] / 1e9
    rows["tensors written, GB"] = told["bytes_written"] / 1e9
    rows["layers"] = told["layers"]
    rows["mean relative error, pruned"] = told["pruned_error"]
    rows["mean relative error"] = told["error"]
    rows["peak resident, GB"] = watch.resident / 1e9
    rows["of it anonymous, GB"] = watch.anonymous / 1e9

    started = time.perf_counter()
    stream = Stream(target)
    for index in range(len(stream.blocks)):
        name, block = stream.block(index)
        stream.fill(name, block)
        assert all(p.isfinite().all() for p in block.parameters())
        stream.empty(block)
    rows["read back block by block, s"] = time.perf_counter() - started
    rows["source, GB"], rows["result, GB"] = size(source) / 1e9, size(target) / 1e9
    ratio = size(target, "_proj.") / size(source, "_proj.")
    rows["linear layers, result / source"] = ratio
    return rows


def main() -> None:
    """Make, compress, read back, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="tinyllama-1.1b")
    parser.add_argument("--work", type=Path, default=Path("build/pipeline"))
    parser.add_argument("--keep", action="store_true", help="the folders, for another run")
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument(
        "--evaluate", type=int, metavar="WINDOWS", help="instead: streamed perplexity, on so many"
    )
    parser.add_argument("options", nargs="*", help="of slr compress, after --")
    args = parser.parse_args()
    options = args.options or ["--prune", "magnitude", "--pattern", "2:4"]
    source, target = args.work / args.model, args.work / f"{args.model}-slr"
    shutil.rmtree(target, ignore_errors=True)
    started = time.perf_counter()
    synthetic(args.model, source)
    rows = {"make the checkpoint, s": time.perf_counter() - started}

    if args.evaluate:
        rows |= evaluated(source, args.evaluate)
    else:
        rows |= compressed(source, target, options)

    width = max(map(len, rows))
    what = "eval --stream" if args.evaluate else f"compress {' '.join(options)}"
    print(f"{args.model}: slr {what}, {os.cpu_count()} CPUs")
    for key, value in rows.items():
        print(f"{key:<{width}}  {value:,.4g}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        about = {"command": "python " + " ".join(sys.argv), "options": options, **provenance()}
        args.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    if not args.keep:
        shutil.rmtree(target, ignore_errors=True)
        shutil.rmtree(source)


if __name__ == "__main__":
    main()
