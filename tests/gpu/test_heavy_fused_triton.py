"""Window and heavy attention as one op on the device, at its real tile sizes; see `test_heavy_triton.py`."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from lizardzoo.kernels import window_and_heavy_attention, window_and_heavy_step, window_attention
from lizardzoo.kernels.heavy import init_state
from lizardzoo.kernels.rows import arrange
from lizardzoo.kernels.window import init_state as init_window_state
from tests.gpu.test_heavy_triton import (
    DEVICE,
    DTYPES,
    FLOOR,
    LENGTHS,
    Choice,
    Inputs,
    draw,
    flags,
    pairs,
    plain,
    results,
    sorted_state,
)
from tests.kernels.cases import assert_same_tokens, poison

pytestmark = pytest.mark.gpu


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> list[Choice]:
    """What every call chose, in order."""
    from lizardzoo.kernels.heavy import fused, ops  # not where Triton is missing and these tests are only collected

    found, run = [], fused._eager

    def record(*arguments: Any) -> tuple[Tensor, ...]:
        outputs = run(*arguments)
        found.append(ops.Choice(*outputs[2:])._asdict())
        return outputs

    monkeypatch.setattr(fused, "_eager", record)
    return found


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


def near_pairs(inputs: Inputs, window: int, keep: int, mask: Tensor | None, starts: Tensor | None) -> Tensor:
    """[B, 1, T, T] bool, by slot: which query has which key in its window or keeps it."""
    rows = arrange(inputs.q, mask, starts, None)
    distance = rows.rank[:, :, None] - rows.rank[:, None]
    together = (rows.document[:, :, None] == rows.document[:, None]) & rows.valid[:, None]
    return (together & (distance >= 0) & ((distance < window) | (rows.rank < keep)[:, None]))[:, None]


def compared(
    choices: list[Choice], inputs: Inputs, dtype: torch.dtype, window: int, heavy: int, keep: int = 0,
    sinks: int = 0, **options: Any,
) -> list[tuple[str, Tensor, Tensor, Tensor]]:  # fmt: skip
    """Outputs and gradients by name: ours, those of plain PyTorch in the same dtype, exact ones; of what was chosen."""
    logits = torch.randn(sinks, device=DEVICE) if sinks else None
    leaves = [inputs.each(torch.float64), inputs.each(dtype), inputs.each(dtype)]
    of = [None if logits is None else logits.to(x.q.dtype, copy=True).requires_grad_() for x in leaves]
    if logits is not None:  # fp32 parameters whatever the model's dtype, as a mixer has them
        of[1:] = [logits.clone().requires_grad_() for _ in range(2)]
    inner = [[*x, *([] if sink is None else [sink])] for x, sink in zip(leaves, of, strict=True)]
    before = len(choices)
    y, mass, *_ = window_and_heavy_attention(
        *leaves[2], window=window, heavy=heavy, keep=keep, sinks=of[2], return_state=False, impl="triton", **options
    )
    assert y.dtype == dtype and mass.dtype == torch.float32
    ours = results((y, mass), inner[2])
    seen = near_pairs(inputs, window, keep, options.get("mask"), options.get("starts"))
    if len(choices) > before:  # of a text no longer than the window nothing is chosen
        seen = seen | pairs(choices[-1], window, inputs.q.shape[1])
    seen = seen.expand(-1, inputs.k.shape[2], -1, -1)
    exact, plainly = (results(plain(leaves[n], seen, **options, sinks=of[n]), inner[n]) for n in (0, 1))
    names = ("y", "log_mass", "seen", "dq", "dk", "dv", "dsinks")
    return list(zip(names, ours, plainly, exact, strict=False))


def assert_within_budget(
    choices: list[Choice], inputs: Inputs, dtype: torch.dtype, *sizes: int, **options: Any
) -> None:
    """At most twice the error of plain PyTorch in the same dtype."""
    found = compared(choices, inputs, dtype, *sizes, **options)
    largest = max(exact.norm() for *_, exact in found[3:])
    for name, a, b, c in found:
        scale = largest if name.startswith("d") else c.norm()
        budget = 2 * (b - c).norm() + FLOOR[dtype] * scale
        assert (a - c).norm() <= budget, f"{name}: {(a - c).norm() / scale:.1e}, PyTorch {(b - c).norm() / scale:.1e}"


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
def test_padding_documents_and_sinks(choices: list[Choice], length: int, dtype: torch.dtype) -> None:
    options = flags(length)
    options["mask"][1] = False  # a row of padding alone
    assert_within_budget(choices, draw(length), dtype, 16, 20, keep=3, sinks=4, **options)
    assert_within_budget(choices, draw(length), dtype, 30, 40, keep=3, mask=options["mask"])
    assert_within_budget(choices, draw(length), dtype, 3, 40, keep=3, sinks=1, starts=options["starts"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (9, 3), (8, 1)])
@pytest.mark.parametrize("dim", [20, 32, 64, 80, 128, 256])
def test_every_head_dim_and_grouping(
    choices: list[Choice], heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> None:
    assert_within_budget(choices, draw(600, heads=heads, kv_heads=kv_heads, dim=dim), dtype, 64, 70, keep=4)


CANARY = {torch.bfloat16: 2e-2, torch.float32: 1e-4}  # of each gradient's own norm; a product gone wrong is a tenth


@pytest.mark.parametrize("dtype", CANARY, ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_no_gradient_is_wrong_at_the_real_tile_sizes(choices: list[Choice], dim: int, dtype: torch.dtype) -> None:
    """Triton on Hopper has given wrong products of transposed fp32 accumulators (flash-linear-attention issue 640).

    Each gradient for itself, so that none hides behind a larger one; at a window and at heavy tokens that both count.
    """
    found = compared(choices, draw(2048, dim=dim), dtype, 64, 64, keep=4)
    for name, a, _, c in found[3:]:
        assert (a - c).norm() <= CANARY[dtype] * c.norm(), f"{name}: {(a - c).norm() / c.norm():.1e}"


def test_everything_is_deterministic() -> None:
    """Bit for bit, gradients too: sums have one order."""
    inputs, options = draw(2000).each(torch.bfloat16), flags(2000)
    sinks = torch.randn(3, device=DEVICE, requires_grad=True)

    def run() -> list[Tensor]:
        outputs = window_and_heavy_attention(
            *inputs, window=100, heavy=131, keep=4, sinks=sinks, impl="triton", return_state=False, **options
        )
        return results(outputs[:2], [*inputs, sinks])

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_splitting_a_sequence_changes_little(dtype: torch.dtype) -> None:
    """Nor does a fold of steps behind it."""
    inputs, options = draw(600).each(dtype), flags(600)
    sizes: dict[str, Any] = {"keep": 4, "half_life": 200.0, "impl": "triton"}
    chunks: dict[str, Any] = {**sizes, "window": 100, "heavy": 70}
    whole = window_and_heavy_attention(*inputs, **chunks, **options)
    pieces: list[Any] = []
    past = state = None
    for start, end in itertools.pairwise([0, 1, 70, 450, 600]):
        part = {name: flag[:, start:end] for name, flag in options.items()}
        tensors = [x[:, start:end] for x in inputs]
        *output, past, state = window_and_heavy_attention(*tensors, **chunks, **part, past=past, state=state)
        pieces.append(output)
    joined = tuple(torch.cat(x, 1) for x in zip(*pieces, strict=True))
    expected = results(whole[:2], inputs)
    largest = max(x.norm() for x in expected[3:])
    for a, b in zip(results(joined, inputs), expected, strict=True):
        assert (a - b).norm() <= 4 * FLOOR[dtype] * max(b.norm(), largest)
    assert_same_tokens(past, whole[2])
    assert state is not None and whole[3] is not None
    for a, b in zip(sorted_state(state), sorted_state(whole[3]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("window", "heavy", "keep", "dim"), [(30, 300, 3, 128), (128, 60, 4, 64), (70, 20, 20, 256)])
@torch.no_grad()
def test_a_fold_of_steps_is_the_whole(window: int, heavy: int, keep: int, dim: int, dtype: torch.dtype) -> None:
    length, mask = 300, flags(300)["mask"]
    inputs = draw(length, heads=9, kv_heads=3, dim=dim).each(dtype)
    options: dict[str, Any] = {"keep": keep, "sinks": torch.randn(2, device=DEVICE), "impl": "triton"}
    whole = window_and_heavy_attention(*inputs, **options, window=window, heavy=heavy, mask=mask)
    past: Any = init_window_state(2, 3, dim, window, keep, dtype, DEVICE)
    state: Any = init_state(2, 3, dim, window, heavy, dtype, DEVICE)
    outputs = []
    for t in range(length):
        one, flag = [x[:, t : t + 1] for x in inputs], mask[:, t : t + 1]
        *output, past, state = window_and_heavy_step(*one, past, state, **options, mask=flag, in_place=True)
        outputs.append(output)
    y, log_mass = (torch.cat(x, 1) for x in zip(*outputs, strict=True))
    assert (y - whole[0]).double().norm() <= 4 * FLOOR[dtype] * whole[0].double().norm()
    finite = torch.isfinite(whole[1])
    assert torch.equal(torch.isfinite(log_mass), finite)
    torch.testing.assert_close(log_mass[finite], whole[1][finite], rtol=1e-4, atol=1e-4)
    assert_same_tokens(past, whole[2])
    for a, b in zip(sorted_state(state), sorted_state(whole[3]), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_window_has_its_own_choice(choices: list[Choice]) -> None:
    """The choice goes by the window's log_mass and not by that of both: it is that of heavy attention alone."""
    from lizardzoo.kernels.heavy import ops

    q, k, v = draw(1000).each(torch.bfloat16)
    with torch.no_grad():
        window_and_heavy_attention(q, k, v, window=64, heavy=70, keep=4, return_state=False, impl="triton")
        _, log_mass, _ = window_attention(q, k, v, window=64, keep=4, return_state=False, impl="triton")
        alone = ops.compute_choice(q, k, log_mass, None, None, None, None, 64, 4, 70, 0, 0.0, 64**-0.5)
    for name, expected in alone._asdict().items():
        found, there = choices[-1][name], torch.ones_like(expected, dtype=torch.bool)
        if name == "places":
            there = alone.keys >= 0
        if name == "drawn":
            there[:, :64] = False  # before the text
        assert torch.equal(found[there], expected[there]), name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
