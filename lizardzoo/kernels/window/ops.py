"""Sliding-window attention by the Triton kernels: checks, launches, torch ops with gradients, states."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lizardzoo.errors import LizardzooError
from lizardzoo.kernels.dispatch import Impl
from lizardzoo.kernels.launching import eager, entry, launch, power_of_2, prepared, strides, unit_stride
from lizardzoo.kernels.rows import arrange, unroll
from lizardzoo.kernels.state import overwriting, writable
from lizardzoo.kernels.window import triton as kernels
from lizardzoo.kernels.window import triton_step
from lizardzoo.kernels.window.state import next_state
from lizardzoo.kernels.window.turning import as_held, turned

INTERPRETED = kernels.INTERPRETED.value  # TRITON_INTERPRET=1
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_DIM = 256
KEPT_BLOCK = 16  # kept tokens a tile: few, and no dot takes fewer
# Kernel -> (bytes of a number, head_dim up to) -> query rows M, keys N, warps, stages. Measured on an H100 (bf16,
# window 128, 4 query heads a key head, head_dim 64, 128): small tiles win, since most of a large tile is outside
# the window, and more programs hide each other's loads (forward, head_dim 128: 0.23 ms with 64 rows, 0.27 with 128).
# For 256 and fp32: what the registers hold. A third number: for devices with less shared memory (`launching.device`),
# by what it holds (benchmarks/shared_memory.py).
TILES: dict[str, dict[tuple[int, ...], tuple[int, int, int, int]]] = {
    "forward": {(2, 64): (64, 32, 4, 3), (2, 128): (64, 32, 4, 3), (2, 256): (64, 32, 4, 2),
                (4, 64): (64, 32, 4, 2), (4, 128): (32, 32, 8, 2), (4, 256): (16, 16, 4, 1)},
    "query": {(2, 64): (64, 32, 4, 3), (2, 128): (64, 32, 4, 2), (2, 256): (64, 32, 8, 1), (2, 256, 99): (32, 32, 8, 1),
              (4, 64): (32, 32, 8, 1), (4, 128): (32, 16, 8, 1), (4, 256): (16, 16, 4, 1)},
    "key": {(2, 64): (64, 64, 4, 2), (2, 128): (32, 64, 4, 2), (2, 256): (32, 64, 8, 1), (2, 256, 99): (32, 32, 8, 1),
            (4, 64): (32, 32, 4, 1), (4, 128): (16, 32, 8, 1), (4, 256): (16, 16, 4, 1)},
}  # fmt: skip
# Registers of a thread at most, where the compiler takes more by itself and none spill: for a fourth block.
REGISTERS = {("query", 2, 64): 128}
# Kept tokens are seen by every later query of their document. Their gradients are summed over the tiles of chunks of
# this many queries in parallel, then over the chunks, always in the same order. A tile has a divisor of it as rows.
CHUNK = 32 if INTERPRETED else 256
SUMMED = 128  # numbers of a program that sums over tiles


def check(op: str, q: Tensor, v: Tensor) -> None:
    """What these kernels do not take."""
    way_out = "pass impl='reference'"
    if q.dtype not in DTYPES:
        raise LizardzooError(f"{op}: triton computes in bfloat16, float16 or float32, got {q.dtype}; {way_out}")
    if max(q.shape[-1], v.shape[-1]) > MAX_DIM:
        raise LizardzooError(
            f"{op}: triton has head_dim up to {MAX_DIM}, got {q.shape[-1]} and {v.shape[-1]}; {way_out}"
        )


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _sizes(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None) -> dict[str, Any]:
    """Compile-time sizes that every kernel takes. Dots need sides of at least 16 and powers of two."""
    return {
        "HKV": k.shape[2],
        "G": q.shape[2] // k.shape[2],
        "DK": q.shape[3],
        "DV": v.shape[3],
        "BLOCK_DK": power_of_2(q.shape[3]),
        "BLOCK_DV": power_of_2(v.shape[3]),
        "DOCUMENTS": first is not None and first.ndim == 2,
    }


def _tiles(kernel: str, q: Tensor, v: Tensor) -> tuple[dict[str, int], dict[str, int | None]]:
    """M and N of a kernel; warps, stages and registers."""
    if INTERPRETED:
        return {"M": 16, "N": 16}, {}  # small inputs then have several tiles
    dim = max(64, power_of_2(max(q.shape[3], v.shape[3])))
    size = q.element_size()
    rows, keys, warps, stages = entry(TILES[kernel], size, dim, q.device)
    options = {"num_warps": warps, "num_stages": stages, "maxnreg": REGISTERS.get((kernel, size, dim))}
    return {"M": rows, "N": keys}, options


SIGNATURE = "Tensor q, Tensor k, Tensor v, Tensor? sink, Tensor? first, Tensor? lengths"
NUMBERS = "SymInt window, SymInt keep, SymInt offset, float scale"


def attend(q, k, v, sink, first, lengths, window, keep, offset, scale):
    """y, log_mass; in a `prepared` function.

    k, v [B, offset + T, Hkv, D], with `unit_stride` as q; sink [H]; first [B] or [B, T], lengths [B]: int32.
    """
    batch, count, heads, _ = q.shape
    y, log_mass = q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=torch.float32)
    tiles, options = _tiles("forward", q, v)
    launch(
        kernels.forward_kernel, (batch * k.shape[2] * _cdiv(count * (heads // k.shape[2]), tiles["M"]),),
        (q, k, v, sink, first, lengths, y, log_mass), (count, window, keep, offset, scale, *strides(q, k, v)),
        {**_sizes(q, k, v, first), "KEEP": keep > 0, **tiles, "R": KEPT_BLOCK}, **options,
    )  # fmt: skip
    return y, log_mass


_attend = prepared(attend)


def compute(q, k, v, *rest):
    """y, log_mass of one call."""
    return _attend(unit_stride(q), unit_stride(k), unit_stride(v), *rest)


_attention = torch.library.custom_op(
    "lizardzoo::window_attention", compute, mutates_args=(), schema=f"({SIGNATURE}, {NUMBERS}) -> (Tensor, Tensor)"
)


@_attention.register_fake
def _(q, k, v, sink, first, lengths, window, keep, offset, scale):
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


def gradients(q, k, v, sink, first, lengths, y, log_mass, dy, dlog_mass, window, keep, offset, scale):
    """Gradients of q, k and v, and delta = dy.y - dlog_mass; in a `prepared` function.

    q, k, v as in `attend`, the others contiguous. y and log_mass may be those of a larger sum that has other terms
    beside the window's.
    """
    batch, count, heads, _ = q.shape
    kv_heads, groups = k.shape[2], heads // k.shape[2]
    delta = log_mass.new_empty(log_mass.shape)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    numbers = (count, window, keep, offset, scale, *strides(q, k, v))
    sizes = _sizes(q, k, v, first)
    tiles, options = _tiles("query", q, v)
    chunks, in_chunk = _cdiv(count, CHUNK) - 1 if keep else 0, CHUNK * groups // tiles["M"]
    columns, grid, width = batch * kv_heads, _cdiv(count * groups, tiles["M"]), keep * (k.shape[3] + v.shape[3])
    later = grid - in_chunk if chunks else 0
    parts, sums = (q.new_empty((columns, n, width), dtype=torch.float32) for n in (later, chunks))
    launch(
        kernels.query_gradient_kernel, (columns * grid,),
        (q, k, v, first, lengths, y, log_mass, dy, dlog_mass, delta, dq, parts), numbers,
        {**sizes, "KEEP": keep > 0, **tiles, "R": KEPT_BLOCK, "C": CHUNK}, **options,
    )  # fmt: skip
    if chunks:
        launch(
            kernels.sum_parts_kernel, (columns * chunks, _cdiv(width, SUMMED)), (parts, sums), (later, width),
            {"TILES": in_chunk, "BLOCK": SUMMED}, num_warps=1,
        )  # fmt: skip
    tiles, options = _tiles("key", q, v)
    launch(
        kernels.key_gradient_kernel, (columns * _cdiv(offset + count, tiles["N"]),),
        (q, k, v, first, lengths, log_mass, dy, delta, sums, dk, dv), numbers,
        {**sizes, "KEEP": keep > 0, **tiles, "C": CHUNK}, **options,
    )  # fmt: skip
    return dq, dk, dv, delta


def sink_gradient(sink, log_mass, delta):
    """The gradient of sink [H], None without one; log_mass and delta [B, T, H]."""
    if sink is None:
        return None
    share = torch.where(torch.isfinite(log_mass), (sink - log_mass).exp(), 0.0)
    return -torch.where(share > 0, share * delta, 0.0).sum((0, 1))


_gradients = prepared(gradients)


def compute_backward(q, k, v, sink, first, lengths, y, log_mass, dy, dlog_mass, *numbers):
    """Gradients of q, k, v, and of sink (empty without one)."""
    dlog_mass = None if dlog_mass is None else dlog_mass.contiguous()
    dq, dk, dv, delta = _gradients(
        unit_stride(q), unit_stride(k), unit_stride(v), sink, first, lengths, y, log_mass, dy.contiguous(), dlog_mass,
        *numbers,
    )  # fmt: skip
    dsink = sink_gradient(sink, log_mass, delta)
    return dq, dk, dv, q.new_empty(0, dtype=torch.float32) if dsink is None else dsink


_backward = torch.library.custom_op(
    "lizardzoo::window_attention_backward",
    compute_backward,
    mutates_args=(),
    schema=f"({SIGNATURE}, Tensor y, Tensor log_mass, Tensor dy, Tensor? dlog_mass, {NUMBERS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)


@_backward.register_fake
def _(q, k, v, sink, first, lengths, y, log_mass, dy, dlog_mass, window, keep, offset, scale):
    dsink = q.new_empty(0 if sink is None else sink.shape[0], dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsink


def _setup_context(ctx, inputs, output):
    q, k, v, sink, first, lengths, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, sink, first, lengths, *output)
    ctx.set_materialize_grads(False)


def _autograd(backward, ctx, dy, dlog_mass):
    q, k, v, sink, first, lengths, y, log_mass = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(y)
    dq, dk, dv, dsink = backward(q, k, v, sink, first, lengths, y, log_mass, dy, dlog_mass, *ctx.numbers)
    return dq, dk, dv, None if sink is None else dsink, *[None] * 6


_attention.register_autograd(partial(_autograd, _backward), setup_context=_setup_context)


_eager = eager(compute, _setup_context, partial(_autograd, compute_backward))


class Placed(NamedTuple):
    """A state's tokens before the new ones, and where rows and documents begin and end, as the kernels take it."""

    k: Tensor
    v: Tensor
    sink: Tensor | None
    first: Tensor | None
    lengths: Tensor | None
    offset: int


