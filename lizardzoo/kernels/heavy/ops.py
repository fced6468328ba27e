"""Heavy attention by the Triton kernels: launches, torch ops with gradients, states."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lizardzoo.kernels.heavy import triton as kernels
from lizardzoo.kernels.heavy import triton_choice as choice
from lizardzoo.kernels.heavy.state import by_score, drawn_ring, init_state, next_state
from lizardzoo.kernels.launching import eager, entry, launch, power_of_2, prepared, strides, unit_stride
from lizardzoo.kernels.rows import arrange, is_whole, last_document, ring_of, unroll
from lizardzoo.kernels.window import ops as window_ops

OP = "heavy_attention"
INTERPRETED = window_ops.INTERPRETED
CHUNK = 16 if INTERPRETED else 128
# Kernel -> (bytes of a number, head_dim up to) -> query rows M, keys N, warps, stages. benchmarks/tune.py chose (2, 64)
# and (2, 128) on an H200; the others are the window's where the registers hold them.
TILES: dict[str, dict[tuple[int, ...], tuple[int, int, int, int]]] = {
    "drawn": {(2, 64): (64, 64, 4, 3), (2, 128): (64, 64, 4, 2), (2, 256): (64, 64, 8, 1),
              (4, 64): (32, 32, 4, 2), (4, 128): (32, 32, 8, 1), (4, 256): (16, 16, 4, 1)},
    "forward": {(2, 64): (64, 32, 4, 2), (2, 128): (128, 32, 4, 3), (2, 256): (64, 32, 8, 2),
                (4, 64): (64, 32, 8, 2), (4, 128): (32, 32, 8, 2), (4, 256): (16, 16, 8, 1)},
    "query": {(2, 64): (64, 32, 4, 2), (2, 128): (128, 32, 4, 3), (2, 256): (32, 32, 8, 1),
              (4, 64): (32, 32, 8, 1), (4, 128): (16, 16, 8, 1), (4, 256): (16, 16, 8, 1)},
    "candidate": {(2, 64): (32, 64, 4, 3), (2, 128): (32, 64, 4, 3), (2, 256): (32, 32, 8, 1),
                  (4, 64): (32, 32, 8, 1), (4, 128): (16, 32, 8, 1), (4, 256): (16, 16, 4, 1)},
}  # fmt: skip


def check(op: str, q: Tensor, v: Tensor) -> None:
    """What these kernels do not take is what the window's do not."""
    window_ops.check(op, q, v)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _tiles(kernel: str, q: Tensor, v: Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """M and N of a kernel; warps and stages."""
    if INTERPRETED:
        return {"M": 16, "N": 16}, {}
    dim = max(64, power_of_2(max(q.shape[3], v.shape[3])))
    rows, keys, warps, stages = entry(TILES[kernel], q.element_size(), dim, q.device)
    return {"M": rows, "N": keys}, {"num_warps": warps, "num_stages": stages}


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    """Compile-time sizes that every kernel of the attention takes."""
    sizes = {"HKV": k.shape[2], "G": q.shape[2] // k.shape[2], "DK": q.shape[3], "DV": v.shape[3]}
    return sizes | {"BLOCK_DK": power_of_2(q.shape[3]), "BLOCK_DV": power_of_2(v.shape[3]), "C": CHUNK}


class Choice(NamedTuple):
    """Who is held when; N chunks of C tokens.

    Attributes:
        keys, places: [B, Hkv, N + 1, heavy], of what is held when each chunk begins, and behind all.
        times, following: [B, Hkv, N, heavy + C] int32, of each chunk's candidates; see `triton_choice.times_kernel`.
        entries: [B, Hkv, T] int32, which candidate of its own chunk the token at each slot of the stream is.
        counts: [B, Hkv, N] int32, of candidates.
        drawn: [B, window + T, Hkv], of the state's window and the new tokens.
    """

    keys: Any
    places: Any
    times: Any
    following: Any
    entries: Any
    counts: Any
    drawn: Any

    @property
    def candidates(self) -> tuple[Any, ...]:
        """What attention to them reads: places, times, following, entries, counts."""
        return self[1:6]


def choose(q, k, log_mass, before, past, first, lengths, window, keep, heavy, offset, fade, scale):
    """A `Choice`; in a `prepared` function.

    Args:
        q, k, log_mass: [B, T, H, D], [B, offset + T, Hkv, D], with `unit_stride`; [B, T, H] fp32.
        before: [B, window, Hkv], what the state's tokens have drawn, oldest first.
        past: [B, Hkv, heavy], keys of what the state holds, best first (see `triton_choice.py`).
        first, lengths: see `window.ops.bounds`.
    """
    batch, count, heads, dim = q.shape
    kv_heads, documents = k.shape[2], first is not None and first.ndim == 2
    lines, chunks = batch * kv_heads, _cdiv(count, CHUNK)
    integers = partial(q.new_empty, dtype=torch.int32)
    whole = torch.int64 if documents else torch.int32
    stream = integers((batch, kv_heads, count), dtype=whole)
    drawn = q.new_empty((batch, window + count, kv_heads), dtype=torch.float32)
    tiles, options = _tiles("drawn", q, k)
    launch(
        choice.drawn_kernel, (lines * _cdiv(window + count, tiles["N"]),),
        (q, k, log_mass, before, first, lengths, stream, drawn),
        (count, window, keep, offset, fade, scale, *strides(q, k)),
        {"HKV": kv_heads, "G": heads // kv_heads, "DK": dim, "BLOCK_DK": power_of_2(dim), "DOCUMENTS": documents,
         **tiles}, **options,
    )  # fmt: skip

    shape = (batch, kv_heads, chunks + 1, heavy)
    keys, places = integers(shape, dtype=whole), integers(shape)
    launch(
        choice.sort_kernel, (lines * (chunks + 1),), (stream, past, keys, places),
        (count, heavy), {"C": CHUNK}, num_warps=4,
    )  # fmt: skip
    tile, reach = 16 if INTERPRETED else min(128, power_of_2(heavy)), 1
    other_keys, other_places = integers(shape, dtype=whole), integers(shape)
    while reach <= chunks:  # doubles how many chunks back a list has seen
        launch(
            choice.merge_kernel, (lines * (chunks + 1) * _cdiv(heavy, tile),),
            (keys, places, other_keys, other_places), (chunks + 1, heavy, reach), {"J": tile}, num_warps=4,
        )  # fmt: skip
        keys, places, other_keys, other_places = other_keys, other_places, keys, places
        reach *= 2
    times, following = (integers((batch, kv_heads, chunks, heavy + CHUNK)) for _ in range(2))
    entries, counts = integers((batch, kv_heads, count)), integers((batch, kv_heads, chunks))
    launch(
        choice.times_kernel, (lines * chunks * (_cdiv(heavy, CHUNK) + 1),),
        (stream, keys, first, times, following, entries, counts), (count, heavy),
        {"HKV": kv_heads, "DOCUMENTS": documents, "C": CHUNK}, num_warps=4,
    )  # fmt: skip
    return Choice(keys, places, times, following, entries, counts, drawn)


_choose = prepared(choose)


def compute_choice(q, k, *rest):
    """What `choose` gives, of one call."""
    return Choice(*_choose(unit_stride(q), unit_stride(k), *rest))


_choice = torch.library.custom_op(
    "lizardzoo::heavy_choice",
    compute_choice,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor log_mass, Tensor? before, Tensor? past, Tensor? first, Tensor? lengths,"
    " SymInt window, SymInt keep, SymInt heavy, SymInt offset, float fade, float scale)"
    f" -> ({', '.join(['Tensor'] * len(Choice._fields))})",
)


def fake_choice(q, k, first, window, heavy):
    """Empty outputs as those of `choose`."""
    batch, count, kv_heads = q.shape[0], q.shape[1], k.shape[2]
    chunks = (count + CHUNK - 1) // CHUNK
    whole = torch.int64 if first is not None and first.ndim == 2 else torch.int32
    lists, candidates = (batch, kv_heads, chunks + 1, heavy), (batch, kv_heads, chunks, heavy + CHUNK)
    shapes = (lists, candidates, candidates, (batch, kv_heads, count), (batch, kv_heads, chunks))
    drawn = q.new_empty((batch, window + count, kv_heads), dtype=torch.float32)
    return q.new_empty(lists, dtype=whole), *(q.new_empty(shape, dtype=torch.int32) for shape in shapes), drawn


@_choice.register_fake
def _(q, k, log_mass, before, past, first, lengths, window, keep, heavy, *_):
    return fake_choice(q, k, first, window, heavy)


def attend(q, k, v, places, times, following, entries, counts, lengths, shift, scale, near=(None, None)):
    """y, log_mass of q [B, T, H, D] on what `choose` found; place p is row p + shift of k and v; `prepared`.

    near: y, log_mass of other keys under the same denominator.
    """
    (batch, count, heads, _), (_, kv_heads, lists, heavy) = q.shape, places.shape
    y, log_mass = q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=torch.float32)
    tiles, options = _tiles("forward", q, v)
    launch(
        kernels.forward_kernel, (batch * kv_heads * (lists - 1) * _cdiv(CHUNK * (heads // kv_heads), tiles["M"]),),
        (q, k, v, places, times, counts, lengths, *near, y, log_mass),
        (count, heavy, shift, scale, *strides(q, k, v)), {**_sizes(q, k, v), **tiles}, **options,
    )  # fmt: skip
    return y, log_mass


_attend = prepared(attend)


def compute(q, k, v, *rest):
    """y, log_mass of one call."""
    return _attend(unit_stride(q), unit_stride(k), unit_stride(v), *rest)


CANDIDATES = "Tensor places, Tensor times, Tensor following, Tensor entries, Tensor counts"
SIGNATURE = f"Tensor q, Tensor k, Tensor v, {CANDIDATES}, Tensor? lengths"
_attention = torch.library.custom_op(
    "lizardzoo::heavy_attention",
    compute,
    mutates_args=(),
    schema=f"({SIGNATURE}, SymInt shift, float scale) -> (Tensor, Tensor)",
)


@_attention.register_fake
def _(q, k, v, *_):
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


def gradients(
    q, k, v, places, times, following, entries, counts, lengths, y, log_mass, dy, dlog_mass, shift, scale, near=None
):
    """Gradients of q, k and v, which have `unit_stride`; the others are contiguous; `prepared`.

    near: what other keys under the same denominator give to dq, dk and dv, which is added to in its place, and delta;
    then y and dlog_mass are not read.
    """
    (batch, count, heads, _), (_, kv_heads, lists, heavy) = q.shape, places.shape
    lines, chunks, total, sizes = batch * kv_heads, lists - 1, k.shape[1], _sizes(q, k, v)
    if near is None:
        delta = log_mass.new_empty(log_mass.shape)
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    else:
        y, dlog_mass, (dq, dk, dv, delta) = None, None, near
    numbers = (count, heavy, shift, scale, *strides(q, k, v))
    tiles, options = _tiles("query", q, v)
    launch(
        kernels.query_gradient_kernel, (lines * chunks * _cdiv(CHUNK * (heads // kv_heads), tiles["M"]),),
        (q, k, v, places, times, counts, lengths, y, log_mass, dy, dlog_mass, delta, dq), numbers, {**sizes, **tiles},
        **options,
    )  # fmt: skip
    part_k, part_v = (x.new_empty((*times.shape, x.shape[3]), dtype=torch.float32) for x in (k, v))  # of each chunk
    tiles, options = _tiles("candidate", q, v)
    launch(
        kernels.candidate_gradient_kernel, (lines * chunks * _cdiv(heavy + CHUNK, tiles["N"]),),
        (q, k, v, places, times, counts, lengths, log_mass, dy, delta, part_k, part_v), numbers, {**sizes, **tiles},
        **options,
    )  # fmt: skip
    tile = 16 if INTERPRETED or max(sizes["BLOCK_DK"], sizes["BLOCK_DV"]) > 128 else 32
    sizes.pop("G")
    launch(
        kernels.token_gradient_kernel, (lines * _cdiv(total, tile),),
        (following, entries, part_k, part_v, dk, dv), (count, heavy, shift, total),
        {**sizes, "N": tile, "ADD": near is not None}, num_warps=4,
    )  # fmt: skip
    return dq, dk, dv


_gradients = prepared(gradients)


def compute_backward(q, k, v, places, times, following, entries, counts, lengths, y, log_mass, dy, dlog_mass, *numbers):
    """Gradients of q, k and v, of one call."""
    dlog_mass = None if dlog_mass is None else dlog_mass.contiguous()
    return _gradients(
        unit_stride(q), unit_stride(k), unit_stride(v), places, times, following, entries, counts, lengths, y, log_mass,
        dy.contiguous(), dlog_mass, *numbers,
    )  # fmt: skip


_backward = torch.library.custom_op(
    "lizardzoo::heavy_attention_backward",
    compute_backward,
    mutates_args=(),
    schema=f"({SIGNATURE}, Tensor y, Tensor log_mass, Tensor dy, Tensor? dlog_mass, SymInt shift, float scale)"
    " -> (Tensor, Tensor, Tensor)",
)


@_backward.register_fake
def _(q, k, v, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.shift, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _autograd(backward, ctx, dy, dlog_mass):
    *tensors, y, log_mass = ctx.saved_tensors
    dy = torch.zeros_like(y) if dy is None else dy
    return *backward(*tensors, y, log_mass, dy, dlog_mass, ctx.shift, ctx.scale), *[None] * 8


_attention.register_autograd(partial(_autograd, _backward), setup_context=_setup_context)


_eager = eager(compute, _setup_context, partial(_autograd, compute_backward))


def chunked(q, k, v, log_mass, window, keep, heavy, fade, scale, mask, starts, past, state, return_state):
    """All tokens of a sequence; see `lizardzoo.kernels.heavy.heavy_attention`."""
    count, seen = q.shape[1], past.length if past is not None else None
    if seen is None and not return_state and count <= window + keep:  # nothing can have left the window
        return (
            q.new_zeros(*q.shape[:3], v.shape[3]),
            torch.full_like(log_mass, float("-inf"), dtype=torch.float32),
            None,
        )
    rows = None
    if mask is not None or starts is not None:
        rows = arrange(q, mask, starts, seen)
        q, k, v, log_mass = (rows.pack(x) for x in (q, k, v, log_mass))
    first, lengths = window_ops.bounds(rows, starts is not None, seen, count)
    before = keys_before = ranks = None
    offset = 0
    if seen is not None:
        held_k, held_v, score, ranks = by_score(state)
        k = torch.cat([held_k, unroll(past.k, seen), k], 1)
        v = torch.cat([held_v, unroll(past.v, seen), v], 1)
        before, keys_before = unroll(state.drawn, seen), keys_of(score, starts is not None)
        offset = heavy + window
    shift = offset - heavy - window
    compiling = torch.compiler.is_compiling()
    with torch.no_grad():
        found = Choice(*(_choice if compiling else compute_choice)(
            q.detach(), k.detach(), log_mass.detach().float().contiguous(), before, keys_before, first, lengths, window,
            keep, heavy, offset, float(fade), float(scale),
        ))  # fmt: skip
    run: Any = _attention if compiling else _eager
    y, mass = run(q, k, v, *found.candidates, lengths, shift, float(scale))

    new_state = None
    if return_state:
        new_state = held_after(k, v, found, rows, first, seen, ranks, window, keep, shift)
    if rows is not None:
        y, mass = rows.unpack(y), rows.unpack(mass)
    return y, mass, new_state


def held_after(k, v, found, rows, first, seen, ranks, window, keep, shift):
    """The state behind a call, of what `choose` gave; place p is row p + shift of k and v.

    seen [B], ranks [B, heavy, Hkv] as `by_score` has them: of the state before, None without one.
    """
    drawn, heavy, count = found.drawn.detach(), found.keys.shape[3], found.drawn.shape[1] - window
    whole = is_whole(rows, seen)
    if whole and count <= window + keep:  # nothing has left the window
        sizes = (k.shape[0], k.shape[2], k.shape[3], window, heavy)
        return init_state(*sizes, k.dtype, k.device, v.shape[3])._replace(drawn=ring_of(drawn[:, window:], window))
    last, best = found.places[:, :, -1].transpose(1, 2).long(), found.keys[:, :, -1].transpose(1, 2)
    there = best >= 0
    if first is not None and first.ndim == 2:
        there = there & (best >> 32 == (first[:, -1].clamp(min=-1) + 1)[:, None, None])
    score = torch.where(there, (best & 0x7FFFFFFF).int().view(torch.float32), float("-inf"))
    index = (last + shift).clamp(0, k.shape[1] - 1)
    if whole:
        return next_state(k, v, index, score, last - heavy - window, ring_of(drawn[:, window:], window))
    if seen is None:
        seen = torch.zeros(k.shape[0], dtype=torch.long, device=k.device)
    began, length = last_document(rows, count, seen)
    rank = last - heavy - window - began[:, None, None]
    if ranks is not None:
        rank = torch.where(last < heavy, ranks.gather(1, last.clamp(0, heavy - 1)), rank)
    return next_state(k, v, index, score, rank, drawn_ring(drawn, began, length, window))


def keys_of(score: Tensor, documents: bool) -> Tensor:
    """What `triton_found.py` compares, [B, Hkv, heavy], of scores [B, heavy, Hkv]; -inf: nothing is held."""
    keys = score.float().contiguous().view(torch.int32)
    keys = torch.where(score == float("-inf"), -1, keys.clamp(min=0)).transpose(1, 2).contiguous()
    return keys.long() if documents else keys
