"""Specs and the layers list: exact round trips, and one clear sentence for each mistake."""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lizardzoo as lz
from lizardzoo import LizardzooError
from lizardzoo.config import MIXERS, PRESETS, describe_spec, resolve_layers, spec_from_dict
from lizardzoo.testing import specs


@given(st.data())
def test_any_list_of_layers_round_trips_through_json(data: st.DataObject) -> None:
    anything = st.one_of(*(specs(MIXERS.get(name)) for name in MIXERS))
    layers = data.draw(st.lists(anything, min_size=1, max_size=4))
    written = json.loads(json.dumps([spec.to_dict() for spec in layers]))
    assert resolve_layers(written, len(layers)) == layers


def test_the_named_presets_are_there_and_are_what_their_names_say() -> None:
    names = {"lizard", "lizard-rope", "lolcats", "recommended"}
    assert names <= set(PRESETS.names())
    lizard, rope = PRESETS.get("lizard"), PRESETS.get("lizard-rope")
    assert isinstance(lizard, lz.Hybrid) and (lizard.merge, lizard.disjoint, lizard.gate) == ("sum", False, "token")
    assert (lizard.window, lizard.sinks, lizard.keep, lizard.maps, lizard.window_rope) == (128, 4, 0, "layer", False)
    assert rope == dataclasses.replace(lizard, window_rope=True)
    lolcats = PRESETS.get("lolcats")
    assert isinstance(lolcats, lz.Hybrid) and (lolcats.merge, lolcats.gate, lolcats.feature_rope) == (
        "joint",
        None,
        True,
    )
    for spec in (lz.GatedLinear(), lz.Heavy(), lz.Hybrid(), lz.Softmax(), lz.Window()):
        assert PRESETS.get(spec.type_name.replace("_", "-")) == spec
    both = PRESETS.get("hybrid")
    assert isinstance(both, lz.Hybrid) and (both.merge, both.disjoint, both.keep, both.sinks) == ("joint", True, 4, 0)
    assert (both.window, both.window_rope, both.feature_rope, both.gate) == (128, True, False, "kv_head")
    best = PRESETS.get("recommended")
    assert isinstance(best, lz.Heavy) and (best.window, best.keep, best.heavy, best.sinks) == (128, 4, 128, 0)
    assert best == lz.Heavy()


def test_what_is_recommended_is_the_default_everywhere_and_is_called_so() -> None:
    calls = (lz.linearize, lz.linearize_checkpoint, lz.select_layers, lz.select_windows)
    assert {inspect.signature(call).parameters["layers"].default for call in calls} == {"recommended"}
    assert describe_spec(lz.Heavy()) == "recommended"
    assert describe_spec(lz.Hybrid()) == "hybrid"


def test_one_entry_serves_all_layers_and_a_list_may_mix_forms() -> None:
    assert resolve_layers("window", 3) == [lz.Window()] * 3
    assert resolve_layers(lz.Softmax(), 2) == [lz.Softmax()] * 2
    mixed = resolve_layers(["softmax", lz.Window(window=5), {"type": "gated_linear", "gate": "token"}], 3)
    assert mixed == [lz.Softmax(), lz.Window(window=5), lz.GatedLinear(gate="token")]


def test_specs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        lz.Window().window = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: lz.Window(window=0), r"Window\(window=0\): window must be from 1 to"),
        (lambda: lz.Window(window=2**40), "window must be from 1 to"),
        (lambda: lz.Window(window=True), "window must be a whole number"),
        (lambda: lz.Window(keep=-1), "keep must be from 0"),
        (lambda: lz.Hybrid(sinks="four"), "sinks must be a whole number"),  # type: ignore[arg-type]
        (lambda: lz.Hybrid(feature_dim=0), "feature_dim must be from 1"),
        (lambda: lz.Hybrid(feature_dim=2.5), "feature_dim must be a whole number or None"),  # type: ignore[arg-type]
        (lambda: lz.Hybrid(gate="head"), "gate must be one of 'token', 'kv_head', 'query_head' or None"),  # type: ignore[arg-type]
        (lambda: lz.Hybrid(gate_init=1.0), "gate_init must be between 0 and 1"),
        (lambda: lz.Hybrid(gate_init=float("nan")), "gate_init must be a finite number"),
        (lambda: lz.Hybrid(merge="product"), "merge must be one of 'sum', 'none', 'joint'"),  # type: ignore[arg-type]
        (lambda: spec_from_dict({"window": 3}), "a layer is described as"),
        (lambda: spec_from_dict({"type": 3}), "a layer is described as"),
        (lambda: spec_from_dict({"type": "windows"}), "unknown mixer 'windows'; there are: gated_linear, heavy"),
        (lambda: spec_from_dict({"type": "window", "widht": 3}), "has no field 'widht'; its fields are: keep, sinks"),
        (lambda: resolve_layers(["window"] * 2, 3), "2 entries but the model has 3 layers"),
        (lambda: resolve_layers("windows", 3), "unknown preset 'windows'; there are: gated-linear, heavy"),
        (lambda: resolve_layers(3, 3), "layers is a list, a spec or a preset name"),  # type: ignore[arg-type]
        (lambda: resolve_layers([None], 1), "a layer is a spec, a preset name or a dict"),  # type: ignore[list-item]
    ],
)
def test_a_mistake_gets_one_clear_sentence(make: Any, words: str) -> None:
    with pytest.raises(LizardzooError, match=words):
        make()
