"""The window kernels on the device, at their real tile sizes: outputs and gradients against float64."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lizardzoo.kernels import window_attention, window_attention_step
from lizardzoo.kernels.window import init_state
from tests.kernels.cases import assert_same_tokens, poison

pytestmark = pytest.mark.gpu
LENGTHS = [1, 63, 64, 65, 127, 500, 2048, 4097]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FLOOR = {torch.bfloat16: 2e-3, torch.float16: 3e-4, torch.float32: 1e-6}  # a quarter of the dtype's step, or a few


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None = None

    def each(self, dtype: torch.dtype) -> Inputs:
        """In a dtype, as leaves; sinks, a parameter, in fp32 at least."""
        wide = torch.promote_types(dtype, torch.float32)
        sinks = None if self.sinks is None else self.sinks.to(wide).detach().requires_grad_()
        return Inputs(*(x.to(dtype).detach().requires_grad_() for x in self[:3]), sinks)

    def leaves(self) -> list[Tensor]:
        return [x for x in self if x is not None]


def draw(
    length: int, *, heads: int = 6, kv_heads: int = 2, dim: int = 64, scale: float = 1.0, **options: Any
) -> Inputs:
    """Numbers that every dtype of DTYPES holds exactly enough: the same inputs for all."""
    batch, sinks = options.get("batch", 2 if length <= 2048 else 1), options.get("sinks")
    q = torch.randn(batch, length, heads, dim, device="cuda") * scale
    k, v = (torch.randn(batch, length, kv_heads, dim, device="cuda") for _ in range(2))
    drawn = None if sinks is None else torch.as_tensor(sinks, device="cuda", dtype=torch.float32)
    return Inputs(*(x.bfloat16().float() for x in (q, k, v)), drawn)


def flags(length: int, batch: int = 2) -> dict[str, Tensor]:
    return {
        "mask": torch.rand(batch, length, device="cuda") < 0.8,
        "starts": torch.rand(batch, length, device="cuda") < 0.01,
    }


def plain(inputs: Inputs, window: int, keep: int = 0, mask: Any = None, starts: Any = None) -> tuple[Tensor, Tensor]:
    """Masked softmax attention in the inputs' dtype: the oracle in float64, the yardstick in a narrower one."""
    q, k, v, sinks = inputs
    batch, count, heads, dim = q.shape
    mask = torch.ones(batch, count, dtype=torch.bool, device=q.device) if mask is None else mask
    starts = torch.zeros_like(mask) if starts is None else starts & mask
    document, order = starts.long().cumsum(1), mask.long().cumsum(1)
    rank = order - torch.where(starts, order, 1).cummax(1).values
    distance = rank[:, :, None] - rank[:, None]
    visible = mask[:, :, None] & mask[:, None] & (document[:, :, None] == document[:, None])
    visible = visible & (distance >= 0) & ((distance < window) | (rank < keep)[:, None])
    k, v = (x.repeat_interleave(heads // k.shape[2], 2).transpose(1, 2) for x in (k, v))
    scores = (q.transpose(1, 2) @ k.transpose(2, 3)) * dim**-0.5
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    if sinks is not None:
        extra = sinks.to(q.dtype).expand(heads, -1)[None, :, None].expand(batch, -1, count, -1)
        scores = torch.cat([scores, extra], -1)
    real = mask[:, None, :, None]
    log_mass = torch.where(real, scores, 0.0).logsumexp(-1, keepdim=True)
    weights = torch.where(real, (scores - log_mass).exp(), 0.0)[..., :count]
    log_mass = torch.where(real, log_mass, float("-inf"))[..., 0]
    return (weights @ v).transpose(1, 2), log_mass.transpose(1, 2)


def results(outputs: tuple[Tensor, Tensor], inputs: Inputs) -> list[Tensor]:
    """y, log_mass (finite part) and the gradients of a fixed function of both, in float64."""
    y, log_mass = outputs
    generator = torch.Generator("cuda").manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, device="cuda").bfloat16() for x in outputs]
    finite = torch.isfinite(log_mass)
    log_mass = log_mass.masked_fill(~finite, 0.0)
    gradients = torch.autograd.grad(
        (y.double() * weights[0]).sum() + (log_mass.double() * weights[1]).sum(), inputs.leaves(), retain_graph=True
    )
    return [x.detach().double() for x in (y, log_mass, finite, *gradients)]


