"""An export to GGUF: S with its zeros, its factors as an adapter, and what llama.cpp makes of them.

llama.cpp itself is asked where node and node-llama-cpp are: ``SLR_NODE_LLAMA`` names a folder with
its ``node_modules``, as ``.ci/run`` makes one.
"""

import json
import os
import re
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Fast
from typer.testing import CliRunner

import slr
from slr.checkpoint import gguf_export
from slr.checkpoint.gguf_vocabulary import LLAMA_3, write_vocabulary
from slr.checkpoint.journal import Journal
from slr.cli import app

gguf = pytest.importorskip("gguf")

NODE = os.environ.get("SLR_NODE_LLAMA")
RECIPE = slr.Recipe(
    prune="magnitude", refine="weights", rank=6, iterations=2,
    overrides={"*.q_proj": {"rank": 3}, "*.o_proj": {"refine": "none"}}, skip=["*.1.*.up_proj"],
)  # fmt: skip


def llama(folder, **options):
    """A random LLaMA as a folder, with the embedded tokenizer; untied if not told otherwise."""
    torch.manual_seed(3)
    sizes = {
        "vocab_size": 4100, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "max_position_embeddings": 256, "initializer_range": 0.2,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**{**sizes, **options})).to(torch.bfloat16).save_pretrained(folder)
    for file in slr.tiny.path().glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Without biases, untied, heads wider than the model's share, layers of two ranks."""
    place = tmp_path_factory.mktemp("gguf")
    slr.compress(llama(place / "dense"), RECIPE, out=place / "c")
    return place / "c"


@pytest.fixture(scope="module")
def biased(small, tmp_path_factory):
    """With biases, tied, layers of one rank."""
    out = tmp_path_factory.mktemp("gguf") / "c"
    slr.compress(small, slr.Recipe(prune="magnitude", rank=5, iterations=2), out=out)
    return out


def tensors(file):
    return {t.name: t for t in gguf.GGUFReader(file).tensors}


def values(tensor):
    return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())


def field(file, name):
    found = gguf.GGUFReader(file).get_field(name)
    return None if found is None else found.contents()


def straight(rows, heads):
    """The rows of q or k in transformers' order again, written anew: even ones, then odd ones."""
    d = rows.shape[0] // heads
    order = [h * d + i for h in range(heads) for i in (*range(0, d, 2), *range(1, d, 2))]
    back = torch.empty_like(rows)
    at = [h * d + i for h in range(heads) for i in range(d)]
    back[at] = rows[order]
    return back


def layers(model):
    """Name in GGUF, layer and heads of every layer that is compressed."""
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, layer in model.named_modules():
        if isinstance(layer, slr.SLRLinear):
            _, _, number, inner = name.split(".", 3)
            told = f"blk.{number}.{gguf_export.NAMES[inner]}.weight"
            yield told, layer, heads.get(name.rpartition(".")[2])


@pytest.mark.parametrize("outtype", gguf_export.OUTTYPES)
def test_the_base_is_s_in_its_type_with_its_zeros(folder, tmp_path, outtype):
    slr.export(folder, tmp_path / "out", "gguf", outtype=outtype)
    found = tensors(tmp_path / "out" / "base.gguf")
    model = slr.load(folder, dtype=torch.float32)
    close = {"f32": 0, "bf16": 0, "f16": 2**-11, "q8_0": 0.5 / 127, "q4_0": 1 / 8}[outtype]
    seen = 0
    for name, layer, heads in layers(model):
        S, tensor = layer.weight, found[name]
        assert tensor.tensor_type.name == outtype.upper()
        read = values(tensor)
        read = straight(read, heads) if heads else read
        assert not read[S == 0].any(), name
        peak = S.view(S.shape[0], -1, 32).abs().amax(-1, keepdim=True).expand(-1, -1, 32)
        scale = 2**-10 if outtype.startswith("q") else 0  # is rounded itself
        assert bool(((read - S).abs() <= (close + scale) * peak.reshape(S.shape) + 1e-7).all())
        seen += 1
    assert seen == 13
    kinds = {name: tensor.tensor_type.name for name, tensor in found.items()}
    assert kinds["blk.0.attn_norm.weight"] == kinds["output_norm.weight"] == "F32"
    assert kinds["blk.1.ffn_up.weight"] == outtype.upper()  # dense: it was skipped
    outer = "Q8_0" if outtype == "q4_0" else outtype.upper()
    assert kinds["token_embd.weight"] == kinds["output.weight"] == outer
    assert torch.equal(
        values(found["blk.1.ffn_norm.weight"]),
        model.model.layers[1].post_attention_layernorm.weight,
    )
    assert len(found) == 3 + 2 * 9


