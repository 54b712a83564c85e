import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import OPTConfig, OPTForCausalLM

import slr
from slr.checkpoint.folder import about
from slr.evaluate.comparison import compare, prune_again
from slr.layer.bits import pack_mask, unpack_mask
from slr.matrix.statistics import GramStatistic, NormStatistic
from slr.matrix.steps import REPAIRS, Known
from slr.model.block import compress_layer
from slr.model.plain import PLAIN


@pytest.fixture
def model(small):
    return slr.load(small, dtype=torch.float32)


@pytest.fixture
def windows(small, text):
    return slr.data.windows(text, slr.load_tokenizer(small), 32, limit=6)


@pytest.mark.parametrize("prune", ["magnitude", "random", "wanda", "sparsegpt"])
@pytest.mark.parametrize("repair", REPAIRS)
def test_every_linear_is_replaced_and_obeys_the_pattern(model, windows, prune, repair):
    before = {name: p.clone() for name, p in model.named_parameters()}
    options = {"prune": prune, "pattern": "2:4", "refine": repair, "iterations": 5}
    if REPAIRS[repair].blind and prune != "wanda":
        with pytest.raises(ValueError, match=f"prune='{prune}' has no effect with refine="):
            slr.Recipe.fitting(**options)
        return
    recipe = slr.Recipe.fitting(**options)
    reports = slr.compress_model(model, recipe, windows)
    assert len(reports) == 14
    for report in reports:
        layer = model.get_submodule(report.name)
        assert isinstance(layer, slr.SLRLinear)
        assert layer.pattern.verify(layer.mask)
        assert layer.rank == report.rank == (0 if repair in ("none", "gptq") else 2)
        W = before[report.name + ".weight"]
        with torch.no_grad():
            error = float((W - layer.dense()).norm() / W.norm())
        assert report.error == pytest.approx(error, rel=1e-3)
        if repair in ("weights", "diagonal") or (repair == "svd" and prune != "sparsegpt"):
            assert report.error < report.pruned_error
    assert torch.equal(model.model.embed_tokens.weight, before["model.embed_tokens.weight"])


def test_wanda_norms_come_from_the_compressed_blocks_before(small, windows):
    model = slr.load(small, dtype=torch.float32)
    recipe = slr.Recipe(prune="wanda", pattern="0.5", refine="none")
    slr.compress_model(model, recipe, windows)

    # By hand for a layer of the last block: prune the first block alone, then look at inputs.
    partly = slr.load(small, dtype=torch.float32)
    name = "model.layers.1.mlp.down_proj"
    for path, layer in model.named_modules():
        if isinstance(layer, slr.SLRLinear) and ".layers.0." in path:
            partly.get_submodule(path).weight.data = layer.weight.data
    norm = NormStatistic(128)
    partly.get_submodule(name).register_forward_pre_hook(lambda module, args: norm.update(args[0]))
    with torch.no_grad():
        partly(input_ids=windows)
    mask = slr.prune(
        partly.get_submodule(name).weight.data, "wanda", "0.5", activation_norm=norm.norm()
    ).mask
    # The norms are added up in another order: a nearly tied score may fall the other way.
    assert float((mask == model.get_submodule(name).mask).float().mean()) > 0.999


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_input_norm_does_not_overflow(dtype):
    norm = NormStatistic(2)
    for _ in range(100):
        norm.update(torch.full((4, 50, 2), 300.0, dtype=dtype))
    assert norm.norm().tolist() == pytest.approx([300 * 20000**0.5] * 2)


def test_saved_and_loaded_bit_for_bit(small, tmp_path):
    reports = slr.compress(small, slr.Recipe(prune="magnitude", iterations=5), out=tmp_path / "a")
    again = slr.load(tmp_path / "a")
    in_memory = slr.load(small)
    slr.compress_model(in_memory, slr.Recipe(prune="magnitude", iterations=5))
    ids = torch.randint(4096, (2, 20))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, in_memory(ids).logits)
    assert again.dtype == torch.bfloat16
    assert torch.equal(again.lm_head.weight, again.model.embed_tokens.weight)
    notes = about(tmp_path / "a")
    assert notes["recipe"]["rank"] == 2
    assert list(notes["layers"]) == [report.name for report in reports]
    out = again.generate(ids[:1], max_new_tokens=3, do_sample=False)
    assert out.shape == (1, 23)


