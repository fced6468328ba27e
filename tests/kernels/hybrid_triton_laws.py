"""Laws of fused hybrid attention under Triton's interpreter; `test_triton.py` runs them in another process.

The interpreter checks indices, masks and mathematics in fp32, not what a GPU makes of them. The linear branch's chunks
are of 4 slots, the window's tiles of 16.
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
from lizardzoo.kernels import FeatureMap, hybrid_attention
from lizardzoo.kernels.gated_linear import launch
from lizardzoo.kernels.hybrid import ops
from tests.kernels.cases import assert_same, poison
from tests.kernels.test_gated_linear import _memory
from tests.kernels.test_hybrid import Case, assert_same_state, cases

assert launch.INTERPRETED
# An example takes a second: no shrinking, which would take minutes. A failing example is printed with its seed.
PHASES = [phase for phase in Phase if phase not in (Phase.shrink, Phase.explain)]
TOLERANCE = 1e-4  # of fp32, with exp features in it


@pytest.fixture(autouse=True)
def _small_chunks_of_poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)
    monkeypatch.setattr(launch, "chunk_size", lambda *a: 4)


def in_fp32(case: Case) -> Case:
    """The same numbers, rounded, as leaves."""

    def narrow(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().float().requires_grad_()

    maps, sinks = case.options["feature_map"], case.options["sinks"]
    maps = FeatureMap(narrow(maps.query), narrow(maps.key), maps.activation)  # type: ignore[arg-type]
    options = {**case.options, "feature_map": maps, "sinks": narrow(sinks)}
    return Case({name: narrow(x) for name, x in case.tensors.items()}, options, case.flags)


def small_cases(**options: Any) -> st.SearchStrategy[Case]:
    return cases(**{"scales": (1.0, 4.0), "longest": 11, **options}).map(in_fp32)


def assert_equals_the_reference(case: Case) -> None:
    *ours, state = hybrid_attention(**case.arguments(), **case.options, impl="triton")
    *expected, expected_state = hybrid_attention(**case.arguments(), **case.options)
    assert_same(tuple(ours), tuple(expected), case.inputs(), TOLERANCE)
    assert state is not None and expected_state is not None
    assert_same_state(state, expected_state, TOLERANCE)


@settings(max_examples=6, phases=PHASES)
@given(small_cases())
def test_equals_the_reference_with_all_gradients(case: Case) -> None:
    assert_equals_the_reference(case)


def one_case(
    *,
    length: int = 9,
    dim: int = 5,
    features: int = 3,
    value_dim: int = 7,
    decay: int | None = 2,
    enter: int | None = 2,
    activation: Any = "softmax",
    shared: bool = False,
    log_scale: float | None = 0.0,
    sinks: float | None = None,
    flags: tuple[str, str] | None = None,
    **options: Any,
) -> Case:
    """4 query heads that share 2 keys; no size is a power of two, unless it is asked for.

    flags: mask and starts, a digit for each token.
    """

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape).requires_grad_()

    log_decay = None if decay is None else F.logsigmoid(torch.randn(1, length, decay) + 1).requires_grad_()
    tensors = {
        "q": randn(1, length, 4, dim),
        "k": randn(1, length, 2, dim),
        "v": randn(1, length, 2, value_dim),
        "log_decay": log_decay,
        "log_input": None if enter is None else randn(1, length, enter),
        "log_scale": None if log_scale is None else (torch.randn(1, length, 4) + log_scale).requires_grad_(),
    }
    if not shared:
        tensors |= {"near_q": randn(1, length, 4, dim), "near_k": randn(1, length, 2, dim)}
    given = {
        "feature_map": FeatureMap(randn(4, dim, features), randn(1, dim, features), activation),
        "sinks": None if sinks is None else torch.full((2,), sinks, requires_grad=True),
        "window": 3,
        "keep": 1,
        "lag": 3,
        "skip": 1,
        **options,
    }
    mask, starts = (None, None) if flags is None else ([torch.tensor([[d == "1" for d in x]]) for x in flags])
    return Case(tensors, given, {"mask": mask, "starts": starts})


@pytest.mark.parametrize(
    "change",
    [
        {"lag": 0, "skip": 0, "shared": True},
        {"shared": True, "decay": 4},  # one memory for each query head, whose gradients meet in shared values
        {"lag": 0, "skip": 0, "keep": 0, "activation": "exp", "decay": None, "enter": None, "log_scale": None},
        {"window": 40, "lag": 40},  # all that there is
        {"window": 1, "lag": 1, "keep": 0, "skip": 0, "value_dim": 20, "dim": 17, "features": 18},
        {"length": 1},
        {"log_scale": -20.0, "sinks": 20.0},
        {"log_scale": 20.0, "sinks": float("-inf")},
        {"length": 13, "window": 2, "lag": 2, "flags": ("1101111101110", "0000100000100")},
        {"length": 13, "lag": 0, "skip": 0, "activation": "exp", "flags": ("0111111110111", "0010001000100")},
    ],
    ids=str,
)
def test_each_way_to_put_the_branches_together(change: dict[str, Any]) -> None:
    assert_equals_the_reference(one_case(**change))


@settings(max_examples=5, phases=PHASES)
@given(small_cases(), st.data())
def test_each_implementation_goes_on_from_the_others_state(case: Case, data: st.DataObject) -> None:
    *whole, last = hybrid_attention(**case.arguments(), **case.options)
    length = whole[0].shape[1]
    edges = sorted({0, *data.draw(st.sets(st.integers(1, length), max_size=2)), length})
    first = data.draw(st.sampled_from([0, 1]))
    outputs, state = [], None
    for n, (start, end) in enumerate(itertools.pairwise(edges)):
        impl = ["triton", "reference"][(n + first) % 2]
        *output, state = hybrid_attention(**case.arguments(start, end), **case.options, state=state, impl=impl)
        outputs.append(output)
    pieces = [torch.cat(part, 1) for part in zip(*outputs, strict=True)]
    assert_same((pieces[0], pieces[1]), (whole[0], whole[1]), case.inputs(), TOLERANCE)
    assert state is not None and last is not None
    assert_same_state(state, last, TOLERANCE)
    assert_same(_memory(state.linear), _memory(last.linear), case.inputs(), TOLERANCE)


@settings(max_examples=3, phases=PHASES)
@given(small_cases(), st.data())
def test_splitting_a_sequence_changes_nothing(case: Case, data: st.DataObject) -> None:
    """By Triton alone, down to single tokens with gradients: those of the pieces come through the states."""
    length = case.tensors["v"].shape[1]  # type: ignore[union-attr]
    edges = sorted({0, *data.draw(st.sets(st.integers(1, length), max_size=3)), length})
    *whole, last = hybrid_attention(**case.arguments(), **case.options)
    outputs, state = [], None
    for start, end in itertools.pairwise(edges):
        *output, state = hybrid_attention(**case.arguments(start, end), **case.options, state=state, impl="triton")
        outputs.append(output)
    pieces = [torch.cat(part, 1) for part in zip(*outputs, strict=True)]
    assert_same((pieces[0], pieces[1]), (whole[0], whole[1]), case.inputs(), TOLERANCE)
    assert state is not None and last is not None
    assert_same_state(state, last, TOLERANCE)


def test_padding_with_nan_in_it_changes_nothing() -> None:
    case = one_case(length=9)
    mask = torch.tensor([[False, True, True, False, True, True, True, True, False]])
    alone = Case({n: x if x is None else x[:, mask[0]] for n, x in case.tensors.items()}, case.options, case.flags)
    holes = {
        n: x if x is None else torch.where(mask.view(mask.shape + (1,) * (x.ndim - 2)), x, float("nan"))
        for n, x in case.tensors.items()
    }
    padded = Case(holes, case.options, {"mask": mask, "starts": None})
    y, log_mass, _ = hybrid_attention(**padded.arguments(), **case.options, impl="triton")
    assert (y[~mask] == 0).all() and (log_mass[~mask] == float("-inf")).all()
    expected = hybrid_attention(**alone.arguments(), **case.options)
    assert_same((y[mask][None], log_mass[mask][None]), expected[:2], case.inputs(), TOLERANCE)


def test_rows_of_padding_alone_give_nothing() -> None:
    case = one_case(length=5)
    arguments = {**case.arguments(), "mask": torch.zeros(1, 5, dtype=torch.bool)}
    y, log_mass, _ = hybrid_attention(**arguments, **case.options, impl="triton")
    assert (y == 0).all() and (log_mass == float("-inf")).all()
    found = torch.autograd.grad(y.sum() + log_mass.exp().sum(), case.inputs(), allow_unused=True)
    assert all(g is None or (g == 0).all() for g in found)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("decay", [2, 4])
@pytest.mark.parametrize(
    "frozen",
    [("q", "k", "v", "near_q", "near_k"), ("q",), ("k", "near_q", "near_k"), ("v", "near_q", "near_k")],
    ids=str,
)
def test_what_is_frozen_changes_no_other_gradient(frozen: tuple[str, ...], shared: bool, decay: int) -> None:
    """Stage 1 trains gates and maps alone, and leaves out the work for q, k and v."""
    case = one_case(length=13, sinks=0.5, decay=decay, shared=shared)
    for name in frozen:
        if name in case.tensors:
            case.tensors[name].requires_grad_(False)
    inputs = [x for x in case.inputs() if x.requires_grad]
    ours, expected = (
        hybrid_attention(**case.arguments(), **case.options, impl=impl, return_state=False)[:2]
        for impl in ("triton", "reference")
    )
    assert_same(ours, expected, inputs, TOLERANCE)


def recorded(case: Case, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Any, ...]:
    """What the operator is called with."""
    calls: list[Any] = []
    original = ops.hybrid

    def record(*arguments: Any) -> Any:
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(ops, "hybrid", record)
    hybrid_attention(**{**case.arguments(), **case.options, **options}, impl="triton")
    monkeypatch.setattr(ops, "hybrid", original)
    return tuple(x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in calls[0])


@pytest.mark.parametrize("goes_on", [False, True])
def test_the_operators_keep_what_torch_asks_of_them(goes_on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schemas, fake tensors and gradients, as torch.compile relies on them."""
    case = one_case(length=6, sinks=0.5, shared=not goes_on)
    options: dict[str, Any] = {"starts": torch.tensor([[0, 0, 0, 1, 0, 0]]) > 0, "mask": torch.arange(6)[None] < 5}
    if goes_on:
        *_, state = hybrid_attention(**case.arguments(0, 5), **case.options)
        assert state is not None
        state = state._replace(linear=state.linear._replace(scale=state.linear.scale.clamp(min=-9.0)))
        options = {"state": state}
    arguments = recorded(case, monkeypatch, **options)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.operator, arguments, test_utils=tests)
    y, log_mass, kv, norm, scale, *saved = (x.detach() for x in ops.operator(*arguments))
    outputs = (saved, y, log_mass, y, torch.zeros_like(log_mass), kv, norm, scale)
    tests = ("test_schema", "test_faketensor")
    for wanted in ([True] * 14, [False] * 3 + [True] * 6 + [False] * 3 + [True] * 2):
        torch.library.opcheck(ops.backward_operator, (*arguments, *outputs, wanted), test_utils=tests)


@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_compiled_for_any_length_it_is_the_same_function() -> None:
    example = one_case()

    def attend(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        *inputs, query, key = tensors
        case = Case(dict(zip(example.tensors, inputs, strict=True)), example.options, example.flags)
        options = {**example.options, "feature_map": FeatureMap(query, key, "softmax")}
        return hybrid_attention(**case.arguments(), **options, return_state=False, impl="triton")[:2]

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._functorch.config.patch(donated_buffer=False):  # `assert_same` keeps the graph
        for length in (5, 9):
            inputs = one_case(length=length).inputs()
            assert_same(compiled(*inputs), attend(*inputs), inputs, 1e-6)


@pytest.mark.parametrize(
    ("dtype", "size", "words"), [(torch.float64, 16, "got torch.float64"), (torch.float32, 272, "got 272, 272")]
)
def test_what_triton_does_not_do_is_one_clear_error(dtype: torch.dtype, size: int, words: str) -> None:
    x = torch.zeros(1, 3, 1, size, dtype=dtype)
    with pytest.raises(LizardzooError, match=f"^hybrid_attention: .*{words}"):
        hybrid_attention(x, x, x, rotated=(x, x), window=2, lag=2, impl="triton")
