"""Folders that appear whole: kills at every file operation, strangers, links, damaged journals."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from slr.checkpoint.digests import check_sums
from slr.checkpoint.journal import Journal

EVERY = """
import sys
from pathlib import Path
import torch
import killing
from slr.checkpoint.journal import Journal

def make(out):
    with Journal(out, {"a": 1}) as journal:
        for name in ("one.safetensors", "two.safetensors", "adapter/three.safetensors"):
            if name not in journal:
                journal.add(name, {"x": torch.ones(3)}, notes=name)
        if "two.safetensors" in journal:
            journal.remove("two.safetensors")
        journal.add_text("README.md", "text")
        journal.finish("{}")

folder, moment, code = Path(sys.argv[1]), 0, killing.KILLED
while code == killing.KILLED:
    moment += 1
    out = folder / str(moment)
    code = killing.run(lambda: make(out), kill_at=moment)
    there = out.is_dir() and any(out.iterdir())
    again = killing.run(lambda: make(out))
    assert again == (killing.REFUSED if there else 0), again
print(moment)
"""


def entries(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


def test_killed_at_every_file_operation(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", EVERY, str(tmp_path)], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sys.path))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1000:]
    moments = int(done.stdout)
    assert moments > 50
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(map(str, range(1, moments + 1)))
    last = entries(tmp_path / "1")
    assert "adapter/three.safetensors" in last
    assert "two.safetensors" not in last
    for folder in tmp_path.iterdir():
        assert entries(folder) == last
        check_sums(folder)


def begun(out, key=None):
    """A journal that stopped after its first file."""
    with suppress(KeyboardInterrupt), Journal(out, key or {}) as journal:
        journal.add("one.safetensors", {"x": torch.ones(3)})
        raise KeyboardInterrupt
    return journal


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("name", ["mine.txt", "files/model-1.safetensors", "scratch/mine.tmp"])
def test_what_no_journal_lists_is_never_touched(tmp_path, name, resume):
    mine = tmp_path / "out.partial" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    before = entries(tmp_path)
    with (
        pytest.raises(ValueError, match=f"{mine} is in the way"),
        Journal(tmp_path / "out", {}, resume),
    ):
        pass
    assert entries(tmp_path) == before
    assert mine.read_text() == "years of work"


def test_a_stranger_among_our_files_is_left(tmp_path):
    journal = begun(tmp_path / "out")
    mine = journal.folder / "mine.txt"
    mine.write_text("years of work")
    with pytest.raises(ValueError, match="is in the way"), Journal(tmp_path / "out", {}):
        pass
    with pytest.raises(ValueError, match="is in the way"), Journal(tmp_path / "out", {}, False):
        pass
    assert mine.read_text() == "years of work"


def test_starting_over_and_finding_it_again(tmp_path):
    begun(tmp_path / "out", {"a": 1})
    with Journal(tmp_path / "out", {"a": 1}) as journal:
        assert "one.safetensors" in journal
    with pytest.raises(ValueError, match="a was 1, now 2"), Journal(tmp_path / "out", {"a": 2}):
        pass
    with Journal(tmp_path / "out", {"a": 2}, resume=False) as journal:
        assert "one.safetensors" not in journal
        assert not (journal.folder / "one.safetensors").exists()


@pytest.mark.parametrize(
    "edit",
    [
        lambda told: told["entries"]["one.safetensors"].update(notes=[{"rank": 7}]),
        lambda told: told["files"].append("../../mine.txt"),
        lambda told: told.pop("key"),
        lambda told: told.update(sha256="0"),
        lambda told: told.clear(),
    ],
)
@pytest.mark.parametrize("resume", [True, False])
def test_an_edited_journal_is_refused(tmp_path, edit, resume):
    journal = begun(tmp_path / "out")
    file = journal.work / "journal.json"
    told = json.loads(file.read_text())
    edit(told)
    file.write_text(json.dumps(told))
    with (
        pytest.raises(ValueError, match="is not a journal that this version of slr wrote"),
        Journal(tmp_path / "out", {}, resume),
    ):
        pass
    assert (journal.folder / "one.safetensors").exists()


@pytest.mark.parametrize("text", ["", "[]", "null", "7", "{", "[" * 99999])
def test_a_journal_that_is_none_is_refused(tmp_path, text):
    journal = begun(tmp_path / "out")
    (journal.work / "journal.json").write_text(text)
    with pytest.raises(ValueError, match="is not a journal"), Journal(tmp_path / "out", {}):
        pass


def test_a_link_to_an_empty_folder_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    with Journal(tmp_path / "out", {}) as journal:
        journal.add("one.safetensors", {"x": torch.ones(3)})
        assert journal.work == tmp_path / "disk" / "real.partial"
        journal.finish("{}")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "out" / "one.safetensors").is_file()


@pytest.mark.parametrize("kind", ["file", "full", "link", "mount"])
def test_a_place_that_cannot_be_made_is_said_before_any_work(tmp_path, kind, monkeypatch):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "full":
        out.mkdir()
        (out / "mine").write_text("mine")
    elif kind == "link":
        out.symlink_to(tmp_path / "nowhere")
    else:
        out.mkdir()
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    before = entries(tmp_path)
    with (
        pytest.raises(ValueError, match=r"exists already|link to nothing|mount point"),
        Journal(out, {}),
    ):
        pass
    assert entries(tmp_path) == before


def test_a_rename_that_fails_loses_nothing(tmp_path):
    out = tmp_path / "out"

    def make():
        with Journal(out, {}) as journal:
            journal.add("one.safetensors", {"x": torch.ones(3)})
            out.mkdir()
            (out / "mine").write_text("mine")  # came while the work went on
            journal.finish("{}")

    with pytest.raises(OSError, match="is complete, but cannot become"):
        make()
    assert (out / "mine").read_text() == "mine"
    (out / "mine").unlink()
    with Journal(out, {}) as journal:
        assert "one.safetensors" in journal
        journal.finish("{}")
    check_sums(out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_nobody_takes_the_lock_of_a_finishing_run(tmp_path):
    with Journal(tmp_path / "out", {}) as journal:
        journal.add("one.safetensors", {"x": torch.ones(3)})
        journal.finish("{}")
        with (
            pytest.raises(ValueError, match="in use by another run"),
            Journal(tmp_path / "out", {}),
        ):
            pass
    with pytest.raises(ValueError, match="exists already"), Journal(tmp_path / "out", {}):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_killed_run_lets_go_of_its_lock(tmp_path):
    code = f"""