def bounds(rows, packed, length, count):
    """Where documents begin and rows end, as kernels take it: `first` [B, T] or [B], `lengths` [B], int32 or None.

    length [B]: what the incoming state has seen, None without one.
    """
    first = lengths = None
    if rows is not None and rows.order is not None:
        lengths = rows.lengths.int()
    if packed:
        first = (torch.arange(count, device=rows.rank.device) - rows.rank).int()
    elif length is not None:
        first = -length.int()
    return first, lengths


def place(k, v, sinks, heads, rows, packed, state, held=None):
    """k, v [B, T, Hkv, D], packed as `rows` says; packed: whether documents begin inside of them.

    held: k, v of tokens that no window sees, which stand between a state's kept ones and its ring.
    """
    count = k.shape[1]
    first, lengths = bounds(rows, packed, None if state is None else state.length, count)
    if state is not None:
        ring_k, ring_v = unroll(state.k, state.length), unroll(state.v, state.length)
        held_k, held_v = ([], []) if held is None else ([held[0]], [held[1]])
        k = torch.cat([state.kept_k, *held_k, ring_k, k], 1)
        v = torch.cat([state.kept_v, *held_v, ring_v, v], 1)
    sink = None
    if sinks is not None:  # a finite floor: the gradient of a logsumexp of -inf alone is NaN
        sink = sinks.float().clamp(min=-1e37).logsumexp(-1).expand(heads).contiguous()
    return Placed(k, v, sink, first, lengths, k.shape[1] - count)


