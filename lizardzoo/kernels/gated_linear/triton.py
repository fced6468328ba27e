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
def _place(start, stride, end, width: tl.constexpr, C: tl.constexpr, W: tl.constexpr, TURN: tl.constexpr):
    """Offsets of the tile [tokens start .. start + C, W columns] and which are inside; TURN: of its transpose.

    The tokens' own offset is one 64-bit number: offsets in the tile are small, and 32-bit ones take half the registers.
    """
    tokens = tl.expand_dims(tl.arange(0, C), 0 if TURN else 1)
    columns = tl.expand_dims(tl.arange(0, W), 1 if TURN else 0)
    inside = (tokens + start >= 0) & (tokens + start < end)
    if width < W:
        inside = inside & (columns < width)
    else:
        inside = inside & (columns >= 0)
    return tokens * stride + columns, inside


@triton.jit
def _tokens(base, start, stride, end, width: tl.constexpr, C: tl.constexpr, W: tl.constexpr, TURN: tl.constexpr):
    """[C, W] of tokens (TURN: [W, C]), zero outside 0 <= token < end, column < width."""
    offsets, inside = _place(start, stride, end, width, C, W, TURN)
    return tl.load(base + (start * tl.full([], 1, tl.int64)) * stride + offsets, mask=inside, other=0.0)


