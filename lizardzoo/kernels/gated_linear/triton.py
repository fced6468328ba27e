# mypy: ignore-errors
"""Gated linear attention in Triton: the gates, the states between chunks, and the outputs.

A sequence is cut into chunks of C slots; the key that enters at slot i stands `lag` slots earlier. With c the log-decay
summed within a chunk and e its sum over the chunk, a key that enters at slot t and a query of slot i of one chunk weigh
exp(c_i - c_t + weight_t) phi_q(i).phi_k(t); what came before the chunk is one matrix S, held as S^T [V, F]: every
product then takes features with tokens as rows, as they are computed. Forward: (1) gates, (2) what each chunk adds to
S, (3) a scan over the chunks, (4) outputs. The backward is in `triton_backward.py`.

The features of a Hedgehog map are those of z = xW and those of -z: kernels go over the two HALVES one after the other,
which needs one product for both and half the registers. Features live in registers only.

What a query is relative to. Softmax features are at most 1, so weights are taken relative to the largest decayed key
weight, which all heads of a group share: no maximum over scores, one exponential for the group. Exp features can be
anything: each row is taken relative to its largest feature, each feature of S to its largest entry. Nothing is summed
in an order that the launch decides: results are deterministic.

Logarithms are in units of log 2 in here: exp2 is one instruction, exp five.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret
"""Whether TRITON_INTERPRET=1 was set: the kernels then run on CPU tensors, slowly."""
NEG_INF = tl.constexpr(float("-inf"))
LARGEST = tl.constexpr(115.0)  # 2 ** 115 is finite in bf16 and fp32, times any sound gradient too
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _finite(x):
    return tl.where(x == NEG_INF, 0.0, x)


@triton.jit
def _tokens(base, start, stride, end, width: tl.constexpr, C: tl.constexpr, W: tl.constexpr):
    """[C, W] of the tokens start .. start + C, zero outside 0 <= token < end, column < width.

    The tokens' own offset is one 64-bit number: offsets in the tile are small, and 32-bit ones take half the registers.
    """
    rows, columns = tl.arange(0, C)[:, None], tl.arange(0, W)[None, :]
    inside = (rows + start >= 0) & (rows + start < end)
    if width < W:
        inside = inside & (columns < width)
    base += (start * tl.full([], 1, tl.int64)) * stride
    return tl.load(base + rows * stride + columns, mask=inside, other=0.0)


@triton.jit
def _put_tokens(base, value, start, stride, end, width: tl.constexpr, C: tl.constexpr, W: tl.constexpr):
    rows, columns = tl.arange(0, C)[:, None], tl.arange(0, W)[None, :]
    inside = (rows + start >= 0) & (rows + start < end)
    if width < W:
        inside = inside & (columns < width)
    base += (start * tl.full([], 1, tl.int64)) * stride
    tl.store(base + rows * stride + columns, value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _vector(base, start, stride, end, other, C: tl.constexpr):
    """[C] of the tokens start .. start + C where each has one number; `other` from token `end` on."""
    i = tl.arange(0, C)
    base += (start * tl.full([], 1, tl.int64)) * stride
    return tl.load(base + i * stride, mask=i + start < end, other=other)


@triton.jit
def _put_vector(base, value, start, stride, end, C: tl.constexpr):
    i = tl.arange(0, C)
    base += (start * tl.full([], 1, tl.int64)) * stride
    tl.store(base + i * stride, value, mask=i + start < end)


@triton.jit
def _half(base, half, rows: tl.constexpr, F: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr, BF: tl.constexpr):
    """Columns half * F .. half * F + F of a matrix [rows, WIDTH], padded with zeros to [R, BF]."""
    r, f = tl.arange(0, R)[:, None], tl.arange(0, BF)[None, :]
    return tl.load(base + r * WIDTH + half * F + f, mask=(r < rows) & (f < F), other=0.0)


@triton.jit
def _dot(a, b, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """bf16 inputs meet as bf16; fp16 and fp32 ones as three products of tf32: weights need the range of fp32."""
    if OPERAND == "bf16":
        a, b = a.to(tl.bfloat16), b.to(tl.bfloat16)
    else:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _dot_turned(a, b, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T."""
    if OPERAND == "bf16":
        a, b = a.to(tl.bfloat16), b.to(tl.bfloat16)
    else:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, tl.trans(b), input_precision=PRECISION)


