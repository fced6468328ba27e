"""Every law of the conformance suite, over every family and every registered mixer among others drawn at random."""

from __future__ import annotations

from typing import Any

import pytest

from lizardzoo.adapters import ADAPTERS
from lizardzoo.config import MIXERS, MixerSpec
from lizardzoo.testing import MODEL_LAWS, check_model_law, layer_lists, tiny_teacher
from tests.adapters.families import FAMILIES, VARIANTS, teacher

COMPILED = {"compiled_steps_are_the_steps", "a_compiled_forward_is_the_forward"}  # seconds each
QUICK = [law for law in MODEL_LAWS if law not in COMPILED]


def test_every_registered_family_is_tried() -> None:
    assert set(ADAPTERS.names()) == {changes["model_type"] for changes in FAMILIES.values()}


@pytest.mark.parametrize("mixer", list(MIXERS))
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("law", QUICK)
def test_law_of_one_mixer(law: str, family: str, mixer: str) -> None:
    layers = layer_lists(teacher(family).config.num_hidden_layers, always=MIXERS.get(mixer))
    check_model_law(MODEL_LAWS[law], teacher(family), layers, examples=1)


@pytest.mark.parametrize("family", [*FAMILIES, *VARIANTS])
@pytest.mark.parametrize("law", QUICK)
def test_law_of_mixed_layers(law: str, family: str) -> None:
    twice = family in FAMILIES and not MODEL_LAWS[law].__module__.endswith("generating")  # those are slow
    check_model_law(MODEL_LAWS[law], teacher(family), examples=2 if twice else 1)


@pytest.mark.parametrize("family", ["llama", "qwen3"])  # one mask for all layers, and one for each kind
def test_compiled_steps(family: str) -> None:
    """All registered mixers in one model."""
    check_model_law(MODEL_LAWS["compiled_steps_are_the_steps"], all_mixers(family), layers(), examples=1)


def test_a_compiled_forward() -> None:
    check_model_law(MODEL_LAWS["a_compiled_forward_is_the_forward"], all_mixers("qwen3"), layers(), examples=1)


def layers() -> list[MixerSpec]:
    return [MIXERS.get(name)() for name in MIXERS]


def all_mixers(family: str) -> Any:
    return tiny_teacher(**FAMILIES[family], num_hidden_layers=len(layers()))