def test_rows_that_are_no_multiple_of_a_block_stay_16_bits(tmp_path):
    source = llama(tmp_path / "dense", intermediate_size=144)
    slr.compress(source, RECIPE, out=tmp_path / "c")
    slr.export(tmp_path / "c", tmp_path / "out", "gguf", outtype="q4_0")
    found = tensors(tmp_path / "out" / "base.gguf")
    kinds = {name: found[f"blk.0.ffn_{name}.weight"].tensor_type.name for name in ("up", "down")}
    assert kinds == {"up": "Q4_0", "down": "F16"}


@pytest.mark.parametrize("outtype", ["f32", "f16"])
def test_the_adapter_is_the_factors(folder, biased, tmp_path, outtype):
    for source, alpha in ((folder, 0.0), (biased, 5.0)):  # ranks differ, or do not
        out = slr.export(source, tmp_path / source.parent.name, "gguf", outtype=outtype)
        file, wanted = out / "adapter.gguf", set()
        assert field(file, "general.type") == "adapter"
        assert field(file, "general.architecture") == "llama"
        assert field(file, "adapter.type") == "lora"
        assert field(file, "adapter.lora.alpha") == alpha
        found = tensors(file)
        for name, layer, heads in layers(slr.load(source, dtype=torch.float32)):
            if layer.rank:
                wanted |= {f"{name}.lora_a", f"{name}.lora_b"}
                A, B = values(found[f"{name}.lora_a"]), values(found[f"{name}.lora_b"])
                B = straight(B, heads) if heads else B
                step = 0 if outtype == "f32" else 2**-25  # of the smallest numbers
                assert torch.allclose(A, layer.A, rtol=0, atol=step)
                assert torch.allclose(B, layer.B, rtol=0, atol=step)
                scale = alpha / layer.rank if alpha else 1.0  # as llama.cpp computes it
                assert scale == 1
        assert set(found) == wanted


def test_biases_are_reordered_too(biased, tmp_path):
    slr.export(biased, tmp_path / "out", "gguf")
    found = tensors(tmp_path / "out" / "base.gguf")
    for name, layer, heads in layers(slr.load(biased, dtype=torch.float32)):
        if layer.bias is not None:
            read = values(found[name.replace("weight", "bias")])
            assert torch.equal(straight(read, heads) if heads else read, layer.bias)
    assert "output.weight" not in found  # tied


def test_transformers_reads_the_base_as_the_sparse_part_alone(folder, tmp_path):
    slr.export(folder, tmp_path / "out", "gguf")
    options = {"gguf_file": "base.gguf", "local_files_only": True}
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, **options)
    ours = slr.load(folder, dtype=torch.float32)
    for layer in ours.modules():
        if isinstance(layer, slr.SLRLinear):
            layer.B.data.zero_()
    ids = torch.randint(4000, (2, 20))
    with torch.no_grad():
        assert torch.allclose(read(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-4)
    for name in ("max_position_embeddings", "rms_norm_eps", "head_dim", "num_key_value_heads"):
        assert getattr(read.config, name) == pytest.approx(getattr(ours.config, name))
    tokenizer = slr.load_tokenizer(folder)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", **options)
    text = slr.data.corpus("validation")[:3000]
    assert theirs(text).input_ids == tokenizer(text).input_ids


def test_a_model_without_low_rank_parts_has_no_adapter(small, tmp_path):
    slr.compress(small, slr.Recipe(prune="magnitude", refine="none"), out=tmp_path / "c")
    slr.export(tmp_path / "c", tmp_path / "out", "gguf")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"base.gguf", "README.md", "SHA256SUMS"}
    assert "no adapter" in (tmp_path / "out" / "README.md").read_text()


