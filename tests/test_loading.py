"""Compressed folders by every way that transformers has to load them, and what is refused."""

import copy
import json
import multiprocessing
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CompileConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    pipeline,
)

import slr

REFINE = slr.Recipe(prune="magnitude", refine="weights", rank=4, iterations=2)
IDS = torch.randint(3, 4000, (2, 12), generator=torch.Generator().manual_seed(1))
INNER = "layers.0.self_attn.q_proj"  # in the base model
FIRST = f"model.{INNER}"


@pytest.fixture(scope="module")
def made(small, tmp_path_factory, several):
    out = tmp_path_factory.mktemp("loading") / "c"
    slr.compress(small, REFINE, out=out)
    return out


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "c")


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def change(folder, **tensors):
    """Replace tensors of the first layer, or drop them for ``None``; as FIRST.name or in full."""
    file = folder / "model-00001-of-00003.safetensors"
    held = load_file(file)
    for part, value in tensors.items():
        held.pop(f"{FIRST}.{part}", None)
        if value is not None:
            held[f"{FIRST}.{part}"] = value(load_file(file)) if callable(value) else value
    save_file(held, file, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    told["weight_map"] = {k: v for k, v in told["weight_map"].items() if v != file.name}
    told["weight_map"] |= dict.fromkeys(held, file.name)
    index.write_text(json.dumps(told))


def test_model_classes_and_tasks(made):
    whole = slr.load(made)
    want, hidden = logits(whole), whole.model(IDS).last_hidden_state
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(made)), want)
    for loader in (AutoModel, LlamaModel):
        base = loader.from_pretrained(made)
        assert type(base) is LlamaModel
        assert torch.equal(base(IDS).last_hidden_state, hidden)
        assert sum(isinstance(m, slr.SLRLinear) for m in base.modules()) == 14
    features = pipeline("feature-extraction", str(made))("def f(", return_tensors=True)
    ids = slr.load_tokenizer(made)("def f(", return_tensors="pt")["input_ids"]
    assert torch.equal(features, whole.model(ids).last_hidden_state)
    judge = AutoModelForSequenceClassification.from_pretrained(made, num_labels=3)
    assert torch.equal(judge.model(IDS).last_hidden_state, hidden)
    assert judge(IDS).logits.shape == (2, 3)


def test_a_base_model_is_saved_and_loaded(made, tmp_path):
    base = AutoModel.from_pretrained(made)
    base.save_pretrained(tmp_path / "b")
    again = AutoModel.from_pretrained(tmp_path / "b")
    assert torch.equal(base(IDS).last_hidden_state, again(IDS).last_hidden_state)
    told = json.loads((tmp_path / "b" / "config.json").read_text())["slr"]["layers"]
    assert told[FIRST.removeprefix("model.")]["error"] > 0
    causal = AutoModelForCausalLM.from_pretrained(tmp_path / "b")  # its head is tied
    assert torch.equal(logits(causal), logits(slr.load(made)))


def test_a_config_alone_keeps_the_format(made, tmp_path):
    config = AutoConfig.from_pretrained(made)
    assert type(config) is LlamaConfig
    config.save_pretrained(tmp_path)
    ours = json.loads((made / "config.json").read_text())["slr"]
    assert json.loads((tmp_path / "config.json").read_text())["slr"]["layers"] == ours["layers"]
    assert LlamaConfig.from_pretrained(tmp_path).num_hidden_layers == 2


def test_generate_may_compile_it(made):
    model = AutoModelForCausalLM.from_pretrained(made)
    step = CompileConfig(mode=None, options=slr.compile_options())
    step._compile_all_devices = True
    asked = []

    def compiled(_):
        asked.append(step)
        return model.__call__

    model.get_compiled_call = compiled
    options = {"use_cache": True, "cache_implementation": "static", "compile_config": step}
    model.generate(IDS, max_new_tokens=3, do_sample=False, **options)
    assert asked


