# mypy: ignore-errors
"""Gated linear attention in Triton: the kernels.

A sequence is cut into chunks of C tokens. With c the log-decay summed within a chunk and e its sum over the chunk, a
key that enters at slot t and a query of slot i of one chunk weigh exp(c_i - c_t + weight_t) phi_q(i).phi_k(t); what
came before the chunk is one matrix S. Forward: (1) what each chunk adds to S, (2) a scan over the chunks, (3) outputs.
Backward: the states again; then (1) and (2) from the right, with queries in the place of keys; then one kernel for q
and one for k, v and the gates. Features live in registers only. Products take their operands as they are loaded or
computed, never a transposed accumulator: Triton 3.4 to 3.7.0 gets those wrong on Hopper.

A matrix S is stored as exp(scale_f) S_f with a scale for each feature f (the largest weight in it), so that exp
features and input gates of any size neither overflow nor vanish. Nothing is summed in an order that the launch
decides: results are deterministic.
"""

from __future__ import annotations

import triton
import triton.language as tl

NEG_INF = tl.constexpr(float("-inf"))
LARGEST = tl.constexpr(80.0)  # its exp() is finite in bf16 and fp32, times any sound gradient too


@triton.jit
def _finite(x):
    return tl.where(x == NEG_INF, 0.0, x)


@triton.jit
def _load(base, rows, columns, row_stride, column_stride, row_end, column_end):
    """A tile [rows, columns], zero outside 0 <= row < row_end, 0 <= column < column_end."""
    inside = ((rows >= 0) & (rows < row_end))[:, None] & ((columns >= 0) & (columns < column_end))[None, :]
    offsets = rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    return tl.load(base + offsets, mask=inside, other=0.0)