def assert_within_budget(inputs: Inputs, dtype: torch.dtype, window: int, **options: Any) -> list[Tensor]:
    """At most twice the error of plain PyTorch in the same dtype; gradients cancel, so their floor is the largest's."""
    exact_inputs, narrow, again = inputs.each(torch.float64), inputs.each(dtype), inputs.each(dtype)
    exact = results(plain(exact_inputs, window, **options), exact_inputs)
    yardstick = results(plain(narrow, window, **options), narrow)
    y, log_mass, _ = window_attention(*again[:3], sinks=again.sinks, window=window, impl="triton", **options)
    assert y.dtype == dtype and log_mass.dtype == torch.float32
    ours = results((y, log_mass), again)
    largest = max(x.norm() for x in exact[3:])
    names = ("y", "log_mass", "visible", "dq", "dk", "dv", "dsinks")
    for name, a, b, c in zip(names, ours, yardstick, exact):
        scale = largest if name.startswith("d") else c.norm()
        budget = 2 * (b - c).norm().nan_to_num(0.0) + FLOOR[dtype] * scale
        assert (a - c).norm() <= budget, f"{name}: {(a - c).norm() / scale:.1e}, PyTorch {(b - c).norm() / scale:.1e}"
    return ours


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("keep", [0, 4])
def test_within_the_error_budget(length: int, dtype: torch.dtype, keep: int) -> None:
    assert_within_budget(draw(length), dtype, 128, keep=keep)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("window", "keep"), [(1, 0), (1, 20), (64, 1), (100, 4), (700, 4), (5000, 4)])
def test_any_window(window: int, keep: int, dtype: torch.dtype) -> None:
    assert_within_budget(draw(1300), dtype, window, keep=keep)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [65, 1300])
def test_padding_and_documents(length: int, dtype: torch.dtype) -> None:
    options = flags(length)
    options["mask"][1] = False  # a row of padding alone
    assert_within_budget(draw(length, sinks=[0.3, -1.0]), dtype, 30, keep=3, **options)
    assert_within_budget(draw(length), dtype, 30, keep=3, mask=options["mask"])
    assert_within_budget(draw(length), dtype, 3, keep=3, starts=options["starts"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (9, 3), (8, 1)])