def test_it_appears_whole_and_goes_on_after_a_whole_file(folder, tmp_path, monkeypatch):
    slr.export(folder, tmp_path / "calm", "gguf")
    real, written = Journal.add_file, []

    def add_file(self, name, *args):
        if name == "adapter.gguf" and len(written) == 1:
            raise KeyboardInterrupt
        written.append(name)
        real(self, name, *args)

    monkeypatch.setattr(Journal, "add_file", add_file)
    with pytest.raises(KeyboardInterrupt):
        slr.export(folder, tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="was begun differently"):
        slr.export(folder, tmp_path / "out", "gguf", outtype="q8_0")
    written.append("stopped")
    slr.export(folder, tmp_path / "out", "gguf")
    assert written == ["base.gguf", "stopped", "adapter.gguf"]
    for file in (tmp_path / "calm").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    assert not (tmp_path / "out.partial").exists()


def test_a_full_disk_leaves_nothing(folder, tmp_path, monkeypatch):
    def full(self, tensor):
        raise OSError("4096 requested and 12 written")  # as numpy says it

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(OSError, match=r"no space left for .*out; nothing is written"):
        slr.export(folder, tmp_path / "out", "gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"outtype": "q5_k"}, "outtype 'q5_k' is unknown; it must be one of f32, bf16, f16, q8_0"),
        ({"outtype": "f16", "to": "dense"}, "outtype 'f16' has no effect with to='dense'"),
    ],
)
def test_bad_types_are_named(folder, tmp_path, options, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        slr.export(folder, tmp_path / "out", **{"to": "gguf", **options})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"model_type": "qwen2"},
            "model type 'qwen2' cannot be written as GGUF yet; it must be ll",
        ),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not llama.cpp's; it must be 'silu'"),
        (
            {"rope_parameters": {"rope_type": "yarn"}},
            "rope_type 'yarn' is not supported; it must be default, linear, llama3",
        ),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(change, says):
    config = LlamaConfig()
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=re.escape(says)):
        gguf_export._check(config)


def test_another_family_and_a_value_beyond_its_type_leave_nothing(small, tmp_path):
    raw = json.loads((slr.tiny.path() / "config.json").read_text())
    raw = {k: v for k, v in raw.items() if "bias" not in k} | {"model_type": "mistral"}
    shutil.copytree(slr.tiny.path(), tmp_path / "dense")
    raw["architectures"] = ["MistralForCausalLM"]
    (tmp_path / "dense" / "config.json").write_text(json.dumps(raw))
    recipe = slr.Recipe(prune="magnitude", refine="none")
    slr.compress(tmp_path / "dense", recipe, out=tmp_path / "c")
    with pytest.raises(ValueError, match="model type 'mistral' cannot be written"):
        slr.export(tmp_path / "c", tmp_path / "out", "gguf")
    model = slr.load(small)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = 1e6
    model.save_pretrained(tmp_path / "loud")
    for file in small.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "loud")
    slr.compress(tmp_path / "loud", recipe, out=tmp_path / "l")
    with pytest.raises(
        ValueError, match=r"tensor blk\.1\.ffn_up\.weight holds 9.99e\+05, too large"
    ):
        slr.export(tmp_path / "l", tmp_path / "out", "gguf")
    assert not [file for file in tmp_path.iterdir() if "out" in file.name]


def fast(cut, **model):
    """The embedded tokenizer, cutting texts otherwise."""
    raw = json.loads((slr.tiny.path() / "tokenizer.json").read_text(encoding="utf-8"))
    raw["model"] |= model
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    if cut is not None:
        tokenizer.pre_tokenizer = cut
    return Fast(tokenizer_object=tokenizer, bos_token="<|endoftext|>")


LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
DIGITS = pre_tokenizers.Digits(individual_digits=True)
SPLIT = pre_tokenizers.Split(Regex(LLAMA_3), "isolated")


