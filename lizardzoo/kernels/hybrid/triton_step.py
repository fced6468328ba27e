# mypy: ignore-errors
"""Hybrid attention in Triton: one token, both branches, their merge and the state, in place, in one kernel.

A program holds one key head of a row: its rings, its memory, its G query heads. Nothing that it reads is written by
another one but two things. A log-decay that all heads share stands in a slot whose old number no head uses when head 0
writes it. And the row's `length`, which they all need: each program reads it by adding MARK to it, and the one that
finds the marks of all others there writes the next length, without marks.

Latency is what such a kernel is made of: what does not depend on the length is asked for before it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lizardzoo.kernels.gated_linear.triton import NEG_INF
from lizardzoo.kernels.gated_linear.triton_step import (
    enter_half,
    half_places,
    load_half,
    load_maps,
    log_features,
    read,
    spread,
    store_half,
)
from lizardzoo.kernels.window.triton import LOG2E, _attend, _dot, _load
from lizardzoo.kernels.window.triton_step import half_turns, kept_keys, rotated, sink_masses

MARK = tl.constexpr(1 << 32)


@triton.jit
def _tile(
    ring_k, ring_v, ring_decay, row, head, window, start, HKV: tl.constexpr, DECAYS: tl.constexpr, D: tl.constexpr,
    V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Slots start .. start + N of the rings: keys [N, BD], values [N, BV], log-decays [N] (zeros without)."""
    slot = start + tl.arange(0, N)
    place, there = row * window + slot, slot < window
    decays = tl.zeros([N], tl.float32)
    if DECAYS > 0:
        decays = tl.load(ring_decay + place * DECAYS + head * DECAYS // HKV, mask=there, other=0.0)
    place = place * HKV + head
    return _load(ring_k, place * D, there, D, BD), _load(ring_v, place * V, there, V, BV), decays


@triton.jit
def _near(peak, mass, acc, lost, tile, start, seen, window, q, k_new, v_new, inside, scale, N: tl.constexpr):
    """Attend to a tile of the window, with the new token in its slot; and what the oldest token lost in this tile."""
    k, v, decays = tile
    slot = start + tl.arange(0, N)
    here, there = slot == seen % window, (slot <= seen) & (slot < window)
    k, v = tl.where(here[:, None], k_new[None, :], k), tl.where(here[:, None], v_new[None, :], v)
    peak, mass, acc = _attend_to(peak, mass, acc, k, v, there, q, inside, scale)
    return peak, mass, acc, lost + tl.where(here, 0.0, decays)


@triton.jit
def _attend_to(peak, mass, acc, k, v, there, q, inside, scale):
    """What is not there may be anything."""
    scores = _dot(q, tl.trans(k)) * (scale * LOG2E)
    return _attend(peak, mass, acc, scores, there[None, :] & inside[:, None], tl.where(there[:, None], v, 0.0))


@triton.jit
def _kept(
    kept_k, kept_v, turn_cos, turn_sin, turn_stride, row, head, keep, start, HKV: tl.constexpr, D: tl.constexpr,
    V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Kept tokens start .. start + R: ranks, keys (turned), values."""
    r = start + tl.arange(0, R)
    place = (row * keep + r) * HKV + head
    keys = kept_keys(kept_k, turn_cos, turn_sin, row * turn_stride, place * D, r < keep, D, BD)
    return r, keys, _load(kept_v, place * V, r < keep, V, BV)


@triton.jit(do_not_specialize=["window", "keep", "skip", "sinks", "turn_stride"])
def step(
    q, k, v, near_q, near_k, cos, sin, decay, enter, log_scale, query_maps, key_maps, sink_logits, mask,
    ring_k, ring_v, kept_k, kept_v, kv, norm, memory_scale, waiting_k, ring_decay, ring_enter, length, turn_cos,
    turn_sin, y, log_mass, window, keep, skip, sinks, sink_stride, scale, table_stride, turn_stride, query_map_heads,
    key_map_heads,
    HKV: tl.constexpr, DECAYS: tl.constexpr, ENTERS: tl.constexpr, LAG: tl.constexpr, KEPT: tl.constexpr,
    D: tl.constexpr, F: tl.constexpr, F2: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr,
    BV: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, TIMES: tl.constexpr, DEPTH: tl.constexpr,
    MAP: tl.constexpr, PRECISION: tl.constexpr, N: tl.constexpr, MORE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """One token of one key head; row m of a product is query head m // TIMES of the group.

    LAG: the token that leaves the window enters the memory; otherwise the new one does. waiting_k None: the memory
    takes the keys of the window. cos, sin: near_q and near_k are rotated here; None: they are already. turn_cos,
    turn_sin: the kept keys are turned by them. MORE: the window is wider than a tile of N slots; the first is asked for
    early.
    """
    head, row = tl.program_id(0) % HKV, (tl.program_id(0) // HKV).to(tl.int64)
    own = row * HKV + head
    WAITING: tl.constexpr = DECAYS if LAG else 0
    one, g, m = tl.arange(0, 1), tl.arange(0, ROWS), tl.arange(0, ROWS * TIMES)
    d, e = tl.arange(0, BD), tl.arange(0, BV)
    real = 1
    if mask is not None:
        real = tl.load(mask + row).to(tl.int32)
    inside = m // TIMES < G * real
    places = own * G + m // TIMES

    # All that does not depend on the length, the largest first.
    query_map_at, key_map_at = ((head * G + g) % query_map_heads) * D * F, (head % key_map_heads) * D * F + one
    query_weight = load_maps(query_maps, query_map_at, g < G * real, 0, D, F, BF, DEPTH, MAP)
    at = half_places(own, 0, F, F2, V, BF, BV), half_places(own, 1, F, F2, V, BF, BV)
    plus, minus = load_half(kv, norm, memory_scale, at[0]), load_half(kv, norm, memory_scale, at[1])
    tile = _tile(ring_k, ring_v, ring_decay, row, head, window, 0, HKV, WAITING, D, V, BD, BV, N)
    key_weight = load_maps(key_maps, key_map_at, one == 0, 0, D, F, BF, DEPTH, MAP)
    if KEPT:
        r, old_keys, old_values = _kept(
            kept_k, kept_v, turn_cos, turn_sin, turn_stride, row, head, keep, 0, HKV, D, V, BD, BV, R
        )
    queries = _load(near_q, places * D, inside, D, BD)
    k_new = tl.load(near_k + own * D + d, mask=d < D, other=0.0)
    if cos is not None:
        c, s, partner = half_turns(cos, sin, row * table_stride, D, BD)
        q_other = tl.load(
            near_q + places[:, None] * D + partner[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0
        )
        k_other = tl.load(near_k + own * D + partner, mask=d < D, other=0.0)
        queries, k_new = rotated(queries, q_other, c[None, :], s[None, :]), rotated(k_new, k_other, c, s)
    v_new = tl.load(v + own * V + e, mask=e < V, other=0.0)
    own_decay, own_enter, shift = 0.0, 0.0, tl.zeros([ROWS * TIMES], tl.float32)
    if DECAYS > 0:
        own_decay = tl.load(decay + row * DECAYS + head * DECAYS // HKV)
    if ENTERS > 0:
        own_enter = tl.load(enter + own)
    if log_scale is not None:
        shift = tl.load(log_scale + places, mask=inside, other=0.0)
    if waiting_k is not None:
        waits = tl.load(k + own * D + d, mask=d < D, other=0.0)
    marked = tl.atomic_add(length + row, MARK, sem="relaxed")
    seen = marked & (MARK - 1)
    slot = (row * window + seen % window) * HKV + head

    # The token that enters the memory.
    enters, weight = seen >= skip, own_enter
    if LAG:
        enters = seen >= window + skip
        value = tl.load(ring_v + slot * V + e, mask=e < V, other=0.0)
        entering_k, key_at = ring_k, slot
        if waiting_k is not None:
            entering_k = waiting_k
        if ENTERS > 0:
            weight = tl.load(ring_enter + slot)
    else:
        value, entering_k, key_at = v_new, k, own
    enters = tl.where(real != 0, enters, False)
    plus_q, minus_q = log_features(
        query_weight, q, (own * G + g) * D, query_maps, query_map_at, g < G * real, D, F, F2, BF, DEPTH, MAP
    )

    # The window.
    lost = tl.zeros([N], tl.float32)
    peak, mass = tl.full([ROWS * TIMES], NEG_INF, tl.float32), tl.zeros([ROWS * TIMES], tl.float32)
    acc = tl.zeros([ROWS * TIMES, BV], tl.float32)
    peak, mass, acc, lost = _near(peak, mass, acc, lost, tile, 0, seen, window, queries, k_new, v_new, inside, scale, N)
    if MORE:
        for start in range(N, window, N):
            tile = _tile(ring_k, ring_v, ring_decay, row, head, window, start, HKV, WAITING, D, V, BD, BV, N)
            peak, mass, acc, lost = _near(
                peak, mass, acc, lost, tile, start, seen, window, queries, k_new, v_new, inside, scale, N
            )
    if KEPT:
        there = (r < keep) & (r <= seen - window)
        peak, mass, acc = _attend_to(peak, mass, acc, old_keys, old_values, there, queries, inside, scale)
        for start in range(R, keep, R):
            r, old_keys, old_values = _kept(
                kept_k, kept_v, turn_cos, turn_sin, turn_stride, row, head, keep, start, HKV, D, V, BD, BV, R
            )
            there = (r < keep) & (r <= seen - window)
            peak, mass, acc = _attend_to(peak, mass, acc, old_keys, old_values, there, queries, inside, scale)
    if sink_logits is not None:
        heads = head * G + m // TIMES
        peak, mass, acc = sink_masses(peak, mass, acc, sink_logits, heads, inside, sink_stride, sinks, R)

    # The memory and the rings move on.
    there = one < tl.where(enters, 1, 0)
    plus_k, minus_k = log_features(
        key_weight, entering_k, key_at * D + one, key_maps, key_map_at, there, D, F, F2, BF, DEPTH, MAP
    )
    if LAG:
        weight += tl.sum(lost, 0) + own_decay
    keeps = tl.where(real != 0, own_decay, 0.0)
    value = tl.where(enters, value.to(tl.float32), 0.0)
    plus = enter_half(plus, tl.where(enters, tl.reshape(plus_k, [BF]) + weight, NEG_INF), value, keeps)
    minus = enter_half(minus, tl.where(enters, tl.reshape(minus_k, [BF]) + weight, NEG_INF), value, keeps)
    tl.debug_barrier()  # no thread stores what another one still has to load
    store_half(kv, norm, memory_scale, at[0], plus)
    store_half(kv, norm, memory_scale, at[1], minus)
    tl.store(ring_k + slot * D + d, k_new, mask=d < D * real)
    tl.store(ring_v + slot * V + e, v_new, mask=e < V * real)
    if waiting_k is not None:
        tl.store(waiting_k + slot * D + d, waits, mask=d < D * real)
    if KEPT:
        kept_slot, kept = (row * keep + seen) * HKV + head, tl.where(seen < keep, real, 0)
        tl.store(kept_k + kept_slot * D + d, k_new, mask=d < D * kept)
        tl.store(kept_v + kept_slot * V + e, v_new, mask=e < V * kept)
    if LAG:
        if ENTERS > 0:
            tl.store(ring_enter + slot + one, own_enter + tl.zeros([1], tl.float32), mask=one < real)
        if DECAYS > 0:
            place = (row * window + seen % window) * DECAYS + head * DECAYS // HKV
            writes = tl.where(head * DECAYS % HKV == 0, real, 0)
            tl.store(ring_decay + place + one, own_decay + tl.zeros([1], tl.float32), mask=one < writes)
    if marked // MARK == HKV - 1:
        tl.store(length + row, seen + real)

    # One denominator.
    far, far_mass, far_peak = read(spread(plus_q, TIMES), spread(minus_q, TIMES), plus, minus, PRECISION)
    near_log, far_log = peak / LOG2E, tl.where(far_mass > 0, far_peak + shift, NEG_INF)
    top = tl.where(inside, tl.maximum(near_log, far_log), 0.0)
    near_share, far_share = tl.exp(near_log - top), tl.exp(far_log - top)
    total = tl.where(inside, near_share * mass + far_share * far_mass, 1.0)
    out = (acc * near_share[:, None] + far * far_share[:, None]) / total[:, None]
    out = tl.where(inside[:, None], out, 0.0)
    first = (m % TIMES == 0) & (m // TIMES < G)
    tl.store(y + places[:, None] * V + e[None, :], out.to(y.dtype.element_ty), mask=first[:, None] & (e < V)[None, :])
    tl.store(log_mass + places, tl.where(inside, tl.log(total) + top, NEG_INF), mask=first)
