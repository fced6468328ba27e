"""Window and heavy attention under one denominator: against both float64 oracles, in pieces, and its entry's errors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lizardzoo import LizardzooError
from lizardzoo.kernels import window_and_heavy_attention, window_and_heavy_step
from lizardzoo.kernels.heavy import init_state
from lizardzoo.kernels.window import init_state as init_window_state
from lizardzoo.testing import heavy_oracle, window_oracle
from tests.kernels.cases import assert_same, error
from tests.kernels.test_heavy import Case, cases


def oracle(case: Case, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """From both sums as they stand in the equation."""
    window, keep = case.options["window"], case.options["keep"]
    near = window_oracle(case.q, case.k, case.v, window=window, keep=keep, sinks=sinks, **case.flags)
    far = heavy_oracle(case.q, case.k, case.v, near[1].detach(), **case.options, **case.flags)
    real = torch.isfinite(near[1])  # all but padding
    masses = [torch.where(real, m, 0.0).exp() * (real & torch.isfinite(m)) for m in (near[1], far[1])]
    total = torch.where(real, masses[0] + masses[1], 1.0)
    y = (masses[0][..., None] * near[0] + masses[1][..., None] * far[0]) / total[..., None]
    return y, torch.where(real, total.log(), -torch.inf)


def logits(case: Case, shape: tuple[int, ...] | None) -> Tensor | None:
    if shape is None:
        return None
    generator = torch.Generator().manual_seed(3)
    shape = shape if len(shape) == 1 else (case.q.shape[2], 2)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


@given(cases(), st.sampled_from([None, (2,), (0, 2)]))
def test_equals_the_oracle_with_all_gradients(case: Case, shape: tuple[int, ...] | None) -> None:
    """The gradient of the sinks, which are in the one denominator, among them."""
    sinks = logits(case, shape)
    inputs = [case.q, case.k, case.v, *([] if sinks is None else [sinks])]
    found = window_and_heavy_attention(*case[:3], **case.options, **case.flags, sinks=sinks)
    assert_same(found[:2], oracle(case, sinks), inputs, 1e-10)


@given(cases(), st.data())
def test_splitting_a_sequence_changes_nothing(case: Case, data: st.DataObject) -> None:
    (batch, length, kv_heads, _), keep = case.k.shape, case.options["keep"]
    window, heavy = case.options["window"], case.options["heavy"]
    sinks = logits(case, (2,))
    whole = window_and_heavy_attention(*case[:3], **case.options, **case.flags, sinks=sinks, return_state=False)
    assert whole[2:] == (None, None)
    past: Any = init_window_state(batch, kv_heads, 4, window, keep, torch.float64, "cpu")
    past = past._replace(v=past.v[..., :3], kept_v=past.kept_v[..., :3])
    state: Any = init_state(batch, kv_heads, 4, window, heavy, torch.float64, "cpu")
    state = state._replace(v=state.v[..., :3])
    outputs = []
    edges = [0, *sorted(data.draw(st.sets(st.integers(1, length))) - {length}), length]
    for start, end in itertools.pairwise(edges):
        tensors = [x[:, start:end] for x in case[:3]]
        flags = {name: None if flag is None else flag[:, start:end] for name, flag in case.flags.items()}
        if end - start == 1 and flags["starts"] is None:
            options = {"keep": keep, "half_life": case.options["half_life"], "sinks": sinks, "mask": flags["mask"]}
            *out, past, state = window_and_heavy_step(*tensors, past, state, **options)
        else:
            *out, past, state = window_and_heavy_attention(
                *tensors, **case.options, **flags, sinks=sinks, past=past, state=state
            )
        outputs.append(out)
    for ours, expected in zip(zip(*outputs, strict=True), whole, strict=False):
        assert error(torch.cat(ours, 1), expected) <= 1e-10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heavy": 0}, "window and heavy must be at least 1 and keep at least 0, got 4, 0 and 0"),
        ({"window": 0}, "window must be at least 1 and keep at least 0, got 0 and 0"),
        ({"half_life": 0.5}, "half_life must be at least 1 token, or None, got 0.5"),
        ({"sinks": torch.zeros(3, 2)}, "sinks are [m] or [2, m], got [3, 2]"),
        ({"past": init_window_state(1, 1, 4, 4, 0, torch.float32, "cpu")}, "past is given without state; give both"),
        ({"state": init_state(1, 1, 4, 4, 2, torch.float32, "cpu")}, "state is given without past; give both"),
        (
            {
                "past": init_window_state(1, 1, 4, 4, 0, torch.float32, "cpu"),
                "state": init_state(1, 1, 4, 4, 3, torch.float32, "cpu"),
            },
            "the states were made with window=4 and 4, heavy=3, keep=0, got window=4, heavy=2, keep=0",
        ),
        ({"starts": torch.ones(1, 4, dtype=torch.bool)}, "starts is a bool tensor of shape [1, 5]"),
        ({"impl": "triton"}, "triton needs CUDA tensors, got cpu; pass impl='reference'"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "q": torch.zeros(1, 5, 2, 4), "k": torch.zeros(1, 5, 1, 4), "v": torch.zeros(1, 5, 1, 4), "window": 4,
        "heavy": 2,
    }  # fmt: skip
    with pytest.raises(LizardzooError) as caught:
        window_and_heavy_attention(**(arguments | change))
    assert f"window_and_heavy_attention: {message}" in str(caught.value)
