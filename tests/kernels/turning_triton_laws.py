"""Laws of steps that turn the kept keys, under Triton's interpreter; `test_triton.py` runs them in another process."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lizardzoo.kernels.state import map_state, state_tensors
from lizardzoo.kernels.window import ops
from tests.kernels.cases import assert_same, assert_same_tokens, error, poison
from tests.kernels.test_turning import CASES, OPS, Case

assert ops.INTERPRETED
# An example takes a second: no shrinking, which would take minutes. A failing example is printed with its seed.
PHASES = [phase for phase in Phase if phase not in (Phase.shrink, Phase.explain)]
TOLERANCE = 1e-4  # of fp32, with exp features in it


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


@settings(max_examples=30, phases=PHASES)
@given(CASES, st.booleans())
@torch.no_grad()
def test_steps_with_turns_are_the_references_steps(case: Case, in_place: bool) -> None:
    """A few of them, each with another turn: what is held goes from one to the next without any."""
    behind, generator = case.behind(torch.float32), case.generator()
    state, expected_state = map_state(torch.clone, behind.state), behind.state
    for _ in range(3):
        one, turn = case.tokens(1, torch.float32, generator), case.turn(torch.float32, generator)
        options = {"mask": case.mask(1, generator), "turn": turn}
        *expected, expected_state = behind.step(one, expected_state, **options, impl="reference")
        *output, new = behind.step(one, state, **options, in_place=in_place, impl="triton")
        assert all(error(a, b) <= TOLERANCE for a, b in zip(output, expected, strict=True))
        assert_same_tokens(behind.window(new), behind.window(expected_state))
        if in_place:
            assert all(a is b for a, b in zip(state_tensors(new), state_tensors(state), strict=True))
        state = new


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("seen", [1, 20])
def test_gradients_through_a_turn_are_the_references(op: str, seen: int) -> None:
    """To the new token and to the kept keys; the state behind it holds these as they were."""
    case = Case(op, 2, seen, 4, 3, (4, 2), True, False, False, 0)
    behind, generator = case.behind(torch.float32), case.generator()
    one, turn = case.tokens(1, torch.float32, generator), case.turn(torch.float32, generator)
    window = behind.window(behind.state)
    for ring in window[:4]:
        ring.nan_to_num_()  # nothing times NaN is NaN in the reference's gradients
    kept = window.kept_k.clone().requires_grad_()
    state = behind.with_window(behind.state, window._replace(kept_k=kept))
    inputs = [*(x.requires_grad_() for x in one), *([kept] if seen > 4 else [])]
    found, expected = (behind.step(one, state, turn=turn, impl=impl) for impl in ("triton", "reference"))
    assert_same(found[:2], expected[:2], inputs, TOLERANCE)
    assert_same_tokens(behind.window(found[2]), behind.window(expected[2]))
