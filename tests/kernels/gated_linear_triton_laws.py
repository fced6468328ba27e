"""Laws of the Triton kernels of gated linear attention under Triton's interpreter; `test_triton.py` runs
them in another process.

The interpreter checks indices, masks and mathematics in fp32, not what a GPU makes of them. Chunks are of 4 slots, so
that short sequences cross many borders.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lizardzoo import LizardzooError
from lizardzoo.kernels import FeatureMap, gated_linear_attention, gated_linear_attention_step
from lizardzoo.kernels.gated_linear import init_state, launch, ops
from tests.kernels.cases import assert_same, assert_same_tokens, error, poison
from tests.kernels.test_gated_linear import Case, _memory, cases

assert launch.INTERPRETED
# An example takes a second: no shrinking, which would take minutes.
PHASES = [phase for phase in Phase if phase not in (Phase.shrink, Phase.explain)]
TOLERANCE = 1e-4  # of fp32, with exp features in it
SIZES = ((4, 2, 3), (5, 3, 7), (3, 20, 1), (20, 17, 18), (16, 16, 16))  # blocks of 16 and 32, full and not


@pytest.fixture(autouse=True)
def _small_chunks_of_poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)
    monkeypatch.setattr(launch, "chunk_size", lambda *a: 4)


def in_fp32(case: Case) -> Case:
    """The same numbers, rounded, as leaves."""

    def narrow(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().float().requires_grad_()

    maps = case.options["feature_map"]
    maps = FeatureMap(narrow(maps.query), narrow(maps.key), maps.activation)
    return Case({n: narrow(x) for n, x in case.tensors.items()}, {**case.options, "feature_map": maps}, case.flags)


def small_cases(**options: Any) -> st.SearchStrategy[Case]:
    return cases(**{"scales": (1.0, 4.0), "sizes": SIZES, **options}).map(in_fp32)


@settings(max_examples=8, phases=PHASES)
@given(small_cases())
def test_equals_the_reference_with_all_gradients(case: Case) -> None:
    *ours, _ = gated_linear_attention(**case.tensors, **case.options, **case.flags, impl="triton")
    *expected, _ = gated_linear_attention(**case.tensors, **case.options, **case.flags)
    assert_same(tuple(ours), tuple(expected), case.inputs(), TOLERANCE)


def one_case(*, length: int = 9, decay: int | None = 1, enter: int | None = 1, activation: Any = "softmax") -> Case:
    """4 query heads that share 2 keys."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape).requires_grad_()

    log_decay = None if decay is None else F.logsigmoid(torch.randn(1, length, decay) + 1).requires_grad_()
    tensors = {
        "q": randn(1, length, 4, 5),
        "k": randn(1, length, 2, 5),
        "v": randn(1, length, 2, 3),
        "log_decay": log_decay,
        "log_input": None if enter is None else randn(1, length, enter),
    }
    return Case(tensors, {"feature_map": FeatureMap(randn(4, 5, 6), randn(1, 5, 6), activation)}, {})


@pytest.mark.parametrize(
    ("lag", "skip", "activation"),
    [
        (0, 0, "exp"),
        (0, 3, "softmax"),
        (1, 0, "exp"),
        (3, 1, "softmax"),
        (6, 2, "exp"),
        (9, 0, "softmax"),
        (40, 2, "exp"),
    ],
)
def test_each_lag_and_skip(lag: int, skip: int, activation: str) -> None:
    """Within a chunk, at its border, over several, up to the sequence's length and beyond."""
    case = one_case(activation=activation)
    options = {**case.options, "lag": lag, "skip": skip}
    *ours, _ = gated_linear_attention(**case.tensors, **options, impl="triton")
    *expected, _ = gated_linear_attention(**case.tensors, **options)
    assert_same(tuple(ours), tuple(expected), case.inputs(), TOLERANCE)


