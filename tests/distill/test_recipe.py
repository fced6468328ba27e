"""Recipes: exact round trip, wrong values, and what the named ones promise."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lizardzoo.distill.recipe import RECIPES, Finetune, Recipe, Stage, recipe_from, register_recipe
from lizardzoo.errors import LizardzooError

rates = st.floats(0, 1, allow_nan=False)
lengths = st.integers(2, 4096)
common = {
    "sequence_length": lengths,
    "batch_size": st.integers(1, 64),
    "scalar_rate": rates,
    "feature_map_rate": rates,
    "warmup": st.floats(0, 1, exclude_max=True),
    "floor": rates,
    "betas": st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)),
    "schedule": st.sampled_from(["cosine", "linear", "constant"]),
    "clip": rates,
}
recipes = st.builds(
    Recipe,
    name=st.text(min_size=1),
    transfer=st.builds(Stage, steps=st.integers(1, 10**6), **common),
    finetune=st.builds(
        Finetune,
        epochs=st.floats(0.01, 100),
        lora_rank=st.integers(1, 64),
        lora_targets=st.lists(st.text(min_size=1), min_size=1).map(tuple),
        ce_weight=rates,
        kl_weight=st.floats(0.01, 1),
        **common,
    ),
    mixing=st.sampled_from(["concatenate", "equal"]),
    isolate_documents=st.booleans(),
    seed=st.integers(0, 2**31),
)


@given(recipe=recipes)
def test_a_recipe_survives_json_exactly(recipe):
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert hash(Recipe.from_dict(recipe.to_dict())) == hash(recipe)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_named_recipe_is_found_by_name_value_and_dict(name):
    recipe = recipe_from(name)
    assert recipe.name == name
    assert recipe_from(recipe) is recipe
    assert recipe_from(recipe.to_dict()) == recipe


def test_the_papers_recipe_is_the_papers():
    lizard = recipe_from("lizard")
    for stage, rate in ((lizard.transfer, 1e-3), (lizard.finetune, 5e-4)):
        assert (stage.epochs, stage.batch_size, stage.sequence_length) == (2, 8, 2048)
        assert stage.scalar_rate == stage.projection_rate == stage.feature_map_rate == rate
        assert (stage.betas, stage.eps, stage.clip) == ((0.9, 0.99), 1e-8, 1.0)
        assert (stage.schedule, stage.warmup, stage.floor) == ("cosine", 0.1, 0.1)
    tune = lizard.finetune
    assert (tune.lora_rank, tune.lora_alpha, tune.lora_rate) == (8, 16, 5e-4)
    assert tune.lora_targets == ("q_proj", "k_proj", "v_proj")
    assert (tune.ce_weight, tune.kl_weight) == (1, 0)


def test_the_recommended_recipe_follows_the_teacher_at_the_measured_rates():
    recipe = recipe_from("recommended")
    assert (recipe.transfer.steps, recipe.finetune.steps) == (200, 250)
    assert (recipe.transfer.batch_size, recipe.transfer.sequence_length) == (16, 1024)
    transfer = recipe.transfer
    assert (transfer.scalar_rate, transfer.projection_rate, transfer.feature_map_rate) == (1e-2, 1e-3, 1e-2)
    assert (recipe.finetune.ce_weight, recipe.finetune.kl_weight) == (0, 1)
    assert "o_proj" in recipe.finetune.lora_targets


def test_epochs_count_whole_batches():
    assert Stage(epochs=2, batch_size=8).total_steps(100) == 24
    assert Stage(epochs=0.5, batch_size=8).total_steps(100) == 6
    assert Stage(steps=7, batch_size=8).total_steps(100) == 7


@pytest.mark.parametrize(
    ("stage", "changes", "words"),
    [
        (Stage, {}, "steps"),
        (Stage, {"steps": 1, "epochs": 1}, "epochs"),
        (Stage, {"steps": 0}, "steps=0"),
        (Stage, {"steps": True}, "steps=True"),
        (Stage, {"steps": 1.5}, "steps=1.5"),
        (Stage, {"epochs": 0}, "epochs=0"),
        (Stage, {"steps": 1, "batch_size": 0}, "batch_size=0"),
        (Stage, {"steps": 1, "sequence_length": 1}, "sequence_length=1"),
        (Stage, {"steps": 1, "scalar_rate": -1}, "scalar_rate=-1"),
        (Stage, {"steps": 1, "feature_map_rate": float("nan")}, "feature_map_rate=nan"),
        (Stage, {"steps": 1, "projection_rate": "1e-3"}, "projection_rate='1e-3'"),
        (Stage, {"steps": 1, "schedule": "cos"}, "cosine, linear, constant"),
        (Stage, {"steps": 1, "warmup": 1.0}, "warmup=1.0"),
        (Stage, {"steps": 1, "floor": 2}, "floor=2"),
        (Stage, {"steps": 1, "betas": (0.9,)}, "two numbers"),
        (Stage, {"steps": 1, "eps": 0}, "eps=0"),
        (Finetune, {"steps": 1, "ce_weight": 0, "kl_weight": 0}, "kl_weight=0"),
        (Finetune, {"steps": 1, "lora_rank": 0}, "lora_rank=0"),
        (Finetune, {"steps": 1, "lora_targets": ()}, "lora_targets=()"),
        (Finetune, {"steps": 1, "lora_targets": "q_proj"}, "'q_proj'"),
        (Finetune, {"steps": 1, "lora_alpha": 0}, "lora_alpha=0"),
    ],
)
def test_a_wrong_value_gets_one_sentence_with_the_field_and_the_value(stage, changes, words):
    with pytest.raises(LizardzooError, match="change the recipe") as error:
        stage(**changes)
    text = str(error.value)
    assert words in text
    assert stage.__name__ in text
    assert "\n" not in text


def test_a_stage_in_the_wrong_place_is_refused():
    stage, tune = Stage(steps=1), Finetune(steps=1)
    for transfer, finetune in ((tune, tune), (stage, stage), (None, tune)):
        with pytest.raises(LizardzooError, match="must be a"):
            Recipe("wrong", transfer, finetune)


def test_unknown_names_and_fields_list_what_exists():
    with pytest.raises(LizardzooError, match=r"unknown recipe 'lizzard'.*demo.*lizard.*recommended"):
        recipe_from("lizzard")
    values = recipe_from("demo").to_dict()
    with pytest.raises(LizardzooError, match=r"Finetune has no field 'lora_rnak'.*lora_rank"):
        recipe_from({**values, "finetune": {**values["finetune"], "lora_rnak": 4}})
    with pytest.raises(LizardzooError, match="Recipe needs the field 'transfer'"):
        recipe_from({"name": "half", "finetune": values["finetune"]})
    with pytest.raises(LizardzooError, match="a recipe is a name, a Recipe or a dict"):
        recipe_from(3)


def test_a_recipe_cannot_be_changed_and_a_taken_name_is_refused():
    demo = recipe_from("demo")
    with pytest.raises(dataclasses.FrozenInstanceError):
        demo.seed = 1
    assert register_recipe(demo) is demo
    with pytest.raises(LizardzooError, match="'demo' is already taken"):
        register_recipe(dataclasses.replace(demo, seed=5))
