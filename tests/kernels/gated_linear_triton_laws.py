"""Laws of the Triton kernels of gated linear attention under Triton's interpreter; `test_gated_linear_triton.py` runs
them in another process.

The interpreter checks indices, masks and mathematics in fp32, not what a GPU makes of them. Chunks are of 4 slots, so
that short sequences cross many borders.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lizardzoo import LizardzooError
from lizardzoo.kernels import FeatureMap, gated_linear_attention, gated_linear_attention_step
from lizardzoo.kernels.gated_linear import init_state, ops
from tests.kernels.cases import assert_same, error
from tests.kernels.test_gated_linear import Case, _memory, cases

assert ops.kernels.INTERPRETED
# An example takes a second: no shrinking, which would take minutes.
PHASES = [phase for phase in Phase if phase not in (Phase.shrink, Phase.explain)]
TOLERANCE = 1e-4  # of fp32, with exp features in it


@pytest.fixture(autouse=True)
def _small_chunks_of_poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel forgets to write shows as NaN."""
    empty, empty_like, blocks = torch.empty, torch.empty_like, ops.blocks

    def poisoned(x: Tensor) -> Tensor:
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(1)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poisoned(empty_like(*a, **k)))
    monkeypatch.setattr(ops, "blocks", lambda *a: blocks(*a)._replace(chunk=4))


def in_fp32(case: Case) -> Case:
    """The same numbers, rounded, as leaves."""

    def narrow(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().float().requires_grad_()

    maps = case.options["feature_map"]
    maps = FeatureMap(narrow(maps.query), narrow(maps.key), maps.activation)
    return Case({n: narrow(x) for n, x in case.tensors.items()}, {**case.options, "feature_map": maps}, case.flags)


def small_cases(**options: Any) -> st.SearchStrategy[Case]:
    return cases(scales=(1.0, 4.0), **options).map(in_fp32)


@settings(max_examples=7, phases=PHASES)
@given(small_cases())
def test_equals_the_reference_with_all_gradients(case: Case) -> None:
    *ours, _ = gated_linear_attention(**case.tensors, **case.options, **case.flags, impl="triton")
    *expected, _ = gated_linear_attention(**case.tensors, **case.options, **case.flags)
    assert_same(tuple(ours), tuple(expected), case.inputs(), TOLERANCE)


@settings(max_examples=3, phases=PHASES)
@given(small_cases(), st.data())
def test_each_implementation_goes_on_from_the_others_state(case: Case, data: st.DataObject) -> None:
    length = case.tensors["q"].shape[1]
    y, log_mass, whole = gated_linear_attention(**case.tensors, **case.options, **case.flags)
    edges = sorted({0, length // 2, length})
    first = data.draw(st.sampled_from([0, 1]))
    outputs, state = [], None
    for n, (start, end) in enumerate(itertools.pairwise(edges)):
        impl = ["triton", "reference"][(n + first) % 2]
        *output, state = gated_linear_attention(**case.piece(start, end), **case.options, state=state, impl=impl)
        outputs.append(output)
    pieces = [torch.cat(part, 1) for part in zip(*outputs, strict=True)]
    assert_same((pieces[0], pieces[1]), (y, log_mass), case.inputs(), TOLERANCE)
    assert state is not None and whole is not None
    for name in ("k", "v", "log_decay", "log_input", "valid", "length"):
        assert torch.equal(getattr(state, name), getattr(whole, name))
    assert_same(_memory(state), _memory(whole), case.inputs(), TOLERANCE)


@settings(max_examples=6, phases=PHASES)
@given(small_cases(documents=False))
@torch.no_grad()
def test_a_step_is_the_references_step(case: Case) -> None:
    q, k, decay, enter = (case.tensors[name] for name in ("q", "k", "log_decay", "log_input"))
    maps = case.options["feature_map"]
    gates = [0 if gate is None else gate.shape[2] for gate in (decay, enter)]
    state = init_state(
        q.shape[0], q.shape[2], k.shape[2], 4, 2 * maps.key.shape[2], case.options["lag"], *gates, torch.float32, "cpu"
    )
    state = state._replace(v=state.v[..., :3], kv=state.kv[..., :3])
    for t in range(min(q.shape[1], 8)):
        piece = case.piece(t, t + 1)
        piece.pop("starts")
        options = {"feature_map": maps, "skip": case.options["skip"]}
        expected = gated_linear_attention_step(**piece, state=state, **options)
        ours = gated_linear_attention_step(**piece, state=state, **options, impl="triton")
        assert error(ours[0], expected[0]) <= TOLERANCE and error(ours[1], expected[1]) <= TOLERANCE
        for name, a, b in zip(state._fields, ours[2], expected[2], strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), name
        state = expected[2]


@settings(max_examples=2, phases=PHASES)
@given(small_cases())
def test_log_features_may_come_from_outside(case: Case) -> None:
    options = {**case.options, "feature_map": None}
    inputs = [x for x in case.tensors.values() if x is not None]
    *ours, _ = gated_linear_attention(**case.tensors, **options, **case.flags, impl="triton")
    *expected, _ = gated_linear_attention(**case.tensors, **options, **case.flags)
    assert_same(tuple(ours), tuple(expected), inputs, TOLERANCE)


@pytest.mark.parametrize(
    ("dtype", "size", "words"), [(torch.float64, 16, "got torch.float64"), (torch.float32, 144, "got 144, 144")]
)
def test_what_triton_does_not_do_is_one_clear_error(dtype: torch.dtype, size: int, words: str) -> None:
    x = torch.zeros(1, 3, 1, size, dtype=dtype)
    with pytest.raises(LizardzooError, match=words):
        gated_linear_attention(x, x, x, impl="triton")


def test_the_operators_have_sound_schemas_and_fakes() -> None:
    """What torch.compile needs: fake outputs like the real ones, gradients registered."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 5, heads, 4, requires_grad=True) for heads in (2, 1, 1))
    decay, weight = (-torch.rand(1, 5, 1)).requires_grad_(), torch.zeros(1, 5, 1, requires_grad=True)
    maps = [torch.randn(1, 4, 8, requires_grad=True) for _ in range(2)]
    arguments = (q, k, v, decay, weight, None, *maps, None, None, None, "softmax", 0)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.gated_linear, arguments, test_utils=tests)
