"""Laws of window and heavy attention as one Triton op, under the interpreter; see `heavy_triton_laws.py`."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lizardzoo.kernels import window_and_heavy_attention, window_and_heavy_step
from lizardzoo.kernels.heavy import fused, init_state
from lizardzoo.kernels.window import init_state as init_window_state
from tests.kernels.cases import assert_same, assert_same_tokens, error, poison
from tests.kernels.heavy_triton_laws import PHASES, assert_same_state, cases
from tests.kernels.test_heavy import Case


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


def draw_sinks(data: st.DataObject, heads: int) -> Tensor | None:
    shape = data.draw(st.sampled_from([None, (2,), (heads, 1)]))
    return None if shape is None else torch.randn(shape, generator=torch.Generator().manual_seed(5)).requires_grad_()


@settings(max_examples=10, phases=PHASES)
@given(cases(), st.data())
def test_equals_the_reference_with_all_gradients(case: Case, data: st.DataObject) -> None:
    """The reference is both branches and their joint; sinks have their gradient too."""
    tensors, sinks = (case.q, case.k, case.v), draw_sinks(data, case.q.shape[2])
    options = {**case.options, **case.flags, "sinks": sinks}
    *found, past, state = window_and_heavy_attention(*tensors, **options, impl="triton")
    *expected, past_2, state_2 = window_and_heavy_attention(*tensors, **options, impl="reference")
    inputs = [*tensors, *([] if sinks is None else [sinks])]
    assert_same((found[0], found[1]), (expected[0], expected[1]), inputs, 1e-5)
    assert_same_tokens(past, past_2)
    assert_same_state(state, state_2)
    stateless = window_and_heavy_attention(*tensors, **options, return_state=False, impl="triton")
    assert stateless[2:] == (None, None)
    for a, b in zip(stateless, found, strict=False):
        assert torch.equal(a, b)


@settings(max_examples=6, phases=PHASES)
@given(cases(), st.data())
def test_either_implementation_goes_on_from_the_others_states(case: Case, data: st.DataObject) -> None:
    """With gradients, through the states, of what came before them."""
    length, tensors, sinks = case.q.shape[1], (case.q, case.k, case.v), draw_sinks(data, case.q.shape[2])
    whole = window_and_heavy_attention(*tensors, **case.options, **case.flags, sinks=sinks, impl="reference")
    edges = [0, *sorted(data.draw(st.sets(st.integers(1, length), max_size=3)) - {length}), length]
    outputs: list[Any] = []
    past = state = None
    for start, end in itertools.pairwise(edges):
        piece = [x[:, start:end] for x in tensors]
        flags = {name: None if flag is None else flag[:, start:end] for name, flag in case.flags.items()}
        impl = "triton" if start == 0 or data.draw(st.booleans()) else "reference"
        *output, past, state = window_and_heavy_attention(
            *piece, **case.options, **flags, sinks=sinks, past=past, state=state, impl=impl
        )
        outputs.append(output)
    y, log_mass = (torch.cat(part, 1) for part in zip(*outputs, strict=True))
    assert_same((y, log_mass), whole[:2], [*tensors, *([] if sinks is None else [sinks])], 1e-5)
    assert_same_tokens(past, whole[2])
    assert_same_state(state, whole[3])


@settings(max_examples=4, phases=PHASES)
@given(cases(longest=16, documents=False))
def test_a_fold_of_steps_with_gradients_is_the_whole(case: Case) -> None:
    keep, mask = case.options["keep"], case.flags["mask"]
    whole = window_and_heavy_attention(case.q, case.k, case.v, **case.options, mask=mask, impl="reference")
    batch, kv_heads = case.q.shape[0], case.k.shape[2]
    past: Any = init_window_state(batch, kv_heads, 5, case.options["window"], keep, torch.float32, "cpu")
    past = past._replace(v=past.v[..., :3], kept_v=past.kept_v[..., :3])
    state: Any = init_state(batch, kv_heads, 5, case.options["window"], case.options["heavy"], torch.float32, "cpu")
    state = state._replace(v=state.v[..., :3])
    outputs = []
    for t in range(case.q.shape[1]):
        now = slice(t, t + 1)
        one, flags = [x[:, now] for x in case[:3]], None if mask is None else mask[:, now]
        *output, past, state = window_and_heavy_step(
            *one, past, state, keep=keep, half_life=case.options["half_life"], mask=flags, impl="triton"
        )
        outputs.append(output)
    y, log_mass = (torch.cat(part, 1) for part in zip(*outputs, strict=True))
    assert_same((y, log_mass), whole[:2], [case.q, case.k, case.v], 1e-5)
    assert_same_tokens(past, whole[2])
    assert_same_state(state, whole[3])


class Ops(TorchDispatchMode):
    """The names of torch's operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name().partition("::")[2].partition(".")[0])
        return func(*args, **(kwargs or {}))


