import json
import re

import numpy as np
import pytest

import slr
from slr.checkpoint.recipes import read_config
from slr.matrix.statistics import GramStatistic, NormStatistic
from slr.options import overrides_of, recipe_of

NAME = "model.layers.3.self_attn.q_proj"


def test_overrides_and_skips_are_by_name():
    recipe = slr.Recipe(
        prune="magnitude",
        skip=["*.down_proj", "model.layers.0.*"],
        overrides={"*.q_proj": {"rank": 5}, "model.layers.3.*": {"pattern": "0.3"}},
    )
    layer = recipe.layer(NAME, 64)
    assert (layer.rank, str(layer.pattern)) == (5, "0.3")
    assert recipe.layer("model.layers.1.self_attn.q_proj", 64).pattern == slr.NM(2, 4)
    assert recipe.layer("model.layers.1.mlp.up_proj", 64).rank == 2
    assert recipe.layer("model.layers.1.mlp.down_proj", 64) is None
    assert recipe.layer("model.layers.0.mlp.up_proj", 64) is None


def test_a_layer_may_be_repaired_where_the_others_are_not():
    recipe = slr.Recipe(refine="none", overrides={"*": {"refine": "weights", "rank_ratio": 0.5}})
    assert recipe.resolved(64).layer(NAME, 64).rank == 32
    back = slr.Recipe(rank=4, overrides={"*": {"refine": "none"}}).layer(NAME, 64)
    assert back.rank is None


def test_the_statistic_is_the_richest_that_any_layer_needs():
    plain = slr.Recipe(prune="magnitude")
    assert plain.statistic is None
    for options, kind in (
        ({"prune": "wanda"}, NormStatistic),
        ({"prune": "sparsegpt"}, GramStatistic),
    ):
        assert slr.Recipe(prune="magnitude", overrides={"*": options}).statistic is kind


