# mypy: ignore-errors
"""Gated linear attention in Triton: gradients.

With p the weight of a key for a query over its denominator, every gradient is made of p (dy.v - delta), where delta =
dy.y - dlog_mass. (1) deltas, (2) what each chunk's queries add to the gradient of the state before it, (3) the scan of
`triton.py` from the right, (4) all that happens within a chunk, and what its queries gain from the state before it,
(5) what its keys gain from the queries behind it, with the gates, (6) from the gradients of the features' logits to
those of q, k and the maps, (7) the gates' gradients as their sources see them. The states before each chunk are the
forward's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lizardzoo.kernels.gated_linear.triton import (
    LARGEST,
    LOG2E,
    NEG_INF,
    _as_rows,
    _documents,
    _dot,
    _dot_turned,
    _features,
    _finite,
    _logits,
    _map,
    _operand,
    _pairs,
    _peak,
    _put_tokens,
    _put_vector,
    _read_gates,
    _scale,
    _signed,
    _state,
    _state_operands,
    _tokens,
    _vector,
)


@triton.jit(do_not_specialize=["rows"])
def deltas(y, d_y, d_log_mass, delta, rows, V: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr):
    """dy.y - dlog_mass of every query."""
    start = tl.program_id(0) * ROWS
    r = start + tl.arange(0, ROWS)
    out = _tokens(y, start, V, rows, V, ROWS, BV).to(tl.float32)
    own = tl.sum(out * _tokens(d_y, start, V, rows, V, ROWS, BV).to(tl.float32), 1)
    if d_log_mass is not None:
        own -= tl.load(d_log_mass + r, mask=r < rows, other=0.0)
    tl.store(delta + r, own, mask=r < rows)


@triton.jit
def _queries(log_mass, delta, place, start, stride, T, C: tl.constexpr):
    """log_mass in units of log 2, +inf where a query has seen nothing: its weights are zero; and delta, zero there."""
    lm = _vector(log_mass + place, start, stride, T, NEG_INF, C) * LOG2E
    loss = _vector(delta + place, start, stride, T, 0.0, C)
    return tl.where(lm == NEG_INF, float("inf"), lm), tl.where(lm == NEG_INF, 0.0, loss)


@triton.jit
def _add_gradient(
    added, masses, peak, z, exponent, slope, losses, half, top, F: tl.constexpr, BF: tl.constexpr, MAP: tl.constexpr,
    SCALES: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one head's queries add to one half of the state's gradient, relative to `top` or to its own `peak`.

    `masses` [16, BF]: rows that sum to the gradient of the norm, as a product with `losses` [16, C] makes them.
    """
    if SCALES == 1:
        features = _features(z, top - exponent, half, F, BF, MAP)
    else:
        logs = _signed(z, half, F, BF) + exponent[:, None]
        higher = tl.maximum(peak, tl.max(logs, 0))
        rescale = tl.exp2(peak - _finite(higher))
        added, masses, peak = added * rescale[None, :], masses * rescale[None, :], higher
        features = tl.exp2(logs - _finite(higher)[None, :])
    features = _operand(features, OPERAND)
    added += _dot(tl.trans(slope), features, OPERAND, PRECISION)
    masses += _dot(losses, features, OPERAND, PRECISION)
    return added, masses, peak