def test_pickles_into_another_process(made, tmp_path):
    model = slr.load(made, dtype=torch.float32)
    parts = (model, model.get_submodule(FIRST), model.config, AutoConfig.from_pretrained(made))
    twin, _layer, config, _ = pickle.loads(pickle.dumps(parts))
    want = logits(model)
    assert torch.equal(logits(twin), want)
    assert torch.equal(logits(copy.deepcopy(model)), want)
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(logits(torch.load(tmp_path / "model.pt", weights_only=False)), want)
    assert config.to_json_string() == model.config.to_json_string()
    twin.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(slr.load(tmp_path / "again")), want)

    code = f"""
import pickle, sys
with open({str(tmp_path / "parts")!r}, "rb") as file:
    assert "slr" not in sys.modules
    model, layer, config, plain = pickle.load(file)
import torch
from transformers import AutoModelForCausalLM
ids = torch.tensor({IDS.tolist()})
again = AutoModelForCausalLM.from_pretrained({str(made)!r}, config=plain, dtype=torch.float32)
torch.save([model(ids).logits, again(ids).logits], {str(tmp_path / "seen")!r})
"""
    (tmp_path / "parts").write_bytes(pickle.dumps(parts))
    spawned = multiprocessing.get_context("spawn").Process(target=exec, args=(code,))
    spawned.start()
    spawned.join()
    assert spawned.exitcode == 0
    assert all(torch.equal(seen, want) for seen in torch.load(tmp_path / "seen"))


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
def test_casts(made, cast):
    model = getattr(slr.load(made, dtype=torch.float32), cast)()
    dtype = {"half": torch.float16, "float": torch.float32, "double": torch.float64}
    assert model.dtype == dtype.get(cast, torch.bfloat16)
    assert model.get_submodule(FIRST).values.dtype == model.dtype
    assert logits(model).dtype == model.dtype
    assert model.to(torch.float32).to("cpu").dtype == torch.float32
    twin = slr.load(made).to(model.dtype)
    assert (logits(twin).float() - logits(model).float()).abs().max() < 0.1


def loaders(folder):
    yield lambda: slr.load(folder)
    for kind in (AutoModelForCausalLM, AutoModel, LlamaForCausalLM):
        yield lambda kind=kind: kind.from_pretrained(folder)


def nan_in(part):
    def broken(tensors):
        value = tensors[f"{FIRST}.{part}"].clone()
        value.view(-1)[3] = torch.nan
        return value

    return {part: broken}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        *(({part: None}, rf"lacks the tensor (model\.)?{INNER}\.{part}")
          for part in ("values", "bitmask", "B", "A", "bias")),
        ({"weight": torch.zeros(64, 64)}, rf"holds the tensor model.{INNER}\.weight, "),
        ({"B": torch.zeros(64, 3)}, rf"{INNER}\.B has shape \(64, 3\), but .* asks for \(64, 4\)"),
        ({"values": torch.zeros(9)}, rf"{INNER}\.values has shape \(9,\)"),
        ({"bitmask": lambda t: t[f"{FIRST}.bitmask"].clone().fill_(1)},
         rf"{INNER}: there are 2048 values, but the bitmask keeps 512"),
        *((nan_in(part), rf"{INNER}\.{part} holds 1 non-finite") for part in ("values", "B", "A")),
        (nan_in("bias"), rf"{INNER}\.bias holds 1 non-finite"),
    ],
)  # fmt: skip
def test_wrong_tensors_are_named(folder, changed, says):
    change(folder, **changed)
    for load in loaders(folder):
        with pytest.raises(ValueError, match=says) as caught:
            load()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda layers: layers.pop(FIRST), rf"the tensor model.{INNER}\.(values|bitmask|A|B)"),
        (lambda layers: layers.update({"model.layers.9.q": layers.pop(FIRST)}),
         r"layers\.9\.q of shape \(64, 64\), but Llama\w+ has there None|lacks .*layers\.9\.q"),
        (lambda layers: layers[FIRST].update(shape=[32, 64]), r"\(32, 64\), but .* Linear\("),
        (lambda layers: layers[FIRST].update(rank=5), r"asks for \((64, 5|5, 64)\)"),
        (lambda layers: layers[FIRST].update(bias=False), rf"holds the tensor model.{INNER}\.bias"),
        (lambda layers: layers[FIRST].update(pattern="4:8"), None),
    ],
)  # fmt: skip
def test_a_wrong_description_is_named(folder, edit, says):
    config = json.loads((folder / "config.json").read_text())
    edit(config["slr"]["layers"])
    (folder / "config.json").write_text(json.dumps(config))
    for load in loaders(folder):
        if says is None:  # the pattern is for the record
            load()
            continue
        with pytest.raises(ValueError, match=says) as caught:
            load()
        assert "\n" not in str(caught.value)


def test_another_tensor_of_the_model_may_not_be_missing_either(folder):
    file = folder / "model-00003-of-00003.safetensors"
    held = load_file(file)
    held.pop("model.norm.weight")
    save_file(held, file, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    del told["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(told))
    for load in loaders(folder):
        with pytest.raises(ValueError, match=r"lacks the tensor model\.norm\.weight|norm\.weight"):
            load()
