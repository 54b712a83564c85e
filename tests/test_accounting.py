import pytest
import torch

import slr
from slr.checkpoint.sizes import checkpoint_account, model_account
from slr.model import account
from slr.model.account import matrix_account


def test_llama_7b_by_the_papers_rule():
    """8.6% fewer parameters: 55% pruned with rank 128, against 45% pruned (both by density)."""
    from transformers import LlamaConfig

    config = LlamaConfig()
    dense = model_account(config)
    plain = model_account(config, "0.45")
    repaired = model_account(config, "0.55", 128)
    assert round(dense.parameters) == 6_738_415_616
    assert round(plain.nonzero) == 3_824_213_197
    assert round(repaired.nonzero) == 3_496_428_339
    assert 1 - repaired.nonzero / plain.nonzero == pytest.approx(0.0857, abs=5e-5)
    assert dense.bytes == 2 * 6_738_415_616
    embedding = 32000 * 4096
    assert dense.flops == 2 * (6_738_415_616 - embedding - 65 * 4096)
    assert dense.decode_bytes == 2 * (6_738_415_616 - embedding + 4096)


def test_formats_by_hand():
    m, n, k = 64, 128, 4
    factors = k * (m + n)
    by = {
        s: matrix_account((m, n), "2:4", k, storage=s).bytes - 2 * factors for s in account.FORMATS
    }
    assert by["dense"] == m * n * 2
    assert by["bitmask"] == m * n / 2 * 2 + m * n / 8
    assert by["2:4"] == m * n / 2 * 2 + m * n / 2 * 2 / 8  # two bits for each kept value
    assert by["csr"] == m * n / 2 * 6 + 4 * 65
    assert matrix_account((m, n), "2:4", k).flops == 2 * (m * n / 2 + factors)


def test_a_compressed_checkpoint_is_as_large_as_computed(small, tmp_path):
    slr.compress(small, slr.Recipe(prune="magnitude", iterations=2), out=tmp_path / "a")
    computed = model_account(small, "2:4", 2, storage="bitmask")
    found = checkpoint_account(tmp_path / "a")
    assert found["bytes"] == computed.bytes
    assert found["nonzero"] <= computed.nonzero
    dense = checkpoint_account(small)
    assert dense["bytes"] == model_account(small).bytes


def test_accounts_add():
    one = matrix_account((4, 4), dtype=torch.float32)
    assert (one + one).bytes == 128


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="'zip' is unknown"):
        matrix_account((4, 4), storage="zip")
    with pytest.raises(ValueError, match=r"holds 2:4 matrices, not 0\.5"):
        matrix_account((4, 4), "0.5", storage="2:4")
