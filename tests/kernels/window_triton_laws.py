"""Laws of the Triton window kernels under Triton's interpreter; `test_triton.py` runs them in another process.

The interpreter checks indices, masks and mathematics in fp32, not what a GPU makes of them; tiles are of 16, so that
these lengths have several.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lizardzoo import LizardzooError
from lizardzoo.kernels import window_attention, window_attention_step
from lizardzoo.kernels.window import init_state, ops
from lizardzoo.testing import token_flags
from tests.kernels.cases import assert_same, assert_same_tokens, error, poison
from tests.kernels.test_window import Case

assert ops.INTERPRETED
# An example takes a second: no shrinking, which would take minutes. A failing example is printed with its seed.
PHASES = [phase for phase in Phase if phase not in (Phase.shrink, Phase.explain)]


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


@st.composite
def cases(draw: st.DrawFn, longest: int = 75, documents: bool = True) -> Case:
    """Lengths of up to five tiles and three chunks of kept tokens' gradients."""
    batch, length = draw(st.integers(1, 2)), draw(st.integers(1, longest))
    kv_heads, groups = draw(st.sampled_from([(1, 1), (1, 3), (2, 2)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    scale = draw(st.sampled_from([1.0, 1.0, 10.0]))

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q = (randn(batch, length, kv_heads * groups, 5) * scale).requires_grad_()
    k, v = (randn(batch, length, kv_heads, dim).requires_grad_() for dim in (5, 3))
    sinks = draw(st.sampled_from([None, (2,), (kv_heads * groups, 2)]))
    options = {
        "window": draw(st.sampled_from([1, 2, 7, 20, 50, 100])),
        "keep": draw(st.sampled_from([0, 1, 3, 18])),
        "sinks": None if sinks is None else (randn(*sinks) * scale).requires_grad_(),
    }
    flags = draw(token_flags(batch, length, documents=documents))
    if flags.starts is not None and draw(st.booleans()):  # half of all tokens begin a document: make it a few
        flags = flags._replace(starts=flags.starts & (torch.rand(batch, length, generator=generator) < 0.1))
    return Case(q, k, v, options, {"mask": flags.mask, "starts": flags.starts})


def test_second_derivatives_are_refused() -> None:
    q, k, v = (torch.randn(1, 9, heads, 5).requires_grad_() for heads in (4, 2, 2))
    y, *_ = window_attention(q, k, v, window=4, impl="triton")
    (slope,) = torch.autograd.grad(y.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@settings(max_examples=16, phases=PHASES)
@given(cases())
def test_equals_the_reference_with_all_gradients(case: Case) -> None:
    y, log_mass, state = window_attention(case.q, case.k, case.v, **case.options, **case.flags, impl="triton")
    expected = window_attention(case.q, case.k, case.v, **case.options, **case.flags, impl="reference")
    assert_same((y, log_mass), expected[:2], case.inputs(), 1e-5)
    assert_same_tokens(state, expected[2])


@settings(max_examples=8, phases=PHASES)
@given(cases(), st.data())
def test_either_implementation_goes_on_from_the_others_state(case: Case, data: st.DataObject) -> None:
    length = case.q.shape[1]
    whole = window_attention(case.q, case.k, case.v, **case.options, **case.flags, impl="reference")
    edges = [0, *sorted(data.draw(st.sets(st.integers(1, length), max_size=3)) - {length}), length]
    outputs, state = [], None
    for start, end in itertools.pairwise(edges):
        tensors, flags = case.piece(start, end)
        impl = "triton" if start == 0 or data.draw(st.booleans()) else "reference"
        *output, state = window_attention(*tensors, **case.options, **flags, state=state, impl=impl)
        outputs.append(output)
    pieces = [torch.cat(part, 1) for part in zip(*outputs, strict=True)]
    assert_same((pieces[0], pieces[1]), whole[:2], case.inputs(), 1e-5)
    assert_same_tokens(state, whole[2])


@settings(max_examples=8, phases=PHASES)
@given(cases(longest=25, documents=False), st.booleans())
def test_a_fold_of_steps_is_the_whole(case: Case, with_gradients: bool) -> None:
    """The step's own kernel without gradients, a sequence of one token with them."""
    mask, window, keep = case.flags["mask"], case.options["window"], case.options["keep"]
    whole = window_attention(case.q, case.k, case.v, **case.options, mask=mask, impl="reference")
    state = init_state(case.q.shape[0], case.k.shape[2], 5, window, keep, torch.float32, "cpu")
    state = state._replace(v=state.v[..., :3], kept_v=state.kept_v[..., :3])
    for x in (state.k, state.v, state.kept_k, state.kept_v):
        x.fill_(float("nan"))  # nothing may read a token that is not there
    outputs = []
    with torch.set_grad_enabled(with_gradients):
        for t in range(case.q.shape[1]):
            tensors, flags = case.piece(t, t + 1)
            *output, state = window_attention_step(
                *tensors, state, keep=keep, sinks=case.options["sinks"], mask=flags["mask"], impl="triton"
            )
            outputs.append(output)
    steps = [torch.cat(part, 1) for part in zip(*outputs, strict=True)]
    if with_gradients:
        assert_same((steps[0], steps[1]), whole[:2], case.inputs(), 1e-5)
    assert error(steps[0], whole[0]) <= 1e-5 and error(steps[1], whole[1]) <= 1e-5
    assert_same_tokens(state, whole[2])


def test_a_new_step_leaves_the_old_state_alone() -> None:
    state = init_state(1, 2, 4, 5, 2, torch.float32, "cpu")
    before = [x.clone() for x in state]
    q, k = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 2, 4)
    with torch.no_grad():
        window_attention_step(q, k, k, state, keep=2, impl="triton")
    for a, b in zip(state, before, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("sink", [float("-inf"), 20.0, 1e4])
def test_extreme_sinks_are_finite(sink: float) -> None:
    q, k, v = (torch.randn(1, 20, 2, 4, requires_grad=True) for _ in range(3))
    sinks = torch.full((2,), sink, requires_grad=True)
    y, log_mass, _ = window_attention(q, k, v, window=4, sinks=sinks, impl="triton")
    (y.sum() + log_mass.sum()).backward()
    assert all(torch.isfinite(x).all() for x in (y, log_mass, q.grad, k.grad, v.grad, sinks.grad))  # type: ignore[arg-type]
    if sink == float("-inf"):
        without = window_attention(q, k, v, window=4, impl="triton")
        assert torch.equal(y, without[0]) and torch.equal(log_mass, without[1])


def test_views_need_no_copy_and_give_the_same() -> None:
    """Heads before tokens, as transformers has them, and every second token of a longer tensor."""
    q, k, v = (torch.randn(2, heads, 40, 4).transpose(1, 2)[:, ::2] for heads in (4, 2, 2))
    viewed = window_attention(q, k, v, window=7, keep=2, impl="triton")
    copied = window_attention(*(x.contiguous() for x in (q, k, v)), window=7, keep=2, impl="triton")
    assert torch.equal(viewed[0], copied[0]) and torch.equal(viewed[1], copied[1])


def test_the_ops_keep_what_torch_asks_of_them() -> None:
    """Schema, fake tensors and autograd registration, as torch.compile relies on them."""
    q, k, v = (torch.randn(1, 20, heads, 4, requires_grad=True) for heads in (4, 2, 2))
    sink, first = torch.zeros(4, requires_grad=True), torch.zeros(1, 20, dtype=torch.int32)
    lengths = torch.tensor([17], dtype=torch.int32)
    torch.library.opcheck(ops._attention, (q, k, v, sink, first, lengths, 5, 2, 0, 0.5))
    state = init_state(1, 2, 4, 5, 2, torch.float32, "cpu")
    one = [x.detach()[:, :1] for x in (q, k, v)]
    for turn in ((None, None), (torch.zeros(1, 1, 4), torch.ones(1, 1, 4))):
        torch.library.opcheck(ops._step, (*one, *state, None, None, *turn, 0.5))


@pytest.mark.parametrize(
    ("dtype", "dim", "words"), [(torch.float64, 4, "float64"), (torch.float32, 257, "head_dim up to 256")]
)
def test_what_it_does_not_take_is_one_clear_error(dtype: torch.dtype, dim: int, words: str) -> None:
    q = torch.zeros(1, 2, 1, dim, dtype=dtype)
    with pytest.raises(LizardzooError, match=words):
        window_attention(q, q, q, window=3, impl="triton")
