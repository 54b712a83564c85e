"""A layer that hears nothing on the calibration text, and single channels that are dead."""

import copy
import warnings

import pytest
import torch

import slr
from slr.matrix.pruning import prune

WINDOWS = torch.randint(4096, (3, 24), generator=torch.Generator().manual_seed(1))
SILENT = {  # what is zero, and who hears nothing then
    "input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
    "self_attn.v_proj": ["self_attn.o_proj"],
    "mlp.up_proj": ["mlp.down_proj"],
}
RECIPES = {
    "wanda": {"prune": "wanda"},
    "sparsegpt": {"prune": "sparsegpt"},
    "activations": {"prune": "magnitude", "refine": "activations", "iterations": 2},
    "mask too": {"prune": "wanda", "refine": "activations", "iterations": 2, "update_mask": True},
    "eora": {"prune": "magnitude", "refine": "eora"},
    "oats": {"prune": "wanda", "refine": "oats", "iterations": 2},
    "slim": {"prune": "sparsegpt", "refine": "slim"},
    "hassle": {"prune": "sparsegpt", "refine": "hassle", "iterations": 2},
    "3basil": {"prune": "wanda", "refine": "3basil", "iterations": 11},
    "unstructured": {"prune": "sparsegpt", "pattern": "0.5", "refine": "eora"},
    "induction": {"prune": "wanda", "prepare": "induction"},
}


def silenced(small, what):
    model = slr.load(small, dtype=torch.float32)
    for value in model.model.layers[0].get_submodule(what).parameters():
        value.data.zero_()
    return model


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("what", SILENT)
def test_a_silent_layer_is_kept_by_magnitude_and_named(small, what, recipe):
    model, recipe = silenced(small, what), slr.Recipe(**{"refine": "none", **recipe})
    dense = copy.deepcopy(model.model.layers[0])
    with pytest.warns(UserWarning, match="all zero") as told:
        reports = slr.compress(model, recipe, calibration=WINDOWS)
    told = [str(warning.message) for warning in told]
    for inner in SILENT[what]:
        says = f"model.layers.0.{inner}: its inputs are all zero on the calibration text"
        assert sum(says in text for text in told) == 1
        weight = dense.get_submodule(inner).weight.detach()
        expected = prune(weight, "magnitude", recipe.pattern).mask
        found = model.model.layers[0].get_submodule(inner).mask
        assert recipe.refine.changes_mask or torch.equal(found, expected)
    if recipe.prepare == "induction":
        assert any("block 0: inputs of" in text and "keeps its scales" in text for text in told)
    assert len(reports) == 14
    assert all(0 <= r.error < 1 for r in reports)
    assert slr.perplexity(model, WINDOWS) > 1


@pytest.mark.parametrize("system", [slr.CAP(steps=2), slr.LoSparse(steps=2)], ids=lambda s: s.name)
@pytest.mark.parametrize("what", SILENT)
def test_systems_take_silent_layers(small, what, system):
    model = silenced(small, what)
    assert len(slr.compress(model, system, calibration=WINDOWS)) == 14
    assert slr.perplexity(model, WINDOWS) > 1


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_dead_channels_are_no_matter(small, recipe):
    model = slr.load(small, dtype=torch.float32)
    for block in model.model.layers:
        block.input_layernorm.weight.data[3] = 0
        block.post_attention_layernorm.weight.data[5:12] = 0
        block.mlp.up_proj.weight.data[7] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recipe = slr.Recipe(**{"refine": "none", **recipe})
        reports = slr.compress(model, recipe, calibration=WINDOWS)
    assert all(0 < r.error < 1 for r in reports)
    assert slr.perplexity(model, WINDOWS) > 1


def test_a_folder_goes_on_too(small, tmp_path):
    silenced(small, "mlp.up_proj").save_pretrained(tmp_path / "a")
    recipe = slr.Recipe(prune="wanda", refine="none")
    with pytest.warns(UserWarning, match=r"model.layers.0.mlp.down_proj: its inputs are all zero"):
        slr.compress(tmp_path / "a", recipe, out=tmp_path / "x", calibration=WINDOWS)
    assert slr.perplexity(tmp_path / "x", WINDOWS) > 1