@pytest.mark.parametrize("dim", [20, 32, 64, 80, 128, 256])
def test_every_head_dim_and_grouping(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    assert_within_budget(draw(600, heads=heads, kv_heads=kv_heads, dim=dim), dtype, 128, keep=4)


@pytest.mark.parametrize("sink", [float("-inf"), 20.0, 1e4])
def test_extreme_sinks(sink: float) -> None:
    inputs = draw(200, sinks=[sink, float("-inf")])
    if sink == 20.0:
        assert_within_budget(draw(200, sinks=[sink]), torch.bfloat16, 64, keep=4)
        return
    leaves = inputs.each(torch.bfloat16)
    y, log_mass, _ = window_attention(*leaves[:3], sinks=leaves.sinks, window=64, keep=4, impl="triton")
    assert all(x.isfinite().all() for x in results((y, log_mass), leaves))
    if sink < 0:
        without = window_attention(*leaves[:3], window=64, keep=4, impl="triton")
        assert torch.equal(y, without[0]) and torch.equal(log_mass, without[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores(dtype: torch.dtype) -> None:
    assert_within_budget(draw(600, scale=30.0), dtype, 128, keep=4)


def test_gradients_are_deterministic() -> None:
    inputs, options = draw(2000, sinks=[0.1]).each(torch.bfloat16), flags(2000)

    def run() -> list[Tensor]:
        outputs = window_attention(*inputs[:3], sinks=inputs.sinks, window=100, keep=4, impl="triton", **options)
        return results(outputs[:2], inputs)

    for a, b in zip(run(), run()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_splitting_a_sequence_changes_little(dtype: torch.dtype) -> None:
    inputs, options = draw(1500).each(dtype), flags(1500)
    arguments: dict[str, Any] = {"window": 100, "keep": 4, "impl": "triton"}
    whole = window_attention(*inputs[:3], **arguments, **options)
    pieces, state = [], None
    for start, end in itertools.pairwise([0, 1, 70, 1100, 1500]):
        part = {name: flag[:, start:end] for name, flag in options.items()}
        *output, state = window_attention(*(x[:, start:end] for x in inputs[:3]), **arguments, **part, state=state)
        pieces.append(output)
    joined = tuple(torch.cat(x, 1) for x in zip(*pieces))
    largest = max(x.norm() for x in results(whole[:2], inputs)[3:])
    for a, b in zip(results(joined, inputs), results(whole[:2], inputs)):
        assert (a - b).norm() <= 4 * FLOOR[dtype] * max(b.norm(), largest)
    assert whole[2] is not None and state is not None
    assert_same_tokens(state, whole[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("window", "keep", "dim"), [(1, 0, 64), (50, 3, 128), (128, 4, 64), (70, 20, 256)])
@torch.no_grad()
def test_a_fold_of_steps_is_the_whole(window: int, keep: int, dim: int, dtype: torch.dtype) -> None:
    length = 200
    q, k, v, _ = draw(length, heads=9, kv_heads=3, dim=dim).each(dtype)
    sinks, mask = torch.randn(9, 2, device="cuda"), flags(length)["mask"]
    whole = window_attention(q, k, v, window=window, keep=keep, sinks=sinks, mask=mask, impl="triton")
    state = init_state(2, 3, dim, window, keep, dtype, "cuda")
    for x in (state.k, state.v, state.kept_k, state.kept_v):
        x.fill_(float("nan"))  # nothing may read a token that is not there
    outputs = []
    for t in range(length):
        now = slice(t, t + 1)
        y, log_mass, state = window_attention_step(
            q[:, now], k[:, now], v[:, now], state, keep=keep, sinks=sinks, mask=mask[:, now], impl="triton"
        )
        outputs.append((y, log_mass))
    y, log_mass = (torch.cat(x, 1) for x in zip(*outputs))
    assert (y - whole[0]).double().norm() <= 2 * FLOOR[dtype] * whole[0].double().norm()
    finite = torch.isfinite(whole[1])
    assert torch.equal(torch.isfinite(log_mass), finite)
    torch.testing.assert_close(log_mass[finite], whole[1][finite], rtol=1e-5, atol=1e-5)
    assert whole[2] is not None
    assert_same_tokens(state, whole[2])


@torch.no_grad()
def test_a_step_in_a_cuda_graph() -> None:
    state = init_state(16, 8, 64, 128, 4, torch.bfloat16, "cuda")
    q, k, v = (torch.randn(16, 1, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (32, 8, 8))

    def step() -> tuple[Tensor, ...]:
        y, log_mass, new = window_attention_step(q, k, v, state, keep=4, impl="triton")
        return (y, log_mass, *new)

    expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for x in captured:
        x.zero_()
    graph.replay()
    for a, b in zip(captured, expected):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
def test_torch_compile_takes_the_whole_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    inputs = draw(300, sinks=[0.5]).each(torch.bfloat16)

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        return window_attention(q, k, v, window=64, keep=4, sinks=sinks, return_state=False, impl="triton")[:2]

    eager = results(attend(*inputs), inputs)  # type: ignore[arg-type]
    compiled = results(torch.compile(attend, fullgraph=True)(*inputs), inputs)  # type: ignore[arg-type]
    for a, b in zip(compiled, eager):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_a_new_length_or_window_compiles_nothing() -> None:
    from lizardzoo.kernels.window import triton as kernels

    def run(length: int, window: int, keep: int) -> None:
        inputs = draw(length).each(torch.bfloat16)
        y, log_mass, _ = window_attention(*inputs[:3], window=window, keep=keep, impl="triton")
        results((y, log_mass), inputs)

    def compiled() -> int:
        names = ("forward_kernel", "query_gradient_kernel", "sum_parts_kernel", "key_gradient_kernel")
        return sum(len(cache[0]) for name in names for cache in getattr(kernels, name).device_caches.values())

    run(1000, 128, 4)
    before = compiled()
    assert before > 0
    for length, window, keep in [(1, 128, 4), (16, 16, 1), (777, 1, 16), (2048, 129, 5), (1024, 64, 4)]:
        run(length, window, keep)
    assert compiled() == before
