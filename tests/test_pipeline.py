"""Whole checkpoints: streamed, killed and resumed, loaded, exported, in every family."""

import copy
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import slr
from slr.checkpoint import exporting, finish, work
from slr.checkpoint.exported import BASE
from slr.checkpoint.exporting import export
from slr.checkpoint.journal import Journal
from slr.model.stream import FAMILIES, Stream

FAST = {"prune": "magnitude", "iterations": 2}
# Standalone: the two meet at a port that is free.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
DATA = {"prune": "wanda", "refine": "activations", "iterations": 2, "samples": 3, "seqlen": 32}
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "ffn_dim": 48,
    "max_position_embeddings": 64, "word_embed_proj_dim": 32, "sliding_window": 8,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip


def hashes(folder):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


def family(kind, folder, tied, dtype=torch.bfloat16):
    """A random model of a family as a folder in several shards, with a tokenizer's files."""
    known = AutoConfig.for_model(kind)
    sizes = {k: v for k, v in SIZES.items() if hasattr(known, k)}
    config = AutoConfig.for_model(kind, **sizes, tie_word_embeddings=tied)
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for value in model.parameters():  # no norm or bias is trivially one or zero
        if value.ndim == 1:
            value.data += 0.1 * torch.randn_like(value)
    model.save_pretrained(folder, max_shard_size="20KB")
    return model.eval()


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_family_streams_saves_and_loads(kind, tied, tmp_path):
    source = tmp_path / "source"
    whole = family(kind, source, tied)
    assert len(list(source.glob("*.safetensors"))) > 1
    windows = torch.randint(96, (3, 32))
    recipe = slr.Recipe(**DATA)
    reports = slr.compress_model(whole, recipe, windows)

    streamed = slr.compress(source, recipe, out=tmp_path / "out", calibration=windows)
    assert [r[:-1] for r in streamed] == [r[:-1] for r in reports]  # all but seconds, exactly

    loaded = slr.load(tmp_path / "out")
    assert type(loaded) is type(whole)
    with torch.no_grad():
        logits = whole(windows).logits
        assert torch.equal(loaded(windows).logits, logits)
        assert logits.isfinite().all()
        assert logits.std() > 0
    whole.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(slr.load(tmp_path / "again")(windows).logits, logits)


def test_streamed_perplexity_is_the_whole_models(small, text, tmp_path):
    slr.compress(small, slr.Recipe(**FAST), out=tmp_path / "a")
    for folder in (small, tmp_path / "a"):
        options = {"seqlen": 32, "limit": 9}
        whole = slr.perplexity(folder, text, **options)
        assert slr.perplexity(folder, text, stream=True, **options) == pytest.approx(
            whole, rel=1e-5
        )


def test_only_one_block_is_ever_filled(small, tmp_path, monkeypatch):
    most = 0

    def measured(self, name, module, fill=Stream.fill):
        nonlocal most
        fill(self, name, module)
        filled = [b for b in self.blocks if any(p.device.type != "meta" for p in b.parameters())]
        most = max(most, len(filled))

    monkeypatch.setattr(Stream, "fill", measured)
    monkeypatch.setattr("slr.checkpoint.measuring.SMALL", 0)  # a small model's sample takes it all
    slr.compress(small, slr.Recipe(**DATA), out=tmp_path / "a")
    assert most == 1


