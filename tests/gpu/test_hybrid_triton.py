"""Fused hybrid attention on the device, at its real tile sizes: outputs, gradients, states, and the mixer around it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lizardzoo.kernels import FeatureMap, gated_linear_attention, hybrid_attention, window_attention
from tests.gpu import plain
from tests.kernels.cases import poison

pytestmark = pytest.mark.gpu
LENGTHS = [1, 63, 64, 65, 127, 500, 2048, 4097]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FLOOR = {torch.bfloat16: 2e-3, torch.float16: 3e-4, torch.float32: 3e-6}  # a quarter of the dtype's step, or a few
GATES = ("log_decay", "log_input", "log_scale")


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:  # not the fixture: hypothesis refuses those of one test
        poison(patch)
        yield


class Inputs(NamedTuple):
    """near_q, near_k None: the window takes q and k as well."""

    q: Tensor
    k: Tensor
    v: Tensor
    near_q: Tensor | None
    near_k: Tensor | None
    log_decay: Tensor | None
    log_input: Tensor | None
    log_scale: Tensor | None
    query: Tensor
    key: Tensor
    sinks: Tensor | None = None

    def each(self, dtype: torch.dtype) -> Inputs:
        """In a dtype, as leaves; gates, maps and sinks, which parameters make, in fp32 at least."""
        wide = torch.promote_types(dtype, torch.float32)
        dtypes = [dtype] * 5 + [wide] * 6
        return Inputs(*(None if x is None else x.to(d).detach().requires_grad_() for x, d in zip(self, dtypes)))  # type: ignore[arg-type]

    def leaves(self) -> list[Tensor]:
        return [x for x in self if x is not None]

    def arguments(self, activation: Any = "softmax", start: int = 0, end: int | None = None) -> dict[str, Any]:
        """Of the tokens start .. end-1."""
        tokens = {name: getattr(self, name) for name in self._fields[:8]}
        tokens = {name: None if x is None else x[:, start:end] for name, x in tokens.items()}
        near_q, near_k = tokens.pop("near_q"), tokens.pop("near_k")
        rotated = (tokens["q"], tokens["k"]) if near_q is None else (near_q, near_k)
        maps = FeatureMap(self.query, self.key, activation)
        return {**tokens, "rotated": rotated, "feature_map": maps, "sinks": self.sinks}


def draw(
    length: int,
    *,
    batch: int = 0,
    heads: int = 6,
    kv_heads: int = 2,
    dim: int = 64,
    features: int | None = None,
    decay: int | None = 2,
    enter: int | None = 2,
    gate: float = 4.0,
    size: float = 1.0,
    log_scale: float | None = 0.0,
    sinks: float | None = None,
    shared: bool = False,
) -> Inputs:
    """Numbers that every dtype of DTYPES holds exactly enough: the same inputs for all.

    gate: the decay's logit; size: of queries and keys.
    """
    batch = batch or (2 if length <= 2048 else 1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda")

    counts = (heads, kv_heads, kv_heads, heads, kv_heads)
    q, k, v, near_q, near_k = (randn(batch, length, n, dim).bfloat16().float() for n in counts)
    q, k, near_q, near_k = (x * size for x in (q, k, near_q, near_k))
    shape = (dim, features or dim)
    query, key = ((torch.eye(*shape, device="cuda") + 0.05 * randn(n, *shape)) for n in (heads, kv_heads))
    return Inputs(
        q,
        k,
        v,
        None if shared else near_q,
        None if shared else near_k,
        None if decay is None else F.logsigmoid(randn(batch, length, decay) + gate),
        None if enter is None else randn(batch, length, enter),
        None if log_scale is None else randn(batch, length, heads) + log_scale,
        query,
        key,
        None if sinks is None else torch.full((2,), sinks, device="cuda"),
    )


def balanced(inputs: Inputs, options: dict[str, Any]) -> Inputs:
    """With a log-scale at which both branches count: softmax features alone are a hundredth of the window's mass."""
    given = {**inputs.each(torch.float32).arguments(options.get("activation", "softmax")), **options}
    near = {name: given[name] for name in ("window", "keep", "mask", "starts") if name in given}
    far = {name: given[name] for name in ("log_input", "feature_map", "lag", "skip", "mask", "starts") if name in given}
    with torch.no_grad():
        _, near_mass, _ = window_attention(*given["rotated"], given["v"], **near, impl="reference")
        _, far_mass, _ = gated_linear_attention(
            given["q"], given["k"], given["v"], given["log_decay"], **far, impl="reference"
        )
    both = torch.isfinite(far_mass) & torch.isfinite(near_mass)
    if inputs.log_scale is None or not both.any():
        return inputs
    return inputs._replace(log_scale=inputs.log_scale + (near_mass - far_mass)[both].median())


