"""Heavy attention against its literal float64 oracle, in pieces, and the errors of its entry."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lizardzoo import LizardzooError
from lizardzoo.kernels import (
    heavy_attention,
    heavy_attention_step,
    window_and_heavy_step,
    window_attention,
    window_attention_step,
)
from lizardzoo.kernels.heavy import init_state, reference
from lizardzoo.kernels.heavy.selection import select, visible
from lizardzoo.kernels.merge import joint
from lizardzoo.kernels.window import init_state as init_window_state
from lizardzoo.testing import heavy_oracle, token_flags, visible_pairs
from tests.kernels.cases import assert_same, error


class Case(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    log_mass: Tensor
    options: dict[str, Any]  # window, heavy, keep
    flags: dict[str, Tensor | None]  # mask, starts
    chunk: int


@st.composite
def cases(draw: st.DrawFn, documents: bool = True) -> Case:
    """log_mass is the window's, so that weights are weights."""
    batch, length = draw(st.integers(1, 2)), draw(st.integers(1, 24))
    kv_heads, groups = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 3]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    scale = draw(st.sampled_from([1.0, 1.0, 10.0]))

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q = (randn(batch, length, kv_heads * groups, 4) * scale).requires_grad_()
    k, v = (randn(batch, length, kv_heads, dim).requires_grad_() for dim in (4, 3))
    window, keep = draw(st.sampled_from([1, 2, 4, 9])), draw(st.sampled_from([0, 1, 3]))
    found = draw(token_flags(batch, length, documents=documents))
    flags = {"mask": found.mask, "starts": found.starts}
    with torch.no_grad():
        _, log_mass, _ = window_attention(q, k, v, window=window, keep=keep, **flags, return_state=False)
    options = {"window": window, "heavy": draw(st.sampled_from([1, 2, 5])), "keep": keep}
    options["half_life"] = draw(st.sampled_from([None, 1.0, 3.0, 50.0]))
    return Case(q, k, v, log_mass, options, flags, draw(st.sampled_from([1, 2, 3, 128])))


@pytest.fixture(autouse=True)
def _chunk() -> Any:
    before = reference.CHUNK
    yield
    reference.CHUNK = before


@given(cases())
def test_equals_the_oracle_with_all_gradients(case: Case) -> None:
    """With chunks of any size, so that what is held is carried over many."""
    reference.CHUNK = case.chunk
    y, log_mass, _ = heavy_attention(case.q, case.k, case.v, case.log_mass, **case.options, **case.flags)
    expected = heavy_oracle(case.q, case.k, case.v, case.log_mass, **case.options, **case.flags)
    assert_same((y, log_mass), expected, [case.q, case.k, case.v], 1e-10)


@given(cases(), st.data())
def test_splitting_a_sequence_changes_nothing(case: Case, data: st.DataObject) -> None:
    reference.CHUNK = case.chunk
    batch, length, kv_heads, _ = case.k.shape
    window, heavy, keep = case.options["window"], case.options["heavy"], case.options["keep"]
    whole = heavy_attention(case.q, case.k, case.v, case.log_mass, **case.options, **case.flags)
    past: Any = init_window_state(batch, kv_heads, 4, window, keep, torch.float64, "cpu")
    past = past._replace(v=past.v[..., :3], kept_v=past.kept_v[..., :3])
    state: Any = init_state(batch, kv_heads, 4, window, heavy, torch.float64, "cpu")
    state = state._replace(v=state.v[..., :3])
    edges = [0, *sorted(data.draw(st.sets(st.integers(1, length)))), length]
    outputs = []
    for start, end in itertools.pairwise(edges):
        if end == start:
            continue
        q, k, v, mass = (x[:, start:end] for x in case[:4])
        flags = {name: None if flag is None else flag[:, start:end] for name, flag in case.flags.items()}
        _, _, after = window_attention(q, k, v, window=window, keep=keep, **flags, state=past)
        if end - start == 1 and flags["starts"] is None:
            *out, state = heavy_attention_step(
                q, k, v, mass, past, state, keep=keep, half_life=case.options["half_life"], mask=flags["mask"]
            )
        else:
            *out, state = heavy_attention(q, k, v, mass, **case.options, **flags, past=past, state=state)
        past = after
        outputs.append(out)
    for ours, expected in zip(zip(*outputs, strict=True), whole, strict=False):
        assert error(torch.cat(ours, 1), expected) <= 1e-10