def test_a_recipe_survives_json():
    recipe = slr.Recipe(skip=["*.o_proj"], overrides={"*.q_proj": {"rank": 3}}, pattern=0.5)
    assert slr.Recipe(**json.loads(json.dumps(recipe.as_dict()))) == recipe


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"overrides": {"*": {"seed": 1}}}, "option 'seed' is not one of a layer"),
        ({"overrides": {"*": {"pattern": "5:2"}}}, "5:2"),
        (
            {"refine": "weights", "update_mask": True},
            "update_mask=True has no effect with refine='weights'",
        ),
        (
            {"refine": "activations", "update_mask": "swaps"},
            "update_mask is 'swaps'; it must be 'admm', true (by score) or false",
        ),
        ({"tolerance": 1}, "tolerance is 1; it must be from 0 to below 1"),
    ],
)
def test_bad_recipes_are_named(options, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        slr.Recipe(**options)


LOW = {"prune": "magnitude", "pattern": "1.0"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({**LOW, "refine": "none"}, "1.0 keeps nothing, and refine='none' has nothing to work on;"),
        (LOW, "refine='weights' has nothing to work on; give 'svd' or 'eora'"),
        ({**LOW, "refine": "activations"}, "refine='activations' has nothing to work on"),
        ({"pattern": "1", "refine": "svd"}, "prune='wanda' has no effect with pattern 1.0, which"),
        ({"overrides": {"*": {"pattern": "1.0"}}}, "overrides['*']: pattern 1.0 keeps nothing"),
    ],
)
def test_where_nothing_is_kept_only_the_low_rank_is_chosen(options, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        slr.Recipe(**options)


def test_induction_has_no_mask_to_train_for_where_nothing_is_kept(small):
    model = slr.load(small)
    recipe = slr.Recipe(**LOW, refine="svd", prepare="induction")
    with pytest.raises(ValueError, match=r"pattern 1.0 keeps nothing; there is no mask"):
        slr.compress_model(model, recipe, None)


def test_names_that_fit_no_layer_are_refused(small):
    model = slr.load(small)
    for options in ({"skip": ["*.w1"]}, {"overrides": {"*.w1": {"rank": 1}}}):
        with pytest.raises(ValueError, match=r"'\*\.w1' in the recipe fits no layer"):
            slr.compress_model(model, slr.Recipe(prune="magnitude", **options))
    with pytest.raises(ValueError, match="leaves none to compress"):
        slr.compress_model(model, slr.Recipe(prune="magnitude", skip=["*"]))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prune": "magnitude", "samples": 4}, "samples=4 has no effect with prune='magnitude'"),
        ({"prune": "magnitude", "seqlen": 64}, "seqlen=64 has no effect"),
        ({"pattern": "2:4", "group": "matrix"}, "group 'matrix' has no effect on pattern 2:4"),
        (
            {"refine": "weights", "tolerance": 0.1},
            "tolerance 0.1 has no effect with schedule='paper'",
        ),
        ({"seqlen": 0}, "seqlen is 0; a window needs at least 2 tokens"),
        ({"refine": "none", "rank": 3}, "rank=3 has no effect with refine='none'"),
        ({"refine": "svd", "iterations": 3}, "iterations=3 has no effect with refine='svd'"),
        ({"refine": "activations", "schedule": "paper"}, "schedule='paper' has no effect"),
        ({"refine": slr.steps.SVD(rank=2), "rank": 3}, "rank=3 has no effect with refine='svd'"),
        ({"overrides": {"*": {"refine": "svd", "iterations": 2}}}, "iterations=2 has no effect"),
        ({"overrides": {"*": {"group": "matrix"}}}, "group 'matrix' has no effect on pattern 2:4"),
    ],
)
def test_an_option_without_effect_is_refused(options, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        slr.Recipe(**options)


@pytest.mark.parametrize("name", ["iterations", "rank", "samples", "seqlen", "seed"])
def test_counts_are_integers(name):
    with pytest.raises(TypeError, match=f"{name} is 2.5; it must be an integer"):
        slr.Recipe(**{name: 2.5})


def test_names_and_objects_make_the_same_recipe():
    by_name = slr.Recipe(
        prune="sparsegpt", pattern="0.5", group="matrix", refine="activations", rank=4,
        iterations=7, update_mask=True, seed=2,
        overrides={"*.q_proj": {"refine": "svd", "rank": 2}},
    )  # fmt: skip
    by_object = slr.Recipe(
        slr.steps.PRUNERS["sparsegpt"](), slr.Unstructured(0.5, "matrix"), seed=2,
        refine=slr.steps.Outputs(rank=4, iterations=7, update_mask=True),
        overrides={"*.q_proj": {"refine": slr.steps.SVD(rank=2)}},
    )  # fmt: skip
    assert by_name == by_object
    assert slr.Recipe(**json.loads(json.dumps(by_name.as_dict()))) == by_object
    layer = by_object.layer(NAME, 64)
    assert (str(layer.refine), layer.rank) == ("svd", 2)
    with pytest.raises(AttributeError, match="a recipe cannot be changed"):
        by_name.seed = 3


def test_what_an_earlier_version_wrote_is_read():
    old = {
        "prune": "sparsegpt", "pattern": "0.5", "group": "matrix", "refine": "none", "rank": None,
        "rank_ratio": 0.03125, "iterations": 50, "schedule": "paper", "update_mask": False,
        "prepare": "none", "tolerance": 0.001, "samples": 16, "seqlen": 512, "seed": 0, "skip": [],
        "overrides": {},
    }  # fmt: skip
    recipe = slr.Recipe.from_dict(old)
    assert recipe == slr.Recipe(
        "sparsegpt", "0.5", group="matrix", refine="none", samples=16, seqlen=512
    )


def test_a_recipe_in_a_file(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("prune: magnitude\npattern: '2:4'\noverrides: {'*.q_proj': {rank: 3}}\n")
    assert slr.Recipe(**read_config(file)) == slr.Recipe(
        "magnitude", overrides={"*.q_proj": {"rank": 3}}
    )
    for text, says in (
        ("- a\n", "holds no options"),
        ("prun: wanda\n", "'prun' is no option; it must be one of prune"),
        ("{", "is not YAML"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=says):
            read_config(file)
    with pytest.raises(ValueError, match="cannot be read"):
        read_config(tmp_path / "none.yaml")


def test_dense_pattern_is_called_so_and_has_no_mask_to_choose():
    recipe = slr.Recipe(pattern="dense", values="int4 by 64")
    assert "pattern='dense'" in repr(recipe)
    assert "update_mask" not in repr(recipe)
    assert slr.Recipe(**recipe.as_dict()) == recipe
    assert slr.Recipe.from_dict(recipe.as_dict() | {"update_mask": "admm"}) == recipe
    slr.Recipe("magnitude", "dense", values="int4 by 64")  # no data: no schedule either


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"values": "int4 by 64", "update_mask": "admm", "refine": "activations"}, "no effect"),
        ({}, "keeps every weight, so that nothing gets smaller; give values"),
        ({"refine": "none"}, "keeps every weight"),
    ],
)
def test_dense_pattern_refuses_what_does_nothing(options, message):
    with pytest.raises(ValueError, match=message):
        slr.Recipe(pattern="dense", **options)


