"""The conformance suite: a linearized model behaves as a transformers model, whatever its family and its mixers.

`check_model(teacher)` runs every law on layer lists drawn from all registered mixers, `check_model(teacher, layers)` on
one list. A plug-in calls it in a test: for a mixer with `tiny_teacher()` and a list that holds it, for an adapter with
`tiny_teacher("its model_type")`. A broken law raises AssertionError and the case that breaks it.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from hypothesis import strategies as st

from lizardzoo.config import MixerSpec, SpecLike, resolve_layers
from lizardzoo.testing.conformance import generating, keeping, serving, training  # noqa: F401  each registers its laws
from lizardzoo.testing.conformance.case import MODEL_LAWS, Case, ModelLaw, model_law, tiny_teacher
from lizardzoo.testing.strategies import layer_lists

__all__ = ["MODEL_LAWS", "Case", "ModelLaw", "check_model", "check_model_law", "model_law", "tiny_teacher"]

Layers = SpecLike | Sequence[SpecLike] | st.SearchStrategy[list[MixerSpec]] | None


def check_model(teacher: Any, layers: Layers = None, examples: int = 5) -> None:
    """Run every law of `MODEL_LAWS` on a teacher's linearized copies.

    Args:
        teacher: a causal LM of a registered architecture, tiny, in float32 and eval mode.
        layers: as `linearize` takes them, or a strategy that draws lists; None draws from all registered mixers.
        examples: how often each law is tried, with other layers, splits, paddings and prompts.

    Raises:
        AssertionError: a law is broken, with the case that breaks it.
        LizardzooError: a teacher in another dtype or in train mode.
    """
    for check in MODEL_LAWS.values():
        check_model_law(check, teacher, layers, examples)


def check_model_law(check: ModelLaw, teacher: Any, layers: Layers = None, examples: int = 5) -> None:
    """Run one law of `MODEL_LAWS`; see `check_model`."""
    count = teacher.config.num_hidden_layers
    if layers is None:
        lists = layer_lists(count)
    elif isinstance(layers, st.SearchStrategy):
        lists = layers
    else:
        lists = st.just(resolve_layers(layers, count))

    # A case is small as it is, and a law takes up to seconds: none is made smaller (Phase.shrink).
    phases = (Phase.explicit, Phase.reuse, Phase.generate)

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), phases=phases)
    @given(st.integers(0, 2**16), st.data(), lists)
    def run(chance: int, data: st.DataObject, specs: list[MixerSpec]) -> None:
        # The first case hypothesis tries is the simplest: no padding, nothing undone, the smallest sizes.
        assume(chance)
        check(data, Case(teacher, specs))

    if settings().derandomize:  # else every law would draw the same layers
        run = seed(zlib.crc32(f"{getattr(check, '__name__', check)} {teacher.config.model_type}".encode()))(run)
    run()