def test_torch_computes_nothing_between_the_kernels() -> None:
    """It allocates, forward and backward. Copies are the interpreter's, `fill_` is poison."""
    q, k, v = (torch.randn(2, 60, heads, 5).requires_grad_() for heads in (4, 2, 2))
    with Ops() as forward:
        y, log_mass, *_ = window_and_heavy_attention(
            q, k, v, window=7, heavy=5, keep=2, half_life=20.0, return_state=False, impl="triton"
        )
    slopes = torch.ones_like(y), torch.ones_like(log_mass)
    with Ops() as backward:
        torch.autograd.grad((y, log_mass), (q, k, v), slopes)
    assert forward.names | backward.names <= {"empty", "new_empty", "set_", "detach", "copy_", "fill_"}


def test_either_output_alone_has_its_gradients() -> None:
    inputs = [torch.randn(1, 40, heads, 5).requires_grad_() for heads in (4, 2, 2)]
    for which in (0, 1):
        found, expected = (
            torch.autograd.grad(
                window_and_heavy_attention(*inputs, window=5, heavy=4, impl=impl)[which].square().sum(),
                inputs,
                allow_unused=True,
                materialize_grads=True,
            )
            for impl in ("triton", "reference")
        )
        for a, b in zip(found, expected, strict=True):
            assert error(a, b, 1.0) <= 1e-5


def test_a_nan_stays_in_its_row_and_reads_nothing_else() -> None:
    q, k, v = (torch.randn(2, 60, 2, 4) for _ in range(3))
    expected = window_and_heavy_attention(q, k, v, window=4, heavy=3, keep=1, impl="triton")
    k[1, 20] = float("nan")
    found = window_and_heavy_attention(q, k, v, window=4, heavy=3, keep=1, impl="triton")
    assert torch.equal(found[0][0], expected[0][0]) and torch.equal(found[1][0], expected[1][0])


def test_second_derivatives_are_refused() -> None:
    q, k, v = (torch.randn(1, 20, heads, 5).requires_grad_() for heads in (4, 2, 2))
    y, *_ = window_and_heavy_attention(q, k, v, window=4, heavy=3, impl="triton")
    (slope,) = torch.autograd.grad(y.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_views_need_no_copy_and_give_the_same() -> None:
    q, k, v = (torch.randn(2, heads, 80, 4).transpose(1, 2)[:, ::2] for heads in (4, 2, 2))
    viewed = window_and_heavy_attention(q, k, v, window=7, heavy=5, keep=2, impl="triton")
    copied = window_and_heavy_attention(*(x.contiguous() for x in (q, k, v)), window=7, heavy=5, keep=2, impl="triton")
    assert torch.equal(viewed[0], copied[0]) and torch.equal(viewed[1], copied[1])


def test_the_op_keeps_what_torch_asks_of_it() -> None:
    """Schema, fake tensors and autograd registration, as torch.compile relies on them."""
    q, k, v = (torch.randn(1, 20, heads, 4, requires_grad=True) for heads in (2, 1, 1))
    sink, first = torch.zeros(2, requires_grad=True), torch.zeros(1, 20, dtype=torch.int32)
    lengths = torch.tensor([18], dtype=torch.int32)
    for given_flags in ((None, None, None), (sink, first, lengths)):
        torch.library.opcheck(fused._attention, (q, k, v, *given_flags, None, None, 5, 2, 3, 0, 0.1, 0.5))
