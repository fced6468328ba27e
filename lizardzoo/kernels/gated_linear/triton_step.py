# mypy: ignore-errors
"""Gated linear attention in Triton: one token, from one kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from lizardzoo.kernels.gated_linear.triton import NEG_INF, _finite, _log_features


@triton.jit
def _one(x, maps, F2: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, MAP: tl.constexpr):
    """log phi of one vector, from W [D, F]: [BF]."""
    f, d = tl.arange(0, BF), tl.arange(0, BD)
    if MAP == "none":
        logits = tl.load(x + f, mask=f < F2, other=0.0).to(tl.float32)[None, :]
    else:
        half = F2 // 2
        inside = (d < D)[:, None] & (f < F2)[None, :]
        weight = tl.load(maps + d[:, None] * half + (f % half)[None, :], mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + d, mask=d < D, other=0.0).to(tl.float32)
        logits = tl.sum(value[:, None] * weight, 0)
        logits = tl.where(f < half, logits, -logits)[None, :]
    return tl.sum(_log_features(logits, 1, F2, BF, MAP), 0)


@triton.jit
def _shift(old, new, target, real, count, size, stride, BLOCK: tl.constexpr):
    """target = the last `count` tokens of [old, new], where `real`; a token has `size` numbers, `stride` apart."""
    for start in range(0, count * size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        token, column = at // size, at % size
        inside = token < count
        source = token + real
        value = tl.load(old + source * stride + column, mask=inside & (source < count), other=0)
        fresh = tl.load(new + column, mask=inside & (source >= count), other=0)
        tl.store(target + token * stride + column, tl.where(source < count, value, fresh), mask=inside)


@triton.jit(do_not_specialize=["lag", "skip"])
def step(
    q, k, v, decay, enter, query_maps, key_maps, mask, kv, norm, scale, old_k, old_v, old_decay, old_enter, old_valid,
    length, y, log_mass, new_kv, new_norm, new_scale, new_k, new_v, new_decay, new_enter, new_valid, new_length,
    query_map_heads, key_map_heads, lag, skip, G, HS, R, DECAYS, ENTERS,
    D: tl.constexpr, F2: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    MAP: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token: the state and the queue of waiting tokens move on by one, and the G query heads read."""
    bh, block = tl.program_id(0), tl.program_id(1)
    row, head = (bh // HS).to(tl.int64), bh % HS
    key, heads = head // R, HS // R
    f, e = tl.arange(0, BF), block * BV + tl.arange(0, BV)
    real = 1
    if MASKED:
        real = tl.load(mask + row).to(tl.int32)
    seen = tl.load(length + row)
    gate = head * DECAYS // HS
    keep = 0.0
    if DECAYS > 0:
        keep = tl.load(decay + row * DECAYS + gate)
    if lag > 0:
        j = tl.arange(0, BLOCK)
        lost = tl.zeros([BLOCK], tl.float64)
        for start in range(1, lag, BLOCK):
            if DECAYS > 0:
                inside = start + j < lag
                lost += tl.load(old_decay + (row * lag + start + j) * DECAYS + gate, mask=inside, other=0.0)
        weight = (tl.sum(lost, 0) + keep).to(tl.float32)
        if ENTERS > 0:
            weight += tl.load(old_enter + row * lag * ENTERS + head * ENTERS // HS)
        enters = tl.load(old_valid + row * lag).to(tl.int32)
        key_at, value_at = old_k + (row * lag * heads + key) * D, old_v + (row * lag * heads + key) * V
    else:
        weight = 0.0
        if ENTERS > 0:
            weight += tl.load(enter + row * ENTERS + head * ENTERS // HS)
        enters = 1
        key_at, value_at = k + (row * heads + key) * D, v + (row * heads + key) * V
    enters = (enters > 0) & (real > 0) & (seen - lag >= skip)
    logs_k = _one(key_at, key_maps + (key % key_map_heads) * D * (F2 // 2), F2, D, BD, BF, MAP)
    value = tl.load(value_at + e, mask=e < V, other=0.0).to(tl.float32)
    add = tl.where(enters, logs_k + weight, NEG_INF)

    matrix, inside = f[:, None] * V + e[None, :], (f < F2)[:, None] & (e < V)[None, :]
    states = bh.to(tl.int64) * F2
    state = tl.load(kv + states * V + matrix, mask=inside, other=0.0)
    mass = tl.load(norm + states + f, mask=f < F2, other=0.0)
    top = tl.load(scale + states + f, mask=f < F2, other=NEG_INF)
    kept = top + tl.where(real > 0, keep, 0.0)
    top = tl.maximum(kept, add)
    old, new = tl.exp(kept - _finite(top)), tl.exp(add - _finite(top))
    state = old[:, None] * state + new[:, None] * value[None, :]
    mass = old * mass + new
    tl.store(new_kv + states * V + matrix, state, mask=inside)
    if block == 0:
        tl.store(new_norm + states + f, mass, mask=f < F2)
        tl.store(new_scale + states + f, top, mask=f < F2)
    for g in range(G):
        own = head * G + g
        at = row * (HS * G) + own
        logs_q = _one(q + at * D, query_maps + (own % query_map_heads) * D * (F2 // 2), F2, D, BD, BF, MAP)
        read = logs_q + top
        peak = _finite(tl.max(read, 0))
        read = tl.exp(read - peak)
        total = tl.sum(read * mass, 0)
        result = tl.sum(read[:, None] * state, 0)
        some = (total > 0) & (real > 0)
        result = tl.where(some, result / tl.where(some, total, 1.0), 0.0)
        tl.store(y + at * V + e, result.to(y.dtype.element_ty), mask=e < V)
        if block == 0:
            tl.store(log_mass + at, tl.where(some, tl.log(tl.where(some, total, 1.0)) + peak, NEG_INF))
    if block == 0:
        if head % R == 0:
            at, past = row * heads + key, row * lag * heads + key
            _shift(old_k + past * D, k + at * D, new_k + past * D, real, lag, D, heads * D, BLOCK)
            _shift(old_v + past * V, v + at * V, new_v + past * V, real, lag, V, heads * V, BLOCK)
        if head == 0:
            past = row * lag
            if DECAYS > 0:
                at, past_at = row * DECAYS, past * DECAYS
                _shift(old_decay + past_at, decay + at, new_decay + past_at, real, lag, DECAYS, DECAYS, BLOCK)
            if ENTERS > 0:
                at, past_at = row * ENTERS, past * ENTERS
                _shift(old_enter + past_at, enter + at, new_enter + past_at, real, lag, ENTERS, ENTERS, BLOCK)
            for start in range(0, lag, BLOCK):  # a token that is pushed in is real
                j = start + tl.arange(0, BLOCK)
                waits = tl.load(old_valid + past + j + real, mask=j + real < lag, other=1)
                tl.store(new_valid + past + j, waits, mask=j < lag)
            tl.store(new_length + row, seen + real)
