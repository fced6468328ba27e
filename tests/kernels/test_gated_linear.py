"""Gated linear attention against its literal float64 oracle."""

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
from lizardzoo.kernels import FeatureMap, gated_linear_attention, gated_linear_attention_step
from lizardzoo.kernels.gated_linear import init_state, reference
from lizardzoo.testing import gated_linear_oracle, token_flags
from tests.kernels.cases import assert_same, assert_same_tokens, error, saved_bytes


class Case(NamedTuple):
    tensors: dict[str, Tensor | None]  # q, k, v, log_decay, log_input
    options: dict[str, Any]  # feature_map, lag, skip
    flags: dict[str, Tensor | None]  # mask, starts

    def inputs(self) -> list[Tensor]:
        maps = self.options["feature_map"]
        return [x for x in self.tensors.values() if x is not None] + [maps.query, maps.key]

    def piece(self, start: int, end: int) -> dict[str, Tensor | None]:
        return {name: None if x is None else x[:, start:end] for name, x in {**self.tensors, **self.flags}.items()}


@st.composite
def cases(
    draw: st.DrawFn,
    documents: bool = True,
    scales: tuple[float, ...] = (1.0, 1.0, 30.0),
    sizes: tuple[tuple[int, int, int], ...] = ((4, 2, 3), (4, 4, 3)),
) -> Case:
    """sizes: of a head, of a half's features and of a value."""
    batch, length = draw(st.integers(1, 2)), draw(st.integers(1, 13))
    kv_heads, groups = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 3]))
    heads, (dim, features, value_dim) = kv_heads * groups, draw(st.sampled_from(sizes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    scale = draw(st.sampled_from(scales))

    def randn(*shape: int, factor: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * factor).requires_grad_()

    gate_heads = st.sampled_from([None, 1, kv_heads, heads])
    decay, enter = draw(gate_heads), draw(gate_heads)
    regime = draw(st.sampled_from([-6.0, 0.0, 6.0]))  # gates near 0, in between, near 1
    log_decay = None if decay is None else F.logsigmoid(randn(batch, length, decay).detach() + regime).requires_grad_()
    maps = FeatureMap(
        randn(draw(st.sampled_from([1, heads])), dim, features, factor=scale),
        randn(draw(st.sampled_from([1, kv_heads])), dim, features, factor=scale),
        draw(st.sampled_from(["softmax", "exp"])),
    )
    flags = draw(token_flags(batch, length, documents=documents))
    return Case(
        {
            "q": randn(batch, length, heads, dim),
            "k": randn(batch, length, kv_heads, dim),
            "v": randn(batch, length, kv_heads, value_dim),
            "log_decay": log_decay,
            "log_input": None if enter is None else randn(batch, length, enter),
        },
        {
            "feature_map": maps,
            "lag": draw(st.sampled_from([0, 1, 3, 6])),
            "skip": draw(st.sampled_from([0, 1, 2])),
        },
        {"mask": flags.mask, "starts": flags.starts},
    )


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short sequences must cross many chunk borders."""
    monkeypatch.setattr(reference, "CHUNK", 4)


@given(cases())
def test_equals_the_oracle_with_all_gradients(case: Case) -> None:
    y, log_mass, _ = gated_linear_attention(**case.tensors, **case.options, **case.flags)
    expected = gated_linear_oracle(**case.tensors, **case.options, **case.flags)
    assert_same((y, log_mass), expected, case.inputs(), 1e-10)


@given(cases(), st.data())
def test_splitting_a_sequence_changes_nothing(case: Case, data: st.DataObject) -> None:
    length = case.tensors["q"].shape[1]
    y, log_mass, whole = gated_linear_attention(**case.tensors, **case.options, **case.flags)
    edges = [0, *sorted(data.draw(st.sets(st.integers(1, length)))), length]
    outputs, state = [], None
    for start, end in itertools.pairwise(edges):
        if end > start:
            *output, state = gated_linear_attention(**case.piece(start, end), **case.options, state=state)
            outputs.append(output)
    pieces = [torch.cat(part, 1) for part in zip(*outputs, strict=True)]
    assert_same((pieces[0], pieces[1]), (y, log_mass), case.inputs(), 1e-10)
    assert state is not None and whole is not None
    assert_same_tokens(state, whole)
    assert_same(_memory(state), _memory(whole), case.inputs(), 1e-10)


def _memory(state: Any) -> tuple[Tensor, Tensor]:
    scale = state.scale.exp()
    return state.kv * scale[..., None], state.norm * scale


@given(cases(documents=False, scales=(1.0,)))
def test_the_memory_is_the_sum_it_stands_for(case: Case) -> None:
    """kv = sum_t phi(k_t) v_t^T exp(L_T - L_t + a_t), over the tokens that are `lag` steps old and not skipped."""
    *_, state = gated_linear_attention(**case.tensors, **case.options, **case.flags)
    assert state is not None
    k, v, decay, enter = (case.tensors[name] for name in ("k", "v", "log_decay", "log_input"))
    maps, heads = case.options["feature_map"], state.kv.shape[1]
    mask = torch.ones(k.shape[:2], dtype=torch.bool) if case.flags["mask"] is None else case.flags["mask"]
    for row in range(k.shape[0]):
        real = mask[row].nonzero().flatten().tolist()
        for head in range(heads):
            kv_head = head * k.shape[2] // heads
            expected = torch.zeros_like(state.kv[0, 0])
            for rank, t in enumerate(real[: max(len(real) - case.options["lag"], 0)]):
                if rank < case.options["skip"]:
                    continue
                logits = k[row, t, kv_head] @ maps.key[min(kv_head, maps.key.shape[0] - 1)]
                halves = [logits, -logits]
                if maps.activation == "softmax":
                    halves = [half.log_softmax(0) for half in halves]
                weight = torch.zeros((), dtype=torch.float64)
                if decay is not None:
                    weight = weight + decay[row, real[rank + 1 :], head * decay.shape[2] // heads].sum()
                if enter is not None:
                    weight = weight + enter[row, t, head * enter.shape[2] // heads]
                expected = expected + torch.outer((torch.cat(halves) + weight).exp(), v[row, t, kv_head])
            assert error(_memory(state)[0][row, head], expected) < 1e-10


@given(cases(documents=False))
def test_a_fold_of_steps_is_the_whole(case: Case) -> None:
    y, log_mass, _ = gated_linear_attention(**case.tensors, **case.options, mask=case.flags["mask"])
    q, k, decay, enter = (case.tensors[name] for name in ("q", "k", "log_decay", "log_input"))
    maps = case.options["feature_map"]
    gates = [0 if gate is None else gate.shape[2] for gate in (decay, enter)]
    state = init_state(
        q.shape[0],
        q.shape[2],
        k.shape[2],
        4,
        2 * maps.key.shape[2],
        case.options["lag"],
        *gates,
        torch.float64,
        "cpu",
    )
    state = state._replace(v=state.v[..., :3], kv=state.kv[..., :3])
    outputs = []
    for t in range(q.shape[1]):
        piece = case.piece(t, t + 1)
        piece.pop("starts")
        *output, state = gated_linear_attention_step(**piece, state=state, feature_map=maps, skip=case.options["skip"])
        outputs.append(output)
    steps = [torch.cat(part, 1) for part in zip(*outputs, strict=True)]
    assert_same((steps[0], steps[1]), (y, log_mass), case.inputs(), 1e-10)


@given(st.integers(1, 40), st.integers(0, 2**16))
def test_without_decay_it_is_plain_linear_attention(length: int, seed: int) -> None:
    torch.manual_seed(seed)
    log_q, log_k = torch.randn(2, length, 4, 6).double(), torch.randn(2, length, 2, 6).double()
    v = torch.randn(2, length, 2, 3).double()
    y, log_mass, _ = gated_linear_attention(log_q, log_k, v, torch.zeros(2, length, 1).double())
    weights = torch.einsum("bihf,bthf->bhit", log_q.exp(), log_k.exp().repeat_interleave(2, 2)).tril()
    values = torch.einsum("bhit,bthd->bihd", weights, v.repeat_interleave(2, 2))
    mass = weights.sum(-1).transpose(1, 2)
    assert error(y, values / mass[..., None]) < 1e-12
    assert error(log_mass, mass.log()) < 1e-12


@given(cases(scales=(30.0,)))
def test_exp_features_survive_logits_of_80_in_fp32(case: Case) -> None:
    """Logits are scaled to reach +-80 on both sides; the error stays that of fp32 numbers of that size."""
    maps = case.options["feature_map"]._replace(activation="exp")
    tensors = dict(case.tensors)
    for side, weight in (("q", maps.query), ("k", maps.key)):
        x = tensors[side]
        logits = torch.einsum("bthd,hdf->bthf", x, weight.expand(x.shape[2], -1, -1))
        tensors[side] = x * (80 / logits.abs().max())
    options = {**case.options, "feature_map": maps}
    exact = gated_linear_oracle(**tensors, **options, **case.flags)
    narrow = {name: None if x is None else x.detach().float().requires_grad_() for name, x in tensors.items()}
    query, key = maps.query.detach().float().requires_grad_(), maps.key.detach().float().requires_grad_()
    options["feature_map"] = FeatureMap(query, key, "exp")
    y, log_mass, _ = gated_linear_attention(**narrow, **options, **case.flags)
    finite = torch.isfinite(exact[1])
    assert torch.equal(torch.isfinite(log_mass), finite)
    assert (log_mass - exact[1])[finite].abs().sum() <= 1e-4 * max(1, finite.sum())
    assert (y - exact[0]).abs().max() <= 1e-3
    (y.sum() + log_mass[finite].sum()).backward() if finite.any() else None
    assert all(x.grad is None or torch.isfinite(x.grad).all() for x in (*narrow.values(), query, key) if x is not None)


@given(cases(scales=(1.0,)))
def test_fp32_errs_at_most_twice_as_much_as_plain_fp32(case: Case) -> None:
    maps = case.options["feature_map"]
    options = {
        **case.options,
        "feature_map": FeatureMap(maps.query.float(), maps.key.float(), maps.activation),
    }
    narrow = {name: None if x is None else x.float() for name, x in case.tensors.items()}
    exact = gated_linear_oracle(**case.tensors, **case.options, **case.flags)
    plain = gated_linear_oracle(**narrow, **options, **case.flags)
    ours = gated_linear_attention(**narrow, **options, **case.flags)
    for a, b, c in zip(ours[:2], plain, exact, strict=True):
        assert error(a.double(), c) <= 2 * error(b.double(), c) + 4e-7


def test_memory_is_linear_in_the_length() -> None:
    maps = FeatureMap(torch.eye(8)[None], torch.eye(8)[None], "softmax")

    def cost(length: int) -> int:
        q = torch.randn(1, length, 3, 8, requires_grad=True)
        decay = torch.full((1, length, 1), -0.1)
        return saved_bytes(
            lambda: gated_linear_attention(q, q[:, :, :1], q[:, :, :1], decay, feature_map=maps, lag=8)[0]
        )

    assert cost(1024) - cost(512) <= 1.05 * 2 * (cost(512) - cost(256))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"log_decay": torch.zeros(1, 5, 3)}, "log_decay is"),
        ({"log_input": torch.zeros(1, 4, 1)}, "log_input is"),
        ({"lag": -1}, "lag and skip"),
        (
            {"feature_map": FeatureMap(torch.zeros(1, 3, 2), torch.zeros(1, 4, 2), "softmax")},
            "query feature map",
        ),
        (
            {"feature_map": FeatureMap(torch.zeros(1, 4, 2), torch.zeros(3, 4, 2), "softmax")},
            "key feature map",
        ),
        ({"feature_map": FeatureMap(torch.zeros(1, 4, 2), torch.zeros(1, 4, 2), "relu")}, "activation"),  # type: ignore[arg-type]
        ({"starts": torch.zeros(2, 5, dtype=torch.bool)}, "starts is a bool tensor"),
        (
            {"lag": 2, "state": init_state(1, 4, 2, 4, 4, 3, 0, 0, torch.float32, "cpu")},
            "start from a new state",
        ),
    ],
)
def test_wrong_input_gets_one_clear_sentence(change: dict[str, Any], words: str) -> None:
    arguments = {"q": torch.zeros(1, 5, 4, 4), "k": torch.zeros(1, 5, 2, 4), "v": torch.zeros(1, 5, 2, 4)}
    with pytest.raises(LizardzooError, match=words):
        gated_linear_attention(**{**arguments, **change})
