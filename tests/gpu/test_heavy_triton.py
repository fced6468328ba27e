"""The kernels of heavy attention on the device, at their real tile sizes.

What is held is compared exactly, by giving the reference the kernel's own scores: two that differ by a rounding may
stand in either order. Scores, outputs and gradients are compared with float64, for what is held.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lizardzoo.kernels import (
    HeavyState,
    heavy_attention,
    heavy_attention_step,
    window_and_heavy_step,
    window_attention,
    window_attention_step,
)
from lizardzoo.kernels.heavy import init_state, reference
from lizardzoo.kernels.rows import arrange
from lizardzoo.kernels.window import init_state as init_window_state
from tests.gpu.plain import _Attend
from tests.kernels.cases import assert_same_tokens, poison

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
LENGTHS = [1, 100, 127, 129, 1000, 2048, 4097]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FLOOR = {torch.bfloat16: 2e-3, torch.float16: 3e-4, torch.float32: 1e-6}  # a quarter of the dtype's step, or a few
Choice = dict[str, Tensor]


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor

    def each(self, dtype: torch.dtype) -> Inputs:
        """In a dtype, as leaves."""
        return Inputs(*(x.to(dtype).detach().requires_grad_() for x in self))


def draw(length: int, *, heads: int = 6, kv_heads: int = 2, dim: int = 64, scale: float = 1.0) -> Inputs:
    """Numbers that every dtype of DTYPES holds exactly enough: the same inputs for all."""
    batch = 2 if length <= 2048 else 1
    q = torch.randn(batch, length, heads, dim, device=DEVICE) * scale
    k, v = (torch.randn(batch, length, kv_heads, dim, device=DEVICE) for _ in range(2))
    return Inputs(*(x.bfloat16().float() for x in (q, k, v)))


def flags(length: int, batch: int = 2) -> dict[str, Tensor]:
    return {
        "mask": torch.rand(batch, length, device=DEVICE) < 0.8,
        "starts": torch.rand(batch, length, device=DEVICE) < 0.01,
    }


def mass_of(inputs: Inputs, window: int, keep: int = 0, **options: Any) -> Tensor:
    """The window's log_mass."""
    with torch.no_grad():
        return window_attention(*inputs, window=window, keep=keep, impl="reference", **options)[1].float()


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> list[Choice]:
    """What every call of the kernels chose, in order."""
    from lizardzoo.kernels.heavy import ops  # not where Triton is missing and these tests are only collected

    found, choose = [], ops.compute_choice

    def record(*arguments: Any) -> Any:
        results = choose(*arguments)
        found.append(results._asdict())
        return results

    monkeypatch.setattr(ops, "compute_choice", record)
    return found


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


def pairs(choice: Choice, window: int, length: int) -> Tensor:
    """[B, Hkv, T, T] bool, by slot: which query sees which key."""
    places, times = choice["places"][:, :, :-1].long(), choice["times"]
    heavy, chunks = places.shape[3], places.shape[2]
    chunk = times.shape[3] - heavy
    since, until, time = times >> 16, times & 0xFFFF, torch.arange(chunk, device=DEVICE)[:, None]
    own = heavy + chunk * torch.arange(chunks, device=DEVICE)[:, None] + since[..., heavy:]
    token = torch.cat([places, own], -1) - heavy - window
    seen = (time >= since[..., None, :]) & (time < until[..., None, :])
    index = token[..., None, :].clamp(0, length - 1).expand(seen.shape)
    counts = torch.zeros(*seen.shape[:-1], length, dtype=torch.int32, device=DEVICE)
    return counts.scatter_add(4, index, seen.int()).flatten(2, 3)[:, :, :length] > 0