def flags(length: int, batch: int = 2) -> dict[str, Tensor]:
    """A fifth of the tokens is padding, every hundredth begins a document; the second row is padding alone."""
    mask = torch.rand(batch, length, device="cuda") < 0.8
    mask[1:2] = False
    return {"mask": mask, "starts": torch.rand(batch, length, device="cuda") < 0.01}


def gradients(y: Tensor, log_mass: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """y, log_mass (finite part, and which are) and the gradients of a fixed function of both, in float64."""
    generator = torch.Generator("cuda").manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, device="cuda").bfloat16() for x in (y, log_mass)]
    finite = torch.isfinite(log_mass)
    log_mass = log_mass.masked_fill(~finite, 0.0)
    loss = (y.double() * weights[0]).sum() + (log_mass.double() * weights[1]).sum()
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    found = [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves)]
    return [x.detach().double() for x in (y, log_mass, finite, *found)]


def results(inputs: Inputs, impl: str, activation: str = "softmax", **options: Any) -> list[Tensor]:
    y, log_mass, _ = hybrid_attention(**inputs.arguments(activation), **options, impl=impl)
    assert y.dtype == inputs.q.dtype
    return gradients(y, log_mass, inputs.leaves())


def yardstick(inputs: Inputs, activation: str = "softmax", **options: Any) -> list[Tensor]:
    """The same of plain PyTorch; with exp features, which no plain product survives, of the reference."""
    if activation == "exp":
        return results(inputs, "reference", activation, **options)
    q, k, v, near_q, near_k, *gates, query, key, sinks = inputs
    near = (q, k) if near_q is None or near_k is None else (near_q, near_k)
    far = (q, k, *gates, FeatureMap(query, key, "softmax"))
    return gradients(*plain.attention(v, near, far, sinks=sinks, **options), inputs.leaves())  # type: ignore[arg-type]


def names(inputs: Inputs) -> list[str]:
    return ["y", "log_mass", "visible", *(f"d_{n}" for n, x in zip(Inputs._fields, inputs) if x is not None)]


def assert_within_budget(inputs: Inputs, dtype: torch.dtype, window: int = 100, keep: int = 4, **options: Any) -> None:
    """At most twice the error that plain PyTorch makes in the same dtype."""
    options = {"window": window, "keep": keep, "lag": window, "skip": keep, **options}
    exact = results(inputs.each(torch.float64), "reference", **options)
    beside = yardstick(inputs.each(dtype), **options)
    if not all(x.isfinite().all() for x in beside):  # fp16 ends at 65504: its numbers in fp32, y rounded as before
        wide = inputs.each(dtype).each(torch.float32)
        beside = yardstick(wide, **options, **({} if options.get("activation") == "exp" else {"rounded": dtype}))
    ours = results(inputs.each(dtype), "triton", **options)
    largest = max(x.norm() for x in exact[3:])
    for name, a, b, c in zip(names(inputs), ours, beside, exact, strict=True):
        scale = largest if name.startswith("d_") else c.norm()
        budget = 2 * (b - c).norm() + FLOOR[dtype] * scale
        assert (a - c).norm() <= budget, f"{name}: {(a - c).norm() / scale:.1e}, PyTorch {(b - c).norm() / scale:.1e}"


def overlapping(keep: int = 4) -> dict[str, Any]:
    """Options: the linear branch sees everything."""
    return {"window": 100, "keep": keep, "lag": 0, "skip": 0}


def disjoint(window: int = 100, keep: int = 4) -> dict[str, Any]:
    return {"window": window, "keep": keep, "lag": window, "skip": keep}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("length", LENGTHS)