def test_second_derivatives_are_refused() -> None:
    """The kernels of the backward have no gradients: better none than a part of them."""
    tensors = one_case().tensors
    y, *_ = gated_linear_attention(**tensors, **one_case().options, impl="triton")
    (slope,) = torch.autograd.grad(y.square().sum(), tensors["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.parametrize(("decay", "enter"), [(None, None), (1, None), (None, 2), (2, 4), (4, 1)])
def test_each_sharing_of_gates(decay: int | None, enter: int | None) -> None:
    case = one_case(decay=decay, enter=enter)
    options = {**case.options, "lag": 2, "skip": 1}
    *ours, _ = gated_linear_attention(**case.tensors, **options, impl="triton")
    *expected, _ = gated_linear_attention(**case.tensors, **options)
    assert_same(tuple(ours), tuple(expected), case.inputs(), TOLERANCE)


@settings(max_examples=4, phases=PHASES)
@given(small_cases(), st.data())
def test_each_implementation_goes_on_from_the_others_state(case: Case, data: st.DataObject) -> None:
    length = case.tensors["q"].shape[1]
    y, log_mass, whole = gated_linear_attention(**case.tensors, **case.options, **case.flags)
    edges = sorted({0, *data.draw(st.sets(st.integers(1, length), max_size=2)), length})
    first = data.draw(st.sampled_from([0, 1]))
    outputs, state = [], None
    for n, (start, end) in enumerate(itertools.pairwise(edges)):
        impl = ["triton", "reference"][(n + first) % 2]
        *output, state = gated_linear_attention(**case.piece(start, end), **case.options, state=state, impl=impl)
        outputs.append(output)
    pieces = [torch.cat(part, 1) for part in zip(*outputs, strict=True)]
    assert_same((pieces[0], pieces[1]), (y, log_mass), case.inputs(), TOLERANCE)
    assert state is not None and whole is not None
    assert_same_tokens(state, whole)
    assert_same(_memory(state), _memory(whole), case.inputs(), TOLERANCE)


@settings(max_examples=5, phases=PHASES)
@given(small_cases())
def test_gradients_come_through_the_memory(case: Case) -> None:
    """In and out, by Triton alone: of the outputs and the last memory, for all inputs and the first memory."""
    length = case.tensors["q"].shape[1]
    *_, before = gated_linear_attention(**case.piece(0, (length + 1) // 2), **case.options)
    leaves = [x.detach().requires_grad_() for x in before[:2]]
    state = type(before)(*leaves, *(x.detach() for x in before[2:]))
    piece = case.piece(length // 2, length)
    found = [
        gated_linear_attention(**piece, **case.options, state=state, impl=impl) for impl in ("triton", "reference")
    ]
    # a memory of which nothing is left passes no gradient in one, and a zero one in the other: `gradients` takes both
    for ours, expected in (found[0][:2], found[1][:2]), (_memory(found[0][2]), _memory(found[1][2])):
        assert_same(ours, expected, [*case.inputs(), *leaves], TOLERANCE)


@settings(max_examples=6, phases=PHASES)
@given(small_cases(documents=False))
@torch.no_grad()
def test_a_step_is_the_references_step(case: Case) -> None:
    q, k, v, decay, enter = (case.tensors[name] for name in ("q", "k", "v", "log_decay", "log_input"))
    maps = case.options["feature_map"]
    gates = [0 if gate is None else gate.shape[2] for gate in (decay, enter)]
    state = init_state(
        q.shape[0], q.shape[2], k.shape[2], k.shape[3], 2 * maps.key.shape[2], case.options["lag"], *gates,
        torch.float32, "cpu",
    )  # fmt: skip
    state = state._replace(
        v=state.v.new_zeros(*state.v.shape[:3], v.shape[3]), kv=state.kv.new_zeros(*state.kv.shape[:3], v.shape[3])
    )
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


@settings(max_examples=3, phases=PHASES)
@given(small_cases())
def test_log_features_may_come_from_outside(case: Case) -> None:
    options = {**case.options, "feature_map": None}
    inputs = [x for x in case.tensors.values() if x is not None]
    *ours, _ = gated_linear_attention(**case.tensors, **options, **case.flags, impl="triton")
    *expected, _ = gated_linear_attention(**case.tensors, **options, **case.flags)
    assert_same(tuple(ours), tuple(expected), inputs, TOLERANCE)


def test_views_and_narrow_inputs_give_what_copies_in_fp32_give() -> None:
    """Heads before tokens, as transformers has them, every second token of a longer tensor, values turned."""
    case = one_case(length=9)
    arguments = {**case.tensors, **case.options, "lag": 2, "impl": "triton"}
    for dtype in (torch.bfloat16, torch.float16):
        narrow = {name: case.tensors[name].detach().to(dtype) for name in ("q", "k", "v")}
        narrow = {n: x.transpose(1, 2).repeat_interleave(2, 2)[:, :, ::2].transpose(1, 2) for n, x in narrow.items()}
        narrow["v"] = narrow["v"].transpose(2, 3).contiguous().transpose(2, 3)
        leaves = {n: x.requires_grad_() for n, x in narrow.items()}
        wide = {n: x.detach().float().requires_grad_() for n, x in narrow.items()}
        y, log_mass, _ = gated_linear_attention(**{**arguments, **leaves})
        expected = gated_linear_attention(**{**arguments, **wide})
        assert y.dtype == dtype and log_mass.dtype == torch.float32
        assert error(log_mass, expected[1]) <= 1e-6
        assert error(y.float(), expected[0]) <= torch.finfo(dtype).eps  # the interpreter cuts bits off
        found = torch.autograd.grad(y.float().square().sum() + log_mass.sum(), list(leaves.values()))
        plain = torch.autograd.grad(expected[0].square().sum() + expected[1].sum(), list(wide.values()))
        for a, b in zip(found, plain, strict=True):
            assert a.dtype == dtype and error(a.float(), b) <= 3 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("dtype", "size", "words"), [(torch.float64, 16, "got torch.float64"), (torch.float32, 272, "got 272, 272")]
)
def test_what_triton_does_not_do_is_one_clear_error(dtype: torch.dtype, size: int, words: str) -> None:
    x = torch.zeros(1, 3, 1, size, dtype=dtype)
    with pytest.raises(LizardzooError, match=words):
        gated_linear_attention(x, x, x, impl="triton")


@pytest.mark.parametrize("activation", ["softmax", "none"])
def test_the_operators_have_sound_schemas_and_fakes(activation: str) -> None:
    """What torch.compile needs: fake outputs like the real ones, gradients registered."""
    q, k, v = (torch.randn(1, 5, heads, 4, requires_grad=True) for heads in (2, 1, 1))
    decay, weight = (-torch.rand(1, 5, 1)).requires_grad_(), torch.zeros(1, 5, 1, requires_grad=True)
    mapped = activation != "none"
    maps = [torch.randn(1, 4, 8, requires_grad=True) for _ in range(2)] if mapped else [None] * 2
    document = torch.tensor([[0, 0, 0, 1, 1]], dtype=torch.int32)
    features = 16 if mapped else 4
    memory = [torch.rand(1, 1, features, 4), torch.rand(1, 1, features), torch.zeros(1, 1, features)]
    arguments = (q, k, v, decay, weight, None, document, *maps, *memory, activation, 0, 0, 0)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.operator, arguments, test_utils=tests)
    y, log_mass, kv, norm, scale, *saved = (x.detach() for x in ops.operator(*arguments))
    outputs = (saved, y, log_mass, y, log_mass, kv, norm, scale)
    for wanted in ([True] * 9, [False] * 3 + [True] * 6):
        given = (*arguments, *outputs, wanted)
        torch.library.opcheck(ops.backward_operator, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_compiled_for_any_length_it_is_the_same_function() -> None:
    def branch(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, decay, enter, query, key = tensors
        return gated_linear_attention(
            q, k, v, decay, log_input=enter, feature_map=FeatureMap(query, key, "softmax"), lag=2, return_state=False,
            impl="triton",
        )[:2]  # fmt: skip

    compiled = torch.compile(branch, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._functorch.config.patch(donated_buffer=False):  # `assert_same` keeps the graph
        for length in (5, 9):
            inputs = one_case(length=length).inputs()
            assert_same(compiled(*inputs), branch(*inputs), inputs, 1e-6)
