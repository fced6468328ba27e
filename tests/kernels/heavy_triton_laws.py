"""Laws of the Triton kernels of heavy attention under Triton's interpreter; `test_triton.py` runs them elsewhere.

Tiles and chunks are of 16 there, so that these lengths have several. The reference computes in fp32 as well, and no
input saturates its weights: scores that differ by a rounding would be another choice, not an error.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lizardzoo import LizardzooError
from lizardzoo.kernels import (
    HeavyState,
    WindowState,
    heavy_attention,
    heavy_attention_step,
    window_and_heavy_step,
    window_attention,
)
from lizardzoo.kernels.heavy import init_state, ops, step
from lizardzoo.kernels.heavy.reference import LEAST
from lizardzoo.kernels.heavy.selection import select
from lizardzoo.kernels.window import init_state as init_window_state
from lizardzoo.kernels.window import ops as window_ops
from lizardzoo.testing import token_flags
from tests.kernels.cases import assert_same, assert_same_tokens, error, poison
from tests.kernels.test_heavy import Case

assert ops.INTERPRETED
# An example takes a second: no shrinking, which would take minutes. A failing example is printed with its seed.
PHASES = [phase for phase in Phase if phase not in (Phase.shrink, Phase.explain)]


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


@st.composite
def cases(draw: st.DrawFn, longest: int = 50, documents: bool = True) -> Case:
    """Lengths of up to four chunks."""
    batch, length = draw(st.integers(1, 2)), draw(st.integers(1, longest))
    kv_heads, groups = draw(st.sampled_from([(1, 1), (1, 3), (2, 2)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q = randn(batch, length, kv_heads * groups, 5).requires_grad_()
    k, v = (randn(batch, length, kv_heads, dim).requires_grad_() for dim in (5, 3))
    window, keep = draw(st.sampled_from([1, 2, 7, 20, 50])), draw(st.sampled_from([0, 1, 3]))
    flags = draw(token_flags(batch, length, documents=documents))
    if flags.starts is not None and draw(st.booleans()):  # half of all tokens begin a document: make it a few
        flags = flags._replace(starts=flags.starts & (torch.rand(batch, length, generator=generator) < 0.1))
    given_flags = {"mask": flags.mask, "starts": flags.starts}
    with torch.no_grad():
        _, log_mass, _ = window_attention(q, k, v, window=window, keep=keep, **given_flags, return_state=False)
    options = {"window": window, "heavy": draw(st.sampled_from([1, 3, 16, 37])), "keep": keep}
    options["half_life"] = draw(st.sampled_from([None, 3.0, 50.0]))
    return Case(q, k, v, log_mass, options, given_flags, 128)


def assert_same_state(actual: HeavyState | None, expected: HeavyState | None) -> None:
    """The same tokens in any order."""
    assert actual is not None and expected is not None
    torch.testing.assert_close(actual.drawn, expected.drawn, rtol=1e-5, atol=1e-5)
    sorted_states = []
    for state in (actual, expected):
        there = state.score > -torch.inf
        order = torch.where(there, state.rank, -1).argsort(1)
        k, v = (
            torch.where(there[..., None], x, 0.0).gather(1, order[..., None].expand_as(x)) for x in (state.k, state.v)
        )
        sorted_states.append((torch.where(there, state.rank, -1).gather(1, order), k, v, state.score.gather(1, order)))
    for a, b in zip(sorted_states[0][:3], sorted_states[1][:3], strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(sorted_states[0][3], sorted_states[1][3], rtol=1e-5, atol=1e-5)


@settings(max_examples=8, phases=PHASES)
@given(cases())
def test_equals_the_reference_with_all_gradients(case: Case) -> None:
    arguments = (case.q, case.k, case.v, case.log_mass)
    y, log_mass, state = heavy_attention(*arguments, **case.options, **case.flags, impl="triton")
    expected = heavy_attention(*arguments, **case.options, **case.flags, impl="reference")
    assert_same((y, log_mass), expected[:2], [case.q, case.k, case.v], 1e-5)
    assert_same_state(state, expected[2])
    stateless = heavy_attention(*arguments, **case.options, **case.flags, return_state=False, impl="triton")
    assert torch.equal(stateless[0], y) and torch.equal(stateless[1], log_mass) and stateless[2] is None


@settings(max_examples=5, phases=PHASES)
@given(cases(), st.data())
def test_either_implementation_goes_on_from_the_others_state(case: Case, data: st.DataObject) -> None:
    length, window, keep = case.q.shape[1], case.options["window"], case.options["keep"]
    tensors = (case.q, case.k, case.v, case.log_mass)
    whole = heavy_attention(*tensors, **case.options, **case.flags, impl="reference")
    edges = [0, *sorted(data.draw(st.sets(st.integers(1, length), max_size=3)) - {length}), length]
    outputs: list[Any] = []
    past = state = None
    for start, end in itertools.pairwise(edges):
        piece = [x[:, start:end] for x in tensors]
        flags = {name: None if flag is None else flag[:, start:end] for name, flag in case.flags.items()}
        impl = "triton" if start == 0 or data.draw(st.booleans()) else "reference"
        *output, state = heavy_attention(*piece, **case.options, **flags, past=past, state=state, impl=impl)
        *_, past = window_attention(*piece[:3], window=window, keep=keep, **flags, state=past)
        outputs.append(output)
    y, log_mass = (torch.cat(part, 1) for part in zip(*outputs, strict=True))
    assert_same((y, log_mass), whole[:2], [case.q, case.k, case.v], 1e-5)
    assert_same_state(state, whole[2])


@settings(max_examples=8, phases=PHASES)
@given(st.data())
def test_the_choice_is_that_of_the_reference_bit_for_bit(data: st.DataObject) -> None:
    """Of the same scores, where many are equal; over many chunks."""
    length, heavy = data.draw(st.integers(1, 70)), data.draw(st.sampled_from([1, 2, 5, 16, 40]))
    window, keep = data.draw(st.sampled_from([1, 4, 30])), data.draw(st.sampled_from([0, 3]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    q = torch.randn(2, length, 2, 4, generator=generator).round()
    k = torch.randn(2, length, 2, 4, generator=generator).round()
    log_mass = torch.zeros(2, length, 2) + 20  # any number; whole scores, so equal ones
    keys, places, times, following, entries, counts, drawn = ops.compute_choice(
        q, k, log_mass, None, None, None, None, window, keep, heavy, 0, 0.0, 1.0
    )
    leaves = torch.arange(length) >= window + keep
    # numpy's logarithm, as the interpreter's: close scores may round to one, here and there alike
    score = torch.from_numpy(np.log2(drawn[:, :length].clamp(min=2.0**-LEAST).numpy()) + np.float32(LEAST))
    scores = torch.where(leaves[None, :, None], score, -torch.inf).transpose(1, 2)
    chunk = ops.CHUNK
    scores = F.pad(scores, (heavy, 0), value=-torch.inf)
    found = select(F.pad(scores, (0, -length % chunk), value=-torch.inf), heavy, chunk)
    since, until = times >> 16, times & 0xFFFF
    assert torch.equal(until[..., :heavy], found.until[..., :heavy]) and (since[..., :heavy] == 0).all()
    seen = found.until[..., heavy:] > torch.arange(chunk)  # of a chunk's own tokens, those that are held at all
    assert torch.equal(counts, heavy + seen.sum(-1).int())
    own = torch.where(seen, heavy + seen.cumsum(-1) - 1, -1).flatten(2)[..., :length]
    assert torch.equal(entries, own.int())
    for name, expected in (("since", torch.arange(chunk).expand_as(seen)), ("until", found.until[..., heavy:])):
        compact = {"since": since, "until": until}[name][..., heavy:]
        filled = torch.arange(chunk) < seen.sum(-1, keepdim=True)
        assert torch.equal(compact[filled], expected[seen].int()) and (compact[~filled] == 0).all(), name
    there = keys[:, :, :-1] >= 0
    held = scores.gather(2, found.held.flatten(2).clamp(max=scores.shape[2] - 1)).view(found.held.shape)
    assert torch.equal(there, held > -torch.inf)
    assert torch.equal(places[:, :, :-1][there].long(), found.held[there])
    assert torch.equal(places[:, :, -1][found.any_last].long(), found.last[found.any_last])
    assert torch.equal(keys[:, :, -1] >= 0, found.any_last)
    # where a candidate stands in the next chunk
    own = heavy + torch.arange(places.shape[2] - 1)[:, None] * chunk + since[..., heavy:]
    candidates = torch.cat([places[:, :, :-1], own], -1)
    after = places[:, :, 1:].gather(3, following.clamp(min=0).long())
    assert torch.equal(after[following >= 0], candidates[following >= 0].int())
    assert torch.equal((following >= 0).sum(-1), (keys[:, :, 1:] >= 0).sum(-1))


def start_states(case: Case, fill: float) -> tuple[WindowState, HeavyState]:
    """Of a text's beginning; `fill` where nothing is held, which nothing may read."""
    batch, kv_heads = case.q.shape[0], case.k.shape[2]
    window, heavy, keep = case.options["window"], case.options["heavy"], case.options["keep"]
    past = init_window_state(batch, kv_heads, 5, window, keep, torch.float32, "cpu")
    state = init_state(batch, kv_heads, 5, window, heavy, torch.float32, "cpu")
    past = past._replace(v=past.v[..., :3].contiguous(), kept_v=past.kept_v[..., :3].contiguous())
    state = state._replace(v=state.v[..., :3].contiguous())
    for x in (past.k, past.v, past.kept_k, past.kept_v, state.k, state.v):
        x.fill_(fill)
    return past, state