def plain(
    inputs: Inputs, seen: Tensor, mask: Tensor | None = None, starts: Tensor | None = None, sinks: Tensor | None = None
) -> Any:
    """Masked softmax attention in the inputs' dtype: the oracle in float64, the yardstick in a narrower one.

    sinks [m]: in the denominator.
    """
    rows = arrange(inputs.q, mask, starts, None)
    q, k, v = (rows.pack(x) for x in inputs)
    wide, groups = torch.promote_types(q.dtype, torch.float32), q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, 2).transpose(1, 2) for x in (k, v))
    scores = (q.transpose(1, 2) @ k.transpose(2, 3)).to(wide) * q.shape[3] ** -0.5
    seen = seen.repeat_interleave(groups, 1) & rows.valid[:, None, :, None]
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        logits = sinks.to(wide).expand(*scores.shape[:3], -1)
        scores = torch.cat([scores, logits.masked_fill(~rows.valid[:, None, :, None], float("-inf"))], -1)
    y, log_mass = _Attend.apply(scores, v, q.dtype)
    return rows.unpack(y.transpose(1, 2)), rows.unpack(log_mass[..., 0].transpose(1, 2))


def results(outputs: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    """y, log_mass (finite part) and the gradients of a fixed function of both, in float64."""
    y, log_mass = outputs
    generator = torch.Generator(DEVICE).manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, device=DEVICE).bfloat16() for x in (y, log_mass)]
    finite = torch.isfinite(log_mass)
    log_mass = log_mass.masked_fill(~finite, 0.0)
    loss = (y.double() * weights[0]).sum() + (log_mass.double() * weights[1]).sum()
    gradients = torch.autograd.grad(loss, list(inputs), retain_graph=True)
    return [x.detach().double() for x in (y, log_mass, finite, *gradients)]


def assert_within_budget(
    choices: list[Choice], inputs: Inputs, dtype: torch.dtype, window: int, heavy: int, keep: int = 0, **options: Any
) -> None:
    """At most twice the error of plain PyTorch in the same dtype; gradients cancel, so their floor is the largest's."""
    exact_inputs, narrow, again = inputs.each(torch.float64), inputs.each(dtype), inputs.each(dtype)
    log_mass = mass_of(inputs, window, keep, **options)
    sizes = {"window": window, "heavy": heavy, "keep": keep}
    y, mass, _ = heavy_attention(*again, log_mass, **sizes, **options, impl="triton")
    assert y.dtype == dtype and mass.dtype == torch.float32
    ours = results((y, mass), again)
    seen = pairs(choices[-1], window, inputs.q.shape[1])
    exact = results(plain(exact_inputs, seen, **options), exact_inputs)
    yardstick = results(plain(narrow, seen, **options), narrow)
    largest = max(x.norm() for x in exact[3:])
    for name, a, b, c in zip(("y", "log_mass", "seen", "dq", "dk", "dv"), ours, yardstick, exact, strict=True):
        scale = largest if name.startswith("d") else c.norm()
        budget = 2 * (b - c).norm() + FLOOR[dtype] * scale
        assert (a - c).norm() <= budget, f"{name}: {(a - c).norm() / scale:.1e}, PyTorch {(b - c).norm() / scale:.1e}"


def sorted_state(state: HeavyState) -> list[Tensor]:
    """By rank; zeros where nothing is held."""
    there = state.score > -torch.inf
    rank = torch.where(there, state.rank, -1)
    order = rank.argsort(1)
    k, v = (torch.where(there[..., None], x, 0.0).gather(1, order[..., None].expand_as(x)) for x in (state.k, state.v))
    return [rank.gather(1, order), k, v, state.score.gather(1, order), state.drawn]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_within_the_error_budget(choices: list[Choice], length: int, dtype: torch.dtype) -> None:
    assert_within_budget(choices, draw(length), dtype, 128, 131, keep=4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("window", "heavy"), [(1, 1), (2, 300), (64, 16), (100, 64), (700, 129), (5000, 4)])
def test_any_window_and_any_number_held(choices: list[Choice], window: int, heavy: int, dtype: torch.dtype) -> None:
    assert_within_budget(choices, draw(1300), dtype, window, heavy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [65, 1300])