@triton.jit
def _store(base, value, rows, columns, row_stride, column_stride, row_end, column_end):
    inside = ((rows >= 0) & (rows < row_end))[:, None] & ((columns >= 0) & (columns < column_end))[None, :]
    offsets = rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    tl.store(base + offsets, value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _dot(a, b, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """bf16 inputs meet as bf16; fp16 ones as tf32, which has their 11 bits and the range that weights need."""
    if OPERAND == "bf16":
        a, b = a.to(tl.bfloat16), b.to(tl.bfloat16)
    else:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _halves(x, first, AXIS: tl.constexpr, MAXIMUM: tl.constexpr):
    """The maximum or sum over each half of the features, where that half's features stand."""
    fill = NEG_INF if MAXIMUM else 0.0
    one, two = tl.where(first, x, fill), tl.where(first, fill, x)
    if MAXIMUM:
        one, two = tl.max(one, AXIS), tl.max(two, AXIS)
    else:
        one, two = tl.sum(one, AXIS), tl.sum(two, AXIS)
    return tl.where(first, tl.expand_dims(one, AXIS), tl.expand_dims(two, AXIS))


@triton.jit
def _log_features(logits, AXIS: tl.constexpr, F2: tl.constexpr, BF: tl.constexpr, MAP: tl.constexpr):
    """log phi from the logits [xW, -xW] along AXIS, -inf in padded features."""
    f = tl.expand_dims(tl.arange(0, BF), 1 - AXIS)
    logits = tl.where(f < F2, logits, NEG_INF)
    if MAP == "softmax":
        first = f < F2 // 2
        logits -= _halves(logits, first, AXIS, True)
        logits -= tl.log(_halves(tl.exp(logits), first, AXIS, False))
    return logits


@triton.jit
def _rows(x, weight, F2: tl.constexpr, BF: tl.constexpr, MAP: tl.constexpr, LOGITS: tl.constexpr):
    """log phi of x [C, D] with [W, -W] [D, 2F]: [C, BF]."""
    logits = x.to(tl.float32)
    if MAP != "none":
        logits = tl.dot(logits, weight, input_precision=LOGITS)
    return _log_features(logits, 1, F2, BF, MAP)


@triton.jit
def _columns(x_t, weight_t, F2: tl.constexpr, BF: tl.constexpr, MAP: tl.constexpr, LOGITS: tl.constexpr):
    """The transpose of _rows, from x^T [D, C] and [W, -W]^T [2F, D]: [BF, C]."""
    logits = x_t.to(tl.float32)
    if MAP != "none":
        logits = tl.dot(weight_t, logits, input_precision=LOGITS)
    return _log_features(logits, 0, F2, BF, MAP)


@triton.jit
def _peak(logs, AXIS: tl.constexpr, MAP: tl.constexpr):
    """What features are taken relative to. Softmax features need nothing: their largest is at least 1/F."""
    top = _finite(tl.max(logs, AXIS))
    return top * 0.0 if MAP == "softmax" else top


@triton.jit
def _logits_gradient(gradient, logs, AXIS: tl.constexpr, F2: tl.constexpr, BF: tl.constexpr, MAP: tl.constexpr):
    """From the gradient of log phi to that of its logits."""
    if MAP == "softmax":
        first = tl.expand_dims(tl.arange(0, BF), 1 - AXIS) < F2 // 2
        gradient -= tl.exp(logs) * _halves(gradient, first, AXIS, False)
    return gradient


@triton.jit
def _gates(decay, weight, row, head, n, T, HS, C: tl.constexpr):
    """Log-decay summed within the chunk, its sum over the chunk, and the log-weights of the keys that enter in it."""
    i = n * C + tl.arange(0, C)
    offsets = (row * T + i) * HS + head
    step = tl.load(decay + offsets, mask=i < T, other=0.0)
    enter = tl.load(weight + offsets, mask=i < T, other=NEG_INF)
    return tl.cumsum(step, 0), tl.sum(step, 0), enter


@triton.jit
def _documents(document, row, n, T, C: tl.constexpr, PACKED: tl.constexpr):
    """Documents of the chunk's slots, of the slot before them and of the last one."""
    here, before, last = tl.zeros([C], tl.int32), n * 0, n * 0
    if PACKED:
        base = document + row * T
        here = tl.load(base + tl.minimum(n * C + tl.arange(0, C), T - 1))
        before = tl.load(base + tl.maximum(n * C - 1, 0), mask=n > 0, other=0)
        last = tl.load(base + tl.minimum(n * C + C - 1, T - 1))
    return here, before, last


@triton.jit
def _pairs(sums, enter, here, row_log, key_peak, C: tl.constexpr):
    """Log-weights [query, key] of a chunk without the features' product; -inf where a query does not see a key."""
    i = tl.arange(0, C)
    seen = (i[:, None] >= i[None, :]) & (here[:, None] == here[None, :])
    between = (sums + row_log)[:, None] + (enter + key_peak - sums)[None, :]
    return tl.where(seen, between, NEG_INF)


@triton.jit(do_not_specialize=["T", "N", "shift"])
def chunk_states(
    x, values, decay, weight, document, maps, log_mass, delta, kv, norm, scale, carry,
    xb, xt, xh, vb, vt, vh, map_heads, T, N, shift, G, HS, R,
    D: tl.constexpr, F2: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, MAP: tl.constexpr, PACKED: tl.constexpr, QUERY: tl.constexpr,
    LOGITS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a chunk adds to the state: sum_t exp(e - c_t + weight_t) phi_k(t) [v_t, 1].

    QUERY: what it adds to the gradient of the state: sum_i exp(c_i - log_mass_i) phi_q(i) [dy_i, delta_i].
    """
    n, bh, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, head = (bh // HS).to(tl.int64), bh % HS
    i, d, f, e = n * C + tl.arange(0, C), tl.arange(0, BD), tl.arange(0, BF), block * BV + tl.arange(0, BV)
    sums, total, enter = _gates(decay, weight, row, head, n, T, HS, C)
    here, before, last = _documents(document, row, n, T, C, PACKED)
    added = tl.zeros([BF, BV], tl.float32)
    mass = tl.zeros([BF], tl.float32)
    peak = tl.full([BF], NEG_INF, tl.float32)
    for g in range(0, G):
        if QUERY:
            own = head * G + g
            scalars = (row * T + i) * (HS * G) + own
            lm = tl.load(log_mass + scalars, mask=i < T, other=NEG_INF)
            part = tl.load(delta + scalars, mask=i < T, other=0.0)
            exponent = tl.where((here == before) & (lm != NEG_INF), sums - _finite(lm), NEG_INF)
        else:
            own = head // R
            part = tl.full([C], 1.0, tl.float32)
            exponent = tl.where(here == last, total - sums + enter, NEG_INF)
        value = _load(values + row * vb + own * vh, i - shift, e, vt, 1, T - shift, V)
        x_t = _load(x + row * xb + own * xh, d, i - shift, 1, xt, D, T - shift)
        map_t = _load(maps + (own % map_heads) * D * F2, f, d, 1, F2, F2, D)
        logs = _columns(x_t, map_t, F2, BF, MAP, LOGITS) + exponent[None, :]
        top = tl.maximum(peak, tl.max(logs, 1))
        rescale = tl.exp(peak - _finite(top))
        features = tl.exp(logs - _finite(top)[:, None])
        added = added * rescale[:, None] + _dot(features, value, OPERAND, PRECISION)
        mass = mass * rescale + tl.sum(features * part[None, :], 1)
        peak = top
    base = bh.to(tl.int64) * N + n
    _store(kv + base * F2 * V, added, f, e, V, 1, F2, V)
    if block == 0:
        tl.store(norm + base * F2 + f, mass, mask=f < F2)
        tl.store(scale + base * F2 + f, peak, mask=f < F2)
        tl.store(carry + base, tl.where(before == last, total, NEG_INF))


@triton.jit(do_not_specialize=["N"])
def scan(
    kv, norm, scale, carry, kv_0, norm_0, scale_0, kv_n, norm_n, scale_n,
    old_kv, old_norm, old_scale, last_kv, last_norm, last_scale, products, N,
    F2: tl.constexpr, V: tl.constexpr, SF: tl.constexpr, BV: tl.constexpr, START: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Replace what each chunk adds (kv, norm, scale) by the state before it, and give the one at the end.

    REVERSE: from the right, with the gradient of the state behind each chunk in the place of the state before it; also
    `products`, that gradient times that state (old_*: the states before each chunk; last_*: behind the last).
    """
    bh, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    f, e = block * SF + tl.arange(0, SF), tl.arange(0, BV)
    inside = (f < F2)[:, None] & (e < V)[None, :]
    matrix, vector = f[:, None] * V + e[None, :], f
    if START:
        state = tl.load(kv_0 + bh * F2 * V + matrix, mask=inside, other=0.0)
        mass = tl.load(norm_0 + bh * F2 + vector, mask=f < F2, other=0.0)
        top = tl.load(scale_0 + bh * F2 + vector, mask=f < F2, other=NEG_INF)
        if REVERSE:  # the gradient of exp(-scale) S
            top = tl.where(top == NEG_INF, NEG_INF, -top)
    else:
        state = tl.zeros([SF, BV], tl.float32)
        mass = tl.zeros([SF], tl.float32)
        top = tl.full([SF], NEG_INF, tl.float32)
    if REVERSE:
        after = tl.load(last_kv + bh * F2 * V + matrix, mask=inside, other=0.0)
        after_mass = tl.load(last_norm + bh * F2 + vector, mask=f < F2, other=0.0)
        after_top = tl.load(last_scale + bh * F2 + vector, mask=f < F2, other=NEG_INF)
    for step in range(0, N):
        n = N - 1 - step if REVERSE else step
        at = bh * N + n
        add = tl.load(kv + at * F2 * V + matrix, mask=inside, other=0.0)
        add_mass = tl.load(norm + at * F2 + vector, mask=f < F2, other=0.0)
        add_top = tl.load(scale + at * F2 + vector, mask=f < F2, other=NEG_INF)
        kept = top + tl.load(carry + at)
        tl.store(kv + at * F2 * V + matrix, state, mask=inside)
        tl.store(norm + at * F2 + vector, mass, mask=f < F2)
        tl.store(scale + at * F2 + vector, top, mask=f < F2)
        if REVERSE:
            product = tl.sum(state * after, 1) + mass * after_mass
            product = tl.where((top == NEG_INF) | (after_top == NEG_INF), 0.0, product * tl.exp(top + after_top))
            tl.store(products + at * tl.num_programs(1) + block, tl.sum(product, 0))
            after = tl.load(old_kv + at * F2 * V + matrix, mask=inside, other=0.0)
            after_mass = tl.load(old_norm + at * F2 + vector, mask=f < F2, other=0.0)
            after_top = tl.load(old_scale + at * F2 + vector, mask=f < F2, other=NEG_INF)
        top = tl.maximum(kept, add_top)
        old, new = tl.exp(kept - _finite(top)), tl.exp(add_top - _finite(top))
        state = old[:, None] * state + new[:, None] * add
        mass = old * mass + new * add_mass
    if REVERSE:  # of exp(-scale) S at the start
        change = tl.where((top == NEG_INF) | (after_top == NEG_INF), 0.0, tl.exp(top + after_top))
        state, mass = state * change[:, None], mass * change
    tl.store(kv_n + bh * F2 * V + matrix, state, mask=inside)
    tl.store(norm_n + bh * F2 + vector, mass, mask=f < F2)
    tl.store(scale_n + bh * F2 + vector, top, mask=f < F2)


@triton.jit(do_not_specialize=["T", "N", "shift"])
def outputs(
    q, k, v, decay, weight, document, query_maps, key_maps, kv, norm, scale, y, log_mass,
    qb, qt, qh, kb, kt, kh, vb, vt, vh, query_map_heads, key_map_heads, T, N, shift, G, HS, R,
    D: tl.constexpr, F2: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, MAP: tl.constexpr, PACKED: tl.constexpr,
    LOGITS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y and log_mass of a chunk, for the G query heads that share a state."""
    n, bh = tl.program_id(0), tl.program_id(1)
    row, head = (bh // HS).to(tl.int64), bh % HS
    i, d, f, e = n * C + tl.arange(0, C), tl.arange(0, BD), tl.arange(0, BF), tl.arange(0, BV)
    sums, total, enter = _gates(decay, weight, row, head, n, T, HS, C)
    here, before, last = _documents(document, row, n, T, C, PACKED)
    key = head // R
    map_t = _load(key_maps + (key % key_map_heads) * D * F2, f, d, 1, F2, F2, D)
    k_t = _load(k + row * kb + key * kh, d, i - shift, 1, kt, D, T - shift)
    logs_k = _columns(k_t, map_t, F2, BF, MAP, LOGITS)
    peak_k = _peak(logs_k, 0, MAP)
    phi_k = tl.exp(logs_k - peak_k[None, :])
    value = _load(v + row * vb + key * vh, i - shift, e, vt, 1, T - shift, V)
    base = bh.to(tl.int64) * N + n
    memory = _load(kv + base * F2 * V, f, e, V, 1, F2, V)
    memory_mass = tl.load(norm + base * F2 + f, mask=f < F2, other=0.0)
    memory_scale = tl.load(scale + base * F2 + f, mask=f < F2, other=NEG_INF)
    for g in range(0, G):
        own = head * G + g
        tile = _load(q + row * qb + own * qh, i, d, qt, 1, T, D)
        map_q = _load(query_maps + (own % query_map_heads) * D * F2, d, f, F2, 1, D, F2)
        logs_q = _rows(tile, map_q, F2, BF, MAP, LOGITS)
        peak_q = _peak(logs_q, 1, MAP)
        product = _dot(tl.exp(logs_q - peak_q[:, None]), phi_k, OPERAND, PRECISION)
        score = _pairs(sums, enter, here, peak_q, peak_k, C)
        score = tl.where(product > 0, score + tl.log(tl.where(product > 0, product, 1.0)), NEG_INF)
        read = logs_q + memory_scale[None, :] + tl.where(here == before, sums, NEG_INF)[:, None]
        top = _finite(tl.maximum(tl.max(score, 1), tl.max(read, 1)))
        score, read = tl.exp(score - top[:, None]), tl.exp(read - top[:, None])
        mass = tl.sum(score, 1) + tl.sum(read * memory_mass[None, :], 1)
        sums_v = _dot(score, value, OPERAND, PRECISION) + _dot(read, memory, OPERAND, PRECISION)
        empty = mass == 0
        mass = tl.where(empty, 1.0, mass)
        result = tl.where(empty[:, None], 0.0, sums_v / mass[:, None])
        _store(y + row * T * (HS * G * V) + own * V, result, i, e, HS * G * V, 1, T, V)
        lm = tl.where(empty, NEG_INF, tl.log(mass) + top)
        tl.store(log_mass + (row * T + i) * (HS * G) + own, lm, mask=i < T)


@triton.jit(do_not_specialize=["rows"])
def deltas(y, d_y, log_mass, d_log_mass, delta, rows, V: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr):
    """d_log_mass - dy.y: what every weight of a query gains by its mass."""
    r, e = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BV)
    out, slope = _load(y, r, e, V, 1, rows, V).to(tl.float32), _load(d_y, r, e, V, 1, rows, V).to(tl.float32)
    own = tl.load(d_log_mass + r, mask=r < rows, other=0.0) - tl.sum(out * slope, 1)
    lm = tl.load(log_mass + r, mask=r < rows, other=NEG_INF)
    tl.store(delta + r, tl.where(lm == NEG_INF, 0.0, own), mask=r < rows)


@triton.jit(do_not_specialize=["T", "N", "shift", "span"])
def query_gradients(
    q, k, v, decay, weight, document, query_maps, key_maps, kv, norm, scale, d_y, log_mass, delta, d_q, d_maps, sides,
    qb, qt, qh, kb, kt, kh, vb, vt, vh, query_map_heads, key_map_heads, T, N, shift, span, G, HS, R,
    D: tl.constexpr, F2: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, MAP: tl.constexpr, PACKED: tl.constexpr,
    LOGITS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_q, this program's part of the query map's gradient, and `sides`: d_log phi_q summed over the features."""
    part, bh = tl.program_id(0), tl.program_id(1)
    row, own = (bh // (HS * G)).to(tl.int64), bh % (HS * G)
    head = own // G
    key = head // R
    d, f, e = tl.arange(0, BD), tl.arange(0, BF), tl.arange(0, BV)
    map_q = _load(query_maps + (own % query_map_heads) * D * F2, d, f, F2, 1, D, F2)
    map_qt = _load(query_maps + (own % query_map_heads) * D * F2, f, d, 1, F2, F2, D)
    map_k = _load(key_maps + (key % key_map_heads) * D * F2, d, f, F2, 1, D, F2)
    d_map = tl.zeros([BD, BF], tl.float32)
    for n in range(part * span, tl.minimum(part * span + span, N)):
        i = n * C + tl.arange(0, C)
        sums, total, enter = _gates(decay, weight, row, head, n, T, HS, C)
        here, before, last = _documents(document, row, n, T, C, PACKED)
        scalars = (row * T + i) * (HS * G) + own
        lm = tl.load(log_mass + scalars, mask=i < T, other=NEG_INF)
        gain = tl.load(delta + scalars, mask=i < T, other=0.0)
        lm = tl.where(lm == NEG_INF, float("inf"), lm)
        slope = _load(d_y + row * T * (HS * G * V) + own * V, i, e, HS * G * V, 1, T, V)
        v_t = _load(v + row * vb + key * vh, e, i - shift, 1, vt, V, T - shift)
        tile = _load(q + row * qb + own * qh, i, d, qt, 1, T, D)
        logs_q = _rows(tile, map_q, F2, BF, MAP, LOGITS)
        logs_k = _rows(_load(k + row * kb + key * kh, i - shift, d, kt, 1, T - shift, D), map_k, F2, BF, MAP, LOGITS)
        peak_q, peak_k = _peak(logs_q, 1, MAP), _peak(logs_k, 1, MAP)
        pairs = tl.exp(tl.minimum(_pairs(sums, enter, here, peak_q - lm, peak_k, C), LARGEST))
        pairs *= _dot(slope, v_t, OPERAND, PRECISION) + gain[:, None]
        gradient = _dot(pairs, tl.exp(logs_k - peak_k[:, None]), OPERAND, PRECISION)
        gradient *= tl.exp(logs_q - peak_q[:, None])
        base = bh.to(tl.int64) // G * N + n
        memory_t = _load(kv + base * F2 * V, e, f, 1, V, V, F2)
        memory_mass = tl.load(norm + base * F2 + f, mask=f < F2, other=0.0)
        memory_scale = tl.load(scale + base * F2 + f, mask=f < F2, other=NEG_INF)
        read = tl.exp(logs_q + memory_scale[None, :] + (tl.where(here == before, sums, NEG_INF) - lm)[:, None])
        gradient += read * (_dot(slope, memory_t, OPERAND, PRECISION) + gain[:, None] * memory_mass[None, :])
        tl.store(sides + scalars, tl.sum(gradient, 1), mask=i < T)
        if MAP == "none":
            result = gradient
        else:
            gradient = _logits_gradient(gradient, logs_q, 1, F2, BF, MAP)
            result = _dot(gradient, map_qt, OPERAND, PRECISION)
            q_t = _load(q + row * qb + own * qh, d, i, 1, qt, D, T)
            d_map += _dot(q_t, gradient, OPERAND, PRECISION)
        _store(d_q + row * T * (HS * G * D) + own * D, result, i, d, HS * G * D, 1, T, D)
    if MAP != "none":
        _store(d_maps + (part * tl.num_programs(1) + bh).to(tl.int64) * D * F2, d_map, d, f, F2, 1, D, F2)


@triton.jit(do_not_specialize=["T", "N", "shift", "span"])
def key_gradients(
    q, k, v, decay, weight, document, query_maps, key_maps, d_kv, d_norm, d_scale, d_y, log_mass, delta, sides,
    products, d_k, d_v, d_maps, d_decay, d_weight,
    qb, qt, qh, kb, kt, kh, vb, vt, vh, query_map_heads, key_map_heads, T, N, shift, span, G, HS, R,
    D: tl.constexpr, F2: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, MAP: tl.constexpr, PACKED: tl.constexpr,
    LOGITS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_k and d_v per head of the state, the gates' gradients, and this program's part of the key map's."""
    part, bh = tl.program_id(0), tl.program_id(1)
    row, head = (bh // HS).to(tl.int64), bh % HS
    key = head // R
    d, f, e = tl.arange(0, BD), tl.arange(0, BF), tl.arange(0, BV)
    map_k = _load(key_maps + (key % key_map_heads) * D * F2, d, f, F2, 1, D, F2)
    map_kt = _load(key_maps + (key % key_map_heads) * D * F2, f, d, 1, F2, F2, D)
    d_map = tl.zeros([BF, BD], tl.float32)
    for n in range(part * span, tl.minimum(part * span + span, N)):
        i = n * C + tl.arange(0, C)
        sums, total, enter = _gates(decay, weight, row, head, n, T, HS, C)
        here, before, last = _documents(document, row, n, T, C, PACKED)
        v_t = _load(v + row * vb + key * vh, e, i - shift, 1, vt, V, T - shift)
        k_t = _load(k + row * kb + key * kh, d, i - shift, 1, kt, D, T - shift)
        logs_k = _columns(k_t, map_kt, F2, BF, MAP, LOGITS)
        peak_k = _peak(logs_k, 0, MAP)
        phi_k = tl.exp(logs_k - peak_k[None, :])
        gradient = tl.zeros([BF, C], tl.float32)
        d_value = tl.zeros([BV, C], tl.float32)
        side = tl.zeros([C], tl.float32)
        for g in range(0, G):
            own = head * G + g
            scalars = (row * T + i) * (HS * G) + own
            lm = tl.load(log_mass + scalars, mask=i < T, other=NEG_INF)
            gain = tl.load(delta + scalars, mask=i < T, other=0.0)
            side += tl.load(sides + scalars, mask=i < T, other=0.0)
            lm = tl.where(lm == NEG_INF, float("inf"), lm)
            slopes, heads = d_y + row * T * (HS * G * V) + own * V, HS * G * V
            queries, maps = q + row * qb + own * qh, query_maps + (own % query_map_heads) * D * F2
            map_q = _load(maps, d, f, F2, 1, D, F2)
            logs_q = _rows(_load(queries, i, d, qt, 1, T, D), map_q, F2, BF, MAP, LOGITS)
            peak_q = _peak(logs_q, 1, MAP)
            pairs = tl.exp(tl.minimum(_pairs(sums, enter, here, peak_q - lm, peak_k, C), LARGEST))
            product = _dot(tl.exp(logs_q - peak_q[:, None]), phi_k, OPERAND, PRECISION)
            slope_t = _load(slopes, e, i, 1, heads, V, T)
            d_value += _dot(slope_t, pairs * product, OPERAND, PRECISION)
            slope = _load(slopes, i, e, heads, 1, T, V)
            pairs *= _dot(slope, v_t, OPERAND, PRECISION) + gain[:, None]
            map_qt = _load(maps, f, d, 1, F2, F2, D)
            logs_qt = _columns(_load(queries, d, i, 1, qt, D, T), map_qt, F2, BF, MAP, LOGITS)
            phi_q = tl.exp(logs_qt - _peak(logs_qt, 0, MAP)[None, :])
            gradient += _dot(phi_q, pairs, OPERAND, PRECISION)
        gradient *= phi_k
        base = bh.to(tl.int64) * N + n
        memory = _load(d_kv + base * F2 * V, f, e, V, 1, F2, V)
        memory_t = _load(d_kv + base * F2 * V, e, f, 1, V, V, F2)
        memory_mass = tl.load(d_norm + base * F2 + f, mask=f < F2, other=0.0)
        memory_scale = tl.load(d_scale + base * F2 + f, mask=f < F2, other=NEG_INF)
        leaves = tl.where(here == last, total - sums + enter, NEG_INF)
        leaves = tl.exp(logs_k + memory_scale[:, None] + leaves[None, :])
        gradient += leaves * (_dot(memory, v_t, OPERAND, PRECISION) + memory_mass[:, None])
        d_value += _dot(memory_t, leaves, OPERAND, PRECISION)
        own_side = tl.sum(gradient, 0)
        offsets = (row * T + i) * HS + head
        tl.store(d_weight + offsets, own_side, mask=i < T)
        later = tl.cumsum(tl.where(i < T, side - own_side, 0.0), 0, reverse=True)
        tl.store(d_decay + offsets, later + tl.load(products + base), mask=i < T)
        if MAP == "none":
            result = gradient
        else:
            gradient = _logits_gradient(gradient, logs_k, 0, F2, BF, MAP)
            result = _dot(map_k, gradient, OPERAND, PRECISION)
            rows_k = _load(k + row * kb + key * kh, i - shift, d, kt, 1, T - shift, D)
            d_map += _dot(gradient, rows_k, OPERAND, PRECISION)
        own_k, own_v = d_k + row * T * HS * D, d_v + row * T * HS * V
        _store(own_k + head * D, result, d, i - shift, 1, HS * D, D, T - shift)
        _store(own_v + head * V, d_value, e, i - shift, 1, HS * V, V, T - shift)
    if MAP != "none":
        _store(d_maps + (part * tl.num_programs(1) + bh).to(tl.int64) * D * F2, d_map, f, d, 1, F2, F2, D)


INTERPRETED = not isinstance(outputs, triton.JITFunction)
"""Whether TRITON_INTERPRET=1 was set: the kernels then run on CPU tensors, slowly."""