def test_transformers_knows_the_format(small, tmp_path):
    """In a process of its own: `import slr` first, and transformers finds everything."""
    slr.compress(small, slr.Recipe(**FAST), out=tmp_path / "a")
    code = f"""
import slr, sys
assert "transformers" not in sys.modules
import torch, copy
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
where = {str(tmp_path / "a")!r}
model = AutoModelForCausalLM.from_pretrained(where)
assert isinstance(model.model.layers[0].mlp.up_proj, slr.SLRLinear)
assert model.dtype == torch.bfloat16
ids = torch.arange(12)[None]
logits = model(ids).logits
twin = copy.deepcopy(model)
assert torch.equal(twin(ids).logits, logits)
other = AutoModelForCausalLM.from_pretrained(where, device_map="cpu", dtype=torch.float32)
assert other.dtype == torch.float32
assert (other(ids).logits - logits).abs().max() < 0.1
auto = AutoModelForCausalLM.from_pretrained(where, device_map="auto")
assert torch.equal(auto(ids).logits.cpu(), logits)
tokenizer = AutoTokenizer.from_pretrained(where)
said = pipeline("text-generation", model=model, tokenizer=tokenizer)("def f(", max_new_tokens=4)
assert said[0]["generated_text"].startswith("def f(")
for turn in "bc":
    model.save_pretrained(where[:-1] + turn)
    model = AutoModelForCausalLM.from_pretrained(where[:-1] + turn)
    assert torch.equal(model(ids).logits, logits)
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("fine\n"), done.stderr[-2000:]
    assert hashes(tmp_path / "b") == hashes(tmp_path / "c")


def test_without_slr_it_does_not_load(small, tmp_path):
    slr.compress(small, slr.Recipe(**FAST), out=tmp_path / "a")
    code = f"""
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, LlamaConfig
where = {str(tmp_path / "a")!r}
for loader in (AutoModelForCausalLM, LlamaForCausalLM, AutoConfig):
    try:
        loader.from_pretrained(where)
    except Exception as error:
        print("refused:", "slr" in str(error))
    else:
        print("loaded", loader)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "refused: True\n" * 3, done.stderr[-2000:]


def command(source, out, **options):
    given = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    return [sys.executable, "-m", "slr.cli", "compress", str(source), "--out", str(out), *given]


KILLED = """
import os, random, sys, killing, slr

source, calm, out, recipe = *sys.argv[1:4], slr.Recipe(**eval(sys.argv[4]))
slr.compress(source, recipe, out=calm)  # undisturbed; and it imports what the others need
draw, there = random.Random(0), False
while not there:
    moment = draw.randint(2, 60)
    code = killing.run(lambda: slr.compress(source, recipe, out=out), kill_at=moment)
    there = os.path.exists(os.path.join(out, "config.json"))
    print(int(code), there, flush=True)
"""


@pytest.mark.parametrize("recipe", [FAST, {**DATA, "refine": "weights"}])
def test_killed_at_any_moment_it_ends_with_the_same_files(small, tmp_path, recipe):
    """Every file operation is a moment: before the n-th of them a process kills itself.

    The processes are children of one that has imported everything, with the one thread that
    a child has.
    """
    calm, out = tmp_path / "calm", tmp_path / "killed"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(small), str(calm), str(out), repr(recipe)],
        capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1",
             "PYTHONPATH": os.pathsep.join(map(str, sys.path))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1000:]
    *killed, last = done.stdout.splitlines()
    assert last in ("0 True", f"{-signal.SIGKILL} True"), done.stderr[-1000:]  # or just after it
    assert set(killed) == {f"{-signal.SIGKILL} False"}
    assert 2 <= len(killed) < 60
    assert hashes(out) == hashes(calm)
    with pytest.raises(ValueError, match="exists already"):
        slr.compress(small, slr.Recipe(**recipe), out=out)
    assert not out.with_name("killed.partial").exists()


def test_a_damaged_block_is_made_again(small, tmp_path):
    slr.compress(small, slr.Recipe(**FAST), out=tmp_path / "calm")
    stop_after_first_block(small, tmp_path / "out", FAST)
    shard = tmp_path / "out.partial" / "files" / "model-00001-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7])
    slr.compress(small, slr.Recipe(**FAST), out=tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "calm")


def stop_after_first_block(source, out, recipe):
    real = Journal.add

    def add(self, name, tensors, notes=None):
        if name.startswith("model-00002"):
            raise KeyboardInterrupt
        real(self, name, tensors, notes)

    Journal.add = add
    try:
        with pytest.raises(KeyboardInterrupt):
            slr.compress(source, slr.Recipe(**recipe), out=out)
    finally:
        Journal.add = real


def test_another_recipe_or_source_does_not_resume(small, tmp_path):
    out, source = tmp_path / "out", tmp_path / "source"
    shutil.copytree(small, source)
    stop_after_first_block(source, out, FAST)
    with pytest.raises(ValueError, match=r"recipe.pattern was '2:4', now '0.5'.*--fresh"):
        slr.compress(source, slr.Recipe(**FAST, pattern="0.5"), out=out)
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"source.model.safetensors was"):
        slr.compress(source, slr.Recipe(**FAST), out=out)
    slr.compress(source, slr.Recipe(**FAST), out=out, resume=False)
    assert out.is_dir()