def test_padding_and_documents(choices: list[Choice], length: int, dtype: torch.dtype) -> None:
    options = flags(length)
    options["mask"][1] = False  # a row of padding alone
    assert_within_budget(choices, draw(length), dtype, 16, 20, keep=3, **options)
    assert_within_budget(choices, draw(length), dtype, 30, 40, keep=3, mask=options["mask"])
    assert_within_budget(choices, draw(length), dtype, 3, 40, keep=3, starts=options["starts"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (9, 3), (8, 1)])
@pytest.mark.parametrize("dim", [20, 32, 64, 80, 128, 256])
def test_every_head_dim_and_grouping(
    choices: list[Choice], heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> None:
    assert_within_budget(choices, draw(600, heads=heads, kv_heads=kv_heads, dim=dim), dtype, 64, 70, keep=4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("window", [1, 30, 128])
def test_what_tokens_draw_is_within_the_error_budget(
    choices: list[Choice], window: int, dim: int, dtype: torch.dtype
) -> None:
    """At most twice the error of squared weights from scores of products in the same dtype."""
    inputs, length = draw(700, dim=dim), 700
    log_mass = mass_of(inputs, window)
    heavy_attention(*inputs.each(dtype), log_mass, window=window, heavy=5, impl="triton")
    age = torch.arange(length, device=DEVICE)[:, None] - torch.arange(length, device=DEVICE)
    counts = (age >= max(1, window // 8)) & (age < window)

    def squared(dtype: torch.dtype) -> Tensor:
        q, k = inputs.q.to(dtype).transpose(1, 2), inputs.k.to(dtype).repeat_interleave(3, 2).transpose(1, 2)
        wide = torch.promote_types(dtype, torch.float32)
        logits = (q @ k.transpose(2, 3)).to(wide) * dim**-0.5 - log_mass.transpose(1, 2)[..., None]
        return torch.where(counts, (2 * logits).exp(), 0.0).unflatten(1, (2, 3)).sum((2, 3)).double()

    ours, exact = choices[-1]["drawn"][:, window:].transpose(1, 2).double(), squared(torch.float64)
    assert (ours - exact).norm() <= 2 * (squared(dtype) - exact).norm() + FLOOR[dtype] * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("window", "heavy"), [(1, 3), (16, 131), (100, 20)])
def test_of_the_same_scores_the_reference_holds_the_same_tokens(
    choices: list[Choice], monkeypatch: pytest.MonkeyPatch, window: int, heavy: int, packed: bool, dtype: torch.dtype
) -> None:
    """What is seen at each query shows in outputs, what is held at the end in the state."""
    inputs, options = draw(1500).each(dtype), flags(1500) if packed else {}
    log_mass = mass_of(inputs, window, **options)
    sizes: dict[str, Any] = {"window": window, "heavy": heavy, "half_life": 100.0}
    with torch.no_grad():
        *ours, state = heavy_attention(*inputs, log_mass, **sizes, **options, impl="triton")
        drawn = choices[-1]["drawn"]
        heavy_attention(*inputs, log_mass, **{**sizes, "heavy": 1500}, **options, impl="triton")
        everything = choices[-1]  # the score of each token that ever joined
        keys, places = (everything[name][:, :, -1] for name in ("keys", "places"))
        table = torch.zeros(2, 2, 1501, device=DEVICE)  # the last one for what is not there
        slots = torch.where(keys >= 0, places - 1500, 1500).long()
        table.scatter_(2, slots, (keys & 0x7FFFFFFF).int().view(torch.float32))
        monkeypatch.setattr(reference, "_drawn", lambda *_: drawn)
        monkeypatch.setattr(reference, "settled", lambda *_: table[:, :, :1500].transpose(1, 2))
        *theirs, expected = heavy_attention(*inputs, log_mass, **sizes, **options, impl="reference")
    assert state is not None and expected is not None
    for a, b in zip(sorted_state(state), sorted_state(expected), strict=True):
        assert torch.equal(a, b)
    assert (ours[0] - theirs[0]).double().norm() <= 4 * FLOOR[dtype] * theirs[0].double().norm()
    finite = torch.isfinite(theirs[1])
    assert torch.equal(torch.isfinite(ours[1]), finite)
    torch.testing.assert_close(ours[1][finite], theirs[1][finite], rtol=1e-4, atol=1e-4)


def test_everything_is_deterministic() -> None:
    inputs, options = draw(2000).each(torch.bfloat16), flags(2000)
    log_mass = mass_of(inputs, 100, **options)

    def run() -> list[Tensor]:
        outputs = heavy_attention(*inputs, log_mass, window=100, heavy=131, impl="triton", **options)
        return results(outputs[:2], inputs)

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_splitting_a_sequence_changes_little(dtype: torch.dtype) -> None:
    inputs, options = draw(600).each(dtype), flags(600)
    log_mass = mass_of(inputs, 100, 4, **options)
    sizes: dict[str, Any] = {"window": 100, "keep": 4}
    whole = heavy_attention(*inputs, log_mass, **sizes, heavy=70, half_life=200.0, **options, impl="triton")
    pieces: list[Any] = []
    past = state = None
    for start, end in itertools.pairwise([0, 1, 70, 450, 600]):
        part = {name: flag[:, start:end] for name, flag in options.items()}
        tensors = [x[:, start:end] for x in inputs]
        *output, state = heavy_attention(
            *tensors,
            log_mass[:, start:end],
            **sizes,
            heavy=70,
            half_life=200.0,
            **part,
            past=past,
            state=state,
            impl="triton",
        )
        *_, past = window_attention(*tensors, **sizes, **part, state=past, impl="triton")
        pieces.append(output)
    joined = tuple(torch.cat(x, 1) for x in zip(*pieces, strict=True))
    expected = results(whole[:2], inputs)
    largest = max(x.norm() for x in expected[3:])
    for a, b in zip(results(joined, inputs), expected, strict=True):
        assert (a - b).norm() <= 4 * FLOOR[dtype] * max(b.norm(), largest)
    assert whole[2] is not None and state is not None
    for a, b in zip(sorted_state(state), sorted_state(whole[2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("window", "heavy", "keep", "dim"), [(1, 1, 0, 64), (30, 300, 3, 128), (128, 60, 4, 64), (70, 20, 20, 256)]
)
@torch.no_grad()
def test_a_fold_of_steps_is_the_whole(window: int, heavy: int, keep: int, dim: int, dtype: torch.dtype) -> None:
    """Both kernels of a step: behind the window's own, and with it."""
    length, mask = 300, flags(300)["mask"]
    inputs = draw(length, heads=9, kv_heads=3, dim=dim).each(dtype)
    sizes: dict[str, Any] = {"window": window, "keep": keep}
    near = window_attention(*inputs, **sizes, mask=mask, impl="triton")
    whole = heavy_attention(*inputs, near[1], **sizes, heavy=heavy, mask=mask, impl="triton")

    def start() -> tuple[Any, HeavyState]:
        past = init_window_state(2, 3, dim, window, keep, dtype, DEVICE)
        state = init_state(2, 3, dim, window, heavy, dtype, DEVICE)
        for x in (past.k, past.v, past.kept_k, past.kept_v, state.k, state.v):
            x.fill_(float("nan"))  # nothing may read a token that is not there
        return past, state

    (past, state), (both_past, both_state) = start(), start()
    outputs = []
    for t in range(length):
        now = slice(t, t + 1)
        one, options = [x[:, now] for x in inputs], {"keep": keep, "mask": mask[:, now], "impl": "triton"}
        one_near = window_attention_step(*one, past, **options)
        y, log_mass, state = heavy_attention_step(*one, one_near[1], past, state, **options)
        past = one_near[2]
        both_y, both_mass, both_past, both_state = window_and_heavy_step(
            *one, both_past, both_state, **options, in_place=True
        )
        outputs.append((y, log_mass, both_y, both_mass))
    y, log_mass, both_y, both_mass = (torch.cat(x, 1) for x in zip(*outputs, strict=True))
    masses = torch.stack([near[1], whole[1]])
    total = masses.logsumexp(0)
    shares = torch.where(masses > -torch.inf, (masses - total).exp(), 0.0)[..., None]
    joint = shares[0] * near[0].float() + shares[1] * whole[0].float()
    for ours, expected, ours_mass, expected_mass in (
        (y, whole[0], log_mass, whole[1]),
        (both_y, joint, both_mass, total),
    ):
        assert (ours - expected).double().norm() <= 4 * FLOOR[dtype] * expected.double().norm()
        finite = torch.isfinite(expected_mass)
        assert torch.equal(torch.isfinite(ours_mass), finite)
        torch.testing.assert_close(ours_mass[finite], expected_mass[finite], rtol=1e-4, atol=1e-4)
    assert whole[2] is not None and near[2] is not None
    assert_same_tokens(both_past, near[2])
    for found in (state, both_state):
        for a, b in zip(sorted_state(found), sorted_state(whole[2]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_step_in_a_cuda_graph_goes_on_where_it_stopped() -> None:
    """Replayed, it moves both states on as calls do."""
    text = [torch.randn(16, 40, heads, 64, device=DEVICE, dtype=torch.bfloat16) for heads in (9, 3, 3)]

    def start() -> tuple[Any, HeavyState]:
        return (
            init_window_state(16, 3, 64, 8, 2, torch.bfloat16, DEVICE),
            init_state(16, 3, 64, 8, 5, torch.bfloat16, DEVICE),
        )

    expected, given = start(), [x[:, :1].clone() for x in text]
    outputs = []
    for t in range(40):
        y, *_ = window_and_heavy_step(*(x[:, t : t + 1] for x in text), *expected, keep=2, in_place=True)
        outputs.append(y)
    moved = start()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, *_ = window_and_heavy_step(*given, *moved, keep=2, in_place=True)
    for t in range(40):
        for x, tokens in zip(given, text, strict=True):
            x.copy_(tokens[:, t : t + 1])
        graph.replay()
        assert torch.equal(captured, outputs[t])
    for a, b in zip((*moved[0], *moved[1]), (*expected[0], *expected[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
def test_torch_compile_takes_the_whole_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    inputs = draw(600).each(torch.bfloat16)
    log_mass = mass_of(inputs, 64)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return heavy_attention(q, k, v, log_mass, window=64, heavy=70, return_state=False, impl="triton")[:2]

    eager = results(attend(*inputs), inputs)
    compiled = results(torch.compile(attend, fullgraph=True)(*inputs), inputs)
    for a, b in zip(compiled, eager, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_a_new_length_or_size_compiles_nothing() -> None:
    from lizardzoo.kernels.heavy import triton as attention
    from lizardzoo.kernels.heavy import triton_choice as choice

    def run(length: int, window: int, heavy: int) -> None:
        inputs = draw(length).each(torch.bfloat16)
        outputs = heavy_attention(*inputs, mass_of(inputs, window), window=window, heavy=heavy, impl="triton")
        results(outputs[:2], inputs)

    kernels = [
        *(getattr(choice, f"{name}_kernel") for name in ("drawn", "sort", "times")),
        *(getattr(attention, f"{name}_kernel") for name in ("forward", "query_gradient", "candidate_gradient")),
        attention.token_gradient_kernel,
    ]  # merging has a tile for few tokens held and one for many

    def compiled() -> int:
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    run(1000, 128, 131)
    before = compiled()
    assert before > 0
    for length, window, heavy in [(1, 128, 131), (16, 16, 16), (777, 1, 1), (2048, 129, 128), (1024, 64, 200)]:
        run(length, window, heavy)
    assert compiled() == before