@pytest.mark.parametrize("with_sinks", [False, True])
def test_torch_compile_takes_the_whole_graph(monkeypatch: pytest.MonkeyPatch, with_sinks: bool) -> None:
    monkeypatch.undo()
    inputs = [*draw(600).each(torch.bfloat16)]
    if with_sinks:
        inputs.append(torch.randn(2, device=DEVICE, requires_grad=True))

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return window_and_heavy_attention(
            q, k, v, window=64, heavy=70, keep=4, sinks=sinks, return_state=False, impl="triton"
        )[:2]

    eager = results(attend(*inputs), inputs)
    compiled = results(torch.compile(attend, fullgraph=True)(*inputs), inputs)
    for a, b in zip(compiled, eager, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_a_new_length_or_size_compiles_nothing() -> None:
    from lizardzoo.kernels.heavy import triton as attention

    def run(length: int, window: int, heavy: int) -> None:
        inputs = draw(length).each(torch.bfloat16)
        outputs = window_and_heavy_attention(*inputs, window=window, heavy=heavy, impl="triton")
        results(outputs[:2], inputs)

    kernels = [
        getattr(attention, f"{name}_kernel") for name in ("forward", "query_gradient", "candidate_gradient",
                                                          "token_gradient")
    ]  # fmt: skip

    def compiled() -> int:
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    run(1000, 128, 131)
    before = compiled()
    assert before > 0
    for length, window, heavy in [(1, 128, 131), (16, 16, 16), (777, 1, 1), (2048, 129, 128), (1024, 64, 200)]:
        run(length, window, heavy)
    assert compiled() == before
