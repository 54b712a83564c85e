"""Masks of a model that was pruned before, by anybody."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import slr
from slr.checkpoint.work import look


@pytest.fixture
def pruned(small, tmp_path):
    """The dense model with half of the weights at zero, 2:4, and the rest moved: tuned, say."""
    folder = tmp_path / "pruned"
    shutil.copytree(small, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            mask = slr.patterns.parse("2:4").chosen(tensor.abs().float())
            tensors[name] = (tensor * mask * 1.25).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_given_mask_is_kept_and_the_weights_are_the_references(small, pruned, tmp_path):
    like = slr.Recipe(f"like {pruned}", "2:4", iterations=4)
    same = slr.Recipe("magnitude", "2:4", iterations=4)
    assert like != same
    assert slr.Recipe(**like.as_dict()) == like
    slr.compress(small, like, out=tmp_path / "like")
    slr.compress(small, same, out=tmp_path / "same")
    ours, theirs = (load_file(tmp_path / x / "model.safetensors") for x in ("like", "same"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    loaded = slr.load(small, dtype=torch.float32)
    slr.compress(loaded, like)
    name = "model.layers.0.mlp.up_proj"
    mask = load_file(pruned / "model.safetensors")[f"{name}.weight"] != 0
    assert torch.equal(loaded.get_submodule(name).mask, mask)


def test_rows_may_differ_if_the_whole_does_not(small, pruned, tmp_path):
    loaded = slr.load(small, dtype=torch.float32)
    slr.compress(loaded, slr.Recipe(f"like {pruned}", "0.5", refine="svd", rank=1))
    with pytest.raises(ValueError, match=r"do not have the pattern 0.6: 50.0% of them are not"):
        slr.compress(
            slr.load(small, dtype=torch.float32), slr.Recipe(f"like {pruned}", "0.6", refine="none")
        )
    with pytest.raises(ValueError, match=r"do not have the pattern 1:4: 50.0%"):
        slr.compress(small, slr.Recipe(f"like {pruned}", "1:4"), out=tmp_path / "out")


def test_folders_that_do_not_fit_are_named_before_anything_is_written(small, pruned, tmp_path):
    def refused(folder, says):
        with pytest.raises(ValueError, match=says):
            slr.compress(small, slr.Recipe(f"like {folder}"), out=tmp_path / "out")
        assert not (tmp_path / "out.partial").exists()

    refused(tmp_path / "nowhere", "is no folder here")
    tensors = load_file(pruned / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name][:-4]}, pruned / "model.safetensors")
    refused(pruned, rf"{name} has shape \(\d+, \d+\) there, and should be of shape")
    del tensors[name]
    save_file(tensors, pruned / "model.safetensors")
    refused(pruned, f"{name} is not there")
    with pytest.raises(ValueError, match="lacks a folder"):
        slr.Recipe("like")
    with pytest.raises(ValueError, match="is for a model, whose layers have names"):
        slr.SLRLinear.from_linear(torch.nn.Linear(8, 8), prune=f"like {pruned}", rank=1)


def test_another_folder_of_masks_is_another_run(small, pruned, tmp_path):
    from slr.checkpoint.work import begin

    recipe = slr.Recipe(f"like {pruned}", "2:4", refine="none")
    look(small, tmp_path / "out", recipe)  # nothing is written
    with begin(small, tmp_path / "out", recipe) as work:
        key = work.journal.key
    tensors = load_file(pruned / "model.safetensors")
    save_file({k: v * 2 for k, v in tensors.items()}, pruned / "model.safetensors")
    with begin(small, tmp_path / "out", recipe, resume=False) as work:
        assert work.journal.key != key


def test_masks_that_change_meanwhile_are_seen(small, pruned, tmp_path, monkeypatch):
    from slr.checkpoint.journal import Journal

    real = Journal.add

    def add(self, name, tensors, notes=None):
        (pruned / "config.json").touch()
        real(self, name, tensors, notes)

    monkeypatch.setattr(Journal, "add", add)
    recipe = slr.Recipe(f"like {pruned}", "2:4", refine="none")
    with pytest.raises(ValueError, match="pruned was changed while it was read"):
        slr.compress(small, recipe, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