@settings(max_examples=4, phases=PHASES)
@given(cases(longest=16, documents=False), st.booleans())
def test_a_fold_of_steps_is_the_whole(case: Case, with_gradients: bool) -> None:
    """The step's own kernel without gradients, a sequence of one token with them."""
    window, keep, mask = case.options["window"], case.options["keep"], case.flags["mask"]
    arguments = (case.q, case.k, case.v, case.log_mass)
    whole = heavy_attention(*arguments, **case.options, mask=mask, impl="reference")
    past, state = start_states(case, 0.0 if with_gradients else float("nan"))
    outputs = []
    with torch.set_grad_enabled(with_gradients):
        for t in range(case.q.shape[1]):
            now = slice(t, t + 1)
            flags = None if mask is None else mask[:, now]
            one = [x[:, now] for x in arguments]
            *output, state = heavy_attention_step(
                *one, past, state, keep=keep, half_life=case.options["half_life"], mask=flags, impl="triton"
            )
            *_, past = window_attention(*one[:3], window=window, keep=keep, mask=flags, state=past)
            outputs.append(output)
    y, log_mass = (torch.cat(part, 1) for part in zip(*outputs, strict=True))
    if with_gradients:
        assert_same((y, log_mass), whole[:2], [case.q, case.k, case.v], 1e-5)
    assert error(y, whole[0]) <= 1e-5 and error(log_mass, whole[1]) <= 1e-5
    assert_same_state(state, whole[2])