def chunked(q, k, v, window, keep, sinks, scale, mask, starts, state, return_state):
    """All tokens of a sequence; see `lizardzoo.kernels.window.window_attention`."""
    rows = None
    if mask is not None or starts is not None:
        rows = arrange(q, mask, starts, None if state is None else state.length)
        q, k, v = rows.pack(q), rows.pack(k), rows.pack(v)
    *near, offset = place(k, v, sinks, q.shape[2], rows, starts is not None, state)
    run: Any = _attention if torch.compiler.is_compiling() else _eager
    y, log_mass = run(q, *near, window, keep, offset, float(scale))
    new_state = next_state(k, v, rows, state, window, keep) if return_state else None
    if rows is not None:
        y, log_mass = rows.unpack(y), rows.unpack(log_mass)
    return y, log_mass, new_state


def turn_tables(turn, keep):
    """cos and sin as steps take them, contiguous; without kept keys there is nothing to turn."""
    return (None, None) if turn is None or keep == 0 else tuple(x.contiguous() for x in turn)


def table_stride(cos):
    """From row to row of a contiguous table [B or 1, 1, D], 0 where all rows have one."""
    return 0 if cos is None or cos.shape[0] == 1 else cos.shape[2]


@prepared
def _launch_step(q, k, v, ring_k, ring_v, kept_k, kept_v, length, sinks, mask, cos, sin, scale):
    (batch, _, heads, _), kv_heads = q.shape, k.shape[2]
    y, log_mass = q.new_empty((batch, 1, heads, v.shape[3])), q.new_empty((batch, 1, heads), dtype=torch.float32)
    shape = {name: value for name, value in _sizes(q, k, v, None).items() if name != "DOCUMENTS"}
    wide = max(shape["BLOCK_DK"], shape["BLOCK_DV"]) * q.element_size()  # N: what the shared memory holds, two stages
    tile = {
        "M": power_of_2(heads // kv_heads),
        "N": 16 if INTERPRETED else min(64, max(16, 8192 // wide)),
    }
    launch(
        triton_step.step_kernel, (batch * kv_heads,),
        (q, k, v, ring_k, ring_v, kept_k, kept_v, length, sinks, mask, cos, sin, y, log_mass),
        (ring_k.shape[1], kept_k.shape[1], 0 if sinks is None else sinks.shape[-1], scale,
         *(x.stride(axis) for x in (q, k, v) for axis in (0, 2)),
         0 if sinks is None or sinks.ndim == 1 else sinks.shape[-1], table_stride(cos)),
        {**shape, **tile, "R": KEPT_BLOCK}, num_warps=4, num_stages=2,
    )  # fmt: skip
    return y, log_mass


def compute_step(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, kept_k: Tensor, kept_v: Tensor, length: Tensor,
    sinks: Tensor | None, mask: Tensor | None, cos: Tensor | None, sin: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y, log_mass; the (contiguous) state moves on in place. cos, sin: see `turn_tables`."""
    sinks, mask = (None if x is None else x.contiguous() for x in (sinks, mask))
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    y, log_mass = _launch_step(q, k, v, ring_k, ring_v, kept_k, kept_v, length, sinks, mask, cos, sin, scale)
    length += 1 if mask is None else mask[:, 0]
    return y, log_mass


_step = torch.library.custom_op(
    "lizardzoo::window_attention_step",
    compute_step,
    mutates_args=("ring_k", "ring_v", "kept_k", "kept_v", "length"),
)


@_step.register_fake
def _(q, k, v, *_):
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


def step(q, k, v, keep, sinks, scale, mask, turn, state, in_place):
    """One token; see `lizardzoo.kernels.window.window_attention_step`.

    One kernel launch, without a graph; where a gradient is wanted, the kernels of a whole sequence do it.
    """
    inputs = (q, k, v, sinks, *state[:4])
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        near = turned(state, turn, Impl.TRITON)
        *found, new = chunked(q, k, v, state.k.shape[1], keep, sinks, scale, mask, None, near, True)
        return *found, new if near is state else as_held(new, state)
    state = writable("window_attention", state, in_place)
    tables = turn_tables(turn, keep)
    found = overwriting(_step, compute_step, state, q, k, v, *state, sinks, mask, *tables, float(scale))
    return *found, state
