"""A compressed folder that was changed is never taken for what was written."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import slr
from slr.checkpoint.digests import SUMS, fingerprint, stamps
from slr.cli import app

RECIPE = slr.Recipe(prune="magnitude", rank=2, iterations=2)
SHARD = "model-00001-of-00003.safetensors"
LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory, several):
    out = tmp_path_factory.mktemp("whole") / "out"
    slr.compress(small, RECIPE, out=out)
    return out


@pytest.fixture
def folder(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    return tmp_path / "out"


def test_what_was_written_is_whole(whole):
    assert {file.name for file in slr.verify(whole)} >= {SHARD, "config.json", "tokenizer.json"}
    assert slr.load(whole, verify=True) is not None


def test_no_flipped_bit_is_silent(whole, folder):
    draw = random.Random(0)
    files = sorted(folder.iterdir())
    for turn in range(3 * len(files)):
        file = files[turn % len(files)]
        held = bytearray(file.read_bytes())
        bit = draw.randrange(8 * len(held))
        held[bit // 8] ^= 1 << bit % 8
        file.write_bytes(held)
        with pytest.raises(ValueError, match=r"\A[^\n]+\Z"):
            slr.verify(folder)
        shutil.copyfile(whole / file.name, file)
    slr.verify(folder)


@pytest.mark.parametrize("name", [SHARD, "config.json", "tokenizer.json", SUMS, "mine.txt"])
def test_a_file_more_or_less_is_named(folder, name):
    if (folder / name).exists():
        (folder / name).unlink()
    else:
        (folder / name).write_text("")
    with pytest.raises(ValueError, match=name):
        slr.verify(folder)


def test_hidden_files_of_a_download_are_passed_over(folder):
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "x.lock").write_text("")
    (folder / ".gitattributes").write_text("*")
    slr.verify(folder)


def change(folder, edit):
    tensors = load_file(folder / SHARD)
    edit(tensors)
    save_file(tensors, folder / SHARD, metadata={"format": "pt"})


def unlist(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["slr"]["layers"][LAYER]
    (folder / "config.json").write_text(json.dumps(config))


CHANGES = {
    "missing": lambda f: change(f, lambda t: t.pop(f"{LAYER}.B")),
    "shape": lambda f: change(f, lambda t: t.update({f"{LAYER}.B": torch.ones(3, 2)})),
    "dtype": lambda f: change(f, lambda t: t.update({f"{LAYER}.B": t[f"{LAYER}.B"].int()})),
    "nan": lambda f: change(f, lambda t: t[f"{LAYER}.values"].fill_(float("nan"))),
    "mask": lambda f: change(f, lambda t: t[f"{LAYER}.bitmask"].zero_()),
    "norm": lambda f: change(
        f, lambda t: t["model.layers.0.input_layernorm.weight"].fill_(float("inf"))
    ),
    "unlisted": unlist,
}


@pytest.mark.parametrize("how", CHANGES)
def test_a_folder_that_does_not_fit_is_not_loaded(folder, how, tmp_path):
    CHANGES[how](folder)
    for call in (
        lambda: AutoModelForCausalLM.from_pretrained(folder),
        lambda: slr.load(folder),
        lambda: slr.perplexity(folder, torch.ones(1, 8, dtype=torch.long), stream=True),
        lambda: slr.export(folder, tmp_path / "dense", "dense"),
    ):
        with pytest.raises(ValueError, match=r"\A[^\n]+\Z"):
            call()
    assert not (tmp_path / "dense").exists()


def test_a_change_that_fits_is_seen_by_verify_alone(folder, tmp_path):
    change(folder, lambda tensors: tensors[f"{LAYER}.values"].mul_(2))
    assert slr.load(folder) is not None
    for call in (
        lambda: slr.load(folder, verify=True),
        lambda: slr.export(folder, tmp_path / "dense", "dense", verify=True),
    ):
        with pytest.raises(ValueError, match=f"{SHARD} is not what was written"):
            call()


def test_the_commands_verify(folder, tmp_path):
    def run(*args):
        return CliRunner().invoke(app, [str(arg) for arg in args])

    done = run("verify", folder)
    assert done.exit_code == 0
    assert "is what was written" in done.stdout
    change(folder, lambda tensors: tensors[f"{LAYER}.values"].mul_(2))
    for args in (
        ("verify", folder),
        ("eval", folder, "--verify"),
        ("export", folder, "--to", "dense", "--out", tmp_path / "dense", "--verify"),
    ):
        done = run(*args)
        assert done.exit_code == 2
        assert f"{SHARD} is not what was written" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "dense").exists()


def test_a_fingerprint_covers_every_byte_and_knows_what_it_read(small, tmp_path, monkeypatch):
    shutil.copytree(small, tmp_path / "a")
    first = fingerprint(tmp_path / "a")
    known = {"stamps": stamps(tmp_path / "a"), "sha256": first}
    file = tmp_path / "a" / "model.safetensors"
    held = bytearray(file.read_bytes())
    held[-12345] ^= 1
    file.write_bytes(held)
    assert fingerprint(tmp_path / "a", known) != first
    monkeypatch.setattr("slr.checkpoint.digests.sha256", lambda file: pytest.fail("read again"))
    known["stamps"] = stamps(tmp_path / "a")
    assert fingerprint(tmp_path / "a", known) == first


def test_a_source_that_changes_meanwhile_is_seen(small, tmp_path, monkeypatch):
    shutil.copytree(small, tmp_path / "a")
    from slr.checkpoint.journal import Journal

    real = Journal.add

    def add(self, name, tensors, notes=None):
        (tmp_path / "a" / "config.json").touch()
        real(self, name, tensors, notes)

    monkeypatch.setattr(Journal, "add", add)
    with pytest.raises(ValueError, match="was changed while it was read"):
        slr.compress(tmp_path / "a", RECIPE, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
