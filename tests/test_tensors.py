"""Which files and tensors are the model: as transformers takes them, whole and streamed alike."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import slr
from slr.model.tensors import INDEX, TensorFiles

SINGLE = "model.safetensors"
PRUNE = slr.Recipe(prune="magnitude", refine="none")
IDS = torch.randint(96, (2, 12), generator=torch.Generator().manual_seed(1))


def made(folder, tied=True, dtype=torch.float32, **saving):
    config = AutoConfig.for_model(
        "llama", vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder, **saving)
    return model


def edited(folder, edit):
    tensors = load_file(folder / SINGLE)
    edit(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def renamed(folder, rename):
    tensors = {rename(k): v for k, v in load_file(folder / SINGLE).items()}
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def no_dtype(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))


def stale_shards(folder):
    made(folder, max_shard_size="20KB")
    zero = {f: load_file(f) for f in folder.glob("*.safetensors")}
    for file, tensors in zero.items():
        save_file({k: v * 0 for k, v in tensors.items()}, file, metadata={"format": "pt"})
    made(folder.with_name("single"))
    shutil.copy(folder.with_name("single") / SINGLE, folder)


def consolidated(folder):
    made(folder, max_shard_size="20KB")
    save_file({"output.weight": torch.zeros(3)}, folder / "consolidated.safetensors")


def only_consolidated(folder):
    made(folder)
    (folder / SINGLE).rename(folder / "consolidated.safetensors")


def no_index(folder):
    made(folder, max_shard_size="20KB")
    (folder / INDEX).unlink()


def absent_shard(folder):
    made(folder, max_shard_size="20KB")
    next(folder.glob("model-00002*")).unlink()


def index_elsewhere(folder):
    made(folder, max_shard_size="20KB")
    index = json.loads((folder / INDEX).read_text())
    name = next(iter(index["weight_map"]))
    shutil.copy(folder / index["weight_map"][name], folder.parent / "other.safetensors")
    index["weight_map"][name] = "../other.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def odd_index(folder):
    made(folder, max_shard_size="20KB")
    (folder / INDEX).write_text('{"weight_map": [1]}')


def base_model(tied):
    def make(folder):
        made(folder, tied).model.save_pretrained(folder)

    return make


def head(change):
    def make(folder):
        made(folder)
        edited(folder, change)

    return make


def only_head(tensors):
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


def both_equal(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def both_differ(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()


def twice(tensors):
    tensors["layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"] * 2


def buffers(tensors):
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)


def lost(name, shape=(2, 32)):
    return head(lambda tensors: tensors.update({name: torch.ones(shape)}))


def mixed(tensors):
    for i, name in enumerate(tensors):
        tensors[name] = tensors[name].to(torch.float16 if i % 2 else torch.bfloat16)


def mixed_dtypes(folder):
    head(mixed)(folder)
    no_dtype(folder)


def cast(dtype):
    def change(tensors):
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].to(dtype)

    return head(change)


def prefixed(prefix):
    def make(folder):
        made(folder)
        renamed(folder, lambda name: prefix + name)

    return make


READ = {
    "single": made,
    "shards": lambda folder: made(folder, max_shard_size="20KB"),
    "stale shards": stale_shards,
    "consolidated beside": consolidated,
    "base": base_model(True),
    "only head": head(only_head),
    "both equal": head(both_equal),
    "both differ": head(both_differ),
    "buffers": head(buffers),
    "mixed": mixed_dtypes,
}
REFUSED = {
    "only consolidated": (only_consolidated, "has neither model.safetensors nor"),
    "no index": (no_index, "has neither model.safetensors nor"),
    "absent": (absent_shard, "which its index names"),
    "elsewhere": (index_elsewhere, "'../other.safetensors', which is no file beside it"),
    "odd index": (odd_index, "has no weight_map"),
    "base without head": (base_model(False), "lm_head.weight"),
    "module": (prefixed("module."), "module."),
    "compiled": (prefixed("_orig_mod."), "_orig_mod."),
    "twice": (head(twice), "layers.0.mlp.up_proj.weight"),
    "score": (lost("score.weight"), "score.weight"),
    "value head": (lost("v_head.summary.weight"), "v_head.summary.weight"),
    "adapter inside": (
        lost("model.layers.0.self_attn.q_proj.lora_A.weight"), "q_proj.lora_A.weight"
    ),
    "more blocks": (lost("model.layers.2.mlp.up_proj.weight"), "layers.2.mlp.up_proj"),
    "float8": (cast(torch.float8_e4m3fn), "up_proj.weight has dtype F8_E4M3"),
    "int8": (cast(torch.int8), "up_proj.weight"),
}  # fmt: skip


@pytest.mark.parametrize("layout", READ)
def test_what_transformers_reads_is_read_alike(layout, tmp_path):
    source = tmp_path / "source"
    READ[layout](source)
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        theirs = theirs.eval()(input_ids=IDS, labels=IDS).loss.exp()
    whole = slr.perplexity(source, IDS, dtype=torch.float32)
    assert whole == pytest.approx(float(theirs), rel=1e-5)
    assert slr.perplexity(source, IDS, dtype=torch.float32, stream=True) == pytest.approx(whole)
    slr.compress(source, PRUNE, out=tmp_path / "out")
    small = slr.perplexity(tmp_path / "out", IDS, dtype=torch.float32)
    assert slr.perplexity(tmp_path / "out", IDS, stream=True, dtype=torch.float32) == pytest.approx(
        small
    )
    dense = slr.load(source, dtype=torch.float32)
    slr.compress(dense, PRUNE)
    assert slr.perplexity(dense, IDS) == pytest.approx(small, rel=2e-2)


@pytest.mark.parametrize("layout", REFUSED)
def test_what_is_not_the_model_is_refused_by_all(layout, tmp_path):
    source = tmp_path / "source"
    make, says = REFUSED[layout]
    make(source)
    for call in (
        lambda: slr.compress(source, PRUNE, out=tmp_path / "out"),
        lambda: slr.perplexity(source, IDS, stream=True),
        lambda: slr.load(source),
    ):
        with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as error:
            call()
        assert says in str(error.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_an_adapter_beside_the_model_is_carried_or_refused(tmp_path):
    peft = pytest.importorskip("peft")
    source = tmp_path / "source"
    model = made(source)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(source)
    told = json.loads((source / "adapter_config.json").read_text())
    told["base_model_name_or_path"] = str(source)
    (source / "adapter_config.json").write_text(json.dumps(told))
    with torch.no_grad():
        wanted = adapted.eval()(input_ids=IDS, labels=IDS).loss.exp()
    assert slr.perplexity(slr.load(source), IDS) == pytest.approx(float(wanted), rel=1e-5)
    for call in (
        lambda: slr.compress(source, PRUNE, out=tmp_path / "out"),
        lambda: slr.perplexity(source, IDS, stream=True),
    ):
        with pytest.raises(ValueError, match="holds an adapter"):
            call()


def test_the_dtype_is_the_configurations_or_the_majoritys(tmp_path):
    made(tmp_path / "a", dtype=torch.float32)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    slr.compress(tmp_path / "a", PRUNE, out=tmp_path / "b")
    stored = TensorFiles(tmp_path / "b").headers().values()
    assert {dtype for _, dtype in stored} == {"BF16", "U8"}
    assert slr.load(tmp_path / "b").dtype == torch.bfloat16
    no_dtype(tmp_path / "a")
    edited(tmp_path / "a", lambda t: t.update({"model.norm.weight": t["model.norm.weight"].half()}))
    assert TensorFiles(tmp_path / "a").dtype == torch.float32
    assert slr.load(tmp_path / "a").dtype == torch.float32


def test_the_bytes_do_not_depend_on_the_order_of_sets(tmp_path):
    mixed_dtypes(tmp_path / "source")
    code = "import sys, slr; slr.compress(sys.argv[1], slr.Recipe(prune='magnitude', rank=2, "
    code += "iterations=2), out=sys.argv[2])"
    for seed in "12":
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "source"), str(tmp_path / seed)],
            env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-1000:]
    files = sorted(file.name for file in (tmp_path / "1").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "2").iterdir())
    for name in files:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name