def test_another_version_does_not_resume(small, tmp_path, monkeypatch):
    stop_after_first_block(small, tmp_path / "out", FAST)
    monkeypatch.setattr(slr, "__version__", "9.9.9")
    with pytest.raises(ValueError, match=r"slr was '[0-9.]+', now '9.9.9'"):
        slr.compress(small, slr.Recipe(**FAST), out=tmp_path / "out")


def test_two_runs_do_not_share_a_folder(small, tmp_path):
    with Journal(tmp_path / "out", {}), pytest.raises(ValueError, match="in use by another run"):
        slr.compress(small, slr.Recipe(**FAST), out=tmp_path / "out")


def test_a_full_disk_is_one_line_and_loses_nothing(small, tmp_path):
    out = tmp_path / "out"

    def small_files_only():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    args = command(small, out, prune="magnitude", iterations=2)
    done = subprocess.run(args, capture_output=True, text=True, preexec_fn=small_files_only)
    assert done.returncode == 1
    assert "no space left" in done.stderr.splitlines()[-1]
    assert not out.exists()
    assert not list((tmp_path / "out.partial").rglob("*.tmp"))
    slr.compress(small, slr.Recipe(prune="magnitude", iterations=2), out=out)
    assert out.is_dir()


def test_too_small_a_disk_is_said_beforehand(small, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 1000))
    with pytest.raises(OSError, match="will need about"):
        slr.compress(small, slr.Recipe(**FAST), out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def tensor_bytes(folder):
    return sum(v.nbytes for f in folder.rglob("*.safetensors") for v in load_file(f).values())


@pytest.fixture
def room(monkeypatch):
    """Bytes that were asked for, and those of all tensors whenever a file was added."""
    asked, taken, add = [], [], Journal.add

    def watched(journal, *arguments):
        add(journal, *arguments)
        taken.append(tensor_bytes(journal.folder))

    monkeypatch.setattr(Journal, "add", watched)
    for user in (work, exporting):
        monkeypatch.setattr(user, "check_space", lambda need, out: asked.append(need))
    return asked, taken


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("values", ["float", "int4 by 32"])
def test_a_compression_asks_for_the_room_that_it_takes(
    small, tmp_path, room, values, joined, monkeypatch
):
    asked, taken = room
    monkeypatch.setattr(finish, "SMALL", 1e9 if joined else 0)
    monkeypatch.setattr(work, "HELD_OUT", 4 if joined else 16)
    options = {"values": values} if values != "float" else {}
    recipe = slr.Recipe(**DATA | {"rank": 4, "seqlen": 64}, **options)
    slr.compress(small, recipe, out=tmp_path / "out")
    assert tensor_bytes(tmp_path / "out") < max(taken) <= asked[0] < 1.8 * max(taken)


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("to", ["dense", "peft"])
def test_an_export_asks_for_the_room_that_it_takes(small, tmp_path, room, to, joined, monkeypatch):
    asked, taken = room
    monkeypatch.setattr(finish, "SMALL", 1e9 if joined else 0)
    slr.compress(small, slr.Recipe(**FAST, rank=4), out=tmp_path / "c")
    asked.clear()
    taken.clear()
    export(tmp_path / "c", tmp_path / "out", to)
    assert asked == [max(taken)]


def spoil(source, how):
    shard = source / "model.safetensors"
    config = json.loads((source / "config.json").read_text())
    if how == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif how == "corrupt":
        shard.write_bytes(b"\xff" * 16 + shard.read_bytes()[16:])
    elif how == "missing":
        tensors = load_file(shard)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, shard)
    elif how == "shape":
        config["intermediate_size"] = 96
    elif how == "pickle":
        shard.rename(source / "pytorch_model.bin")
    elif how == "family":
        config["model_type"] = "mamba"
    elif how == "quantised":
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    elif how == "tokenizer":
        for file in source.glob("tokenizer*"):
            file.unlink()
    elif how == "index":
        index = {"weight_map": {"model.norm.weight": "model-00009-of-00009.safetensors"}}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
        shard.rename(source / "model-00001-of-00009.safetensors")
    (source / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("truncated", "model.safetensors is damaged or cut short"),
        ("corrupt", "model.safetensors is damaged or cut short"),
        ("missing", "lacks the tensor model.layers.1.mlp.up_proj.weight"),
        ("shape", "but config.json asks for"),
        ("pickle", "has no .safetensors file (pickles are not read)"),
        ("family", "model type 'mamba' is not supported; slr knows llama"),
        ("quantised", "is quantised (gptq)"),
        ("tokenizer", "has no tokenizer"),
        ("index", "has no model-00009-of-00009.safetensors, which its index names"),
    ],
)
def test_bad_sources_are_named_and_nothing_is_written(small, tmp_path, how, says):
    source = tmp_path / "source"
    shutil.copytree(small, source)
    spoil(source, how)
    before = hashes(source)
    with pytest.raises(ValueError, match=re.escape(says)):
        slr.compress(source, slr.Recipe(**DATA), out=tmp_path / "out")
    assert hashes(source) == before
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("model", "out", "says"),
    [
        ("nowhere", "out", "neither 'tiny', 'smollm2', nor a folder, nor a GGUF file"),
        ("no/model", "out", "the hub did not give it"),
        (None, "file/out", "cannot write to"),
        (None, "/", "is not the name of a new folder"),
    ],
)
def test_bad_places_are_named(small, tmp_path, model, out, says):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=re.escape(says)):
        slr.compress(model or small, slr.Recipe(**FAST), out=tmp_path / out)