def stored(folder):
    return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


def test_files_are_as_small_as_they_should_be(small, tmp_path):
    slr.compress(small, slr.Recipe(prune="magnitude", iterations=2), out=tmp_path / "a")
    tensors = stored(tmp_path / "a")
    name = "model.layers.0.mlp.up_proj"
    m, n, k = 128, 64, 2
    size = sum(v.nbytes for key, v in tensors.items() if key.startswith(name))
    assert size == m * n // 2 * 2 + m * n // 8 + 2 * k * (m + n)


def test_pruned_source_is_the_model_without_repair(small, tmp_path, model):
    recipe = slr.Recipe(prune="magnitude", pattern="0.5", iterations=3)
    compressed = slr.load(small, dtype=torch.float32)
    slr.compress_model(compressed, recipe)
    dense = slr.load(small, dtype=torch.float32)
    prune_again(dense, compressed, {"recipe": recipe.as_dict()}, small)
    slr.compress_model(model, slr.Recipe(prune="magnitude", pattern="0.5", refine="none"))
    ids = torch.randint(4096, (1, 9))
    with torch.no_grad():
        assert torch.allclose(dense(ids).logits, model(ids).logits, atol=1e-5)


def test_mask_bits():
    for shape in [(1, 1), (3, 5), (8, 8), (7, 9)]:
        mask = torch.rand(shape) < 0.5
        bits = pack_mask(mask)
        assert len(bits) == -(-mask.numel() // 8)
        assert torch.equal(unpack_mask(bits, shape), mask)


def test_recipe_ranks():
    assert slr.Recipe().resolved(256).rank == 8
    assert slr.Recipe(rank_ratio=0.1).resolved(256).rank == 25
    assert slr.Recipe(rank=3).resolved(256).rank == 3
    assert slr.Recipe(refine="none").resolved(256).rank is None
    refined = compress_layer(torch.randn(8, 8), slr.Recipe(prune="magnitude", rank=2)).refined
    assert refined.A.shape == (2, 8)
    assert refined.mask.sum() == 32


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prune": "best"}, "prune 'best' is unknown"),
        ({"refine": "more"}, "refine 'more' is unknown"),
        ({"refine": "weights", "schedule": "now"}, "schedule 'now' is unknown"),
        ({"pattern": "3:2"}, "3:2"),
        ({"rank": 0}, "rank is 0"),
        ({"rank_ratio": 1.5}, "rank_ratio is 1.5"),
        ({"rank": 4, "rank_ratio": 0.5}, "both given"),
        ({"iterations": 0}, "iterations is 0"),
        ({"samples": 0}, "samples is 0"),
    ],
)
def test_bad_recipes_are_named(options, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        slr.Recipe(**options)


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (slr.Recipe(prune="magnitude", rank=33), "rank 33 is above 32"),
        (slr.Recipe(prune="magnitude", pattern="2:6"), "does not divide the inputs"),
        (slr.Recipe(prune="wanda"), "needs calibration windows"),
    ],
)
def test_a_recipe_that_does_not_fit_changes_nothing(model, recipe, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        slr.compress_model(model, recipe)
    assert not any(isinstance(m, slr.SLRLinear) for m in model.modules())


def test_non_finite_weights_are_refused(small, tmp_path):
    model = slr.load(small)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="1 non-finite"):
        slr.compress_model(model, slr.Recipe(prune="magnitude", iterations=1))


def test_not_compressed_twice(small, tmp_path):
    slr.compress(small, slr.Recipe(prune="magnitude", refine="none"), out=tmp_path / "a")
    with pytest.raises(ValueError, match="compressed already"):
        slr.compress(tmp_path / "a", slr.Recipe(prune="magnitude"), out=tmp_path / "b")
    with pytest.raises(ValueError, match="exists already"):
        slr.compress(small, slr.Recipe(prune="magnitude"), out=tmp_path / "a")
    assert not (tmp_path / "b").exists()