def test_any_length_in_any_dtype(length: int, dim: int, dtype: torch.dtype) -> None:
    assert_within_budget(balanced(draw(length, dim=dim), disjoint()), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 65, 500])
def test_heads_wider_than_a_tile(length: int, dtype: torch.dtype) -> None:
    assert_within_budget(balanced(draw(length, dim=256), disjoint()), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [1, 64, 100, 128, 256, 5000])
def test_any_window(window: int, dtype: torch.dtype) -> None:
    assert_within_budget(balanced(draw(700), disjoint(window)), dtype, window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", [-6.0, 0.0, 9.0])
def test_gates_near_0_and_1_where_the_branches_overlap(gate: float, dtype: torch.dtype) -> None:
    assert_within_budget(balanced(draw(700, gate=gate), overlapping()), dtype, **overlapping())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decays_of_nothing_and_of_everything(dtype: torch.dtype) -> None:
    """Behind a window of 100 tokens with gates of exp(-6), nothing is left; the log-scale cannot bring it back."""
    for gate in (-6.0, 9.0):
        assert_within_budget(draw(700, gate=gate), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_queries_and_keys(dtype: torch.dtype) -> None:
    """Softmax maps at logits of +-30, window scores of +-200."""
    assert_within_budget(balanced(draw(500, size=8.0), disjoint()), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("log_scale", [-20.0, 20.0])
def test_extreme_log_scales(log_scale: float, dtype: torch.dtype) -> None:
    assert_within_budget(draw(500, log_scale=log_scale), dtype)


@pytest.mark.parametrize("sink", [float("-inf"), 0.5, 20.0])
def test_sinks(sink: float) -> None:
    inputs = balanced(draw(500, sinks=sink), disjoint())
    assert_within_budget(inputs, torch.bfloat16)
    if sink < 0:
        arguments = {**inputs.each(torch.bfloat16).arguments(), **disjoint(), "impl": "triton"}
        without = hybrid_attention(**{**arguments, "sinks": None})
        for a, b in zip(hybrid_attention(**arguments)[:2], without[:2]):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "change",
    [
        {"shared": True},
        {"decay": None, "enter": None, "log_scale": None},  # as LoLCATs has it
        {"decay": 6, "enter": 1},  # a memory for each query head
        {"heads": 4, "kv_heads": 4},
        {"heads": 9, "kv_heads": 3, "decay": 1, "enter": None},
    ],
    ids=str,
)
def test_any_gates_and_grouping(change: dict[str, Any]) -> None:
    change = {"enter": change.get("kv_heads", 2), "decay": change.get("kv_heads", 2), **change}
    inputs = draw(300, **change)
    assert_within_budget(balanced(inputs, disjoint()), torch.bfloat16)
    if inputs.near_q is None:
        assert_within_budget(balanced(inputs, overlapping()), torch.bfloat16, **overlapping())


@pytest.mark.parametrize("features", [16, 32, 48])
def test_fewer_features_than_a_head_has_numbers(features: int) -> None:
    """A whole batch of long sequences too: with 32 features, one like it ended in an illegal address."""
    assert_within_budget(balanced(draw(500, features=features), disjoint()), torch.bfloat16)
    inputs = draw(2048, batch=8, heads=9, kv_heads=3, decay=3, enter=3, features=features).each(torch.bfloat16)
    first, second = (results(inputs, "triton", **disjoint(171, 4)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_exp_features() -> None:
    for options in (disjoint(), overlapping()):
        options = {**options, "activation": "exp"}
        assert_within_budget(balanced(draw(300), options), torch.float32, **options)


@pytest.mark.parametrize(("dim", "dtype"), [(64, dtype) for dtype in DTYPES] + [(128, torch.bfloat16)])
def test_padding_packed_documents_and_a_row_of_nothing(dim: int, dtype: torch.dtype) -> None:
    for options in ({**disjoint(30, 3), **flags(500)}, {**disjoint(30, 3), "mask": flags(500)["mask"]}):
        assert_within_budget(balanced(draw(500, dim=dim), options), dtype, **options)
    inputs = draw(500, dim=dim).each(dtype)
    y, _, visible, *found = results(inputs, "triton", **disjoint(), **flags(500))
    assert (y[1] == 0).all() and not visible[1].any()
    assert all(g.isfinite().all() for g in found) and all((g[1] == 0).all() for g in found[:8])


class Drawn(NamedTuple):
    """A case whose tensors follow from its numbers."""

    length: int
    sizes: tuple[int, int, int]  # heads, kv_heads, dim
    window: int
    keep: int
    overlaps: bool
    flagged: bool
    shared: bool
    gate: float
    size: float
    seed: int


CASES = st.builds(
    Drawn,
    length=st.integers(1, 1300),
    sizes=st.sampled_from([(6, 2, 64), (6, 2, 64), (6, 2, 128), (4, 4, 64)]),
    window=st.integers(1, 300),
    keep=st.sampled_from([1, 4, 20]),
    overlaps=st.booleans(),
    flagged=st.booleans(),
    shared=st.booleans(),
    gate=st.sampled_from([-6.0, 1.0, 4.0, 9.0]),
    size=st.sampled_from([1.0, 4.0]),
    seed=st.integers(0, 2**16),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=5, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(case=CASES)
def test_whatever_is_drawn(dtype: torch.dtype, case: Drawn) -> None:
    """15 examples in all: 5 in each dtype."""
    torch.manual_seed(case.seed)
    heads, kv_heads, dim = case.sizes
    options: dict[str, Any] = flags(case.length) if case.flagged else {}
    options |= {"window": case.window, "keep": case.keep, **({"lag": 0, "skip": 0} if case.overlaps else {})}
    options = {"lag": case.window, "skip": case.keep, **options}
    sharing = {"heads": heads, "kv_heads": kv_heads, "decay": kv_heads, "enter": kv_heads, "shared": case.shared}
    inputs = draw(case.length, dim=dim, gate=case.gate, size=case.size, **sharing)  # type: ignore[arg-type]
    assert_within_budget(balanced(inputs, options), dtype, **options)


def test_runs_agree_to_the_last_bit() -> None:
    for options in (disjoint(), {**disjoint(), **flags(1500)}):
        inputs = balanced(draw(1500), options).each(torch.bfloat16)
        first = results(inputs, "triton", **options)
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(first, results(inputs, "triton", **options)))


CANARY = {  # of each gradient's own norm, in which a product gone wrong is a tenth and more
    torch.bfloat16: {"q": 2e-2, "k": 2e-2, "v": 1e-2, "near_q": 2e-2, "near_k": 2e-2},
    torch.float32: dict.fromkeys(Inputs._fields, 1e-4) | dict.fromkeys(GATES, 5e-4),
}


@pytest.mark.parametrize("dtype", CANARY, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("options", [disjoint(16), overlapping()], ids=["disjoint", "overlapping"])
def test_no_gradient_is_wrong_at_the_real_tile_sizes(options: dict[str, Any], dim: int, dtype: torch.dtype) -> None:
    """Triton on Hopper has given wrong products of transposed fp32 accumulators (flash-linear-attention issue 640).

    Each gradient for itself, with gates that forget much within a chunk, so that none hides behind a larger one.
    """
    inputs = balanced(draw(2048, dim=dim, gate=1.0, batch=1), options)
    exact = results(inputs.each(torch.float64), "reference", **options)
    ours = results(inputs.each(dtype), "triton", **options)
    for name, a, c in list(zip(names(inputs), ours, exact, strict=True))[3:]:
        bound = CANARY[dtype].get(name[2:], 3e-2)
        assert (a - c).norm() <= bound * c.norm(), f"{name}: {(a - c).norm() / c.norm():.1e}, expected {bound}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_splitting_a_sequence_changes_little(dtype: torch.dtype) -> None:
    """With the gradients that come through the states, of one piece in the other implementation too."""
    options = disjoint()
    inputs = balanced(draw(500), options).each(dtype)
    whole = results(inputs, "triton", **options)
    for impls in (("triton", "triton", "triton"), ("triton", "reference", "triton")):
        outputs, state = [], None
        for impl, (start, end) in zip(impls, itertools.pairwise([0, 70, 71, 500])):
            *output, state = hybrid_attention(
                **inputs.arguments("softmax", start, end), **options, state=state, impl=impl
            )
            outputs.append(output)
        y, log_mass = (torch.cat(x, 1) for x in zip(*outputs))
        pieces = gradients(y, log_mass, inputs.leaves())
        largest = max(x.norm() for x in whole[3:])
        for name, a, b in zip(names(inputs), pieces, whole, strict=True):
            scale = max(b.norm(), largest) if name.startswith("d_") else b.norm()
            assert (a - b).norm() <= 4 * FLOOR[dtype] * scale, f"{name}: {(a - b).norm() / scale:.1e}"


def compiled_forms() -> int:
    """How many forms of their kernels Triton has compiled in this process."""
    from lizardzoo.kernels.gated_linear import triton, triton_backward
    from lizardzoo.kernels.window import triton as window_triton

    kernels = [
        x for module in (triton, triton_backward, window_triton) for x in vars(module).values()
        if hasattr(x, "device_caches")
    ]  # fmt: skip
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


def test_no_length_and_no_window_compiles_a_kernel_again() -> None:
    results(draw(500).each(torch.bfloat16), "triton", **disjoint())
    before = compiled_forms()
    assert before > 0
    for length in (129, 300, 1027, 16, 2048):
        results(draw(length).each(torch.bfloat16), "triton", **disjoint())
    for window in (1, 16, 64, 128, 255, 256, 1000):
        results(draw(500).each(torch.bfloat16), "triton", **disjoint(window))
    for keep in (1, 3, 16):
        results(draw(500).each(torch.bfloat16), "triton", **disjoint(64, keep))
    assert compiled_forms() == before


def shifted(x: Tensor | None) -> Tensor | None:
    """The same numbers, one number away from where an allocation begins."""
    if x is None:
        return None
    return torch.cat([x.detach().flatten()[:1], x.detach().flatten()])[1:].view(x.shape).requires_grad_()


def test_the_form_for_aligned_memory_is_not_taken_for_other_memory() -> None:
    """First as allocated, then one number further: a vector load there faults, or reads its neighbours."""
    inputs = balanced(draw(300, batch=1, sinks=0.5), disjoint()).each(torch.bfloat16)
    moved = Inputs(*map(shifted, inputs))  # type: ignore[arg-type]
    assert moved.q.data_ptr() % 16 and moved.log_decay.data_ptr() % 16  # type: ignore[union-attr]

    def run(case: Inputs, place: Callable[[Tensor], Any]) -> list[Tensor]:
        y, log_mass, _ = hybrid_attention(**case.arguments(), **disjoint(), impl="triton")
        weights = [place(torch.linspace(-1, 1, x.numel(), device="cuda").to(x).view_as(x)) for x in (y, log_mass)]
        return [y, log_mass, *torch.autograd.grad((y, log_mass), case.leaves(), weights)]

    expected = run(inputs, lambda x: x)
    for a, b in zip(run(moved, shifted), expected, strict=True):
        assert (a - b).double().norm() <= 1e-5 * b.double().norm()


@torch.no_grad()
def test_a_stride_beyond_2_to_the_31_is_not_taken_for_a_small_one() -> None:
    """A single row's own stride says nothing, and may be what a sequence of a million tokens has."""
    arguments = {**draw(300, batch=1).each(torch.bfloat16).arguments(), **disjoint(), "impl": "triton"}
    expected = hybrid_attention(**arguments)

    def far(x: Tensor) -> Tensor:
        return x.as_strided(x.shape, (2**31 + 16, *x.stride()[1:]))

    wide = {name: far(arguments[name]) for name in ("q", "k", "v")}
    rotated = tuple(far(x) for x in arguments["rotated"])
    for a, b in zip(hybrid_attention(**{**arguments, **wide, "rotated": rotated})[:2], expected[:2]):
        assert torch.equal(a, b)


def test_memory_is_linear_in_the_length() -> None:
    def peak(length: int) -> int:
        inputs = draw(length, batch=1).each(torch.bfloat16)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y, log_mass, _ = hybrid_attention(**inputs.arguments(), **disjoint(), return_state=False, impl="triton")
        torch.autograd.grad(y.sum() + log_mass.sum(), inputs.leaves())
        return torch.cuda.max_memory_allocated() - before

    peak(4096)
    assert peak(8192) < 2.3 * peak(4096)