@pytest.mark.parametrize("name", ["tokenizer_backup", "LICENSES", "chat_templates"])
def test_folders_are_not_copied(small, tmp_path, name):
    source = tmp_path / "source"
    shutil.copytree(small, source)
    (source / name).mkdir()
    slr.compress(source, slr.Recipe(**FAST), out=tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert not (tmp_path / "out" / name).exists()


def test_what_cannot_be_copied_is_said_before_any_work(small, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(small, source)
    (source / "LICENSE").symlink_to("nowhere")
    with pytest.raises(ValueError, match="LICENSE is to be copied, but cannot be read"):
        slr.compress(source, slr.Recipe(**FAST), out=tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_data_free_recipe_needs_no_tokenizer(small, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(small, source)
    spoil(source, "tokenizer")
    slr.compress(source, slr.Recipe(**FAST), out=tmp_path / "out")
    assert slr.load(tmp_path / "out") is not None


def test_skipped_layers_stay_as_they_were(small, tmp_path):
    recipe = slr.Recipe(**FAST, skip=["*.down_proj"], overrides={"*.q_proj": {"rank": 4}})
    slr.compress(small, recipe, out=tmp_path / "out")
    loaded, dense = slr.load(tmp_path / "out"), slr.load(small)
    down = loaded.model.layers[0].mlp.down_proj
    assert isinstance(down, torch.nn.Linear)
    assert torch.equal(down.weight, dense.model.layers[0].mlp.down_proj.weight)
    assert loaded.model.layers[1].self_attn.q_proj.rank == 4
    assert loaded.model.layers[1].self_attn.k_proj.rank == 2


def test_exports_compute_the_same(small, tmp_path):
    from peft import PeftModel

    ids = torch.randint(4096, (2, 20))
    recipe = slr.Recipe(**FAST, overrides={"*.q_proj": {"rank": 4}, "*.o_proj": {"refine": "none"}})
    slr.compress(small, recipe, out=tmp_path / "a")
    for form in ("peft", "dense"):
        export(tmp_path / "a", tmp_path / form, form)
    for dtype in (torch.float32, torch.bfloat16):
        ours = slr.load(tmp_path / "a", dtype=dtype)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "peft", dtype=dtype)
        theirs = PeftModel.from_pretrained(
            base, tmp_path / "peft" / "adapter", autocast_adapter_dtype=False
        ).eval()
        with torch.no_grad():
            logits = ours(ids).logits
            near = 1e-5 if dtype == torch.float32 else 0.03  # sums in another order
            assert (theirs(ids).logits - logits).abs().max() <= near * logits.abs().max()
    assert AutoTokenizer.from_pretrained(tmp_path / "dense") is not None
    dense = slr.load(tmp_path / "dense", dtype=torch.float32)
    with torch.no_grad():
        exact = slr.load(tmp_path / "a", dtype=torch.float32)(ids).logits
        assert (dense(ids).logits - exact).abs().max() < 0.02 * exact.abs().max()
    kept = base.model.layers[0].mlp.up_proj.weight
    assert float((kept == 0).float().mean()) == 0.5


@pytest.mark.parametrize("form", ["peft", "dense"])
def test_an_export_goes_on_where_it_stopped(small, tmp_path, form):
    slr.compress(small, slr.Recipe(**FAST), out=tmp_path / "a")
    export(tmp_path / "a", tmp_path / "calm", form)
    real, written = Journal.add, []

    def add(self, name, tensors, notes=None):
        if name.startswith("model-00002") and len(written) == 1:
            raise KeyboardInterrupt
        written.append(name)
        real(self, name, tensors, notes)

    Journal.add = add
    try:
        with pytest.raises(KeyboardInterrupt):
            export(tmp_path / "a", tmp_path / "out", form)
        written.append("stopped")
        export(tmp_path / "a", tmp_path / "out", form)
    finally:
        Journal.add = real
    assert written.count("model-00001-of-00003.safetensors") == 1
    left, right = (
        {f.relative_to(d): f.read_bytes() for f in d.rglob("*") if f.is_file()}
        for d in (tmp_path / "calm", tmp_path / "out")
    )
    assert left == right
    if form == "peft":
        told = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
        assert told["base_model_name_or_path"] == BASE


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"to": "onnx"}, "to 'onnx' is unknown; it must be one of peft, dense, gguf"),
        ({"to": "dense", "model": "dense"}, "is not compressed"),
        ({"to": "peft", "model": "pruned"}, "has no low-rank part"),
    ],
)
def test_bad_exports_are_named(small, tmp_path, options, says):
    slr.compress(small, slr.Recipe(prune="magnitude", refine="none"), out=tmp_path / "pruned")
    model = small if options.get("model") == "dense" else tmp_path / "pruned"
    with pytest.raises(ValueError, match=re.escape(says)):
        export(model, tmp_path / "out", options["to"])
    assert not (tmp_path / "out").exists()


