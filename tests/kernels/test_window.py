"""Sliding-window attention against its literal float64 oracle and against PyTorch's own softmax attention."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lizardzoo import LizardzooError
from lizardzoo.kernels import window_attention, window_attention_step
from lizardzoo.kernels.window import init_state
from lizardzoo.testing import token_flags, window_oracle
from tests.kernels.cases import assert_same, assert_same_tokens, error, saved_bytes


class Case(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]  # window, keep, sinks
    flags: dict[str, Tensor | None]  # mask, starts

    def inputs(self) -> list[Tensor]:
        return [self.q, self.k, self.v] + ([self.options["sinks"]] if self.options["sinks"] is not None else [])

    def piece(self, start: int, end: int) -> tuple[list[Tensor], dict[str, Tensor | None]]:
        flags = {name: None if flag is None else flag[:, start:end] for name, flag in self.flags.items()}
        return [x[:, start:end] for x in (self.q, self.k, self.v)], flags


@st.composite
def cases(draw: st.DrawFn, documents: bool = True) -> Case:
    batch, length = draw(st.integers(1, 2)), draw(st.integers(1, 13))
    kv_heads, groups = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 3]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    scale = draw(st.sampled_from([1.0, 1.0, 30.0]))

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q = (randn(batch, length, kv_heads * groups, 4) * scale).requires_grad_()
    k, v = (
        randn(batch, length, kv_heads, 4).requires_grad_(),
        randn(batch, length, kv_heads, 3).requires_grad_(),
    )
    sinks = draw(st.sampled_from([None, (2,), (kv_heads * groups, 2)]))
    options = {
        "window": draw(st.sampled_from([1, 2, 4, 30])),
        "keep": draw(st.sampled_from([0, 1, 3])),
        "sinks": None if sinks is None else (randn(*sinks) * scale).requires_grad_(),
    }
    flags = draw(token_flags(batch, length, documents=documents))
    return Case(q, k, v, options, {"mask": flags.mask, "starts": flags.starts})


@given(cases())
def test_equals_the_oracle_with_all_gradients(case: Case) -> None:
    y, log_mass, _ = window_attention(case.q, case.k, case.v, **case.options, **case.flags)
    expected = window_oracle(case.q, case.k, case.v, **case.options, **case.flags)
    assert_same((y, log_mass), expected, case.inputs(), 1e-10)


@given(cases(), st.data())
def test_splitting_a_sequence_changes_nothing(case: Case, data: st.DataObject) -> None:
    length = case.q.shape[1]
    y, log_mass, whole = window_attention(case.q, case.k, case.v, **case.options, **case.flags)
    edges = [0, *sorted(data.draw(st.sets(st.integers(1, length)))), length]
    outputs, state = [], None
    for start, end in itertools.pairwise(edges):
        if end > start:
            tensors, flags = case.piece(start, end)
            *output, state = window_attention(*tensors, **case.options, **flags, state=state)
            outputs.append(output)
    pieces = [torch.cat(part, 1) for part in zip(*outputs, strict=True)]
    assert_same((pieces[0], pieces[1]), (y, log_mass), case.inputs(), 1e-10)
    assert state is not None and whole is not None
    assert_same_tokens(state, whole)


@given(cases(documents=False))
def test_a_fold_of_steps_is_the_whole(case: Case) -> None:
    y, log_mass, _ = window_attention(case.q, case.k, case.v, **case.options, mask=case.flags["mask"])
    batch, length, _, dim = case.q.shape
    window, keep = case.options["window"], case.options["keep"]
    state = init_state(batch, case.k.shape[2], dim, window, keep, torch.float64, "cpu")
    state = state._replace(v=state.v[..., :3], kept_v=state.kept_v[..., :3])
    outputs = []
    for t in range(length):
        tensors, flags = case.piece(t, t + 1)
        *output, state = window_attention_step(
            *tensors, state, keep=keep, sinks=case.options["sinks"], mask=flags["mask"]
        )
        outputs.append(output)
    steps = [torch.cat(part, 1) for part in zip(*outputs, strict=True)]
    assert_same((steps[0], steps[1]), (y, log_mass), case.inputs(), 1e-10)


@given(st.integers(1, 150), st.sampled_from([1, 3]), st.integers(0, 2**16))
def test_a_window_that_holds_everything_is_softmax_attention(length: int, groups: int, seed: int) -> None:
    torch.manual_seed(seed)
    q, k, v = (torch.randn(2, length, heads, 8, dtype=torch.float64) for heads in (2 * groups, 2, 2))
    y, log_mass, _ = window_attention(q, k, v, window=length)
    expected = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    assert error(y, expected) < 1e-12
    # A sink changes nothing but the denominator.
    sinks = torch.randn(2 * groups, 2, dtype=torch.float64)
    with_sinks, larger, _ = window_attention(q, k, v, window=length, sinks=sinks)
    assert error(larger, torch.logaddexp(log_mass, sinks.logsumexp(-1))) < 1e-12
    assert error(with_sinks, y * (log_mass - larger).exp()[..., None]) < 1e-12


@pytest.mark.parametrize("sink", [float("-inf"), 20.0, 1e4])
def test_extreme_sinks_are_finite(sink: float) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 9, 2, 4, requires_grad=True) for _ in range(3))
    sinks = torch.full((2,), sink, requires_grad=True)
    y, log_mass, _ = window_attention(q, k, v, window=4, sinks=sinks)
    (y.sum() + log_mass.sum()).backward()
    assert all(torch.isfinite(x).all() for x in (y, log_mass, q.grad, k.grad, v.grad, sinks.grad))  # type: ignore[arg-type]
    if sink == float("-inf"):
        without = window_attention(q, k, v, window=4)
        assert torch.equal(y, without[0]) and torch.equal(log_mass, without[1])


def test_memory_is_linear_in_the_length() -> None:
    def cost(length: int) -> int:
        q = torch.randn(1, length, 3, 8, requires_grad=True)
        return saved_bytes(lambda: window_attention(q, q[:, :, :1], q[:, :, :1], window=32, keep=2)[0])

    assert cost(1024) - cost(512) <= 1.05 * 2 * (cost(512) - cost(256))


@given(cases())
def test_fp32_errs_at_most_twice_as_much_as_plain_fp32(case: Case) -> None:
    narrow = {name: x.float() if isinstance(x, Tensor) else x for name, x in case.options.items()}
    q, k, v = case.q.float(), case.k.float(), case.v.float()
    exact = window_oracle(case.q, case.k, case.v, **case.options, **case.flags)
    plain = window_oracle(q, k, v, **narrow, **case.flags)
    ours = window_attention(q, k, v, **narrow, **case.flags)
    for a, b, c in zip(ours[:2], plain, exact, strict=True):
        assert error(a.double(), c) <= 2 * error(b.double(), c) + 4e-7


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"window": 0}, "window must be at least 1"),
        ({"keep": -1}, "keep at least 0"),
        ({"sinks": torch.zeros(3, 3, 3)}, "sinks are"),
        ({"mask": torch.ones(1, 5)}, "mask is a bool tensor"),
        ({"impl": "triton"}, "triton needs CUDA tensors, got cpu"),
        ({"impl": "fast"}, "unknown impl"),
        ({"q": torch.zeros(1, 5, 3, 4)}, "do not fit"),
        ({"q": torch.zeros(1, 5, 4, 4).half()}, "one floating-point dtype"),
        ({"state": init_state(1, 2, 4, 7, 0, torch.float32, "cpu")}, "start from a new state"),
    ],
)
def test_wrong_input_gets_one_clear_sentence(change: dict[str, Any], words: str) -> None:
    arguments = {
        "q": torch.zeros(1, 5, 4, 4),
        "k": torch.zeros(1, 5, 2, 4),
        "v": torch.zeros(1, 5, 2, 4),
        "window": 3,
    }
    with pytest.raises(LizardzooError, match=words):
        window_attention(**{**arguments, **change})