@settings(max_examples=4, phases=PHASES)
@given(cases(longest=20, documents=False), st.sampled_from([None, (2,), (4, 2)]), st.booleans())
@torch.no_grad()
def test_a_step_of_both_is_the_joint_of_their_steps(case: Case, shape: tuple[int, ...] | None, in_place: bool) -> None:
    """Outputs, and both states as they move on: in place, or beside the old ones, which stay."""
    keep, heads = case.options["keep"], case.q.shape[2]
    if shape is not None and len(shape) == 2:
        shape = (heads, 2)
    options: dict[str, Any] = {
        "keep": keep,
        "half_life": case.options["half_life"],
        "sinks": None if shape is None else torch.randn(shape),
    }
    past, state = start_states(case, float("nan"))
    expected = start_states(case, 0.0)
    for t in range(case.q.shape[1]):
        now = slice(t, t + 1)
        one = [x[:, now] for x in (case.q, case.k, case.v)]
        options["mask"] = None if case.flags["mask"] is None else case.flags["mask"][:, now]
        before = [x.clone() for x in (*past, *state)]
        y, log_mass, new_past, new_state = window_and_heavy_step(
            *one, past, state, **options, in_place=in_place, impl="triton"
        )
        if in_place:
            assert all(a is b for a, b in zip((*past, *state), (*new_past, *new_state), strict=True))
        else:
            for a, b in zip((*past, *state), before, strict=True):
                assert torch.equal(a.nan_to_num(), b.nan_to_num())
        past, state = new_past, new_state
        *theirs, past_2, state_2 = window_and_heavy_step(*one, *expected, **options, impl="reference")
        expected = past_2, state_2
        assert error(y, theirs[0]) <= 1e-5 and error(log_mass, theirs[1]) <= 1e-5
        assert_same_tokens(past, past_2)
    assert_same_state(state, expected[1])


@pytest.mark.parametrize("impl", ["triton", "reference"])
@torch.no_grad()
def test_of_equal_scores_the_oldest_token_gives_way(impl: str) -> None:
    """In every key head for itself, whatever its slot."""
    past = init_window_state(1, 2, 4, 5, 0, torch.float32, "cpu")._replace(length=torch.tensor([40]))
    state = init_state(1, 2, 4, 5, 37, torch.float32, "cpu")
    ranks = torch.stack([torch.randperm(35)[:30] for _ in range(2)], 1)[None].int()
    ranks = torch.cat([ranks[:, :20], ranks[:, :7] + 40, ranks[:, 20:]], 1)
    score = torch.full((1, 37, 2), 0.0)
    state = state._replace(score=score, rank=ranks)
    q, k = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 2, 4)
    *_, after = heavy_attention_step(q, k, k, torch.zeros(1, 1, 4), past, state, impl=impl)
    replaced = (after.rank != ranks).nonzero()
    assert torch.equal(replaced[:, 1][replaced[:, 2].argsort()], ranks.argmin(1)[0])
    assert (after.rank[after.rank != ranks] == 40 - 5).all()


