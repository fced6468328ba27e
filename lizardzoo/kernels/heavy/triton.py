"""Triton kernels of heavy attention: forward and backward, chunk by chunk. `ops.py` launches them.

The candidates of a chunk of C tokens are the `heavy` that were held when it began and those that join in it and are
seen at all, which is often few of C; each is seen from its own time until another one (see `selection.py`, and
`times_kernel` for TIMES, NEXT, ENTRIES and COUNTS). Place p is row p + `shift` of K and V.

As in `window/triton.py` a tile holds M of the C * G query rows of a key head.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from lizardzoo.kernels.window.triton import LOG2E, _attend, _dot, _length, _load, _query_rows, _score_gradient, _store

SIZES = ["count", "heavy", "shift", "total"]


@triton.jit
def _candidates(PLACES, TIMES, line, chunk, chunks, j, heavy, C: tl.constexpr):
    """Of candidates j of a chunk: their places, and since and until which of its tokens they are seen."""
    times = tl.load(TIMES + (line * chunks + chunk) * (heavy + C) + j, mask=j < heavy + C, other=0)
    since = times >> 16
    place = tl.load(PLACES + (line * (chunks + 1) + chunk) * heavy + j, mask=j < heavy, other=0)
    place = tl.where(j < heavy, place, heavy + chunk * C + since)
    return place, since, times & 0xFFFF


@triton.jit
def _visible(time, since, until):
    """Which candidates (columns) are seen at which times (rows; below 0: at none): two operations, not four."""
    return (time[:, None] - since[None, :]).to(tl.uint32) < tl.maximum(until - since, 0).to(tl.uint32)[None, :]


@triton.jit
def _log_mass(LOG_MASS, place, real):
    """That of a query which sees nothing is turned round, so that its weights are 0 and not infinite."""
    log_mass = tl.load(LOG_MASS + place, mask=real, other=0.0)
    return tl.where(log_mass == float("-inf"), float("inf"), log_mass)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    Q, K, V, PLACES, TIMES, COUNTS, LENGTHS, NEAR_Y, NEAR_MASS, Y, LOG_MASS, count, heavy, shift, scale,
    sqb, sqt, sqh, skb, skt, skh, svb, svt, svh,
    HKV: tl.constexpr, G: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr, C: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """y and log_mass of a tile of a chunk's queries.

    NEAR_Y, NEAR_MASS: of a softmax over other keys, which goes on here; None: there are no others.
    """
    tiles, chunks = tl.cdiv(C * G, M), tl.cdiv(count, C)
    tile, chunk = tl.program_id(0) % tiles, (tl.program_id(0) // tiles) % chunks
    line = (tl.program_id(0) // tiles // chunks).to(tl.int64)
    head, b = line % HKV, line // HKV
    rows = tile * M + tl.arange(0, M)
    time, heads = rows // G, head * G + rows % G
    i = chunk * C + time
    written = (time < C) & (i < count)
    real = written & (i < _length(LENGTHS, b, count))
    q = _load(Q + b * sqb, i.to(tl.int64) * sqt + heads * sqh, real, DK, BLOCK_DK)
    keys, values = K + b * skb + head * skh, V + b * svb + head * svh

    place_q = (b * count + i) * (HKV * G) + heads
    if NEAR_Y is None:
        peak = tl.full([M], float("-inf"), tl.float32)
        mass = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, BLOCK_DV], tl.float32)
    else:
        peak = tl.load(NEAR_MASS + place_q, mask=real, other=float("-inf")) * LOG2E
        mass = tl.full([M], 1.0, tl.float32)
        acc = _load(NEAR_Y, place_q * DV, real, DV, BLOCK_DV).to(tl.float32)
    stop = tl.minimum(tl.load(COUNTS + line * chunks + chunk), heavy + (tile * M + M - 1) // G + 1)
    for j0 in range(0, stop, N):
        place, since, until = _candidates(PLACES, TIMES, line, chunk, chunks, j0 + tl.arange(0, N), heavy, C)
        there, index = until > since, (place + shift).to(tl.int64)
        k = _load(keys, index * skt, there, DK, BLOCK_DK)
        v = _load(values, index * svt, there, DV, BLOCK_DV)
        visible = _visible(time, since, until)
        peak, mass, acc = _attend(peak, mass, acc, _dot(q, tl.trans(k)) * (scale * LOG2E), visible, v)
    seen = real & (mass > 0.0)
    mass = tl.where(seen, mass, 1.0)
    y = tl.where(seen[:, None], acc / mass[:, None], 0.0)
    _store(Y, place_q * DV, y.to(Y.dtype.element_ty), written, DV, BLOCK_DV)
    tl.store(LOG_MASS + place_q, tl.where(seen, (peak + tl.log2(mass)) / LOG2E, float("-inf")), mask=written)


@triton.jit(do_not_specialize=SIZES)
def query_gradient_kernel(
    Q, K, V, PLACES, TIMES, COUNTS, LENGTHS, Y, LOG_MASS, DY, DLOG_MASS, DELTA, DQ, count, heavy, shift, scale,
    sqb, sqt, sqh, skb, skt, skh, svb, svt, svh,
    HKV: tl.constexpr, G: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr, C: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dq of a tile of a chunk's queries, and delta = dy . y - dlog_mass, which the candidates need as well.

    Y, DLOG_MASS None: DELTA is there, and DQ holds what other keys under the same denominator gave, which is added to.
    """
    tiles, chunks = tl.cdiv(C * G, M), tl.cdiv(count, C)
    tile, chunk = tl.program_id(0) % tiles, (tl.program_id(0) // tiles) % chunks
    line = (tl.program_id(0) // tiles // chunks).to(tl.int64)
    head, b = line % HKV, line // HKV
    rows = tile * M + tl.arange(0, M)
    time, heads = rows // G, head * G + rows % G
    i = chunk * C + time
    written = (time < C) & (i < count)
    real = written & (i < _length(LENGTHS, b, count))
    place_q = (b * count + i) * (HKV * G) + heads
    q = _load(Q + b * sqb, i.to(tl.int64) * sqt + heads * sqh, real, DK, BLOCK_DK)
    dy = _load(DY, place_q * DV, real, DV, BLOCK_DV)
    log_mass = _log_mass(LOG_MASS, place_q, real)
    if Y is None:
        delta = tl.load(DELTA + place_q, mask=real, other=0.0)
    else:
        y = _load(Y, place_q * DV, real, DV, BLOCK_DV)
        delta = tl.sum(dy.to(tl.float32) * y.to(tl.float32), 1)
        if DLOG_MASS is not None:
            delta -= tl.load(DLOG_MASS + place_q, mask=real, other=0.0)
        tl.store(DELTA + place_q, delta, mask=written)
    keys, values = K + b * skb + head * skh, V + b * svb + head * svh

    dq = tl.zeros([M, BLOCK_DK], tl.float32)
    stop = tl.minimum(tl.load(COUNTS + line * chunks + chunk), heavy + (tile * M + M - 1) // G + 1)
    for j0 in range(0, stop, N):
        place, since, until = _candidates(PLACES, TIMES, line, chunk, chunks, j0 + tl.arange(0, N), heavy, C)
        there, index = until > since, (place + shift).to(tl.int64)
        k = _load(keys, index * skt, there, DK, BLOCK_DK)
        v = _load(values, index * svt, there, DV, BLOCK_DV)
        visible = _visible(tl.where(real, time, -1), since, until)
        dq += _dot(_score_gradient(q, k, v, dy, log_mass, delta, visible, scale).to(k.dtype), k)
    dq *= scale
    if Y is None:
        dq += _load(DQ, place_q * DK, written, DK, BLOCK_DK).to(tl.float32)
    _store(DQ, place_q * DK, dq.to(DQ.dtype.element_ty), written, DK, BLOCK_DK)


@triton.jit(do_not_specialize=SIZES)
def candidate_gradient_kernel(
    Q, K, V, PLACES, TIMES, COUNTS, LENGTHS, LOG_MASS, DY, DELTA, PART_K, PART_V, count, heavy, shift, scale,
    sqb, sqt, sqh, skb, skt, skh, svb, svt, svh,
    HKV: tl.constexpr, G: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr, C: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """What one chunk's queries give to dk and dv of a tile of its candidates: PART_K, PART_V [lines, N, heavy + C, D].

    Behind the chunk's last candidate they stay as they are: nothing reads them.

    Scores are computed with keys as rows: see `window/triton.py`.
    """
    tiles, chunks = tl.cdiv(heavy + C, N), tl.cdiv(count, C)
    tile, chunk = tl.program_id(0) % tiles, (tl.program_id(0) // tiles) % chunks
    line = (tl.program_id(0) // tiles // chunks).to(tl.int64)
    head, b = line % HKV, line // HKV
    j = tile * N + tl.arange(0, N)
    place, since, until = _candidates(PLACES, TIMES, line, chunk, chunks, j, heavy, C)
    there, index = until > since, (place + shift).to(tl.int64)
    k = _load(K + b * skb + head * skh, index * skt, there, DK, BLOCK_DK)
    v = _load(V + b * svb + head * svh, index * svt, there, DV, BLOCK_DV)
    dk = tl.zeros([N, BLOCK_DK], tl.float32)
    dv = tl.zeros([N, BLOCK_DV], tl.float32)
    start = tl.min(tl.where(there, since, C), 0)
    stop = tl.minimum(tl.max(tl.where(there, until, 0), 0), _length(LENGTHS, b, count) - chunk * C)
    until = tl.minimum(until, stop)
    for row0 in range(start * G, stop * G, M):
        time0, behind, g = _query_rows(G, M, row0)
        time = time0 + behind
        real = time < stop
        q0 = Q + b * sqb + (chunk * C + time0).to(tl.int64) * sqt + head * G * sqh
        q = _load(q0, behind.to(tl.int64) * sqt + g.to(tl.int64) * sqh, real, DK, BLOCK_DK)
        place0, place_q = (b * count + chunk * C + time0) * (HKV * G) + head * G, behind * (HKV * G) + g
        dy = _load(DY + place0 * DV, place_q * DV, real, DV, BLOCK_DV)
        log_mass = tl.load(LOG_MASS + place0 + place_q, mask=real)
        delta = tl.load(DELTA + place0 + place_q, mask=real, other=0.0)
        # What is not visible gets a score and not a weight of its own: one mask, which registers do not have to hold.
        visible = (time[None, :] >= since[:, None]) & (time[None, :] < until[:, None])
        scores = _dot(k, tl.trans(q)) * (scale * LOG2E) - (log_mass * LOG2E)[None, :]
        weights = tl.exp2(tl.where(visible, scores, float("-inf")))
        dv += _dot(weights.to(dy.dtype), dy)
        gradient = weights * (_dot(v, tl.trans(dy)) - delta[None, :])
        dk += _dot(gradient.to(q.dtype), q)
    at, there = (line * chunks + chunk) * (heavy + C) + j, j < tl.load(COUNTS + line * chunks + chunk)
    _store(PART_K, at * DK, dk * scale, there, DK, BLOCK_DK)
    _store(PART_V, at * DV, dv, there, DV, BLOCK_DV)


@triton.jit(do_not_specialize=SIZES)
def token_gradient_kernel(
    NEXT, ENTRIES, PART_K, PART_V, DK_OUT, DV_OUT, count, heavy, shift, total,
    HKV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr,
    C: tl.constexpr, N: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of tokens: the sum over the chunks in which each is a candidate, in their order.

    ADD: to what is there.
    """
    tiles, chunks = tl.cdiv(total, N), tl.cdiv(count, C)
    tile, line = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    index = tile * N + tl.arange(0, N)
    place = index - shift
    slot = place - heavy
    chunk = tl.maximum(slot, 0) // C
    held = (index < total) & (place >= 0) & (slot < count)
    j = tl.where(slot < 0, place, tl.load(ENTRIES + line * count + slot, mask=held & (slot >= 0), other=-1))
    held = held & (j >= 0)
    dk = tl.zeros([N, BLOCK_DK], tl.float32)
    dv = tl.zeros([N, BLOCK_DV], tl.float32)
    while tl.max(held.to(tl.int32), 0) > 0:
        at = (line * chunks + chunk) * (heavy + C) + j
        dk += _load(PART_K, at * DK, held, DK, BLOCK_DK)
        dv += _load(PART_V, at * DV, held, DV, BLOCK_DV)
        j = tl.load(NEXT + at, mask=held, other=-1)
        chunk += 1
        held = held & (j >= 0) & (chunk < chunks)
    row = ((line // HKV) * total + index) * HKV + line % HKV
    if ADD:
        dk += _load(DK_OUT, row * DK, index < total, DK, BLOCK_DK).to(tl.float32)
        dv += _load(DV_OUT, row * DV, index < total, DV, BLOCK_DV).to(tl.float32)
    _store(DK_OUT, row * DK, dk.to(DK_OUT.dtype.element_ty), index < total, DK, BLOCK_DK)
    _store(DV_OUT, row * DV, dv.to(DV_OUT.dtype.element_ty), index < total, DV, BLOCK_DV)
