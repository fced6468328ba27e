"""Every law of the conformance suite, over every family and every registered mixer among others drawn at random."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st

from lizardzoo.adapters import ADAPTERS
from lizardzoo.config import MIXERS
from lizardzoo.testing import MODEL_LAWS, Case, check_model_law, layer_lists, specs, tiny_teacher
from tests.adapters.families import FAMILIES, VARIANTS, teacher

COMPILED = {"compiled_steps_are_the_steps", "a_compiled_forward_is_the_forward"}  # seconds each
QUICK = [law for law in MODEL_LAWS if law not in COMPILED]


def test_every_registered_family_is_tried() -> None:
    assert set(ADAPTERS.names()) == {changes["model_type"] for changes in FAMILIES.values()}


@pytest.mark.parametrize("mixer", list(MIXERS))
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("law", QUICK)
def test_law_of_one_mixer(law: str, family: str, mixer: str) -> None:
    """In all layers of a Llama and a Qwen3, in one layer among any others of the other two."""
    spec, count = MIXERS.get(mixer), teacher(family).config.num_hidden_layers
    alone = st.lists(specs(spec), min_size=count, max_size=count)
    layers = alone if family in ("llama", "qwen3") else layer_lists(count, always=spec)
    check_model_law(MODEL_LAWS[law], teacher(family), layers, examples=1)


@pytest.mark.parametrize("family", [*FAMILIES, *VARIANTS])
@pytest.mark.parametrize("law", QUICK)
def test_law_of_mixed_layers(law: str, family: str) -> None:
    twice = family in FAMILIES and not MODEL_LAWS[law].__module__.endswith("generating")  # those are slow
    check_model_law(MODEL_LAWS[law], teacher(family), examples=2 if twice else 1)


@pytest.mark.parametrize(
    ("law", "family"),
    [
        *(("compiled_steps_are_the_steps", family) for family in [*FAMILIES, "mistral, sliding"]),
        # one mask for all layers, and one for each kind
        *(("a_compiled_forward_is_the_forward", family) for family in ("llama", "qwen3")),
    ],
)
def test_law_of_compilation(law: str, family: str) -> None:
    """All registered mixers in one model, in any order."""
    changes = (FAMILIES | VARIANTS)[family] | {"num_hidden_layers": len(MIXERS.names())}
    check_model_law(MODEL_LAWS[law], tiny_teacher(**changes), examples=1)


def test_the_cases_of_a_law_are_no_trivial_ones() -> None:
    """Hypothesis begins with the simplest case: no padding, nothing undone, the smallest sizes. It is not counted."""
    for examples in (1, 2, 5):
        found: list[tuple[int, ...]] = []

        def law(data: st.DataObject, case: Case, found: list[tuple[int, ...]] = found) -> None:
            found.append(tuple(data.draw(st.integers(0, 15)) for _ in range(4)))

        check_model_law(law, teacher("llama"), "window", examples)
        assert len(found) == examples and (0, 0, 0, 0) not in found
