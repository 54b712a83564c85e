"""Seeds, and for the tests a small random LLaMA as a checkpoint folder, and the embedded model."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

import shutil

import pytest
import torch
from hypothesis import HealthCheck, settings

import slr

# The same examples in every run, and no example is too slow: what passes once passes always.
# `make fuzz` takes other ones (--hypothesis-profile=random), and more of them.
calm = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("fixed", **calm, derandomize=True, max_examples=40)
settings.register_profile("random", **calm, max_examples=400, print_blob=True)
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Folder of a random two-block LLaMA, with biases, and the embedded tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        attention_bias=True, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("small")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for file in slr.tiny.path().glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def several():
    """While a module runs, compressed folders have several tensor files, as large models have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slr.checkpoint.finish.SMALL", 0)
        yield


@pytest.fixture(scope="session")
def text():
    """A few thousand characters of the validation corpus."""
    return slr.data.corpus("validation")[:20_000]