@pytest.mark.parametrize(
    ("cut", "model", "pre"),
    [
        (None, {}, "gpt-2"),
        ([DIGITS, pre_tokenizers.ByteLevel(add_prefix_space=False)], {}, "smollm"),
        ([SPLIT, LEVEL], {"ignore_merges": True}, "llama-bpe"),
        ([SPLIT, LEVEL], {}, None),
        ([pre_tokenizers.Whitespace()], {}, None),
        ([pre_tokenizers.ByteLevel(add_prefix_space=True)], {}, None),
    ],
)
def test_the_way_of_cutting_is_named_or_refused(cut, model, pre, tmp_path):
    tokenizer = fast(cut and pre_tokenizers.Sequence(cut), **model)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    if pre is None:
        with pytest.raises(ValueError, match="has no name that is known to llama"):
            write_vocabulary(writer, tokenizer, 4100)
        return
    write_vocabulary(writer, tokenizer, 4100)
    kept = {key: value.value for key, value in writer.kv_data[0].items()}
    assert kept["tokenizer.ggml.pre"] == pre
    assert kept["tokenizer.ggml.model"] == "gpt2"
    assert kept["tokenizer.ggml.bos_token_id"] == 0
    assert kept["tokenizer.ggml.add_bos_token"] is False
    assert kept["tokenizer.ggml.token_type"][0] == gguf.TokenType.CONTROL
    assert kept["tokenizer.ggml.tokens"][-1] == "[PAD4099]"
    assert kept["tokenizer.ggml.token_type"][-1] == gguf.TokenType.UNUSED
    with pytest.raises(ValueError, match="tokenizer has the id 4095; the embedding has 99 rows"):
        write_vocabulary(gguf.GGUFWriter(tmp_path / "y.gguf", "llama"), tokenizer, 99)


ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip


def test_the_command_writes_it_and_says_how_large_it_is(folder, tmp_path):
    arguments = ["export", folder, "--to", "gguf", "--out", tmp_path / "out", "--outtype", "Q8_0"]
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    assert "base.gguf" in done.stdout
    assert "adapter.gguf" in done.stdout
    assert "matrices as Q8_0" in (tmp_path / "out" / "README.md").read_text()
    kind = gguf.LlamaFileType.MOSTLY_Q8_0
    assert field(tmp_path / "out" / "base.gguf", "general.file_type") == kind


def test_llama_3s_rotary_frequencies_are_divided(tmp_path):
    slr.compress(llama(tmp_path / "dense", rope_parameters=ROPE), RECIPE, out=tmp_path / "c")
    slr.export(tmp_path / "c", tmp_path / "out", "gguf")
    factors = values(tensors(tmp_path / "out" / "base.gguf")["rope_freqs.weight"])
    assert factors.shape == (16,)
    assert float(factors[0]) == pytest.approx(1)
    assert float(factors[-1]) == pytest.approx(8)
    assert bool((factors.diff() > -1e-5).all())


@pytest.mark.skipif(
    NODE is None or shutil.which("node") is None,
    reason="needs node, and SLR_NODE_LLAMA: a folder with node_modules/node-llama-cpp",
)
@pytest.mark.parametrize("kind", ["two ranks", "biased", "rotary", "embedded", "no adapter"])
def test_llama_cpp_computes_the_same(kind, folder, biased, tmp_path):
    helper = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "llama_cpp.py"))
    source = {"two ranks": folder, "biased": biased}.get(kind, tmp_path / "c")
    if kind == "rotary":
        slr.compress(llama(tmp_path / "dense", rope_parameters=ROPE), RECIPE, out=source)
    if kind == "embedded":
        slr.compress("tiny", slr.Recipe(prune="magnitude", rank=8, iterations=2), out=source)
    if kind == "no adapter":
        slr.compress("tiny", slr.Recipe(prune="magnitude", refine="none"), out=source)
    model, tokenizer = slr.load(source, dtype=torch.float32), slr.load_tokenizer(source)
    text, texts = slr.data.corpus("validation"), list(helper["TEXTS"])
    prompts = slr.data.windows(text, tokenizer, 20, 3).tolist()
    # 16 bits round activations too: of 400,000 log-probabilities the worst moved by 0.02.
    for outtype, close in (("f32", 1e-4), ("f16", 0.1)):
        out = slr.export(source, tmp_path / outtype, "gguf", outtype=outtype)
        ids, greedy, logs = helper["ask"](
            Path(NODE), out, texts, prompts, 12, model.config.vocab_size
        )
        assert ids == [tokenizer(t, add_special_tokens=False).input_ids for t in texts]
        whole = [prompt + more for prompt, more in zip(prompts, greedy, strict=True)]
        assert helper["difference"](model, whole, logs)[0] < close
        for prompt, more in zip(prompts, greedy, strict=True):
            with torch.no_grad():
                ours = model(torch.tensor([prompt + more])).logits[0, len(prompt) - 1 : -1]
            chosen = ours.gather(1, torch.tensor(more)[:, None])[:, 0]
            assert len(more) == 12
            assert bool((chosen > ours.amax(1) - 2 * close).all())