import os, signal, torch
from slr.checkpoint.journal import Journal
with Journal({str(tmp_path / "out")!r}, {{}}) as journal:
    journal.add("one.safetensors", {{"x": torch.ones(3)}})
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    with Journal(tmp_path / "out", {}) as journal:
        assert "one.safetensors" in journal


def test_starting_over_forgets_what_was_remembered(tmp_path):
    with suppress(KeyboardInterrupt), Journal(tmp_path / "out", {"a": 1}) as journal:
        journal.add("one.safetensors", {"x": torch.ones(3)})
        journal.remember(measured=17)
        raise KeyboardInterrupt
    with Journal(tmp_path / "out", {"a": 2}, resume=False, memory={"b": 3}) as journal:
        assert journal.memory == {"b": 3}
        journal.add("one.safetensors", {"x": torch.ones(3)})
        journal.finish("{}")


def test_how_to_start_over_is_told(tmp_path):
    begun(tmp_path / "out", {"a": 1})
    with (
        pytest.raises(ValueError, match=r"start over by removing .*out\.partial"),
        Journal(tmp_path / "out", {"a": 2}),
    ):
        pass
    assert (tmp_path / "out.partial").exists()


def test_a_room_for_small_files_is_emptied_after_a_kill(tmp_path):
    with suppress(KeyboardInterrupt), Journal(tmp_path / "out", {}) as journal:
        journal.add("one.safetensors", {"x": torch.ones(3)})
        (journal.room() / "left.json").write_text("{}")
        raise KeyboardInterrupt
    with Journal(tmp_path / "out", {}) as journal:
        assert not list(journal.room().iterdir())
        journal.finish("{}")
    assert not (tmp_path / "out.partial").exists()


def test_the_folder_one_is_in_is_no_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is the folder you are in"):
        Journal(".", {})
