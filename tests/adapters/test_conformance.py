"""Every law of the conformance suite, over every family and every registered mixer among others drawn at random."""

from __future__ import annotations

import pytest

from lizardzoo.adapters import ADAPTERS
from lizardzoo.config import MIXERS
from lizardzoo.testing import MODEL_LAWS, check_model_law, layer_lists
from tests.adapters.families import FAMILIES, VARIANTS, teacher

COMPILED = {"compiled_steps_are_the_steps", "a_compiled_forward_is_the_forward"}  # seconds each
QUICK = [law for law in MODEL_LAWS if law not in COMPILED]
# peft asks transformers 5.20 and newer by the old name
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


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
    check_model_law(MODEL_LAWS[law], teacher(family), examples=2)


@pytest.mark.parametrize("mixer", list(MIXERS))
@pytest.mark.parametrize("law", sorted(COMPILED))
def test_compiled_law(law: str, mixer: str) -> None:
    """Each mixer in a layer of another family: the graphs of a mixer do not depend on the family."""
    family = list(FAMILIES)[MIXERS.names().index(mixer) % len(FAMILIES)]
    layers = [MIXERS.get(mixer)(), "softmax", MIXERS.get(mixer)()]
    check_model_law(MODEL_LAWS[law], teacher(family), layers, examples=1)