@given(cases(documents=False))
def test_the_state_holds_the_tokens_that_drew_most(case: Case) -> None:
    """By rank, with their own keys and values; a slot without a token has score -inf."""
    reference.CHUNK = case.chunk
    *_, state = heavy_attention(case.q, case.k, case.v, case.log_mass, **case.options, **case.flags)
    assert state is not None
    mask = case.flags["mask"]
    mask = torch.ones(case.q.shape[:2], dtype=torch.bool) if mask is None else mask
    for row, head in itertools.product(range(case.k.shape[0]), range(case.k.shape[2])):
        real = mask[row].nonzero()[:, 0]
        left = visible_pairs(mask, torch.zeros_like(mask), row, lag=case.options["window"], skip=case.options["keep"])
        count = min(len(left[int(real[-1])]) if len(real) else 0, case.options["heavy"])
        there = state.score[row, :, head] > -torch.inf
        assert there.sum() == count
        ranks = state.rank[row, there, head].long()
        assert len(set(ranks.tolist())) == count
        assert torch.equal(state.k[row, there, head], case.k[row, real[ranks], head])
        assert torch.equal(state.v[row, there, head], case.v[row, real[ranks], head])


@given(st.data())
def test_a_selection_is_that_of_a_loop(data: st.DataObject) -> None:
    """Equal keys, missing tokens and all, over many chunks."""
    heavy, chunk, chunks = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    key = st.sampled_from([float("-inf"), 0.0, 1.0, 2.0])
    stream = data.draw(st.lists(key, min_size=chunk * chunks, max_size=chunk * chunks))
    keys = torch.tensor([float("-inf")] * heavy + stream)
    found = select(keys, heavy, chunk)
    held: list[int] = []
    for t, value in enumerate(stream):
        n, inside = divmod(t, chunk)
        if value > float("-inf"):
            held = sorted([*held, t], key=lambda s: (stream[s], s))[-heavy:]
        seen = visible(found.until, heavy)[n, inside]
        places = torch.cat([found.held[n], heavy + n * chunk + torch.arange(chunk)])
        assert sorted((places[seen] - heavy).tolist()) == sorted(held), t
    assert sorted((found.last[found.any_last] - heavy).tolist()) == sorted(held)