def test_a_step_of_both_with_gradients_is_the_references() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 30, heads, 4, generator=generator) for heads in (4, 2, 2))
    near = window_attention(q, k, v, window=4, keep=1)
    state = heavy_attention(q, k, v, near[1], window=4, heavy=3, keep=1)[2]
    assert near[2] is not None and state is not None
    one = [torch.randn(1, 1, heads, 4, generator=generator, requires_grad=True) for heads in (4, 2, 2)]
    found, expected = (
        window_and_heavy_step(*one, near[2], state, keep=1, impl=impl)[:2] for impl in ("triton", "reference")
    )
    assert_same(found, expected, one, 1e-5)


def test_a_nan_stays_in_its_row_and_reads_nothing_else() -> None:
    q, k, v = (torch.randn(2, 60, 2, 4) for _ in range(3))
    log_mass = window_attention(q, k, v, window=4)[1]
    expected = heavy_attention(q, k, v, log_mass, window=4, heavy=3, impl="triton")
    k[1, 20] = float("nan")
    found = heavy_attention(q, k, v, log_mass, window=4, heavy=3, impl="triton")
    assert torch.equal(found[0][0], expected[0][0]) and torch.equal(found[1][0], expected[1][0])


def test_second_derivatives_are_refused() -> None:
    q, k, v = (torch.randn(1, 20, heads, 5).requires_grad_() for heads in (4, 2, 2))
    y, *_ = heavy_attention(q, k, v, torch.zeros(1, 20, 4), window=4, heavy=3, impl="triton")
    (slope,) = torch.autograd.grad(y.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_views_need_no_copy_and_give_the_same() -> None:
    """Heads before tokens, as transformers has them, and every second token of a longer tensor."""
    q, k, v = (torch.randn(2, heads, 80, 4).transpose(1, 2)[:, ::2] for heads in (4, 2, 2))
    log_mass = window_attention(q, k, v, window=7)[1]
    viewed = heavy_attention(q, k, v, log_mass, window=7, heavy=5, impl="triton")
    copies = [x.contiguous() for x in (q, k, v)]
    copied = heavy_attention(*copies, log_mass, window=7, heavy=5, impl="triton")
    assert torch.equal(viewed[0], copied[0]) and torch.equal(viewed[1], copied[1])


def test_the_ops_keep_what_torch_asks_of_them() -> None:
    """Schema, fake tensors and autograd registration, as torch.compile relies on them."""
    q, k, v = (torch.randn(1, 20, heads, 4, requires_grad=True) for heads in (2, 1, 1))
    first = torch.zeros(1, 20, dtype=torch.int32)
    chosen = (q.detach(), k.detach(), torch.zeros(1, 20, 2), None, None)
    for flags in ((None, None), (first, torch.tensor([18], dtype=torch.int32))):
        torch.library.opcheck(ops._choice, (*chosen, *flags, 5, 2, 3, 0, 0.1, 0.5))
    found = ops.compute_choice(*chosen, None, None, 5, 2, 3, 0, 0.1, 0.5)
    torch.library.opcheck(ops._attention, (q, k, v, *found.candidates, None, -8, 0.5))
    past = init_window_state(1, 1, 4, 5, 2, torch.float32, "cpu")
    state = init_state(1, 1, 4, 5, 3, torch.float32, "cpu")
    one = [x.detach()[:, :1] for x in (q, k, v)]
    torch.library.opcheck(step._heavy_step, (*one, torch.zeros(1, 1, 2), *past, *state, None, 0.1, 0.5))
    for turn in ((None, None), (torch.zeros(1, 1, 4), torch.ones(1, 1, 4))):
        torch.library.opcheck(step._joint_step, (*one, *past, *state, torch.zeros(2), None, *turn, 0.1, 0.5))


@pytest.mark.parametrize(
    ("dtype", "dim", "words"), [(torch.float64, 4, "float64"), (torch.float32, 257, "head_dim up to 256")]
)
def test_what_it_does_not_take_is_one_clear_error(dtype: torch.dtype, dim: int, words: str) -> None:
    q = torch.zeros(1, 2, 1, dim, dtype=dtype)
    with pytest.raises(LizardzooError, match=words):
        heavy_attention(q, q, q, q[..., 0], window=3, heavy=2, impl="triton")
    assert window_ops.MAX_DIM == 256