def test_damaged_folders_are_named(small, tmp_path):
    folder = tmp_path / "a"
    slr.compress(small, slr.Recipe(prune="magnitude", iterations=1), out=folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole, notes = weights.read_bytes(), json.loads(config.read_text())

    tensors = load_file(weights)
    tensors.pop("model.layers.0.mlp.up_proj.bitmask")
    save_file(tensors, weights)
    with pytest.raises(ValueError, match=r"up_proj\.bitmask"):
        slr.load(folder)
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged"):
        slr.load(folder)
    weights.write_bytes(whole)
    config.write_text(json.dumps({**notes, "slr": {**notes["slr"], "format": 99}}))
    with pytest.raises(ValueError, match="format 99"):
        slr.load(folder)
    config.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        slr.load(folder)


def test_eora_is_the_one_shot_repair_of_the_outputs():
    statistic = GramStatistic(16)
    statistic.update(torch.randn(64, 16) * torch.rand(16))
    weight = torch.randn(12, 16)
    recipe = slr.Recipe(prune="magnitude", refine="eora", rank=3)
    assert recipe.statistic is GramStatistic
    found = compress_layer(weight, recipe, known=Known(gram=statistic.gram())).refined
    gram = slr.Gram(statistic.gram())
    assert torch.equal(found.sparse, slr.prune(weight, "magnitude", "2:4").weight)
    expected = slr.svd_repair(weight, found.mask, 3, gram)
    assert torch.allclose(found.B @ found.A, expected.B @ expected.A, atol=1e-5)
    by_weights = compress_layer(weight, slr.Recipe(prune="magnitude", refine="svd", rank=3)).refined
    assert gram.error(weight - found.dense()) < 0.99 * gram.error(weight - by_weights.dense())


def test_a_tolerance_stops_refinement_but_not_the_papers_ramp():
    weight, gram = torch.randn(12, 16), torch.eye(16)
    for options in ({"refine": "activations"}, {"refine": "weights", "schedule": "accelerated"}):
        counts = [
            len(compress_layer(
                weight, slr.Recipe(prune="magnitude", rank=3, tolerance=tolerance, **options),
                known=Known(gram=gram),
            ).refined.trace)
            for tolerance in (0.0, 0.3)
        ]  # fmt: skip
        assert counts[0] == 51
        assert counts[1] < 10
    with pytest.raises(ValueError, match=r"tolerance 0.3 has no effect with schedule='paper'"):
        slr.Recipe(prune="magnitude", refine="weights", tolerance=0.3)


# What pruning left is data: where it moves weights, a mask on the dense ones is another model.
MOVING = [
    {"prune": "sparsegpt"},
    {"prune": "sparsegpt", "refine": "svd"},
    {"prune": "wanda", "refine": "activations", "update_mask": True, "iterations": 6},
    {"prune": "magnitude", "prepare": "induction", "iterations": 2},
]


@pytest.mark.parametrize("options", MOVING)
def test_what_pruning_left_is_what_is_reported(model, windows, options):
    recipe = slr.Recipe(pattern="2:4", **options)
    alone = slr.load(model.name_or_path, dtype=torch.float32)
    before = {n: p.clone() for n, p in model.named_parameters()}
    reports = {r.name: r for r in slr.compress_model(model, recipe, windows)}
    pruned = {r.name: r for r in slr.compress_model(alone, recipe.pruned_only(), windows)}
    # Whose inputs are the same: of the default recipe only the first three, as it goes by stages.
    same = ("q_proj", "k_proj", "v_proj") if recipe.follows_dense else ""
    for name in [n for n in reports if ".layers.0." in n and n.endswith(same)]:
        assert reports[name].pruned_error == pytest.approx(pruned[name].error, rel=1e-5)
        if options["prune"] == "sparsegpt":
            W = before[f"{name}.weight"]
            masked = float((W * ~alone.get_submodule(name).mask).norm() / W.norm())
            assert pruned[name].error > 1.02 * masked


@pytest.mark.parametrize("options", MOVING)
def test_the_pruned_row_is_the_pruned_model(small, tmp_path, windows, options):
    data = {"samples": 6, "seqlen": 32}
    recipe = slr.Recipe(pattern="2:4", **options, **data)
    slr.compress(small, recipe, out=tmp_path / "out")
    alone = recipe.pruned_only()
    slr.compress(small, alone, out=tmp_path / "pruned")
    found = compare(tmp_path / "out", windows)
    assert [name for name in found if name not in PLAIN][:2] == ["dense", "pruned"]
    assert found["pruned"] == pytest.approx(slr.perplexity(tmp_path / "pruned", windows), rel=1e-6)


def test_no_pruned_row_without_its_calibration_text(small, tmp_path, text, windows):
    file = tmp_path / "text.txt"
    file.write_text(text)
    recipe = slr.Recipe(prune="sparsegpt", samples=4, seqlen=32, iterations=2)
    slr.compress(small, recipe, out=tmp_path / "out", calibration=file)
    assert "pruned" in compare(tmp_path / "out", windows)
    file.write_text(text[100:])  # not what it was
    assert "pruned" not in compare(tmp_path / "out", windows)
    file.unlink()
    assert list(compare(tmp_path / "out", windows)) == ["dense", *PLAIN, "refined"]


def test_the_group_of_a_pattern_is_kept_on_disk(small, tmp_path):
    recipe = slr.Recipe(prune="magnitude", pattern="0.3", group="matrix", iterations=2)
    slr.compress(small, recipe, out=tmp_path / "out")
    layers = [m for m in slr.load(tmp_path / "out").modules() if isinstance(m, slr.SLRLinear)]
    assert len(layers) == 14
    for layer in layers:
        assert layer.pattern == slr.Unstructured(0.3, "matrix")
        assert layer.pattern.verify(layer.mask)
    again = slr.Recipe.from_dict(about(tmp_path / "out")["recipe"])
    assert again.pattern == slr.Unstructured(0.3, "matrix")


def test_one_verb_for_a_folder_and_for_a_loaded_model(small, tmp_path, windows):
    recipe = slr.Recipe(prune="wanda", iterations=2)
    streamed = slr.compress(small, recipe, out=tmp_path / "out", calibration=windows)
    loaded = slr.load(small)
    in_place = slr.compress(loaded, recipe, calibration=windows)
    assert [r[:-1] for r in in_place] == [r[:-1] for r in streamed]
    ids = windows[:2]
    assert torch.equal(loaded(ids).logits, slr.load(tmp_path / "out")(ids).logits)
    named = slr.load(small)  # a text needs the tokenizer, which is where the model is from
    data = slr.Recipe(prune="wanda", iterations=2, samples=3, seqlen=32)
    assert len(slr.compress(named, data, calibration="embedded")) == 14


@pytest.mark.parametrize("system", [slr.CAP, slr.LoSparse])
def test_systems_by_the_same_verb(small, windows, system):
    model = slr.load(small, dtype=torch.float32)
    reports = slr.compress(model, system(budget=0.4, steps=2), calibration=windows)
    dense = sum(r.shape[0] * r.shape[1] for r in reports)
    assert sum(r.kept + r.rank * sum(r.shape) for r in reports) <= 0.4 * dense
    assert sum(isinstance(m, slr.SLRLinear) for m in model.modules()) == 14


def dropping(rate=0.5):
    """A random OPT in training mode, but for one module; it has dropout."""
    config = OPTConfig(
        vocab_size=4096, hidden_size=32, ffn_dim=64, word_embed_proj_dim=32, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, pad_token_id=1, dropout=rate,
    )  # fmt: skip
    torch.manual_seed(2)
    model = OPTForCausalLM(config).train()
    model.model.decoder.layers[1].fc1.eval()
    return model


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize(
    "recipe", [slr.Recipe(prune="wanda", refine="none"), slr.CAP(budget=0.4, steps=2),
               slr.LoSparse(budget=0.4, steps=2)],
)  # fmt: skip
def test_dropout_is_off_while_looking_and_modes_come_back(windows, recipe):
    masks = []
    for seed in (0, 1):
        model = dropping(0 if isinstance(recipe, slr.LoSparse) else 0.5)
        before = modes(model)
        torch.manual_seed(seed)
        slr.compress(model, recipe, calibration=windows)
        assert modes(model) == before
        layers = [m for m in model.modules() if isinstance(m, slr.SLRLinear)]
        masks.append(torch.cat([m.mask.flatten() for m in layers]))
    assert torch.equal(*masks)


def test_modes_come_back_after_an_error_and_after_looking(windows, monkeypatch):
    model = dropping()
    before = modes(model)
    assert slr.perplexity(model, windows) == slr.perplexity(model, windows)
    assert modes(model) == before

    def broken(*args, **kwargs):
        raise RuntimeError("broken")

    monkeypatch.setattr("slr.methods.blockwise.compress_block", broken)
    with pytest.raises(RuntimeError, match="broken"):
        slr.compress(model, slr.Recipe(prune="wanda", refine="none"), calibration=windows)
    assert modes(model) == before


@pytest.mark.parametrize(
    "recipe",
    [slr.Recipe(prune="magnitude", refine="none"), slr.Recipe(prune="wanda", rank=2, iterations=1),
     slr.CAP(budget=0.4, steps=1), slr.LoSparse(budget=0.4, steps=1)],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_errors_of_a_zero_matrix_are_numbers(model, windows, recipe, tmp_path):
    name = "model.layers.1.self_attn.o_proj"
    model.get_parameter(f"{name}.weight").data.zero_()
    reports = {report.name: report for report in slr.compress(model, recipe, calibration=None if
               not recipe.needs_data else windows)}  # fmt: skip
    exact = not model.get_submodule(name).dense().any()
    assert reports[name].error == (0 if exact else 1)
    if isinstance(recipe, slr.Recipe):
        assert reports[name].pruned_error == 0
    if not getattr(recipe, "follows_dense", False):  # such a layer is asked for more than zero
        assert reports[name].error == reports[name].pruned_error
        assert reports[name].output_error in (None, 0)
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    json.loads(text, parse_constant=lambda found: pytest.fail(f"{found} is not JSON"))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "says"),
    [
        (["folder"], {}, ValueError, "out= has to name a folder to make"),
        (["model"], {"out": "x"}, ValueError, "model is loaded, and compressed in place"),
        (["model"], {"device": "cpu"}, ValueError, "have no effect on a loaded model"),
        (["model"], {"calibration": "embedded"}, ValueError, "has no effect"),
        (["folder"], {"out": "x", "calibration": "embedded"}, ValueError, "has no effect"),
        (["folder", "x"], {}, TypeError, "the folder to make is out="),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    small, model, tmp_path, monkeypatch, arguments, options, error, says
):
    monkeypatch.chdir(tmp_path)
    what = {"folder": small, "model": model}[arguments[0]]
    recipe = arguments[1] if len(arguments) > 1 else slr.Recipe("magnitude", iterations=1)
    with pytest.raises(error, match=says):
        slr.compress(what, recipe, **options)
    assert not any(isinstance(m, slr.SLRLinear) for m in model.modules())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("repair", ["svd", "eora"])
def test_low_rank_alone_is_stored_and_loaded(small, windows, tmp_path, repair):
    """The toolkit's lowrank-only: B A of W itself, and no entry of S."""
    dense = slr.load(small, dtype=torch.float32)
    recipe = slr.Recipe("magnitude", "1.0", refine=repair, rank=5)
    text = windows if repair == "eora" else None
    reports = slr.compress(small, recipe, calibration=text, out=tmp_path / "out")
    assert {(r.kept, r.rank, r.pruned_error) for r in reports} == {(0, 5, 1.0)}
    model = slr.load(tmp_path / "out", dtype=torch.float32)
    if repair == "svd":
        for report in reports:
            layer = model.get_submodule(report.name)
            W = dense.get_submodule(report.name).weight.detach()
            U, s, Vh = torch.linalg.svd(W, full_matrices=False)
            best = (U[:, :5] * s[:5]) @ Vh[:5]
            assert torch.allclose((layer.B @ layer.A).detach(), best, atol=0.02 * float(W.std()))
            assert report.error == pytest.approx(float((W - best).norm() / W.norm()), rel=1e-2)
    for report in reports:
        assert model.get_submodule(report.name).values.numel() == 0
        assert (report.output_error is None) == (repair == "svd")
    assert slr.perplexity(model, windows) < math.inf