@triton.jit
def _put_tokens(
    base, value, start, stride, end, width: tl.constexpr, C: tl.constexpr, W: tl.constexpr, TURN: tl.constexpr
):
    offsets, inside = _place(start, stride, end, width, C, W, TURN)
    base += (start * tl.full([], 1, tl.int64)) * stride
    tl.store(base + offsets, value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _matrix(base, rows: tl.constexpr, columns: tl.constexpr, R: tl.constexpr, W: tl.constexpr, TURN: tl.constexpr):
    """A matrix [rows, columns], padded with zeros to [R, W] (TURN: [W, R])."""
    return _tokens(base, 0, columns, rows, columns, R, W, TURN)


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
def _rows(
    x, maps, D: tl.constexpr, F2: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr,
    MAP: tl.constexpr, LOGITS: tl.constexpr,
):  # fmt: skip
    """log phi of x [C, D] with [W, -W] [D, 2F]: [C, BF].

    A bf16 x meets the fp32 weights as two bf16 terms, one behind the other: as exact as tf32, and as fast.
    """
    if MAP == "none":
        logits = x.to(tl.float32)
    elif LOGITS == "bf16x2":
        logits = tl.dot(x, _matrix(maps, D, F2, BD, BF, False))
        logits += tl.dot(x, _matrix(maps + D * F2, D, F2, BD, BF, False))
    else:
        logits = tl.dot(x.to(tl.float32), _matrix(maps, D, F2, BD, BF, False), input_precision=LOGITS)
    return _log_features(logits, 1, F2, BF, MAP)


@triton.jit
def _columns(
    x_t, maps, D: tl.constexpr, F2: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr,
    MAP: tl.constexpr, LOGITS: tl.constexpr,
):  # fmt: skip
    """The transpose of _rows, from x^T [D, C]: [BF, C]."""
    if MAP == "none":
        logits = x_t.to(tl.float32)
    elif LOGITS == "bf16x2":
        logits = tl.dot(_matrix(maps, D, F2, BD, BF, True), x_t)
        logits += tl.dot(_matrix(maps + D * F2, D, F2, BD, BF, True), x_t)
    else:
        logits = tl.dot(_matrix(maps, D, F2, BD, BF, True), x_t.to(tl.float32), input_precision=LOGITS)
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
    C: tl.constexpr, MAP: tl.constexpr, PACKED: tl.constexpr, QUERY: tl.constexpr, WIDTH: tl.constexpr,
    TERMS: tl.constexpr, LOGITS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a chunk adds to the state: sum_t exp(e - c_t + weight_t) phi_k(t) [v_t, 1].

    QUERY: what it adds to the gradient of the state: sum_i exp(c_i - log_mass_i) phi_q(i) [dy_i, delta_i].
    """
    n, bh, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, head = (bh // HS).to(tl.int64), bh % HS
    i, f = n * C + tl.arange(0, C), tl.arange(0, BF)
    sums, total, enter = _gates(decay, weight, row, head, n, T, HS, C)
    here, before, last = _documents(document, row, n, T, C, PACKED)
    added = tl.zeros([BF, BV], tl.float32)
    mass = tl.zeros([BF], tl.float32)
    peak = tl.full([BF], NEG_INF, tl.float32)
    for g in range(G):
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
        start = n * C - shift
        value = _tokens(values + row * vb + own * vh + block * BV, start, vt, T - shift, WIDTH, C, BV, False)
        x_t = _tokens(x + row * xb + own * xh, start, xt, T - shift, D, C, BD, True)
        logs = _columns(x_t, maps + (own % map_heads) * TERMS * D * F2, D, F2, BD, BF, MAP, LOGITS) + exponent[None, :]
        top = tl.maximum(peak, tl.max(logs, 1))
        rescale = tl.exp(peak - _finite(top))
        features = tl.exp(logs - _finite(top)[:, None])
        added = added * rescale[:, None] + _dot(features, value, OPERAND, PRECISION)
        mass = mass * rescale + tl.sum(features * part[None, :], 1)
        peak = top
    base = bh.to(tl.int64) * N + n
    _put_tokens(kv + base * F2 * V + block * BV, added, 0, V, F2, WIDTH, BF, BV, False)
    if block == 0:
        tl.store(norm + base * F2 + f, mass, mask=f < F2)
        tl.store(scale + base * F2 + f, peak, mask=f < F2)
        tl.store(carry + base, tl.where(before == last, total, NEG_INF))


@triton.jit(do_not_specialize=["N"])
def scan(
    kv, norm, scale, carry, kv_0, norm_0, scale_0, kv_n, norm_n, scale_n, to_kv, to_norm, to_scale,
    old_kv, old_norm, old_scale, last_kv, last_norm, last_scale, products, N,
    F2: tl.constexpr, V: tl.constexpr, SF: tl.constexpr, BV: tl.constexpr, START: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """From what each chunk adds (kv, norm, scale) to the state before it (to_*), and the one at the end.

    REVERSE: from the right, with the gradient of the state behind each chunk in the place of the state before it; also
    `products`, that gradient times that state (old_*: the states before each chunk; last_*: behind the last). Never in
    place: a vector has copies in several warps, and one would store before another has loaded.
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
    for step in range(N):
        n = N - 1 - step if REVERSE else step
        at = bh * N + n
        add = tl.load(kv + at * F2 * V + matrix, mask=inside, other=0.0)
        add_mass = tl.load(norm + at * F2 + vector, mask=f < F2, other=0.0)
        add_top = tl.load(scale + at * F2 + vector, mask=f < F2, other=NEG_INF)
        kept = top + tl.load(carry + at)
        tl.store(to_kv + at * F2 * V + matrix, state.to(to_kv.dtype.element_ty), mask=inside)
        tl.store(to_norm + at * F2 + vector, mass, mask=f < F2)
        tl.store(to_scale + at * F2 + vector, top, mask=f < F2)
        if REVERSE:
            product = tl.sum(state * after, 1) + mass * after_mass
            product = tl.where((top == NEG_INF) | (after_top == NEG_INF), 0.0, product * tl.exp(top + after_top))
            tl.store(products + at * tl.num_programs(1) + block, tl.sum(product, 0))
            after = tl.load(old_kv + at * F2 * V + matrix, mask=inside, other=0.0).to(tl.float32)
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
    C: tl.constexpr, MAP: tl.constexpr, PACKED: tl.constexpr, TERMS: tl.constexpr,
    LOGITS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y and log_mass of a chunk, for the G query heads that share a state."""
    n, bh = tl.program_id(0), tl.program_id(1)
    row, head = (bh // HS).to(tl.int64), bh % HS
    i, f, start = n * C + tl.arange(0, C), tl.arange(0, BF), n * C - shift
    sums, _, enter = _gates(decay, weight, row, head, n, T, HS, C)
    here, before, _ = _documents(document, row, n, T, C, PACKED)
    key = head // R
    k_t = _tokens(k + row * kb + key * kh, start, kt, T - shift, D, C, BD, True)
    logs_k = _columns(k_t, key_maps + (key % key_map_heads) * TERMS * D * F2, D, F2, BD, BF, MAP, LOGITS)
    peak_k = _peak(logs_k, 0, MAP)
    phi_k = tl.exp(logs_k - peak_k[None, :])
    value = _tokens(v + row * vb + key * vh, start, vt, T - shift, V, C, BV, False)
    base = bh.to(tl.int64) * N + n
    memory = _matrix(kv + base * F2 * V, F2, V, BF, BV, False)
    memory_mass = tl.load(norm + base * F2 + f, mask=f < F2, other=0.0)
    memory_scale = tl.load(scale + base * F2 + f, mask=f < F2, other=NEG_INF)
    for g in range(G):
        own = head * G + g
        tile = _tokens(q + row * qb + own * qh, n * C, qt, T, D, C, BD, False)
        logs_q = _rows(tile, query_maps + (own % query_map_heads) * TERMS * D * F2, D, F2, BD, BF, MAP, LOGITS)
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
        _put_tokens(y + row * T * (HS * G * V) + own * V, result, n * C, HS * G * V, T, V, C, BV, False)
        lm = tl.where(empty, NEG_INF, tl.log(mass) + top)
        tl.store(log_mass + (row * T + i) * (HS * G) + own, lm, mask=i < T)


@triton.jit(do_not_specialize=["rows"])
def deltas(y, d_y, log_mass, d_log_mass, delta, rows, V: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr):
    """d_log_mass - dy.y: what every weight of a query gains by its mass."""
    start = tl.program_id(0) * ROWS
    r = start + tl.arange(0, ROWS)
    out = _tokens(y, start, V, rows, V, ROWS, BV, False).to(tl.float32)
    slope = _tokens(d_y, start, V, rows, V, ROWS, BV, False).to(tl.float32)
    own = tl.load(d_log_mass + r, mask=r < rows, other=0.0) - tl.sum(out * slope, 1)
    lm = tl.load(log_mass + r, mask=r < rows, other=NEG_INF)
    tl.store(delta + r, tl.where(lm == NEG_INF, 0.0, own), mask=r < rows)


@triton.jit(do_not_specialize=["T", "N", "shift", "span"])
def query_gradients(
    q, k, v, decay, weight, document, query_maps, key_maps, kv, norm, scale, d_y, log_mass, delta, d_q, d_maps, sides,
    qb, qt, qh, kb, kt, kh, vb, vt, vh, query_map_heads, key_map_heads, T, N, shift, span, G, HS, R,
    D: tl.constexpr, F2: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, MAP: tl.constexpr, PACKED: tl.constexpr, TERMS: tl.constexpr,
    LOGITS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_q, this program's part of the query map's gradient, and `sides`: d_log phi_q summed over the features."""
    part, bh = tl.program_id(0), tl.program_id(1)
    row, own = (bh // (HS * G)).to(tl.int64), bh % (HS * G)
    head = own // G
    key = head // R
    f = tl.arange(0, BF)
    map_q = query_maps + (own % query_map_heads) * TERMS * D * F2
    map_k = key_maps + (key % key_map_heads) * TERMS * D * F2
    d_map = tl.zeros([BD, BF], tl.float32)
    for n in range(part * span, tl.minimum(part * span + span, N)):
        i = n * C + tl.arange(0, C)
        sums, _, enter = _gates(decay, weight, row, head, n, T, HS, C)
        here, before, _ = _documents(document, row, n, T, C, PACKED)
        scalars = (row * T + i) * (HS * G) + own
        lm = tl.load(log_mass + scalars, mask=i < T, other=NEG_INF)
        gain = tl.load(delta + scalars, mask=i < T, other=0.0)
        lm = tl.where(lm == NEG_INF, float("inf"), lm)
        start = n * C - shift
        slope = _tokens(d_y + row * T * (HS * G * V) + own * V, n * C, HS * G * V, T, V, C, BV, False)
        v_t = _tokens(v + row * vb + key * vh, start, vt, T - shift, V, C, BV, True)
        tile = _tokens(q + row * qb + own * qh, n * C, qt, T, D, C, BD, False)
        logs_q = _rows(tile, map_q, D, F2, BD, BF, MAP, LOGITS)
        tile = _tokens(k + row * kb + key * kh, start, kt, T - shift, D, C, BD, False)
        logs_k = _rows(tile, map_k, D, F2, BD, BF, MAP, LOGITS)
        peak_q, peak_k = _peak(logs_q, 1, MAP), _peak(logs_k, 1, MAP)
        pairs = tl.exp(tl.minimum(_pairs(sums, enter, here, peak_q - lm, peak_k, C), LARGEST))
        pairs *= _dot(slope, v_t, OPERAND, PRECISION) + gain[:, None]
        gradient = _dot(pairs, tl.exp(logs_k - peak_k[:, None]), OPERAND, PRECISION)
        gradient *= tl.exp(logs_q - peak_q[:, None])
        base = bh.to(tl.int64) // G * N + n
        memory_t = _matrix(kv + base * F2 * V, F2, V, BF, BV, True)
        memory_mass = tl.load(norm + base * F2 + f, mask=f < F2, other=0.0)
        memory_scale = tl.load(scale + base * F2 + f, mask=f < F2, other=NEG_INF)
        read = tl.exp(logs_q + memory_scale[None, :] + (tl.where(here == before, sums, NEG_INF) - lm)[:, None])
        gradient += read * (_dot(slope, memory_t, OPERAND, PRECISION) + gain[:, None] * memory_mass[None, :])
        tl.store(sides + scalars, tl.sum(gradient, 1), mask=i < T)
        if MAP == "none":
            result = gradient
        else:
            gradient = _logits_gradient(gradient, logs_q, 1, F2, BF, MAP)
            result = _dot(gradient, _matrix(map_q, D, F2, BD, BF, True), OPERAND, PRECISION)
            q_t = _tokens(q + row * qb + own * qh, n * C, qt, T, D, C, BD, True)
            d_map += _dot(q_t, gradient, OPERAND, PRECISION)
        _put_tokens(d_q + row * T * (HS * G * D) + own * D, result, n * C, HS * G * D, T, D, C, BD, False)
    if MAP != "none":
        d_maps += (part * tl.num_programs(1) + bh).to(tl.int64) * D * F2
        _put_tokens(d_maps, d_map, 0, F2, D, F2, BD, BF, False)


@triton.jit(do_not_specialize=["T", "N", "shift", "span"])
def key_gradients(
    q, k, v, decay, weight, document, query_maps, key_maps, d_kv, d_norm, d_scale, d_y, log_mass, delta, sides,
    products, d_k, d_v, d_maps, d_decay, d_weight,
    qb, qt, qh, kb, kt, kh, vb, vt, vh, query_map_heads, key_map_heads, T, N, shift, span, G, HS, R,
    D: tl.constexpr, F2: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, MAP: tl.constexpr, PACKED: tl.constexpr, TERMS: tl.constexpr,
    LOGITS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_k and d_v per head of the state, the gates' gradients, and this program's part of the key map's."""
    part, bh = tl.program_id(0), tl.program_id(1)
    row, head = (bh // HS).to(tl.int64), bh % HS
    key = head // R
    f = tl.arange(0, BF)
    map_k = key_maps + (key % key_map_heads) * TERMS * D * F2
    d_map = tl.zeros([BF, BD], tl.float32)
    for n in range(part * span, tl.minimum(part * span + span, N)):
        i = n * C + tl.arange(0, C)
        sums, total, enter = _gates(decay, weight, row, head, n, T, HS, C)
        here, _, last = _documents(document, row, n, T, C, PACKED)
        start = n * C - shift
        v_t = _tokens(v + row * vb + key * vh, start, vt, T - shift, V, C, BV, True)
        k_t = _tokens(k + row * kb + key * kh, start, kt, T - shift, D, C, BD, True)
        logs_k = _columns(k_t, map_k, D, F2, BD, BF, MAP, LOGITS)
        peak_k = _peak(logs_k, 0, MAP)
        phi_k = tl.exp(logs_k - peak_k[None, :])
        gradient = tl.zeros([BF, C], tl.float32)
        d_value = tl.zeros([BV, C], tl.float32)
        side = tl.zeros([C], tl.float32)
        for g in range(G):
            own = head * G + g
            scalars = (row * T + i) * (HS * G) + own
            lm = tl.load(log_mass + scalars, mask=i < T, other=NEG_INF)
            gain = tl.load(delta + scalars, mask=i < T, other=0.0)
            side += tl.load(sides + scalars, mask=i < T, other=0.0)
            lm = tl.where(lm == NEG_INF, float("inf"), lm)
            slopes, heads = d_y + row * T * (HS * G * V) + own * V, HS * G * V
            queries, maps = q + row * qb + own * qh, query_maps + (own % query_map_heads) * TERMS * D * F2
            logs_q = _rows(_tokens(queries, n * C, qt, T, D, C, BD, False), maps, D, F2, BD, BF, MAP, LOGITS)
            peak_q = _peak(logs_q, 1, MAP)
            pairs = tl.exp(tl.minimum(_pairs(sums, enter, here, peak_q - lm, peak_k, C), LARGEST))
            product = _dot(tl.exp(logs_q - peak_q[:, None]), phi_k, OPERAND, PRECISION)
            slope_t = _tokens(slopes, n * C, heads, T, V, C, BV, True)
            d_value += _dot(slope_t, pairs * product, OPERAND, PRECISION)
            slope = _tokens(slopes, n * C, heads, T, V, C, BV, False)
            pairs *= _dot(slope, v_t, OPERAND, PRECISION) + gain[:, None]
            logs_qt = _columns(_tokens(queries, n * C, qt, T, D, C, BD, True), maps, D, F2, BD, BF, MAP, LOGITS)
            phi_q = tl.exp(logs_qt - _peak(logs_qt, 0, MAP)[None, :])
            gradient += _dot(phi_q, pairs, OPERAND, PRECISION)
        gradient *= phi_k
        base = bh.to(tl.int64) * N + n
        memory = _matrix(d_kv + base * F2 * V, F2, V, BF, BV, False)
        memory_t = _matrix(d_kv + base * F2 * V, F2, V, BF, BV, True)
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
            result = _dot(_matrix(map_k, D, F2, BD, BF, False), gradient, OPERAND, PRECISION)
            rows_k = _tokens(k + row * kb + key * kh, start, kt, T - shift, D, C, BD, False)
            d_map += _dot(gradient, rows_k, OPERAND, PRECISION)
        own_k, own_v = d_k + row * T * HS * D, d_v + row * T * HS * V
        _put_tokens(own_k + head * D, result, start, HS * D, T - shift, D, C, BD, True)
        _put_tokens(own_v + head * V, d_value, start, HS * V, T - shift, V, C, BV, True)
    if MAP != "none":
        d_maps += (part * tl.num_programs(1) + bh).to(tl.int64) * D * F2
        _put_tokens(d_maps, d_map, 0, F2, D, F2, BD, BF, True)


INTERPRETED = not isinstance(outputs, triton.JITFunction)
"""Whether TRITON_INTERPRET=1 was set: the kernels then run on CPU tensors, slowly."""
