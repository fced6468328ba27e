"""Laws of the fused decode step under Triton's interpreter; `test_triton.py` runs them in another process.

The interpreter checks indices, masks and mathematics in fp32, and runs the programs one after the other: what races on
a GPU it does not see.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lizardzoo import LizardzooError
from lizardzoo.kernels import FeatureMap, hybrid_attention_step
from lizardzoo.kernels.hybrid import step as fused
from lizardzoo.kernels.rotary import rotate
from lizardzoo.kernels.state import map_state, state_tensors
from lizardzoo.kernels.window import ops as window_ops
from tests.kernels.cases import error, poison
from tests.kernels.test_hybrid import Case, assert_same_state, cases

assert window_ops.INTERPRETED
# An example takes a second: no shrinking, which would take minutes. A failing example is printed with its seed.
PHASES = [phase for phase in Phase if phase not in (Phase.shrink, Phase.explain)]
TOLERANCE = 1e-4  # of fp32, with exp features in it


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


def in_fp32(case: Case) -> Case:
    """The same numbers, rounded."""

    def narrow(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().float()

    maps, sinks = case.options["feature_map"], case.options["sinks"]
    maps = FeatureMap(narrow(maps.query), narrow(maps.key), maps.activation)  # type: ignore[arg-type]
    options = {**case.options, "feature_map": maps, "sinks": narrow(sinks)}
    return Case({name: narrow(x) for name, x in case.tensors.items()}, options, case.flags)


def narrow_cases(longest: int = 13) -> st.SearchStrategy[Case]:
    return cases(documents=False, scales=(1.0, 4.0), longest=longest).map(in_fp32)


def poisoned(case: Case) -> Any:
    """The first state, with NaN wherever it holds no token: nothing may read it."""
    state = case.init_state()
    rings = (*state.window[:4], *state.linear[3:7])
    for x in rings:
        x.fill_(float("nan"))
    return state


@settings(max_examples=14, phases=PHASES)
@given(narrow_cases(), st.booleans())
@torch.no_grad()
def test_steps_are_the_references_steps(case: Case, in_place: bool) -> None:
    expected_state, state = case.init_state(), poisoned(case)
    addresses = [x.data_ptr() for x in state_tensors(state)]
    for t in range(case.tensors["v"].shape[1]):  # type: ignore[union-attr]
        arguments = case.step_arguments(t)
        before = map_state(torch.clone, state)
        *expected, expected_state = hybrid_attention_step(**arguments, state=expected_state)
        *output, new = hybrid_attention_step(**arguments, state=state, in_place=in_place, impl="triton")
        assert all(error(a, b) <= TOLERANCE for a, b in zip(output, expected, strict=True))
        assert_same_state(new, expected_state, TOLERANCE)
        if in_place:
            assert new is state and [x.data_ptr() for x in state_tensors(state)] == addresses
        else:
            for a, b in zip(state_tensors(state), state_tensors(before), strict=True):
                assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
        state = new


@settings(max_examples=4, phases=PHASES)
@given(narrow_cases(longest=4), st.booleans())
@torch.no_grad()
def test_a_step_rotates_as_rotate_does(case: Case, one_table: bool) -> None:
    """In the kernel, in the reference, and where the branches step one by one; beside it a turn of the kept keys."""
    assume("near_q" in case.tensors)  # or the branches share keys
    states = [poisoned(case), case.init_state()]
    for t in range(case.tensors["v"].shape[1]):  # type: ignore[union-attr]
        arguments = case.step_arguments(t)
        q, k = arguments["q"], arguments["k"]
        angles = torch.randn(2, 1 if one_table else q.shape[0], 1, q.shape[3] // 2).repeat(1, 1, 1, 2)
        rope, arguments["turn"] = zip(angles.cos(), angles.sin())
        rotated = rotate(q, k, *rope, impl="reference")
        *expected, after = hybrid_attention_step(**{**arguments, "rotated": rotated}, state=states[1])
        del arguments["rotated"]
        *output, states[0] = hybrid_attention_step(**arguments, rope=rope, state=states[0], impl="triton")
        *exact, same = hybrid_attention_step(**arguments, rope=rope, state=states[1])
        assert all(error(a, b) <= TOLERANCE for a, b in zip(output, expected, strict=True))
        assert_same_state(states[0], after, TOLERANCE)
        assert all(
            torch.equal(a, b) for a, b in zip((*exact, *state_tensors(same)), (*expected, *state_tensors(after)))
        )
        states[1] = after


def test_a_step_is_rotated_or_to_be_rotated() -> None:
    x = torch.zeros(1, 1, 2, 16)
    state: Any = SimpleNamespace(window=SimpleNamespace(k=x), linear=SimpleNamespace(k=x))
    for ways, said in (({}, "neither"), ({"rotated": (x, x), "rope": (x[0], x[0])}, "both")):
        with pytest.raises(LizardzooError, match=f"either rotated or rope, got {said}"):
            hybrid_attention_step(x, x, x, None, state, **ways)  # type: ignore[arg-type]


@settings(max_examples=6, phases=PHASES)
@given(narrow_cases(longest=4))
@torch.no_grad()
def test_a_padded_token_with_nan_in_it_changes_nothing(case: Case) -> None:
    state = poisoned(case)
    for t in range(case.tensors["v"].shape[1]):  # type: ignore[union-attr]
        arguments = case.step_arguments(t)
        *_, state = hybrid_attention_step(**{**arguments, "mask": None}, state=state, impl="triton")
        before = map_state(torch.clone, state)
        names = [n for n in ("q", "k", "v", "log_decay", "log_input", "log_scale") if arguments[n] is not None]
        empty = {name: torch.full_like(arguments[name], float("nan")) for name in names}
        near = tuple(torch.full_like(x, float("nan")) for x in arguments["rotated"])
        if arguments["rotated"][1] is arguments["k"]:
            near = (empty["q"], empty["k"])
        padded = {**arguments, **empty, "rotated": near, "mask": torch.zeros_like(state.window.length)[:, None] > 0}
        y, log_mass, _ = hybrid_attention_step(**padded, state=state, in_place=True, impl="triton")
        assert (y == 0).all() and (log_mass == float("-inf")).all()
        for a, b in zip(state_tensors(state), state_tensors(before), strict=True):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@settings(max_examples=4, phases=PHASES)
@given(narrow_cases(longest=3))
@torch.no_grad()
def test_the_operator_keeps_what_torch_asks_of_it(case: Case) -> None:
    """Schema, what it overwrites, and fake tensors, as torch.compile relies on them."""
    calls: list[Any] = []
    state = case.init_state()
    state.linear.scale.zero_()  # opcheck cannot compare infinities
    assume(fused._fits(case.tensors["k"], case.tensors["log_input"], case.options["feature_map"], state))
    original = fused.compute_step

    def record(*arguments: Any) -> Any:
        calls.append(arguments)
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "compute_step", record)
        turn = torch.zeros(1, 1, 4), torch.ones(1, 1, 4)
        hybrid_attention_step(**case.step_arguments(0), state=state, turn=turn, impl="triton")
    torch.library.opcheck(fused.hybrid_step, calls[0], test_utils=("test_schema", "test_faketensor"))
