"""Logits a few tokens at a time: what the model itself gives, in little memory."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import slr
from slr.evaluate.agree import agreement
from slr.model import heads
from slr.model.stream import FAMILIES

SIZES = {
    "vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "pad_token_id": 0,
    "max_position_embeddings": 64, "initializer_range": 0.5,
}  # fmt: skip
MORE = {
    "gemma3_text": {"final_logit_softcapping": 2.0},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 8},  # with project_in and project_out
}


def model_of(kind, **sizes):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **{**SIZES, **MORE.get(kind, {}), **sizes})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_gives_its_own_logits(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(heads, "LOGITS_AT_ONCE", 300 * 7)
    model, windows = model_of(kind), torch.randint(300, (3, 20))
    with torch.no_grad():
        expected = model(input_ids=windows).logits[:, :-1].flatten(0, 1)
        parts = list(heads.logits(model, windows))
    assert [len(part) for part in parts] == [7] * 8 + [1]
    assert torch.allclose(torch.cat(parts), expected, atol=1e-5)
    loss = torch.nn.functional.cross_entropy(expected.double(), windows[:, 1:].flatten())
    assert slr.perplexity(model, windows) == pytest.approx(math.exp(loss), rel=1e-5)
    assert agreement(model, model, windows).loss.mean() == pytest.approx(float(loss), rel=1e-5)
    model.save_pretrained(tmp_path)
    streamed = slr.perplexity(tmp_path, windows.int(), stream=True)
    assert streamed == pytest.approx(math.exp(loss), rel=1e-5)


def test_an_adapter_on_the_head_counts():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        model_of("llama", tie_word_embeddings=False),
        peft.LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False),
    ).eval()
    windows = torch.randint(300, (2, 10))
    with torch.no_grad():
        logits = model(input_ids=windows).logits[:, :-1].double().flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, windows[:, 1:].flatten())
    assert slr.perplexity(model, windows) == pytest.approx(math.exp(loss), rel=1e-5)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation gives."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for value in found if isinstance(found, tuple | list) else [found]:
            if isinstance(value, torch.Tensor) and value.device.type != "meta":
                self.bytes = max(self.bytes, value.untyped_storage().nbytes())
        return found


@pytest.mark.parametrize("how", ["whole", "streamed", "agreement"])
def test_a_large_vocabulary_takes_little_memory(how, tmp_path):
    """A few tensors of 40 MB at most: below 300 MB for 262,144 tokens, however many positions."""
    sizes = {
        "vocab_size": 262_144,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = model_of("llama", **sizes, max_position_embeddings=512, tie_word_embeddings=True)
    windows = torch.randint(262_144, (1, 400))  # their logits would be 418 MB
    model.save_pretrained(tmp_path)
    with Largest() as seen:
        if how == "agreement":
            agreement(model, model, windows)
        else:
            slr.perplexity(tmp_path, windows, stream=how == "streamed")
    assert 10e6 < seen.bytes < 40e6
