"""Laws of gated linear attention and of the hybrid beyond a kernel's tiles, under Triton's interpreter.

`test_triton.py` runs them in another process. Tiles are of 8 here, so that small sizes are wide: slabs of 8 and what is
left.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lizardzoo.kernels import (
    FeatureMap,
    gated_linear_attention,
    hybrid_attention,
    hybrid_attention_step,
)
from lizardzoo.kernels.gated_linear import launch, ops
from lizardzoo.kernels.launching import device
from tests.kernels import hybrid_triton_laws as hybrids
from tests.kernels.cases import assert_same, assert_same_tokens, error, poison
from tests.kernels.gated_linear_triton_laws import PHASES, TOLERANCE, small_cases
from tests.kernels.test_gated_linear import Case, _memory

TILE = 8
WIDE = ((12, 5, 3), (5, 12, 7), (4, 3, 12), (12, 10, 9))  # a head, a half's features, a value; all three


@pytest.fixture(autouse=True)
def _narrow_tiles_of_poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)
    monkeypatch.setattr(launch, "chunk_size", lambda *a: 4)
    monkeypatch.setattr(ops, "widest", lambda q: TILE)


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes that the kernels are asked for."""
    seen: list[int] = []
    compute = ops.gated_linear

    def recorded(*inputs: Any) -> Any:
        given = ops.Inputs(*inputs)
        seen.extend([given.q.shape[3], given.v.shape[3], *(() if given.key_map is None else given.key_map.shape[2:])])
        return compute(*inputs)

    monkeypatch.setattr(ops, "gated_linear", recorded)
    return seen


@settings(max_examples=3, phases=PHASES)
@given(small_cases(sizes=WIDE), st.data())
def test_wide_attention_equals_the_reference_with_all_gradients(case: Case, data: st.DataObject) -> None:
    """In one call, and in two of which the second goes on from the first's memory, or from the reference's."""
    y, log_mass, whole = gated_linear_attention(**case.tensors, **case.options, **case.flags)
    assert whole is not None
    *ours, state = gated_linear_attention(**case.tensors, **case.options, **case.flags, impl="triton")
    assert_same(tuple(ours), (y, log_mass), case.inputs(), TOLERANCE)
    cut = data.draw(st.integers(1, case.tensors["q"].shape[1]))  # type: ignore[union-attr]
    first, second = data.draw(st.sampled_from([("triton", "triton"), ("reference", "triton"), ("triton", "reference")]))
    *begun, state = gated_linear_attention(**case.piece(0, cut), **case.options, impl=first)
    pieces = [begun]
    if cut < y.shape[1]:
        *rest, state = gated_linear_attention(**case.piece(cut, y.shape[1]), **case.options, state=state, impl=second)
        pieces.append(rest)
    joined = [torch.cat(part, 1) for part in zip(*pieces, strict=True)]
    assert_same((joined[0], joined[1]), (y, log_mass), case.inputs(), TOLERANCE)
    assert state is not None
    assert_same_tokens(state, whole)
    assert_same(_memory(state), _memory(whole), case.inputs(), TOLERANCE)


@settings(max_examples=1, phases=PHASES)
@given(small_cases(sizes=WIDE[-1:]))
def test_wide_log_features_may_come_from_outside(case: Case) -> None:
    options = {**case.options, "feature_map": None}
    inputs = [x for x in case.tensors.values() if x is not None]
    *ours, _ = gated_linear_attention(**case.tensors, **options, **case.flags, impl="triton")
    *expected, _ = gated_linear_attention(**case.tensors, **options, **case.flags)
    assert_same(tuple(ours), tuple(expected), inputs, TOLERANCE)


@pytest.mark.parametrize("sizes", WIDE, ids=str)
@pytest.mark.parametrize("in_place", [False, True])
@torch.no_grad()
def test_a_wide_step_is_the_references_step(sizes: tuple[int, int, int], in_place: bool) -> None:
    dim, features, value_dim = sizes
    case = hybrids.one_case(length=6, dim=dim, features=features, value_dim=value_dim)
    *_, state = hybrid_attention(**case.arguments(0, 1), **case.options)
    assert state is not None
    for t in range(1, 6):
        *expected, after = hybrid_attention_step(**case.step_arguments(t), state=state)
        *ours, found = hybrid_attention_step(**case.step_arguments(t), state=state, in_place=in_place, impl="triton")
        assert all(error(a, b) <= TOLERANCE for a, b in zip(ours, expected, strict=True))
        assert (found is state) == in_place
        hybrids.assert_same_state(found, after, TOLERANCE)
        state = after


@pytest.mark.parametrize(
    "change",
    [
        {"dim": 12, "features": 10, "value_dim": 9},
        {"dim": 12, "value_dim": 12, "shared": True, "activation": "exp", "sinks": 1.0},
        {"features": 12, "decay": 4, "lag": 0, "skip": 0},
        {"length": 13, "dim": 12, "flags": ("1101111101110", "0000100000100")},
    ],
    ids=str,
)
def test_a_wide_hybrid_equals_the_reference(change: dict[str, Any], widths: list[int]) -> None:
    """And no kernel is asked for more than its tile."""
    hybrids.assert_equals_the_reference(hybrids.one_case(**change))
    assert 0 < max(widths) <= TILE


@pytest.mark.parametrize(("dim", "features", "memory"), [(256, 64, 227), (256, 256, 227), (128, 80, 99)])
def test_of_the_size_of_real_heads(dim: int, features: int, memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles as they are on devices of so many KB."""
    monkeypatch.undo()
    monkeypatch.setattr(device, "ON_CPU", memory)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 6, heads, dim, generator=generator) for heads in (2, 1, 1))
    maps = FeatureMap(*(torch.randn(1, dim, features, generator=generator) / dim**0.5 for _ in range(2)), "softmax")
    found = [gated_linear_attention(q, k, v, feature_map=maps, lag=1, impl=impl) for impl in ("triton", "reference")]
    for ours, expected in zip(found[0][:2], found[1][:2], strict=True):
        assert error(ours, expected) <= TOLERANCE