def test_a_token_that_is_read_again_and_again_is_held() -> None:
    """Forgotten by a window of the same size; what is read once is let go."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 64, 1, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    q[:, 6:12], k[:, 5] = 3.0, 3.0  # those after token 5 read it
    window = {"window": 8, "keep": 0}
    near = window_attention(q, k, v, **window, return_state=False)
    *far, state = heavy_attention(q, k, v, near[1], heavy=2, **window)
    assert state is not None and 5 in state.rank[0, :, 0].tolist()
    q[:, -1] = 3.0
    near = window_attention(q, k, v, **window, return_state=False)
    *far, _ = heavy_attention(q, k, v, near[1], heavy=2, **window)
    y, _ = joint([(near[0], near[1]), (far[0], far[1])])
    assert (y[0, -1] - v[0, 5]).norm() < 0.1


@given(cases(documents=False))
def test_a_step_of_both_is_the_softmax_over_what_either_holds(case: Case) -> None:
    """One denominator, and both states as their own steps leave them."""
    keep, mask = case.options["keep"], case.flags["mask"]
    (batch, length, _, _), kv_heads = case.q.shape, case.k.shape[2]
    past: Any = init_window_state(batch, kv_heads, 4, case.options["window"], keep, torch.float64, "cpu")
    past = past._replace(v=past.v[..., :3], kept_v=past.kept_v[..., :3])
    state: Any = init_state(batch, kv_heads, 4, case.options["window"], case.options["heavy"], torch.float64, "cpu")
    state = state._replace(v=state.v[..., :3])
    for t in range(length):
        now = slice(t, t + 1)
        q, k, v = (x[:, now] for x in case[:3])
        options = {"keep": keep, "mask": None if mask is None else mask[:, now]}
        y, log_mass, both_past, both_state = window_and_heavy_step(q, k, v, past, state, **options)
        *near, new_past = window_attention_step(q, k, v, past, **options)
        *far, state = heavy_attention_step(q, k, v, near[1], past, state, **options)
        past = new_past
        expected = joint([(near[0], near[1]), (far[0], far[1])])
        assert error(y, expected[0]) <= 1e-12 and error(log_mass, expected[1]) <= 1e-12
        for a, b in zip((*both_past, *both_state), (*past, *state), strict=True):
            assert torch.equal(a, b)


def test_a_token_that_drew_much_fades() -> None:
    """What it drew is halved so often that the next tokens, which drew nothing much, take its place."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (0.1 * torch.randn(1, 64, 1, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    q[:, 6:12], k[:, 5] = 3.0, 3.0
    near = window_attention(q, k, v, window=8, return_state=False)
    for half_life, held in ((None, True), (1000.0, True), (2.0, False)):
        *_, state = heavy_attention(q, k, v, near[1], heavy=2, window=8, half_life=half_life)
        assert state is not None and (5 in state.rank[0, :, 0].tolist()) == held


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heavy": 0}, "window and heavy must be at least 1 and keep at least 0, got 4, 0 and 0"),
        ({"window": 0}, "window and heavy must be at least 1 and keep at least 0, got 0, 2 and 0"),
        ({"half_life": 0.5}, "half_life must be at least 1 token, or None, got 0.5"),
        ({"half_life": float("nan")}, "half_life must be at least 1 token, or None, got nan"),
        ({"log_mass": torch.zeros(1, 5, 1)}, "log_mass is what window_attention returns, of shape [1, 5, 2]"),
        ({"past": init_window_state(1, 1, 4, 4, 0, torch.float32, "cpu")}, "past is given without state; give both"),
        (
            {
                "past": init_window_state(1, 1, 4, 3, 0, torch.float32, "cpu"),
                "state": init_state(1, 1, 4, 4, 2, torch.float32, "cpu"),
            },
            "the states were made with window=3 and 4, heavy=2, keep=0, got window=4, heavy=2, keep=0",
        ),
        ({"mask": torch.ones(1, 4, dtype=torch.bool)}, "mask is a bool tensor of shape [1, 5]"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "q": torch.zeros(1, 5, 2, 4), "k": torch.zeros(1, 5, 1, 4), "v": torch.zeros(1, 5, 1, 4),
        "log_mass": torch.zeros(1, 5, 2), "window": 4, "heavy": 2,
    }  # fmt: skip
    with pytest.raises(LizardzooError) as caught:
        heavy_attention(**(arguments | change))
    assert message in str(caught.value)


def test_a_step_takes_one_token_and_no_gradients_in_place() -> None:
    past = init_window_state(1, 1, 4, 4, 0, torch.float32, "cpu")
    state = init_state(1, 1, 4, 4, 2, torch.float32, "cpu")
    two = [torch.zeros(1, 2, 1, 4)] * 3
    with pytest.raises(LizardzooError, match="a step takes one token, got 2; call heavy_attention"):
        heavy_attention_step(*two, torch.zeros(1, 2, 1), past, state)
    one = [torch.zeros(1, 1, 1, 4)] * 3
    with pytest.raises(LizardzooError, match="in_place=True gives no gradients"):
        heavy_attention_step(*one, torch.zeros(1, 1, 1), past, state, in_place=True)
    with pytest.raises(LizardzooError, match="a step takes one token, got 2; call window_and_heavy_attention"):
        window_and_heavy_step(*two, past, state)
    with pytest.raises(LizardzooError, match="in_place=True gives no gradients"):
        window_and_heavy_step(*one, past, state, in_place=True)
    with pytest.raises(LizardzooError, match="the state was made with window=4, keep=0, got window=4, keep=2"):
        window_and_heavy_step(*one, past, state, keep=2)