@pytest.mark.parametrize(
    ("whole", "layer", "left"),
    [
        ({"prune": "magnitude"}, {"values": "int4 by 64"}, {"schedule": "paper"}),
        ({}, {"pattern": "dense", "values": "int4 by 64"}, {"update_mask": False}),
        (
            {"pattern": "dense", "values": "int4 by 64"},
            {"pattern": "2:4", "values": None},
            {"factors": None},
        ),
    ],
)
def test_an_override_drops_what_it_makes_void(whole, layer, left):
    recipe = slr.Recipe(**whole, overrides={"*.q_proj": layer})
    found = recipe.layer("model.layers.0.self_attn.q_proj", 64).refine.options()
    assert {name: found[name] for name in left} == left
    assert slr.Recipe.from_dict(json.loads(json.dumps(recipe.as_dict()))) == recipe


def test_numbers_of_numpy_and_grids_become_plain():
    recipe = slr.Recipe(
        rank=np.int64(4), iterations=np.int32(9), samples=np.int64(2), seed=np.int64(3),
        overrides={"*.q_proj": {"values": slr.Grid(4, 64), "rank": np.int64(2)}},
    )  # fmt: skip
    assert slr.Recipe.from_dict(json.loads(json.dumps(recipe.as_dict()))) == recipe
    with pytest.raises(ValueError, match="seed is"):
        slr.Recipe(seed=2**70)


def test_a_file_may_say_two_four_as_one_writes_it(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("pattern: 2:4\nrank: 4\ntolerance: 1e-3\nadmm: no\n".replace("admm: no\n", ""))
    assert read_config(file) == {"pattern": "2:4", "rank": 4, "tolerance": 1e-3}
    assert slr.Recipe(**read_config(file)).pattern == slr.NM(2, 4)


def test_overrides_of_one_name_are_merged_and_numbers_are_numbers(tmp_path):
    given = ["*.o_proj:rank=3", "*.q_proj:rank=2", "*.o_proj:pattern=1:4"]
    assert overrides_of(given) == {
        "*.q_proj": {"rank": 2},
        "*.o_proj": {"rank": 3, "pattern": "1:4"},
    }
    with pytest.raises(ValueError, match="rank is 'abc', which is no number"):
        overrides_of(["*.o_proj:rank=abc"])
    file = tmp_path / "own.yaml"
    file.write_text("overrides:\n  '*.o_proj':\n    pattern: 1:4\n")
    with pytest.warns(UserWarning, match="pattern='0.5' is for the layers that the overrides"):
        recipe_of(None, {}, {"pattern": "0.5"}, file)
