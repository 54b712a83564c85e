import json
import re

import pytest

import slr
from slr.matrix.statistics import GramStatistic, NormStatistic

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
        ({"update_mask": True}, "update_mask=True has no effect with refine='weights'"),
        ({"tolerance": 1}, "tolerance is 1; it must be from 0 to below 1"),
    ],
)
def test_bad_recipes_are_named(options, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        slr.Recipe(**options)


def test_names_that_fit_no_layer_are_refused(small):
    model = slr.load(small)
    for options in ({"skip": ["*.w1"]}, {"overrides": {"*.w1": {"rank": 1}}}):
        with pytest.raises(ValueError, match=r"'\*\.w1' in the recipe fits no layer"):
            slr.compress_model(model, slr.Recipe(prune="magnitude", **options))
    with pytest.raises(ValueError, match="leaves none to compress"):
        slr.compress_model(model, slr.Recipe(prune="magnitude", skip=["*"]))
