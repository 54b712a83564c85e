"""PEFT and compressed models: train, merge, take out again, save, load."""

import re
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import slr
from slr.checkpoint.exported import BASE
from slr.checkpoint.folder import about

peft = pytest.importorskip("peft")

REFINE = slr.Recipe(prune="magnitude", refine="weights", rank=4, iterations=2)
IDS = torch.randint(3, 4000, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    out = tmp_path_factory.mktemp("adapters") / "c"
    slr.compress(small, REFINE, out=out)
    return out


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def lora(**options):
    return peft.LoraConfig(
        **{"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"],
           "init_lora_weights": False, "task_type": "CAUSAL_LM"} | options
    )  # fmt: skip


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def packed(model):
    layers = {n: m for n, m in model.named_modules() if isinstance(m, slr.SLRLinear)}
    return {f"{n}.{k}": v.clone() for n, m in layers.items() for k, v in m.packed().items()}


@pytest.mark.parametrize("first", ["slr", "peft"])
def test_peft_knows_the_layer_whoever_is_imported_first(first, folder):
    other = {"slr": "peft", "peft": "slr"}[first]
    code = f"""
import {first}, {other}, sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r})
config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
tuned = peft.get_peft_model(model, config)
found = {{n.split(".")[-2] for n, m in tuned.named_modules() if isinstance(m, slr.SLRLinear)}}
print(len(found))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:peft", "-c", code],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "7\n", done.stderr[-2000:]


def test_slr_alone_does_not_import_peft():
    code = "import slr, sys; print('peft' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False False\n", done.stderr


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True, "lora_dropout": 0.1}, {"lora_bias": True}]
)
def test_merged_into_the_factors_and_taken_out_again(folder, options, safe):
    before = packed(load(folder))
    tuned = peft.get_peft_model(load(folder), lora(**options)).eval()
    want = logits(tuned)
    tuned.merge_adapter(safe_merge=safe)
    layer = tuned.base_model.model.model.layers[0].self_attn.q_proj.get_base_layer()
    assert layer.rank == 4 + 3
    assert torch.allclose(logits(tuned), want, atol=1e-5)
    tuned.unmerge_adapter()
    after = packed(tuned.base_model.model)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), after.values(), strict=True))
    assert torch.equal(logits(tuned), want)


def test_several_adapters(folder):
    base = load(folder)
    plain = logits(base)
    tuned = peft.get_peft_model(base, lora()).eval()
    tuned.add_adapter("other", lora(r=2, target_modules=["q_proj", "up_proj"]))
    tuned.base_model.set_adapter(["default", "other"])
    both = logits(tuned)
    tuned.merge_adapter(["default"])
    tuned.merge_adapter(["other"])
    ranks = [layer.rank for layer in tuned.modules() if isinstance(layer, slr.SLRLinear)]
    assert sorted(set(ranks)) == [4, 6, 7, 9]
    assert torch.allclose(logits(tuned), both, atol=1e-5)
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned), plain)


def test_a_merged_model_is_saved_with_the_ranks_that_it_has(folder, tmp_path):
    tuned = peft.get_peft_model(load(folder), lora(lora_bias=True)).eval()
    want = logits(tuned)
    merged = tuned.merge_and_unload()
    merged.save_pretrained(tmp_path / "m")
    told = about(tmp_path / "m")["layers"]
    assert told["model.layers.0.self_attn.q_proj"]["rank"] == 7
    assert told["model.layers.0.mlp.down_proj"]["bias"] is True
    assert (
        told["model.layers.0.mlp.up_proj"] == about(folder)["layers"]["model.layers.0.mlp.up_proj"]
    )
    again = slr.load(tmp_path / "m")
    assert torch.equal(logits(again), logits(merged))
    assert torch.allclose(logits(again), want, atol=1e-5)


def test_a_broken_adapter_is_not_merged_safely(folder):
    tuned = peft.get_peft_model(load(folder), lora(target_modules=["q_proj"])).eval()
    layer = tuned.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_A["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="'default' is not finite"):
        tuned.merge_adapter(safe_merge=True)
    assert layer.get_base_layer().rank == 4
    assert not layer.merged


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}]
)
def test_what_changes_the_matrix_is_refused(folder, options):
    model = load(folder)
    before = packed(model)
    with pytest.raises(ValueError, match=f"^{next(iter(options))}.* use plain LoRA"):
        peft.get_peft_model(model, lora(**options))
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), packed(model).values(), strict=True)
    )


def test_a_trained_adapter_is_saved_and_loaded(folder, tmp_path):
    tuned = peft.get_peft_model(load(folder), lora(init_lora_weights=True))
    plain = logits(tuned)
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        tuned(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    want = logits(tuned.eval())
    assert not torch.equal(want, plain)
    tuned.save_pretrained(tmp_path / "lora")
    again = peft.PeftModel.from_pretrained(load(folder), tmp_path / "lora")
    assert torch.equal(logits(again), want)
    assert torch.equal(logits(load(tmp_path / "lora")), want)  # by transformers alone
    with pytest.raises(ValueError, match="has an adapter; save what merge_and_unload"):
        tuned.base_model.model.save_pretrained(tmp_path / "wrong")


def test_transformers_own_adapters(folder, tmp_path):
    model = load(folder)
    model.add_adapter(lora())
    want = logits(model.eval())
    model.save_pretrained(tmp_path / "lora")
    assert not (tmp_path / "lora" / "config.json").exists()
    again = load(folder)
    again.load_adapter(tmp_path / "lora")
    assert torch.equal(logits(again), want)


@pytest.mark.parametrize(
    "recipe", [slr.Recipe(prune="wanda"), slr.CAP(steps=1), slr.LoSparse(steps=1)]
)
def test_a_model_with_an_adapter_is_not_compressed(small, recipe):
    model = slr.load(small, dtype=torch.float32)
    model.add_adapter(lora())
    want = logits(model.eval())
    with pytest.raises(
        ValueError, match=r"an adapter at model.layers.0.self_attn.q_proj; compress"
    ):
        slr.compress(model, recipe, calibration=IDS)
    assert torch.equal(logits(model), want)
    assert not any(isinstance(m, slr.SLRLinear) for m in model.modules())


def test_pefts_plain_layer_cannot_merge_into_the_void():
    layer = slr.SLRLinear(torch.eye(4))
    wrapped = peft.tuners.lora.Linear(layer, "default", config=lora(), r=2)
    with pytest.raises(ValueError, match="would be lost"):
        wrapped.merge()
    assert torch.equal(layer.weight, torch.eye(4))
    assert isinstance(wrapped, nn.Module)


def test_an_export_loads_from_any_folder_as_its_readme_says(small, tmp_path, monkeypatch):
    recipe = slr.Recipe("magnitude", rank=20, iterations=2, overrides={"*.q_proj": {"rank": 3}})
    slr.compress(small, recipe, out=tmp_path / "c")
    slr.export(tmp_path / "c", tmp_path / "made", "peft")
    (tmp_path / "made").rename(tmp_path / "moved")
    text = (tmp_path / "moved" / "README.md").read_text(encoding="utf-8")
    assert "--max-lora-rank 32" in text  # the next to 20 that vLLM has
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    assert code.count("this folder") == 1
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "c" / "config.json", tmp_path)  # of another model, in the way
    monkeypatch.chdir(tmp_path / "elsewhere")
    found: dict = {}
    exec(code.replace("this folder", str(tmp_path / "moved")), found)
    ours, theirs = slr.load(tmp_path / "c"), found["model"]
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}
    near = logits(ours).abs().max() / 64  # in bfloat16 the two round at other places
    assert (logits(theirs) - logits(ours)).abs().max() < near
    assert torch.equal(logits(theirs.float()), logits(slr.load(tmp_path / "c", torch.float32)))
    assert found["tokenizer"]("x").input_ids
    for auto in (peft.AutoPeftModelForCausalLM, AutoModelForCausalLM):  # neither cwd nor the hub
        with pytest.raises(OSError, match="Repo id must use") as refused:
            auto.from_pretrained(tmp_path / "moved" / "adapter")
        assert BASE in str(refused.value)