def test_lm_eval_scores_all_forms_alike(small, tmp_path):
    from peft import PeftModel

    from slr.evaluate.harness import tasks

    draw = random.Random(0)
    words = slr.data.corpus("validation")[:4000].split()
    rows = [
        {
            "text": " ".join(draw.choices(words, k=6)),
            "choices": draw.choices(words, k=3),
            "gold": i % 3,
        }
        for i in range(12)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "words.yaml").write_text(
        "task: words\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {tmp_path / 'rows.jsonl'}\ntest_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{text}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: gold\n'
        "metric_list:\n  - metric: acc\n"
    )
    slr.compress(small, slr.Recipe(**FAST), out=tmp_path / "a")
    export(tmp_path / "a", tmp_path / "peft", "peft")
    export(tmp_path / "a", tmp_path / "dense", "dense")
    tokenizer = slr.load_tokenizer(tmp_path / "a")
    base = slr.load(tmp_path / "peft", dtype=torch.float32)
    forms = {
        "slr": slr.load(tmp_path / "a", dtype=torch.float32),
        "peft": PeftModel.from_pretrained(base, tmp_path / "peft" / "adapter"),
        "dense": slr.load(tmp_path / "dense", dtype=torch.float32),
    }
    options = {"folder": tmp_path / "tasks", "seqlen": 64}
    scores = {
        form: tasks(model, tokenizer, ["words"], **options)["words"]["acc,none"]
        for form, model in forms.items()
    }
    assert len(set(scores.values())) == 1
    with pytest.raises(ValueError, match="task 'letters' is unknown"):
        tasks(forms["slr"], tokenizer, ["letters"], **options)


