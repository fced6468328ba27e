"""Hybrid attention against its literal float64 oracle; one denominator; steps in place."""

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
from lizardzoo.kernels import (
    FeatureMap,
    HybridState,
    gated_linear_attention,
    gated_linear_attention_step,
    hybrid_attention,
    hybrid_attention_step,
    window_attention,
    window_attention_step,
)
from lizardzoo.kernels.gated_linear import init_state as init_linear_state
from lizardzoo.kernels.gated_linear import reference
from lizardzoo.kernels.hybrid import share
from lizardzoo.kernels.merge import joint
from lizardzoo.kernels.state import state_tensors
from lizardzoo.kernels.window import init_state as init_window_state
from lizardzoo.testing import hybrid_oracle, token_flags
from tests.kernels.cases import assert_same, assert_same_tokens, error

DIM, VALUE_DIM = 4, 3


class Case(NamedTuple):
    tensors: dict[
        str, Tensor | None
    ]  # q, k, v, log_decay, log_input, log_scale and, unless `same_keys`, near_q, near_k
    options: dict[str, Any]  # feature_map, window, keep, lag, skip, sinks
    flags: dict[str, Tensor | None]  # mask, starts

    def inputs(self) -> list[Tensor]:
        maps, sinks = self.options["feature_map"], self.options["sinks"]
        return [x for x in (*self.tensors.values(), maps.query, maps.key, sinks) if x is not None]

    def arguments(self, start: int = 0, end: int | None = None) -> dict[str, Any]:
        """The tensors and flags of tokens start .. end-1."""
        found = {n: None if x is None else x[:, start:end] for n, x in {**self.tensors, **self.flags}.items()}
        near = found.pop("near_q", found["q"]), found.pop("near_k", found["k"])
        return {**found, "rotated": near}

    def step_arguments(self, t: int) -> dict[str, Any]:
        """Those of one token, as a step takes them."""
        found = {name: x for name, x in self.arguments(t, t + 1).items() if name != "starts"}
        return {**found, **{name: self.options[name] for name in ("feature_map", "keep", "skip", "sinks")}}

    def init_state(self) -> HybridState:
        q, k = self.tensors["q"], self.tensors["k"]
        assert q is not None and k is not None
        batch, heads, kv_heads = q.shape[0], q.shape[2], k.shape[2]
        gates = [0 if x is None else x.shape[2] for x in (self.tensors["log_decay"], self.tensors["log_input"])]
        features = 2 * self.options["feature_map"].key.shape[2]
        window = init_window_state(
            batch, kv_heads, DIM, self.options["window"], self.options["keep"], q.dtype, q.device
        )
        linear = init_linear_state(
            batch, heads, kv_heads, DIM, features, self.options["lag"], *gates, q.dtype, q.device
        )
        window = window._replace(v=window.v[..., :VALUE_DIM].clone(), kept_v=window.kept_v[..., :VALUE_DIM].clone())
        linear = linear._replace(v=linear.v[..., :VALUE_DIM].clone(), kv=linear.kv[..., :VALUE_DIM].clone())
        return share(window, linear, "near_k" not in self.tensors)