@triton.jit(do_not_specialize=["T", "N"])
def state_gradients(
    q, d_y, sums, weight, document, maps, log_mass, delta, kv, norm, scale, qb, qt, qh, map_heads, T, N, G, HS,
    D: tl.constexpr, F: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, HALVES: tl.constexpr, MAP: tl.constexpr, SCALES: tl.constexpr, PACKED: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a chunk's queries add to the gradient of the state before it: sum_i exp(c_i - log_mass_i) phi_q(i) [dy_i,
    -delta_i]."""
    n, bh = tl.program_id(0), tl.program_id(1)
    row, head = (bh // HS).to(tl.int64), bh % HS
    f = tl.arange(0, BF)
    F2: tl.constexpr = F * HALVES
    c, _, _ = _read_gates(sums, weight, bh, n, T, C)
    here, before, _ = _documents(document, row, n, T, C, PACKED)
    reads = tl.where(here == before, c, NEG_INF)
    at = bh.to(tl.int64) * N + n
    top = tl.full([], NEG_INF, tl.float32)
    if SCALES == 1:
        for g in range(G):
            lm, loss = _queries(log_mass, delta, row * T * (HS * G) + head * G + g, n * C, HS * G, T, C)
            top = tl.maximum(top, tl.max(reads - lm, 0))
        tl.store(scale + at, top)
        top = _finite(top)
    first, second = tl.zeros([BV, BF], tl.float32), tl.zeros([BV, BF], tl.float32)
    first_mass, second_mass = tl.zeros([16, BF], tl.float32), tl.zeros([16, BF], tl.float32)
    first_peak, second_peak = tl.full([BF], NEG_INF, tl.float32), tl.full([BF], NEG_INF, tl.float32)
    for g in range(G):
        own = head * G + g
        lm, loss = _queries(log_mass, delta, row * T * (HS * G) + own, n * C, HS * G, T, C)
        slope = _tokens(d_y + row * T * (HS * G * V) + own * V, n * C, HS * G * V, T, V, C, BV)
        x = _tokens(q + row * qb + own * qh, n * C, qt, T, D, C, BD)
        w = _map(maps + (own % map_heads) * D * F, D, F, BD, BF, MAP)
        z = _logits(x, w, MAP, OPERAND, PRECISION)
        exponent, losses = reads - lm, _as_rows(-loss, C, OPERAND, 1)
        first, first_mass, first_peak = _add_gradient(
            first, first_mass, first_peak, z, exponent, slope, losses, 0, top, F, BF, MAP, SCALES, OPERAND, PRECISION
        )
        if HALVES == 2:
            second, second_mass, second_peak = _add_gradient(
                second, second_mass, second_peak, z, exponent, slope, losses, 1, top, F, BF, MAP, SCALES,
                OPERAND, PRECISION,
            )  # fmt: skip
    at *= F2
    _put_tokens(kv + at * V, first, 0, F2, V, F, BV, BF)
    tl.store(norm + at + f, tl.sum(first_mass, 0), mask=f < F)
    if SCALES > 1:
        tl.store(scale + at + f, first_peak, mask=f < F)
    if HALVES == 2:
        _put_tokens(kv + at * V + F, second, 0, F2, V, F, BV, BF)
        tl.store(norm + at + F + f, tl.sum(second_mass, 0), mask=f < F)
        if SCALES > 1:
            tl.store(scale + at + F + f, second_peak, mask=f < F)


@triton.jit
def _outer(x, OPERAND: tl.constexpr):
    """-x [C] as an operand [C, 16] whose product with `_as_rows(m)`, 2 TIMES, is -x m^T."""
    column, high = tl.arange(0, 16)[None, :], x.to(tl.bfloat16).to(tl.float32)
    both = tl.where(column < 2, high[:, None], tl.where(column < 4, (x - high)[:, None], 0.0))
    return _operand(-both, OPERAND)


@triton.jit
def _chunk_keys(
    k, sums, weight, document, maps, bh, n, start, end, kb, kt, kh, map_heads, HS, R, T,
    D: tl.constexpr, F: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, C: tl.constexpr, HALVES: tl.constexpr,
    MAP: tl.constexpr, PACKED: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What all heads of a chunk share: its decays, the log-weights of its keys, both halves of their features, and its
    slots' documents with that of the slot before."""
    row, key = (bh // HS).to(tl.int64), bh % HS // R
    c, _, enter = _read_gates(sums, weight, bh, n, T, C)
    here, before, _ = _documents(document, row, n, T, C, PACKED)
    x = _tokens(k + row * kb + key * kh, start, kt, end, D, C, BD)
    w = _map(maps + (key % map_heads) * D * F, D, F, BD, BF, MAP)
    z = _logits(x, w, MAP, OPERAND, PRECISION)
    peak = _peak(z, F, BF, C, MAP)
    first = _operand(_features(z, peak, 0, F, BF, MAP), OPERAND)
    second = _operand(_features(z, peak, HALVES - 1, F, BF, MAP), OPERAND)
    return c, enter + peak - c, first, second, here, before


@triton.jit(do_not_specialize=["T", "N", "shift"])
def query_gradients(
    q, k, v, sums, weight, document, query_maps, key_maps, kv, norm, scale, d_y, log_mass, delta, d_z, sides,
    qb, qt, qh, kb, kt, kh, vb, vt, vh, query_map_heads, key_map_heads, T, N, shift, G, HS, R,
    D: tl.constexpr, F: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, HALVES: tl.constexpr, MAP: tl.constexpr, SCALES: tl.constexpr, PACKED: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What queries gain from the keys of their chunk and from the state before it.

    d_z [B, T, H, F] of their logits, `sides` [B, T, H]: p (dy.v - delta) summed over all keys.
    """
    n, bh = tl.program_id(0), tl.program_id(1)
    row, head = (bh // HS).to(tl.int64), bh % HS
    start, at = n * C - shift, bh.to(tl.int64) * N + n
    F2: tl.constexpr = F * HALVES
    HELD: tl.constexpr = OPERAND == "bf16" and BF * BV <= 64 * 64  # or shared memory holds one block less
    c, keys_at, first_k, second_k, here, before = _chunk_keys(
        k, sums, weight, document, key_maps, bh, n, start, T - shift, kb, kt, kh, key_map_heads, HS, R, T,
        D, F, BD, BF, C, HALVES, MAP, PACKED, OPERAND, PRECISION,
    )  # fmt: skip
    value = _tokens(v + row * vb + (head // R) * vh, start, vt, T - shift, V, C, BV)
    if HELD:
        first_memory, first_mass = _state_operands(kv, norm, at, 0, F, F2, V, BF, BV, OPERAND, 2)
        second_memory, second_mass = _state_operands(kv, norm, at, HALVES - 1, F, F2, V, BF, BV, OPERAND, 2)
    reads_at = tl.where(here == before, c, NEG_INF)
    if SCALES == 1:
        reads_at += tl.load(scale + at)
    for g in range(G):
        own = head * G + g
        place = row * T * (HS * G) + own
        lm, loss = _queries(log_mass, delta, place, n * C, HS * G, T, C)
        x = _tokens(q + row * qb + own * qh, n * C, qt, T, D, C, BD)
        slope = _tokens(d_y + row * T * (HS * G * V) + own * V, n * C, HS * G * V, T, V, C, BV)
        w = _map(query_maps + (own % query_map_heads) * D * F, D, F, BD, BF, MAP)
        z = _logits(x, w, MAP, OPERAND, PRECISION)
        peak = _peak(z, F, BF, C, MAP)
        pairs = tl.exp2(tl.minimum(_pairs(c + peak - lm, keys_at, here, C, PACKED, False), LARGEST))
        pairs *= _dot_turned(slope, value, OPERAND, PRECISION) - loss[:, None]
        pairs = _operand(pairs, OPERAND)
        reads, losses = reads_at - lm, _outer(loss, OPERAND)
        if SCALES == 1:
            reads = tl.exp2(tl.minimum(reads, LARGEST))
        gradient, side = tl.zeros([C, BF], tl.float32), tl.zeros([C], tl.float32)
        for half in tl.static_range(HALVES):
            if HELD:
                memory, mass = (first_memory, first_mass) if half == 0 else (second_memory, second_mass)
            else:
                memory, mass = _state_operands(kv, norm, at, half, F, F2, V, BF, BV, OPERAND, 2)
            far = _dot(slope, memory, OPERAND, PRECISION) + _dot(losses, mass, OPERAND, PRECISION)
            near = _dot(pairs, first_k if half == 0 else second_k, OPERAND, PRECISION)
            phi = _operand(_features(z, peak, half, F, BF, MAP), OPERAND).to(tl.float32)
            if SCALES == 1:
                logs = phi * (far * reads[:, None] + near)
            else:
                read = _signed(z, half, F, BF) + _scale(scale, at, half, F, BF, SCALES)[None, :] + reads[:, None]
                logs = phi * near + far * tl.exp2(tl.minimum(read, LARGEST))
            total = tl.sum(logs, 1)
            side += total
            if MAP == "softmax":
                logs -= phi * total[:, None]
            gradient = gradient + logs if half == 0 else gradient - logs
        _put_vector(sides + place, side, n * C, HS * G, T, C)
        _put_tokens(d_z + row * T * (HS * G * F) + own * F, gradient, n * C, HS * G * F, T, F, C, BF)


@triton.jit(do_not_specialize=["T", "N", "shift", "keys"])
def near_key_gradients(
    q, k, v, sums, weight, document, query_maps, key_maps, d_y, log_mass, delta, d_features, d_v,
    qb, qt, qh, kb, kt, kh, vb, vt, vh, query_map_heads, key_map_heads, T, N, shift, keys, G, HS, R,
    D: tl.constexpr, F: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, HALVES: tl.constexpr, MAP: tl.constexpr, SCALES: tl.constexpr, PACKED: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """What keys gain from the queries of their chunk: d_features [B, Hs, N, C, 2F], and d_v (ADD: added to it).

    A kernel apart from that of the queries: together they need more registers than there are. Pairs have their keys as
    rows: a transposed accumulator as the operand of a product is miscompiled on Hopper by Triton 3.4 to 3.7.0
    (flash-linear-attention issue 640).
    """
    n, bh = tl.program_id(0), tl.program_id(1)
    row, head = (bh // HS).to(tl.int64), bh % HS
    start, at = n * C - shift, bh.to(tl.int64) * N + n
    F2: tl.constexpr = F * HALVES
    c, keys_at, first_k, second_k, here, _ = _chunk_keys(
        k, sums, weight, document, key_maps, bh, n, start, T - shift, kb, kt, kh, key_map_heads, HS, R, T,
        D, F, BD, BF, C, HALVES, MAP, PACKED, OPERAND, PRECISION,
    )  # fmt: skip
    value = _tokens(v + row * vb + (head // R) * vh, start, vt, T - shift, V, C, BV)
    first, second = tl.zeros([C, BF], tl.float32), tl.zeros([C, BF], tl.float32)
    d_value = tl.zeros([C, BV], tl.float32)
    for g in range(G):
        own = head * G + g
        lm, loss = _queries(log_mass, delta, row * T * (HS * G) + own, n * C, HS * G, T, C)
        x = _tokens(q + row * qb + own * qh, n * C, qt, T, D, C, BD)
        slope = _tokens(d_y + row * T * (HS * G * V) + own * V, n * C, HS * G * V, T, V, C, BV)
        w = _map(query_maps + (own % query_map_heads) * D * F, D, F, BD, BF, MAP)
        z = _logits(x, w, MAP, OPERAND, PRECISION)
        peak = _peak(z, F, BF, C, MAP)
        pairs = tl.exp2(tl.minimum(_pairs(keys_at, c + peak - lm, here, C, PACKED, True), LARGEST))
        slopes = _operand(pairs * (_dot_turned(value, slope, OPERAND, PRECISION) - loss[None, :]), OPERAND)
        phi = _operand(_features(z, peak, 0, F, BF, MAP), OPERAND)
        first += _dot(slopes, phi, OPERAND, PRECISION)
        score = _dot_turned(first_k, phi, OPERAND, PRECISION)
        if HALVES == 2:
            phi = _operand(_features(z, peak, 1, F, BF, MAP), OPERAND)
            second += _dot(slopes, phi, OPERAND, PRECISION)
            score += _dot_turned(second_k, phi, OPERAND, PRECISION)
        d_value += _dot(_operand(score * pairs, OPERAND), slope, OPERAND, PRECISION)
    _put_tokens(d_features + at * C * F2, first, 0, F2, C, F, C, BF)
    if HALVES == 2:
        _put_tokens(d_features + at * C * F2 + F, second, 0, F2, C, F, C, BF)
    values = d_v + row * keys * HS * V + head * V
    if ADD:
        d_value += _tokens(values, start, HS * V, T - shift, V, C, BV).to(tl.float32)
    _put_tokens(values, d_value, start, HS * V, T - shift, V, C, BV)


@triton.jit(do_not_specialize=["T", "N", "shift", "keys", "parts"])
def key_gradients(
    k, v, sums, weight, document, maps, d_kv, d_norm, d_scale, through, sides, d_features, d_z, d_v, d_sums, d_weight,
    kb, kt, kh, vb, vt, vh, map_heads, T, N, shift, keys, parts, G, HS, R,
    D: tl.constexpr, F: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, HALVES: tl.constexpr, MAP: tl.constexpr, SCALES: tl.constexpr, PACKED: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What keys gain from the queries behind their chunk, added to what `near_key_gradients` left.

    d_z [B, offset + T, Hs, F] of the keys' logits, d_v (added to it), and the gates' gradients by slot.
    """
    n, bh = tl.program_id(0), tl.program_id(1)
    row, head = (bh // HS).to(tl.int64), bh % HS
    key = head // R
    F2: tl.constexpr = F * HALVES
    i, start, at = n * C + tl.arange(0, C), n * C - shift, bh.to(tl.int64) * N + n
    c, total, enter = _read_gates(sums, weight, bh, n, T, C)
    here, _, last = _documents(document, row, n, T, C, PACKED)
    value = _tokens(v + row * vb + key * vh, start, vt, T - shift, V, C, BV)
    x = _tokens(k + row * kb + key * kh, start, kt, T - shift, D, C, BD)
    w = _map(maps + (key % map_heads) * D * F, D, F, BD, BF, MAP)
    # `if`s that always hold: Triton gives all warps to the rows of a product whose result another product needs, and
    # with 8 warps half of them would repeat the others' work; it does not look past a branch
    z = tl.zeros([C, BF], tl.float32)
    if T > 0:
        z = _logits(x, w, MAP, OPERAND, PRECISION)
    peak = _peak(z, F, BF, C, MAP)
    side = tl.zeros([C], tl.float32)
    for g in range(G):
        side += _vector(sides + row * T * (HS * G) + head * G + g, n * C, HS * G, T, 0.0, C)
    leaves = tl.where(here == last, total - c + enter, NEG_INF)
    if SCALES == 1:
        leaves = tl.exp2(tl.minimum(leaves + tl.load(d_scale + at), LARGEST))
    near, far = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    gradient = tl.zeros([C, BF], tl.float32)
    d_value = tl.zeros([C, BV], tl.float32)
    for half in tl.static_range(HALVES):
        phi = _operand(_features(z, peak, half, F, BF, MAP), OPERAND)
        memory, mass = _state(d_kv, d_norm, at, half, F, F2, V, BF, BV)
        if SCALES == 1:
            leave, rows = phi, leaves
        else:
            leave = _signed(z, half, F, BF) + _scale(d_scale, at, half, F, BF, SCALES)[None, :] + leaves[:, None]
            leave, rows = tl.exp2(tl.minimum(leave, LARGEST)), near * 0.0 + 1.0
        behind = tl.zeros([C, BF], tl.float32)
        if T > 0:
            d_value += _dot_turned(leave, memory, OPERAND, PRECISION) * rows[:, None]
        if T > 0:
            behind = _dot(value, memory, OPERAND, PRECISION) + mass[None, :]
        behind *= leave.to(tl.float32) * rows[:, None]
        inside = _tokens(d_features + at * C * F2 + half * F, 0, F2, C, F, C, BF).to(tl.float32)
        phi = phi.to(tl.float32)
        inside *= phi
        near += tl.sum(inside, 1)
        far += tl.sum(behind, 1)
        inside += behind
        if MAP == "softmax":
            inside -= phi * tl.sum(inside, 1)[:, None]
        gradient = gradient + inside if half == 0 else gradient - inside
    passing = tl.zeros([16], tl.float32)
    for p in range(0, parts, 16):
        part = p + tl.arange(0, 16)
        passing += tl.load(through + at * parts + part, mask=part < parts, other=0.0)
    gates = bh.to(tl.int64) * T + i
    tl.store(d_weight + gates, near + far, mask=i < T)
    later = tl.cumsum(tl.where(i < T, side - near, 0.0), 0, reverse=True)
    tl.store(d_sums + gates, tl.sum(passing, 0) + later + tl.cumsum(far, 0) - far, mask=i < T)
    values = d_v + row * keys * HS * V + head * V
    d_value += _tokens(values, start, HS * V, T - shift, V, C, BV).to(tl.float32)
    _put_tokens(values, d_value, start, HS * V, T - shift, V, C, BV)
    _put_tokens(d_z + row * keys * HS * F + head * F, gradient, start, HS * F, T - shift, F, C, BF)


@triton.jit(do_not_specialize=["T", "end", "span"])
def map_gradients(
    x, maps, d_z, d_x, d_maps, xb, xt, xh, map_heads, T, end, span, H, R,
    D: tl.constexpr, F: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, C: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From d_z [B, T, H, F] to d_x = d_z W^T [B, T, H, D] (zero from token `end` on) and this part of d_W = x^T d_z.

    d_x may be d_z itself where F = D: a tile is read whole before it is written; None: it is not wanted.
    """
    part, bh = tl.program_id(0), tl.program_id(1)
    row, own = (bh // H).to(tl.int64), bh % H
    key = own // R
    w = _map(maps + (key % map_heads) * D * F, D, F, BD, BF, "")
    d_map = tl.zeros([BD, BF], tl.float32)
    for n in range(part * span, tl.minimum(part * span + span, tl.cdiv(T, C))):
        tile = _tokens(x + row * xb + key * xh, n * C, xt, end, D, C, BD)
        gradient = _tokens(d_z + row * T * H * F + own * F, n * C, H * F, end, F, C, BF)
        d_map += _dot(tl.trans(tile), gradient, OPERAND, PRECISION)
        if d_x is not None:
            d_tile = _dot_turned(gradient, w, OPERAND, PRECISION)
            _put_tokens(d_x + row * T * H * D + own * D, d_tile, n * C, H * D, T, D, C, BD)
    _put_tokens(d_maps + (part * tl.num_programs(1) + bh).to(tl.int64) * D * F, d_map, 0, F, D, F, BD, BF)


@triton.jit(do_not_specialize=["T", "lag", "offset"])
def gate_gradients(d_sums, d_weight, d_decay, d_enter, T, lag, offset, HS, C: tl.constexpr, BLOCK: tl.constexpr):
    """From the gradients per slot [B, Hs, T] to those of the sources [B, offset + T, Hs].

    A token's decay is also lost by the keys that enter at the `lag` slots from its own on.
    """
    n, bh = tl.program_id(0), tl.program_id(1)
    row, head = (bh // HS).to(tl.int64), bh % HS
    first = n * C - offset
    s = first + tl.arange(0, C)
    base = bh.to(tl.int64) * T
    place = (row * (offset + T) + s + offset) * HS + head
    if d_decay is not None:
        lost = tl.zeros([BLOCK], tl.float64)
        for start in range(tl.maximum(first, 0), tl.minimum(first + lag, T), BLOCK):
            t = start + tl.arange(0, BLOCK)
            lost += tl.load(d_weight + base + t, mask=t < tl.minimum(first + lag, T), other=0.0).to(tl.float64)
        here = tl.load(d_weight + base + s, mask=(s >= 0) & (s < T), other=0.0).to(tl.float64)
        late = tl.load(d_weight + base + s + lag, mask=(s + lag >= 0) & (s + lag < T), other=0.0).to(tl.float64)
        moved = tl.sum(lost, 0) - (tl.cumsum(here, 0) - here) + (tl.cumsum(late, 0) - late)
        own = tl.load(d_sums + base + s, mask=(s >= 0) & (s < T), other=0.0)
        tl.store(d_decay + place, own + moved.to(tl.float32), mask=s < T)
    if d_enter is not None:
        entered = tl.load(d_weight + base + s + lag, mask=(s + lag >= 0) & (s + lag < T), other=0.0)
        tl.store(d_enter + place, entered, mask=s < T)