@pytest.mark.parametrize("options", [[], ["--asymmetric"]])
def test_two_ranks_give_what_one_gives(small, tmp_path, options):
    slr.load(small, dtype=torch.float32).save_pretrained(tmp_path / "source")
    for file in small.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "source")
    recipe = slr.Recipe(**{**DATA, "samples": 4}, asymmetric=bool(options))
    slr.compress(tmp_path / "source", recipe, out=tmp_path / "one")
    args = command(tmp_path / "source", tmp_path / "two", **{**DATA, "samples": 4})[1:]
    done = subprocess.run([*TORCHRUN, *args, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = slr.load(tmp_path / "one"), slr.load(tmp_path / "two")
    for (name, a), b in zip(one.named_modules(), two.modules(), strict=True):
        if isinstance(a, slr.SLRLinear):
            # Norms of two halves are added, not those of one whole: a nearly tied score may fall
            # the other way, here and there.
            assert float((a.mask == b.mask).float().mean()) > 0.999, name
            same = (a.mask == b.mask).all(1)
            apart = (a.dense() - b.dense())[same].norm() / a.dense().norm()
            assert float(apart) <= (1e-4 if same.all() else 1e-2), name


def test_two_ranks_tune_to_the_same(small, tmp_path):
    """They see other windows, one of them one more; the steps are of both."""
    code = """
import hashlib, sys, slr, torch
from slr.model import distributed
distributed.start("cpu")
torch.manual_seed(0)
windows = torch.randint(4096, (5, 32))
model = slr.load(sys.argv[1], dtype=torch.float32)
recipe = slr.Recipe("magnitude", rank=2, iterations=2, tune=1)
slr.compress(model, recipe, calibration=windows)
state = b"".join(value.numpy().tobytes() for value in model.state_dict().values())
with open(f"{sys.argv[2]}/{distributed.rank()}", "w") as file:
    file.write(hashlib.sha256(state).hexdigest())
"""
    (tmp_path / "run.py").write_text(code)
    args = [*TORCHRUN, str(tmp_path / "run.py"), str(small), str(tmp_path)]
    done = subprocess.run(args, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text()


def test_two_ranks_allocate_and_tune_as_one_run(small, tmp_path):
    """The commands join the group: one folder is written, and the windows are shared out."""
    slr.compress(small, slr.Recipe("magnitude", rank=2, iterations=2), out=tmp_path / "small")
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 400, encoding="utf-8")
    shared = [*TORCHRUN, "-m", "slr.cli"]
    given = ["--calibration", str(text), "--samples", "4", "--seqlen", "32"]
    allocated = ["allocate", str(small), "--pattern", "0.5", *given]
    for out, start in (("one", [sys.executable, "-m", "slr.cli"]), ("two", shared)):
        args = [*start, *allocated, "--out", str(tmp_path / f"{out}.yaml")]
        done = subprocess.run(args, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (
        yaml.safe_load((tmp_path / f"{out}.yaml").read_text())["overrides"]
        for out in ("one", "two")
    )
    assert one.keys() == two.keys()
    for name, each in one.items():  # norms of two halves are added: a tie may fall the other way
        assert float(two[name]["pattern"]) == pytest.approx(float(each["pattern"]), abs=0.01), name
    args = [*shared, "tune", str(tmp_path / "small"), "--out", str(tmp_path / "tuned"), "--passes"]
    done = subprocess.run(
        [*args, "1", "--calibration", str(text)], capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("divergence from the dense model") == 1
    assert slr.verify(tmp_path / "tuned")


def test_an_error_on_one_rank_stops_all(small, tmp_path):
    code = """
import sys, slr
from slr.model import block as module
from slr.model import distributed
real = module.compress_layer
def broken(*args, **options):
    if distributed.rank() == 1:
        # Said here: torchrun may end a process before it has shown its error.
        print("rank 1 is broken", file=sys.stderr, flush=True)
        raise RuntimeError
    return real(*args, **options)
module.compress_layer = broken
slr.compress(sys.argv[1], slr.Recipe(prune="magnitude", iterations=2), out=sys.argv[2])
"""
    (tmp_path / "run.py").write_text(code)
    args = [*TORCHRUN, str(tmp_path / "run.py"), str(small), str(tmp_path / "out")]
    done = subprocess.run(args, capture_output=True, text=True)  # does not hang
    assert done.returncode != 0
    assert "rank 1 is broken" in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_deepcopy_and_grad_still_work(small, tmp_path):
    slr.compress(small, slr.Recipe(**FAST), out=tmp_path / "a")
    model = slr.load(tmp_path / "a", dtype=torch.float32)
    twin = copy.deepcopy(model)
    ids = torch.randint(4096, (1, 8))
    twin(ids, labels=ids).loss.backward()
    assert twin.model.layers[0].mlp.up_proj.B.grad is not None
    assert model.model.layers[0].mlp.up_proj.B.grad is None


def test_the_page_on_the_format_reads_it_by_hand(tmp_path, monkeypatch):
    """The code of book/format.md, run on a folder that has been made as it says."""
    from pathlib import Path

    page = (Path(__file__).parent.parent / "book" / "format.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", page, re.S)[1]
    slr.compress("tiny", slr.Recipe(**FAST), out=tmp_path / "small")
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(code, found)
    layer = slr.load(tmp_path / "small").model.layers[0].mlp.up_proj
    assert torch.equal(found["W"], layer.weight + layer.B @ layer.A)