@st.composite
def cases(
    draw: st.DrawFn, documents: bool = True, scales: tuple[float, ...] = (1.0, 1.0, 30.0), longest: int = 13
) -> Case:
    batch, length = draw(st.integers(1, 2)), draw(st.integers(1, longest))
    kv_heads, groups = draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 2)]))
    heads, features = kv_heads * groups, draw(st.sampled_from([2, 4]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    scale = draw(st.sampled_from(scales))

    def randn(*shape: int, factor: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * factor).requires_grad_()

    gate_heads = st.sampled_from([None, 1, kv_heads, heads])
    decay, enter = draw(gate_heads), draw(gate_heads)
    log_decay = None if decay is None else F.logsigmoid(randn(batch, length, decay).detach() + 2).requires_grad_()
    tensors = {
        "q": randn(batch, length, heads, DIM, factor=scale),
        "k": randn(batch, length, kv_heads, DIM),
        "v": randn(batch, length, kv_heads, VALUE_DIM),
        "log_decay": log_decay,
        "log_input": None if enter is None else randn(batch, length, enter),
        "log_scale": randn(batch, length, heads) if draw(st.booleans()) else None,
    }
    if draw(st.booleans()):
        tensors |= {"near_q": randn(batch, length, heads, DIM), "near_k": randn(batch, length, kv_heads, DIM)}
    window, keep = draw(st.sampled_from([1, 2, 4, 30])), draw(st.sampled_from([0, 1, 3]))
    sinks = draw(st.sampled_from([None, (2,), (heads, 2)]))
    lag, skip = draw(st.sampled_from([(window, keep), (window, keep), (0, 0), (3, 1)]))
    options = {
        "feature_map": FeatureMap(
            randn(draw(st.sampled_from([1, heads])), DIM, features),
            randn(draw(st.sampled_from([1, kv_heads])), DIM, features),
            draw(st.sampled_from(["softmax", "exp"])),
        ),
        "window": window,
        "keep": keep,
        "lag": lag,
        "skip": skip,
        "sinks": None if sinks is None else randn(*sinks),
    }
    flags = draw(token_flags(batch, length, documents=documents))
    return Case(tensors, options, {"mask": flags.mask, "starts": flags.starts})


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short sequences must cross many chunk borders."""
    monkeypatch.setattr(reference, "CHUNK", 4)


def assert_same_state(actual: HybridState, expected: HybridState, tolerance: float) -> None:
    """The same tokens, and the same memory whatever its scales."""
    assert_same_tokens(actual.window, expected.window)
    assert_same_tokens(actual.linear, expected.linear)
    scales = actual.linear.scale.exp(), expected.linear.scale.exp()
    assert error(actual.linear.norm * scales[0], expected.linear.norm * scales[1]) <= tolerance
    memories = (actual.linear.kv * scales[0][..., None], expected.linear.kv * scales[1][..., None])
    assert error(*memories) <= tolerance


@given(cases())
def test_equals_the_oracle_with_all_gradients(case: Case) -> None:
    y, log_mass, _ = hybrid_attention(**case.arguments(), **case.options)
    assert_same((y, log_mass), hybrid_oracle(**case.arguments(), **case.options), case.inputs(), 1e-10)


@given(cases(), st.data())
def test_splitting_a_sequence_changes_nothing(case: Case, data: st.DataObject) -> None:
    y, log_mass, whole = hybrid_attention(**case.arguments(), **case.options)
    length = y.shape[1]
    edges = [0, *sorted(data.draw(st.sets(st.integers(1, length))) - {length}), length]
    outputs, state = [], None
    for start, end in itertools.pairwise(edges):
        *output, state = hybrid_attention(**case.arguments(start, end), **case.options, state=state)
        outputs.append(output)
    pieces = [torch.cat(part, 1) for part in zip(*outputs, strict=True)]
    assert_same((pieces[0], pieces[1]), (y, log_mass), case.inputs(), 1e-10)
    assert state is not None and whole is not None
    assert_same_state(state, whole, 1e-10)


@given(cases(documents=False))
def test_a_fold_of_steps_is_the_whole(case: Case) -> None:
    y, log_mass, _ = hybrid_attention(**case.arguments(), **case.options)
    state, outputs = case.init_state(), []
    for t in range(y.shape[1]):
        *output, state = hybrid_attention_step(**case.step_arguments(t), state=state)
        outputs.append(output)
    steps = [torch.cat(part, 1) for part in zip(*outputs, strict=True)]
    assert_same((steps[0], steps[1]), (y, log_mass), case.inputs(), 1e-10)


@given(cases(documents=False))
@torch.no_grad()
def test_a_step_in_place_is_the_step_at_the_same_addresses(case: Case) -> None:
    state, moved = case.init_state(), case.init_state()
    addresses = [x.data_ptr() for x in state_tensors(moved)]
    for t in range(case.tensors["v"].shape[1]):
        *expected, state = hybrid_attention_step(**case.step_arguments(t), state=state)
        *output, same = hybrid_attention_step(**case.step_arguments(t), state=moved, in_place=True)
        assert same is moved and [x.data_ptr() for x in state_tensors(moved)] == addresses
        for a, b in zip((*output, *state_tensors(moved)), (*expected, *state_tensors(state)), strict=True):
            assert torch.equal(a, b)


@given(cases(documents=False))
@torch.no_grad()
def test_the_branches_step_in_place_as_well(case: Case) -> None:
    """Each behind a state of its own."""
    state = case.init_state()
    window, linear = (type(s)(*(x.clone() for x in s)) for s in state)
    for t in range(case.tensors["v"].shape[1]):
        given = case.step_arguments(t)
        near = {name: given[name] for name in ("v", "keep", "sinks", "mask")}
        far = {n: given[n] for n in ("q", "k", "v", "log_decay", "log_input", "feature_map", "skip", "mask")}
        q, k = given["rotated"]
        for step, arguments, held in (
            (window_attention_step, {"q": q, "k": k, **near}, window),
            (gated_linear_attention_step, far, linear),
        ):
            *expected, new = step(**arguments, state=held)  # type: ignore[operator]
            *output, same = step(**arguments, state=held, in_place=True)  # type: ignore[operator]
            assert same is held
            for a, b in zip((*output, *held), (*expected, *new), strict=True):
                assert torch.equal(a, b)


@given(st.integers(0, 2**16))
def test_joint_is_the_logarithm_of_a_sum(seed: int) -> None:
    """With branches that saw nothing: they add nothing, and their gradients are zero, not NaN."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    ys, masses = randn(2, 2, 5, 3, 4), 30 * randn(2, 2, 5, 3)
    masses = masses.masked_fill(torch.rand(masses.shape, generator=generator) < 0.3, float("-inf"))
    leaves = [x.requires_grad_() for x in (*ys, *masses)]
    y, log_mass = joint(list(zip(leaves[:2], leaves[2:], strict=True)))
    assert error(log_mass, torch.logaddexp(*masses)) <= 1e-12
    shares = (masses - torch.where(torch.isinf(log_mass), 0.0, log_mass)).exp()
    assert error(y, (shares[..., None] * ys).sum(0)) <= 1e-12
    finite = torch.isfinite(log_mass)
    (y.square().sum() + log_mass[finite].square().sum()).backward()
    for leaf, mass in zip(leaves, (*masses, *masses), strict=True):
        assert leaf.grad is not None and torch.isfinite(leaf.grad).all()
        assert (leaf.grad[torch.isinf(mass)] == 0).all()


def test_a_prompt_within_the_window_is_softmax_attention() -> None:
    """Disjoint branches: nothing is far yet."""
    q, k = torch.randn(2, 9, 4, 8).double(), torch.randn(2, 9, 2, 8).double()
    maps = FeatureMap(torch.eye(8)[None].double(), torch.eye(8)[None].double(), "softmax")
    y, log_mass, _ = hybrid_attention(q, k, k, rotated=(q, k), feature_map=maps, window=9, lag=9)
    near, near_mass, _ = window_attention(q, k, k, window=9)
    far, far_mass, _ = gated_linear_attention(q, k, k, feature_map=maps, lag=9)
    assert torch.equal(far_mass, torch.full_like(far_mass, float("-inf"))) and (far == 0).all()
    assert error(y, near) <= 1e-12 and error(log_mass, near_mass) <= 1e-12


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"window": 0}, "hybrid_attention: window must be at least 1"),
        ({"lag": -1}, "hybrid_attention: lag and skip"),
        ({"log_decay": torch.zeros(1, 5, 3)}, "log_decay is"),
        ({"log_scale": torch.zeros(1, 5, 2)}, r"log_scale is \[1, 5, 4\]"),
        ({"rotated": (torch.zeros(1, 5, 3, 4), torch.zeros(1, 5, 2, 4))}, "do not fit"),
        ({"mask": torch.ones(1, 5)}, "mask is a bool tensor"),
        ({"impl": "triton"}, "triton needs CUDA tensors, got cpu"),
    ],
)
def test_wrong_input_gets_one_clear_sentence(change: dict[str, Any], words: str) -> None:
    q, k = torch.zeros(1, 5, 4, 4), torch.zeros(1, 5, 2, 4)
    arguments = {"q": q, "k": k, "v": k, "rotated": (q, k), "window": 3, "lag": 3}
    with pytest.raises(LizardzooError, match=words):
        hybrid_attention(**{**arguments, **change})


def test_a_step_in_place_refuses_to_be_differentiated() -> None:
    state = init_window_state(1, 2, 4, 5, 0, torch.float32, "cpu")
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(LizardzooError, match=r"call it under torch\.no_grad\(\)"):
        window_attention_step(x, x, x, state, in_place=True)