@triton.jit
def _map(maps, D: tl.constexpr, F: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, MAP: tl.constexpr):
    """A map W [BD, BF]; without a map, nothing that is read."""
    if MAP == "none":
        return tl.zeros([BD, BF], tl.float32)
    else:
        return _half(maps, 0, D, F, F, BD, BF)


@triton.jit
def _logits(x, w, MAP: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """z = x W in units of log 2, from x [C, D]; without a map, from x itself."""
    if MAP == "none":
        return x.to(tl.float32) * LOG2E
    else:
        return _dot(x, w, OPERAND, PRECISION) * LOG2E


@triton.jit
def _signed(z, half, F: tl.constexpr, BF: tl.constexpr):
    """z of the first half, -z of the second; -inf in padded features."""
    z = z if half == 0 else -z
    if F < BF:
        z = tl.where((tl.arange(0, BF) < F)[None, :], z, NEG_INF)
    return z


@triton.jit
def _peak(z, F: tl.constexpr, BF: tl.constexpr, C: tl.constexpr, MAP: tl.constexpr):
    """What the features of a token are taken relative to, as a logarithm; [C]. Softmax features need nothing."""
    if MAP == "softmax":
        return tl.zeros([C], tl.float32)
    top = tl.max(_signed(z, 0, F, BF), 1)
    if MAP == "exp":
        top = tl.maximum(top, tl.max(_signed(z, 1, F, BF), 1))
    return _finite(top)


@triton.jit
def _features(z, peak, half, F: tl.constexpr, BF: tl.constexpr, MAP: tl.constexpr):
    """phi of one half, times exp(-peak); [C, BF], zero in padded features."""
    z = _signed(z, half, F, BF)
    if MAP == "softmax":
        phi = tl.exp2(z - tl.max(z, 1)[:, None])
        return phi * (tl.exp2(-peak) / tl.sum(phi, 1))[:, None]
    else:
        return tl.exp2(z - peak[:, None])


@triton.jit
def _operand(x, OPERAND: tl.constexpr):
    """As products take it: a tile that waits for one then takes half the registers, or none."""
    return x.to(tl.bfloat16) if OPERAND == "bf16" else x


@triton.jit
def _read_gates(sums, weight, bh, n, T, C: tl.constexpr):
    """Log-decay summed within the chunk, over the chunk, and the log-weights of the keys that enter in it."""
    i = n * C + tl.arange(0, C)
    base = bh.to(tl.int64) * T
    total = tl.load(sums + base + tl.minimum(n * C + C, T) - 1)
    c = tl.load(sums + base + i, mask=i < T, other=0.0)
    return c, total, tl.load(weight + base + i, mask=i < T, other=NEG_INF)


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
def _pairs(rows, columns, here, C: tl.constexpr, PACKED: tl.constexpr, TURNED: tl.constexpr):
    """Sums of two logarithms [query, key] of a chunk, TURNED [key, query]; -inf where a query does not see a key."""
    i = tl.arange(0, C)
    seen = i[:, None] <= i[None, :] if TURNED else i[:, None] >= i[None, :]
    if PACKED:
        seen = seen & (here[:, None] == here[None, :])
    return tl.where(seen, rows[:, None] + columns[None, :], NEG_INF)


@triton.jit
def _state(kv, norm, at, half, F: tl.constexpr, F2: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr):
    """One half of a state: S^T [BV, BF] and its norm [BF], both relative to its scale."""
    f = tl.arange(0, BF)
    mass = tl.load(norm + at * F2 + half * F + f, mask=f < F, other=0.0)
    return _half(kv + at * F2 * V, half, V, F, F2, BV, BF), mass


@triton.jit
def _as_rows(x, BF: tl.constexpr, OPERAND: tl.constexpr, TIMES: tl.constexpr):
    """A vector [BF] as an operand [16, BF] whose rows sum to it TIMES: a product with it costs less than a sum."""
    r, high = tl.arange(0, 16)[:, None], x.to(tl.bfloat16).to(tl.float32)
    rows = tl.where(r % 2 == 0, high[None, :], (x - high)[None, :])
    return _operand(tl.where(r < 2 * TIMES, rows, 0.0), OPERAND)


@triton.jit
def _state_operands(
    kv, norm, at, half, F: tl.constexpr, F2: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    OPERAND: tl.constexpr, TIMES: tl.constexpr,
):  # fmt: skip
    """The same, both as operands."""
    matrix, mass = _state(kv, norm, at, half, F, F2, V, BF, BV)
    return matrix, _as_rows(mass, BF, OPERAND, TIMES)


@triton.jit
def _scale(scale, at, half, F: tl.constexpr, BF: tl.constexpr, SCALES: tl.constexpr):
    """The log-scale of one half of a state: [BF]; a number where SCALES = 1."""
    if SCALES == 1:
        return tl.load(scale + at)
    else:
        f = tl.arange(0, BF)
        return tl.load(scale + at * SCALES + half * F + f, mask=f < F, other=NEG_INF)


@triton.jit(do_not_specialize=["T", "lag", "offset", "skip"])
def gates(
    decay, enter, allowed, sums, weight, T, lag, offset, skip, HS, DECAYS, ENTERS,
    C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`sums`, `weight` [B, Hs, T]: log-decay summed within its chunk, and the log-weight with which a key enters.

    The weight is the key's log_input and what it lost while it waited, the decays of the `lag` slots up to the one at
    which it enters. decay, enter [B, offset + T, heads of the gate] begin `offset` slots before slot 0. Sums are fp64,
    since waiting tokens may lose much more than the differences that count.
    """
    n, bh = tl.program_id(0), tl.program_id(1)
    row, head = (bh // HS).to(tl.int64), bh % HS
    i = n * C + tl.arange(0, C)
    lost = tl.zeros([C], tl.float64)
    c = tl.zeros([C], tl.float64)
    if decay is not None:
        decays, first = decay + row * (offset + T) * DECAYS + head * DECAYS // HS, offset + n * C
        own = tl.load(decays + (offset + i) * DECAYS, mask=i < T, other=0.0).to(tl.float64)
        c = tl.cumsum(own, 0)
        past = offset + i - lag
        gone = tl.load(decays + past * DECAYS, mask=(past >= 0) & (i < T), other=0.0).to(tl.float64)
        waits = tl.zeros([BLOCK], tl.float64)
        for start in range(tl.maximum(first - lag, 0), first, BLOCK):
            s = start + tl.arange(0, BLOCK)
            waits += tl.load(decays + s * DECAYS, mask=s < first, other=0.0).to(tl.float64)
        lost = tl.sum(waits, 0) + c - tl.cumsum(gone, 0)
    w = lost.to(tl.float32)
    source = offset + i - lag
    if enter is not None:
        inside = (source >= 0) & (i < T)
        w += tl.load(enter + (row * (offset + T) + source) * ENTERS + head * ENTERS // HS, mask=inside, other=0.0)
    if allowed is not None:
        w = tl.where(tl.load(allowed + row * T + i, mask=i < T, other=0) != 0, w, NEG_INF)
    else:
        w = tl.where(i >= lag + skip, w, NEG_INF)
    place = bh.to(tl.int64) * T + i
    tl.store(sums + place, c.to(tl.float32) * LOG2E, mask=i < T)
    tl.store(weight + place, w * LOG2E, mask=i < T)


@triton.jit(do_not_specialize=["T", "N", "shift"])
def chunk_states(
    k, v, sums, weight, document, maps, kv, norm, scale, carry, kb, kt, kh, vb, vt, vh, map_heads, T, N, shift, HS, R,
    D: tl.constexpr, F: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, HALVES: tl.constexpr, MAP: tl.constexpr, SCALES: tl.constexpr, PACKED: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a chunk adds to the state: sum_t exp(e - c_t + weight_t) phi_k(t) [v_t, 1], and its decay `carry`."""
    n, bh = tl.program_id(0), tl.program_id(1)
    row, head = (bh // HS).to(tl.int64), bh % HS
    key, f = head // R, tl.arange(0, BF)
    F2: tl.constexpr = F * HALVES
    c, total, enter = _read_gates(sums, weight, bh, n, T, C)
    here, before, last = _documents(document, row, n, T, C, PACKED)
    start = n * C - shift
    value = _tokens(v + row * vb + key * vh, start, vt, T - shift, V, C, BV)
    x = _tokens(k + row * kb + key * kh, start, kt, T - shift, D, C, BD)
    w = _map(maps + (key % map_heads) * D * F, D, F, BD, BF, MAP)
    z = _logits(x, w, MAP, OPERAND, PRECISION)
    exponent = tl.where(here == last, total - c + enter, NEG_INF)
    top = tl.max(exponent, 0)
    at = bh.to(tl.int64) * N + n
    for half in tl.static_range(HALVES):
        place = half * F + f
        if SCALES == 1:
            features = _features(z, _finite(top) - exponent, half, F, BF, MAP)
        else:
            logs = _signed(z, half, F, BF) + exponent[:, None]
            peak = tl.max(logs, 0)
            features = tl.exp2(logs - _finite(peak)[None, :])
            tl.store(scale + at * F2 + place, peak, mask=f < F)
        added = _dot(tl.trans(value), features, OPERAND, PRECISION)
        _put_tokens(kv + at * F2 * V + half * F, added, 0, F2, V, F, BV, BF)
        tl.store(norm + at * F2 + place, tl.sum(features, 0), mask=f < F)
    if SCALES == 1:
        tl.store(scale + at, top)
    tl.store(carry + at, tl.where(before == last, total, NEG_INF))


@triton.jit(do_not_specialize=["N"])
def scan(
    kv, norm, scale, carry, kv_0, norm_0, scale_0, kv_n, norm_n, scale_n, to_kv, to_norm, to_scale,
    old_kv, old_norm, old_scale, through, N,
    F2: tl.constexpr, V: tl.constexpr, SCALES: tl.constexpr, SV: tl.constexpr, SF: tl.constexpr, BF2: tl.constexpr,
    START: tl.constexpr, REVERSE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """From what each chunk adds (kv, norm, scale) to the state before it (to_*), and the one at the end.

    REVERSE: from the right, with the gradient of the state behind each chunk in the place of the state before it; and
    `through`, what passes through a chunk: that gradient times the decayed state before it (old_*), program by program.
    A state that comes in or goes out (kv_0, kv_n) is [F2, V] with a scale for each feature; those between chunks are
    [V, F2]. Never in place: a vector has copies in several warps, and one would store before another has loaded.
    """
    bh = tl.program_id(0).to(tl.int64)
    e, f = tl.program_id(1) * SV + tl.arange(0, SV), tl.program_id(2) * SF + tl.arange(0, SF)
    inside = (e < V)[:, None] & (f < F2)[None, :]
    matrix, turned = e[:, None] * F2 + f[None, :], f[None, :] * V + e[:, None]
    state = tl.zeros([SV, SF], tl.float32)
    mass = tl.zeros([SF], tl.float32)
    top = tl.full([SF] if SCALES > 1 else [], NEG_INF, tl.float32)
    if START:
        state = tl.load(kv_0 + bh * F2 * V + turned, mask=inside, other=0.0)
        mass = tl.load(norm_0 + bh * F2 + f, mask=f < F2, other=0.0)
        own = tl.load(scale_0 + bh * F2 + f, mask=f < F2, other=NEG_INF) * LOG2E
        if REVERSE:  # the gradient of exp(-scale) S
            own = tl.where(own == NEG_INF, NEG_INF, -own)
        if SCALES > 1:
            top = own
        else:
            g = tl.arange(0, BF2)
            each = tl.load(scale_0 + bh * F2 + g, mask=g < F2, other=NEG_INF) * LOG2E
            if REVERSE:
                each = tl.where(each == NEG_INF, NEG_INF, -each)
            top = tl.max(each, 0)
            rescale = tl.exp2(own - _finite(top))
            state, mass = state * rescale[None, :], mass * rescale
    for step in tl.range(N, num_stages=STAGES):  # loads run ahead, or each step would wait for memory
        n = N - 1 - step if REVERSE else step
        at = bh * N + n
        add = tl.load(kv + at * F2 * V + matrix, mask=inside, other=0.0).to(tl.float32)
        add_mass = tl.load(norm + at * F2 + f, mask=f < F2, other=0.0)
        decay = tl.load(carry + at)
        if SCALES > 1:
            add_top = tl.load(scale + at * SCALES + f, mask=f < F2, other=NEG_INF)
        else:
            add_top = tl.load(scale + at)
        tl.store(to_kv + at * F2 * V + matrix, state.to(to_kv.dtype.element_ty), mask=inside)
        if tl.program_id(1) == 0:
            tl.store(to_norm + at * F2 + f, mass, mask=f < F2)
            if SCALES > 1:
                tl.store(to_scale + at * SCALES + f, top, mask=f < F2)
            else:
                tl.store(to_scale + at, top)
        if REVERSE:
            old = tl.load(old_kv + at * F2 * V + matrix, mask=inside, other=0.0).to(tl.float32)
            passing = tl.sum(state * old, 0)
            if tl.program_id(1) == 0:
                passing += mass * tl.load(old_norm + at * F2 + f, mask=f < F2, other=0.0)
            if SCALES > 1:
                old_top = tl.load(old_scale + at * SCALES + f, mask=f < F2, other=NEG_INF)
            else:
                old_top = tl.load(old_scale + at)
            passing *= tl.exp2(tl.minimum(top + old_top + decay, LARGEST))
            programs = tl.num_programs(1) * tl.num_programs(2)
            place = at * programs + tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
            tl.store(through + place, tl.sum(passing, 0))
        kept = top + decay
        top = tl.maximum(kept, add_top)
        before, new = tl.exp2(kept - _finite(top)), tl.exp2(add_top - _finite(top))
        if SCALES > 1:
            state = before[None, :] * state + new[None, :] * add
        else:
            state = before * state + new * add
        mass = before * mass + new * add_mass
    tl.store(kv_n + bh * F2 * V + turned, state, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(norm_n + bh * F2 + f, mass, mask=f < F2)
        tl.store(scale_n + bh * F2 + f, tl.zeros([SF], tl.float32) + top * LN2, mask=f < F2)


@triton.jit(do_not_specialize=["T", "N", "shift"])
def outputs(
    q, k, v, sums, weight, document, query_maps, key_maps, kv, norm, scale, near_y, near_mass, log_scale, y, log_mass,
    qb, qt, qh, kb, kt, kh, vb, vt, vh, query_map_heads, key_map_heads, T, N, shift, G, HS, R,
    D: tl.constexpr, F: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, HALVES: tl.constexpr, MAP: tl.constexpr, SCALES: tl.constexpr, PACKED: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """y and log_mass of a chunk, for the G query heads that share a state.

    With near_y, near_mass (another branch's outputs): of both under one denominator, this branch's mass times
    exp(log_scale).
    """
    n, bh = tl.program_id(0), tl.program_id(1)
    row, head = (bh // HS).to(tl.int64), bh % HS
    key, start = head // R, n * C - shift
    F2: tl.constexpr = F * HALVES
    c, _, enter = _read_gates(sums, weight, bh, n, T, C)
    here, before, _ = _documents(document, row, n, T, C, PACKED)
    x = _tokens(k + row * kb + key * kh, start, kt, T - shift, D, C, BD)
    w = _map(key_maps + (key % key_map_heads) * D * F, D, F, BD, BF, MAP)
    z = _logits(x, w, MAP, OPERAND, PRECISION)
    peak = _peak(z, F, BF, C, MAP)
    keys = enter + peak - c
    value = _tokens(v + row * vb + key * vh, start, vt, T - shift, V, C, BV)
    at = bh.to(tl.int64) * N + n
    # operands that all heads share, made once
    first_k = _operand(_features(z, peak, 0, F, BF, MAP), OPERAND)
    second_k = _operand(_features(z, peak, HALVES - 1, F, BF, MAP), OPERAND)
    if HELD:
        first_memory, first_mass = _state_operands(kv, norm, at, 0, F, F2, V, BF, BV, OPERAND, 1)
        second_memory, second_mass = _state_operands(kv, norm, at, HALVES - 1, F, F2, V, BF, BV, OPERAND, 1)
    top = tl.max(_pairs(c, keys, here, C, PACKED, False), 1)
    reads = tl.where(here == before, c, NEG_INF)
    if SCALES == 1:
        reads += tl.load(scale + at)
        top = tl.maximum(top, reads)
    top = _finite(top)
    for g in range(G):
        own = head * G + g
        place = row * T * (HS * G) + own
        x = _tokens(q + row * qb + own * qh, n * C, qt, T, D, C, BD)
        w = _map(query_maps + (own % query_map_heads) * D * F, D, F, BD, BF, MAP)
        if near_y is not None:  # read early: nothing may be read past a product that is waited for
            near = _vector(near_mass + place, n * C, HS * G, T, NEG_INF, C) * LOG2E
            add = _tokens(near_y + row * T * (HS * G * V) + own * V, n * C, HS * G * V, T, V, C, BV)
            shift_by = tl.zeros([C], tl.float32)
            if log_scale is not None:
                shift_by = _vector(log_scale + place, n * C, HS * G, T, 0.0, C) * LOG2E
        z = _logits(x, w, MAP, OPERAND, PRECISION)
        peak = _peak(z, F, BF, C, MAP)
        base = top + peak  # what this row is relative to
        if SCALES > 1:
            for half in tl.static_range(HALVES):
                size = _scale(scale, at, half, F, BF, SCALES)
                base = tl.maximum(base, tl.max(_signed(z, half, F, BF) + size[None, :], 1) + reads)
        score = tl.zeros([C, C], tl.float32)
        masses = tl.zeros([C, 16], tl.float32)
        total = tl.zeros([C, BV], tl.float32)
        for half in tl.static_range(HALVES):
            phi = _operand(_features(z, peak, half, F, BF, MAP), OPERAND)
            score += _dot_turned(phi, first_k if half == 0 else second_k, OPERAND, PRECISION)
            if SCALES > 1:
                size = _scale(scale, at, half, F, BF, SCALES)
                phi = tl.exp2(_signed(z, half, F, BF) + size[None, :] + (reads - base)[:, None])
            if HELD:
                memory, norms = (first_memory, first_mass) if half == 0 else (second_memory, second_mass)
            else:
                memory, norms = _state_operands(kv, norm, at, half, F, F2, V, BF, BV, OPERAND, 1)
            masses += _dot_turned(phi, norms, OPERAND, PRECISION)
            total += _dot_turned(phi, memory, OPERAND, PRECISION)
        score *= tl.exp2(_pairs(c + peak - base, keys, here, C, PACKED, False))
        mass = tl.sum(score, 1)
        score = _operand(score, OPERAND)
        if SCALES == 1:
            read = tl.exp2(reads - base)
            total *= read[:, None]
            mass += tl.sum(masses, 1) * read
        else:
            mass += tl.sum(masses, 1)
        total += _dot(score, value, OPERAND, PRECISION)
        share = tl.zeros([C], tl.float32)
        if near_y is not None:
            base += shift_by
            some = mass > 0
            peak = _finite(tl.maximum(near, tl.where(some, base + tl.log2(tl.where(some, mass, 1.0)), NEG_INF)))
            share, far = tl.exp2(near - peak), tl.where(some, tl.exp2(base - peak), 0.0)
            total *= far[:, None]
            mass, base = mass * far + share, peak
        inverse = tl.where(mass == 0, 0.0, 1.0 / tl.where(mass == 0, 1.0, mass))
        if near_y is not None:
            total += add.to(tl.float32) * share[:, None]
        _put_tokens(y + row * T * (HS * G * V) + own * V, total * inverse[:, None], n * C, HS * G * V, T, V, C, BV)
        log_total = tl.where(mass == 0, NEG_INF, (tl.log2(tl.where(mass == 0, 1.0, mass)) + base) * LN2)
        _put_vector(log_mass + place, log_total, n * C, HS * G, T, C)
