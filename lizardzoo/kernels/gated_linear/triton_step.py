# mypy: ignore-errors
"""Gated linear attention in Triton: one token, in place.

Features come as two halves, those of z = xW and those of -z, each a row of BF numbers. A program holds one head of the
memory and reads it with that head's G query heads at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lizardzoo.kernels.gated_linear.triton import NEG_INF, _finite


@triton.jit
def _log_softmax(z):
    z -= tl.max(z, 1)[:, None]
    return z - tl.log(tl.sum(tl.exp(z), 1))[:, None]


@triton.jit
def load_maps(
    maps, map_at, inside, start, D: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, DEPTH: tl.constexpr,
    MAP: tl.constexpr,
):  # fmt: skip
    """Rows start .. start + DEPTH of the weights [D, F] at maps + map_at: [ROWS, DEPTH, BF]; 0 without maps."""
    if MAP == "none":
        return 0
    d, f = start + tl.arange(0, DEPTH), tl.arange(0, BF)
    there = (inside[:, None] & (d < D)[None, :])[:, :, None] & (f < F)[None, None, :]
    place = maps + map_at[:, None, None] + d[None, :, None] * F + f[None, None, :]
    return tl.load(place, mask=there, other=0.0)


@triton.jit
def log_features(
    weight, x, at, maps, map_at, inside, D: tl.constexpr, F: tl.constexpr, F2: tl.constexpr, BF: tl.constexpr,
    DEPTH: tl.constexpr, MAP: tl.constexpr,
):  # fmt: skip
    """log phi of the vectors [D] at x + at, both halves [ROWS, BF]; -inf in padded features.

    weight: the first of what `load_maps` loads, asked for early, since it is the most that a step reads.
    """
    f = tl.arange(0, BF)
    if MAP == "none":
        place = x + at[:, None] + f[None, :]
        plus = tl.load(place, mask=inside[:, None] & (f < F)[None, :], other=NEG_INF).to(tl.float32)
        minus = tl.load(place + F, mask=inside[:, None] & (f < F2 - F)[None, :], other=NEG_INF).to(tl.float32)
    else:
        d = tl.arange(0, DEPTH)
        vector = tl.load(x + at[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
        z = tl.sum(vector.to(tl.float32)[:, :, None] * weight.to(tl.float32), 1)
        for start in tl.static_range(DEPTH, D, DEPTH):
            weight = load_maps(maps, map_at, inside, start, D, F, BF, DEPTH, MAP)
            there = inside[:, None] & (start + d < D)[None, :]
            vector = tl.load(x + at[:, None] + start + d[None, :], mask=there, other=0.0)
            z += tl.sum(vector.to(tl.float32)[:, :, None] * weight.to(tl.float32), 1)
        plus, minus = tl.where((f < F)[None, :], z, NEG_INF), tl.where((f < F)[None, :], -z, NEG_INF)
        if MAP == "softmax":
            plus, minus = _log_softmax(plus), _log_softmax(minus)
    return plus, minus


@triton.jit
def half_places(at, half, F: tl.constexpr, F2: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr):
    """Offsets in norm and scale [BF] and in kv [BF, BV] of one half of the memory of head `at`, and their masks."""
    f, e = tl.arange(0, BF), tl.arange(0, BV)
    row = at * F2 + half * F + f
    there = (f < F) & (f < F2 - half * F)
    return row, row[:, None] * V + e[None, :], there, there[:, None] & (e < V)[None, :]


@triton.jit
def load_half(kv, norm, scale, places):
    """One half of the memory: kv [BF, BV], norm and scale [BF]."""
    row, matrix, there, inside = places
    mass = tl.load(norm + row, mask=there, other=0.0)
    return tl.load(kv + matrix, mask=inside, other=0.0), mass, tl.load(scale + row, mask=there, other=NEG_INF)


@triton.jit
def store_half(kv, norm, scale, places, memory):
    """What `load_half` loads."""
    row, matrix, there, inside = places
    tl.store(kv + matrix, memory[0], mask=inside)
    tl.store(norm + row, memory[1], mask=there)
    tl.store(scale + row, memory[2], mask=there)


@triton.jit
def enter_half(memory, log_k, value, keep):
    """exp(keep) times one half of the memory, and the entering token: its log-features with its log-weight, its value.

    At a common scale for each feature, as in the reference.
    """
    kv, norm, scale = memory
    kept = scale + keep
    top = tl.maximum(kept, log_k)
    old, new = tl.exp(kept - _finite(top)), tl.exp(log_k - _finite(top))
    return old[:, None] * kv + new[:, None] * value[None, :], old * norm + new, top


@triton.jit
def spread(x, TIMES: tl.constexpr):
    """Each row of x [ROWS, BF] TIMES times: products take no fewer than 16 rows."""
    ROWS: tl.constexpr = x.shape[0]
    BF: tl.constexpr = x.shape[1]
    return tl.reshape(tl.broadcast_to(x[:, None, :], [ROWS, TIMES, BF]), [ROWS * TIMES, BF])


@triton.jit
def read(plus_q, minus_q, plus, minus, PRECISION: tl.constexpr):
    """sum_f phi_q kv [M, BV] and sum_f phi_q norm [M], both relative to exp(the third result)."""
    plus_q, minus_q = plus_q + plus[2][None, :], minus_q + minus[2][None, :]
    peak = _finite(tl.maximum(tl.max(plus_q, 1), tl.max(minus_q, 1)))
    plus_q, minus_q = tl.exp(plus_q - peak[:, None]), tl.exp(minus_q - peak[:, None])
    total = tl.dot(plus_q, plus[0], input_precision=PRECISION)
    total = tl.dot(minus_q, minus[0], total, input_precision=PRECISION)
    return total, tl.sum(plus_q * plus[1][None, :], 1) + tl.sum(minus_q * minus[1][None, :], 1), peak


@triton.jit(do_not_specialize=["lag", "skip"])
def step(
    q, k, v, decay, enter, query_maps, key_maps, mask, kv, norm, scale, ring_k, ring_v, ring_decay, ring_enter, length,
    y, log_mass, lag, skip, query_map_heads, key_map_heads,
    HS: tl.constexpr, R: tl.constexpr, DECAYS: tl.constexpr, ENTERS: tl.constexpr, LAG: tl.constexpr,
    D: tl.constexpr, F: tl.constexpr, F2: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    G: tl.constexpr, ROWS: tl.constexpr, TIMES: tl.constexpr, DEPTH: tl.constexpr, MAP: tl.constexpr,
    PRECISION: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The oldest waiting token enters one head of the memory, which moves on, and its G query heads read.

    The rings are read only: `push` writes them when all heads have read.
    """
    state = tl.program_id(0).to(tl.int64)
    row, head = state // HS, (state % HS).to(tl.int32)
    key, heads = head // R, HS // R
    real = 1
    if mask is not None:
        real = tl.load(mask + row).to(tl.int32)
    seen = tl.load(length + row)
    gate = head * DECAYS // HS
    keep, weight = 0.0, 0.0
    if DECAYS > 0:
        keep = tl.load(decay + row * DECAYS + gate)
    if LAG:
        slot = seen % lag
        place = row * lag + slot
        lost = tl.zeros([N], tl.float32)
        if DECAYS > 0:
            for start in range(0, lag, N):
                j = start + tl.arange(0, N)
                place_j = (row * lag + j) * DECAYS + gate
                lost += tl.load(ring_decay + place_j, mask=(j < lag) & (j != slot), other=0.0)
        weight = tl.sum(lost, 0) + keep
        k, v, enter = ring_k, ring_v, ring_enter
    else:
        place = row
    if ENTERS > 0:
        weight += tl.load(enter + place * ENTERS + head * ENTERS // HS)
    enters = (real != 0) & (seen - lag >= skip)

    e = tl.arange(0, BV)
    value = tl.load(v + (place * heads + key) * V + e, mask=e < tl.where(enters, V, 0), other=0.0).to(tl.float32)
    one = tl.arange(0, 1)
    map_at, there = (key % key_map_heads) * D * F + one, one < tl.where(enters, 1, 0)
    maps = load_maps(key_maps, map_at, there, 0, D, F, BF, DEPTH, MAP)
    plus_k, minus_k = log_features(
        maps, k, (place * heads + key) * D + one, key_maps, map_at, there, D, F, F2, BF, DEPTH, MAP
    )
    plus_k = tl.where(enters, tl.reshape(plus_k, [BF]) + weight, NEG_INF)
    minus_k = tl.where(enters, tl.reshape(minus_k, [BF]) + weight, NEG_INF)
    keep = tl.where(real != 0, keep, 0.0)
    at = half_places(state, 0, F, F2, V, BF, BV), half_places(state, 1, F, F2, V, BF, BV)
    plus = enter_half(load_half(kv, norm, scale, at[0]), plus_k, value, keep)
    minus = enter_half(load_half(kv, norm, scale, at[1]), minus_k, value, keep)
    tl.debug_barrier()  # no thread stores what another one still has to load
    store_half(kv, norm, scale, at[0], plus)
    store_half(kv, norm, scale, at[1], minus)

    g = tl.arange(0, ROWS)
    own = head * G + g
    map_at, there = (own % query_map_heads) * D * F, g < G * real
    maps = load_maps(query_maps, map_at, there, 0, D, F, BF, DEPTH, MAP)
    plus_q, minus_q = log_features(
        maps, q, (row * HS * G + own) * D, query_maps, map_at, there, D, F, F2, BF, DEPTH, MAP
    )
    total, mass, peak = read(spread(plus_q, TIMES), spread(minus_q, TIMES), plus, minus, PRECISION)
    g = tl.arange(0, ROWS * TIMES)
    some = (mass > 0) & (real != 0)
    mass = tl.where(some, mass, 1.0)
    total = tl.where(some[:, None], total / mass[:, None], 0.0)
    at = row * HS * G + head * G + g // TIMES
    first = (g % TIMES == 0) & (g // TIMES < G)
    tl.store(y + at[:, None] * V + e[None, :], total.to(y.dtype.element_ty), mask=first[:, None] & (e < V)[None, :])
    tl.store(log_mass + at, tl.where(some, tl.log(mass) + peak, NEG_INF), mask=first)


@triton.jit
def _copy(source, target, size, BLOCK: tl.constexpr):
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(target + at, tl.load(source + at, mask=at < size), mask=at < size)


@triton.jit(do_not_specialize=["lag"])
def push(
    k, v, decay, enter, mask, ring_k, ring_v, ring_decay, ring_enter, length, lag,
    KEYS: tl.constexpr, VALUES: tl.constexpr, DECAYS: tl.constexpr, ENTERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The new token of a row takes the slot of the one that has entered: KEYS, VALUES, ... numbers each."""
    row = tl.program_id(0).to(tl.int64)
    real = 1
    if mask is not None:
        real = tl.load(mask + row).to(tl.int32)
    seen = tl.load(length + row)
    if lag > 0:
        place = row * lag + seen % lag
        _copy(k + row * KEYS, ring_k + place * KEYS, KEYS * real, BLOCK)
        _copy(v + row * VALUES, ring_v + place * VALUES, VALUES * real, BLOCK)
        if DECAYS > 0:
            _copy(decay + row * DECAYS, ring_decay + place * DECAYS, DECAYS * real, BLOCK)
        if ENTERS > 0:
            _copy(enter + row * ENTERS, ring_enter + place * ENTERS, ENTERS * real, BLOCK)
    tl.debug_barrier()  # every thread has read the length
    tl.store(length + row, seen + real)
