"""Triton kernels of sliding-window attention: forward and backward. `ops.py` launches them.

Tokens have slots: those of this call 0 .. T-1, those of the state's ring -window .. -1. Query i belongs to the document
that begins at slot first_i (negative: in the state), and sees the slots max(first_i, i - window + 1) .. i and the kept
ones first_i + r <= i - window, r < keep. No other mask is needed: documents are intervals, and padded rows come packed.
A state's tokens stand before the new ones in one key tensor [kept | ring | new]; slot t is its row `offset` + t.

A tile holds M consecutive rows of the T * G queries of a key head (row = i * G + g): the heads that share a key share
its loads, and the fewer tokens a tile spans, the fewer keys outside its queries' windows it multiplies.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(1.4426950408889634)
NO_DOCUMENT = tl.constexpr(-(2**31))
NOWHERE = tl.constexpr(-(2**30))  # a slot that no query sees
SIZES = ["count", "window", "keep", "offset"]  # a new length, window or state never recompiles


@triton.jit
def _dot(a, b):
    if INTERPRETED:  # its bf16 products are wrong
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")  # fp32 inputs are multiplied in fp32, not in tf32


@triton.jit
def _load(base, offsets, mask, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Vectors of DIM numbers at base + offsets, zeros where masked and behind DIM."""
    d = tl.arange(0, BLOCK)
    return tl.load(base + offsets[:, None] + d[None, :], mask=mask[:, None] & (d < DIM)[None, :], other=0.0)


@triton.jit
def _store(base, offsets, x, mask, DIM: tl.constexpr, BLOCK: tl.constexpr):
    d = tl.arange(0, BLOCK)
    tl.store(base + offsets[:, None] + d[None, :], x, mask=mask[:, None] & (d < DIM)[None, :])


@triton.jit
def _first(FIRST, b, i, count, DOCUMENTS: tl.constexpr):
    """The slot at which the document of query i begins; i is a number or a vector."""
    first = i * 0
    if FIRST is not None:
        if DOCUMENTS:
            first = tl.load(FIRST + b * count + i, mask=i < count, other=0)
        else:
            first += tl.load(FIRST + b)
    return first


@triton.jit
def _length(LENGTHS, b, count):
    length = count
    if LENGTHS is not None:
        length = tl.load(LENGTHS + b)
    return length


@triton.jit
def _query_rows(G: tl.constexpr, M: tl.constexpr, row0):
    """Of the M query rows from row0 on: the first one's token, each one's token behind that, each one's group.

    Where row0 is a multiple of a G that divides M, the last two are the same in every round of a loop.
    """
    r = tl.arange(0, M)
    first = row0 // G
    if M % G == 0:
        return first, r // G, r % G
    else:
        return first, (row0 + r) // G - first, (row0 + r) % G


@triton.jit
def _attend(peak, mass, acc, scores, visible, v):
    """One tile of online softmax; `peak` and `scores` in units of log 2."""
    scores = tl.where(visible, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    finite = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a row that has seen no key yet
    weights = tl.exp2(scores - finite[:, None])
    decay = tl.exp2(peak - finite)
    acc = acc * decay[:, None] + _dot(weights.to(v.dtype), v)
    return new_peak, mass * decay + tl.sum(weights, 1), acc


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    Q, K, V, SINK, FIRST, LENGTHS, Y, LOG_MASS, count, window, keep, offset, scale,
    sqb, sqt, sqh, skb, skt, skh, svb, svt, svh,
    HKV: tl.constexpr, G: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr, DOCUMENTS: tl.constexpr, KEEP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    """y and log_mass of a tile of queries."""
    tiles = tl.cdiv(count * G, M)
    tile, head = tl.program_id(0) % tiles, (tl.program_id(0) // tiles) % HKV
    b = (tl.program_id(0) // tiles // HKV).to(tl.int64)
    rows = tile * M + tl.arange(0, M)
    i, heads = rows // G, head * G + rows % G
    length = _length(LENGTHS, b, count)
    real = i < length
    first = _first(FIRST, b, i, count, DOCUMENTS)
    span = tl.minimum(i - first + 1, window)  # how many slots up to its own a query sees
    q = _load(Q + b * sqb, i.to(tl.int64) * sqt + heads * sqh, real, DK, BLOCK_DK)
    keys, values = K + b * skb + head * skh, V + b * svb + head * svh

    peak = tl.full([M], float("-inf"), tl.float32)
    mass = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, BLOCK_DV], tl.float32)
    i0 = tile * M // G
    first0 = _first(FIRST, b, i0, count, DOCUMENTS)
    start = tl.maximum(first0, i0 - window + 1)
    stop = tl.minimum((tile * M + M - 1) // G + 1, length)
    for t0 in range(start, stop, N):
        t = t0 + tl.arange(0, N)
        index = (offset + t).to(tl.int64)
        k = _load(keys, index * skt, t < stop, DK, BLOCK_DK)
        v = _load(values, index * svt, t < stop, DV, BLOCK_DV)
        distance = i[:, None] - t[None, :]
        visible = (distance >= 0) & (distance < span[:, None])
        peak, mass, acc = _attend(peak, mass, acc, _dot(q, tl.trans(k)) * (scale * LOG2E), visible, v)

    if KEEP:  # for each document of the tile: the kept tokens that have left a window
        left = first
        document = tl.where(stop - 1 - first0 >= window, first0, NO_DOCUMENT)
        if DOCUMENTS:
            left = tl.where(real & (i - first >= window), first, NO_DOCUMENT)
            document = tl.max(left, 0)
        while document > NO_DOCUMENT:
            for r0 in range(0, keep, R):
                r = r0 + tl.arange(0, R)
                slot = document + r
                index = tl.where(slot < 0, r, offset + slot).to(tl.int64)
                kept = (r < keep) & (slot < length)
                k = _load(keys, index * skt, kept, DK, BLOCK_DK)
                v = _load(values, index * svt, kept, DV, BLOCK_DV)
                visible = (left == document)[:, None] & kept[None, :] & (slot[None, :] <= (i - window)[:, None])
                peak, mass, acc = _attend(peak, mass, acc, _dot(q, tl.trans(k)) * (scale * LOG2E), visible, v)
            if DOCUMENTS:
                document = tl.max(tl.where(left < document, left, NO_DOCUMENT), 0)
            else:
                document = document * 0 + NO_DOCUMENT

    if SINK is not None:
        sink = tl.load(SINK + heads) * LOG2E
        new_peak = tl.maximum(peak, sink)
        decay = tl.exp2(peak - new_peak)
        peak, mass, acc = new_peak, mass * decay + tl.exp2(sink - new_peak), acc * decay[:, None]
    mass = tl.where(real, mass, 1.0)
    place = (b * count + i) * (HKV * G) + heads
    written = i < count
    y = tl.where(real[:, None], acc / mass[:, None], 0.0)
    _store(Y, place * DV, y.to(Y.dtype.element_ty), written, DV, BLOCK_DV)
    tl.store(LOG_MASS + place, tl.where(real, (peak + tl.log2(mass)) / LOG2E, float("-inf")), mask=written)


@triton.jit
def _score_gradient(q, k, v, dy, log_mass, delta, visible, scale):
    """Gradient of the scores (rows: queries)."""
    weights = tl.exp2(_dot(q, tl.trans(k)) * (scale * LOG2E) - log_mass[:, None] * LOG2E)
    return tl.where(visible, weights * (_dot(dy, tl.trans(v)) - delta[:, None]), 0.0)


@triton.jit
def _add_key_gradients(dk, dv, k, v, q, dy, log_mass, delta, visible, scale):
    """Add what query rows give to keys; dk still lacks its factor `scale`.

    Scores are computed with keys as rows: a transposed fp32 accumulator as the operand of a product is miscompiled on
    Hopper by Triton 3.4 to 3.7.0 (flash-linear-attention issue 640). They alone are masked: a second mask, for the
    gradient, would have to wait in registers and be unpacked again. So v and dy must be numbers where nothing is seen.
    """
    scores = _dot(k, tl.trans(q)) * (scale * LOG2E) - (log_mass * LOG2E)[None, :]
    weights = tl.exp2(tl.where(visible, scores, float("-inf")))
    dv += _dot(weights.to(dy.dtype), dy)
    gradient = weights * (_dot(v, tl.trans(dy)) - delta[None, :])
    dk += _dot(gradient.to(q.dtype), q)
    return dk, dv


@triton.jit(do_not_specialize=SIZES)
def query_gradient_kernel(
    Q, K, V, FIRST, LENGTHS, Y, LOG_MASS, DY, DLOG_MASS, DELTA, DQ, PARTS, count, window, keep, offset, scale,
    sqb, sqt, sqh, skb, skt, skh, svb, svt, svh,
    HKV: tl.constexpr, G: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr, DOCUMENTS: tl.constexpr, KEEP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries, and delta = dy . y - dlog_mass, which the keys need as well.

    PARTS [B * Hkv, tiles from chunk 1 on, keep, DK + DV]: what the tile gives to the kept tokens of the document that
    is open where its chunk of C queries begins. Within a chunk the keys' own kernel sees to it.
    """
    tiles = tl.cdiv(count * G, M)
    tile, head = tl.program_id(0) % tiles, (tl.program_id(0) // tiles) % HKV
    b = (tl.program_id(0) // tiles // HKV).to(tl.int64)
    rows = tile * M + tl.arange(0, M)
    i, heads = rows // G, head * G + rows % G
    length = _length(LENGTHS, b, count)
    real = i < length
    first = _first(FIRST, b, i, count, DOCUMENTS)
    span = tl.minimum(i - first + 1, window)
    place = (b * count + i) * (HKV * G) + heads
    q = _load(Q + b * sqb, i.to(tl.int64) * sqt + heads * sqh, real, DK, BLOCK_DK)
    dy = _load(DY, place * DV, real, DV, BLOCK_DV)
    y = _load(Y, place * DV, real, DV, BLOCK_DV)
    keys, values = K + b * skb + head * skh, V + b * svb + head * svh
    log_mass = tl.load(LOG_MASS + place, mask=real, other=0.0)
    delta = tl.sum(dy.to(tl.float32) * y.to(tl.float32), 1)
    if DLOG_MASS is not None:
        delta -= tl.load(DLOG_MASS + place, mask=real, other=0.0)
    tl.store(DELTA + place, delta, mask=i < count)

    dq = tl.zeros([M, BLOCK_DK], tl.float32)
    i0 = tile * M // G
    first0 = _first(FIRST, b, i0, count, DOCUMENTS)
    start = tl.maximum(first0, i0 - window + 1)
    stop = tl.minimum((tile * M + M - 1) // G + 1, length)
    for t0 in range(start, stop, N):
        t = t0 + tl.arange(0, N)
        index = (offset + t).to(tl.int64)
        k = _load(keys, index * skt, t < stop, DK, BLOCK_DK)
        v = _load(values, index * svt, t < stop, DV, BLOCK_DV)
        distance = i[:, None] - t[None, :]
        visible = (distance >= 0) & (distance < span[:, None])
        dq += _dot(_score_gradient(q, k, v, dy, log_mass, delta, visible, scale).to(k.dtype), k)

    if KEEP:
        left = first
        document = tl.where(stop - 1 - first0 >= window, first0, NO_DOCUMENT)
        if DOCUMENTS:
            left = tl.where(real & (i - first >= window), first, NO_DOCUMENT)
            document = tl.max(left, 0)
        while document > NO_DOCUMENT:
            for r0 in range(0, keep, R):
                r = r0 + tl.arange(0, R)
                slot = document + r
                index = tl.where(slot < 0, r, offset + slot).to(tl.int64)
                kept = (r < keep) & (slot < length)
                k = _load(keys, index * skt, kept, DK, BLOCK_DK)
                v = _load(values, index * svt, kept, DV, BLOCK_DV)
                visible = (left == document)[:, None] & kept[None, :] & (slot[None, :] <= (i - window)[:, None])
                dq += _dot(_score_gradient(q, k, v, dy, log_mass, delta, visible, scale).to(k.dtype), k)
            if DOCUMENTS:
                document = tl.max(tl.where(left < document, left, NO_DOCUMENT), 0)
            else:
                document = document * 0 + NO_DOCUMENT
    _store(DQ, place * DK, (dq * scale).to(DQ.dtype.element_ty), i < count, DK, BLOCK_DK)

    BEFORE: tl.constexpr = C * G // M  # tiles of a chunk
    if KEEP and tile >= BEFORE:
        document = _first(FIRST, b, tile // BEFORE * C, count, DOCUMENTS)
        at = (b * HKV + head) * (tiles - BEFORE) + tile - BEFORE
        # again, since this holds other layouts of them: kept over the loop above they take 23 registers more
        q = _load(Q + b * sqb, i.to(tl.int64) * sqt + heads * sqh, real, DK, BLOCK_DK)
        dy = _load(DY, place * DV, real, DV, BLOCK_DV)
        for r0 in range(0, keep, R):
            r = r0 + tl.arange(0, R)
            slot = document + r
            index = tl.where(slot < 0, r, offset + slot).to(tl.int64)
            kept = (r < keep) & (slot < length)
            k = _load(keys, index * skt, kept, DK, BLOCK_DK)
            v = _load(values, index * svt, kept, DV, BLOCK_DV)
            visible = (real & (first == document))[None, :] & kept[:, None]
            visible = visible & (slot[:, None] <= (i - window)[None, :])
            dk, dv = tl.zeros([R, BLOCK_DK], tl.float32), tl.zeros([R, BLOCK_DV], tl.float32)
            dk, dv = _add_key_gradients(dk, dv, k, v, q, dy, log_mass, delta, visible, scale)
            part = (at * keep + r) * (DK + DV)
            _store(PARTS, part, dk * scale, r < keep, DK, BLOCK_DK)
            _store(PARTS, part + DK, dv, r < keep, DV, BLOCK_DV)


@triton.jit(do_not_specialize=["tiles", "width"])
def sum_parts_kernel(PARTS, SUMS, tiles, width, TILES: tl.constexpr, BLOCK: tl.constexpr):
    """PARTS [B * Hkv, tiles, width] summed over the TILES of each chunk: SUMS [B * Hkv, chunks, width]."""
    chunks = tl.cdiv(tiles, TILES)
    tile = tl.program_id(0) % chunks * TILES
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    at = (tl.program_id(0) // chunks).to(tl.int64) * tiles
    for t in range(tile, tl.minimum(tile + TILES, tiles)):
        total += tl.load(PARTS + (at + t) * width + column, mask=column < width, other=0.0)
    tl.store(SUMS + tl.program_id(0).to(tl.int64) * width + column, total, mask=column < width)


@triton.jit
def _key_gradients(
    dk, dv, k, v, row0, stop, slot, Q, FIRST, LOG_MASS, DY, DELTA, b, head, count, window, keep, scale, sqb, sqt, sqh,
    HKV: tl.constexpr, G: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr, DOCUMENTS: tl.constexpr, KEPT: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Add what one tile of M query rows gives to the keys at `slot`, which are in its window, or kept and behind it."""
    i0, behind, g = _query_rows(G, M, row0)
    i = i0 + behind
    real = i < stop
    q0 = Q + b * sqb + i0.to(tl.int64) * sqt + head.to(tl.int64) * G * sqh
    q = _load(q0, behind.to(tl.int64) * sqt + g.to(tl.int64) * sqh, real, DK, BLOCK_DK)
    place0, place = (b * count + i0) * (HKV * G) + head * G, behind * (HKV * G) + g
    dy = _load(DY + place0 * DV, place * DV, real, DV, BLOCK_DV)
    log_mass = tl.load(LOG_MASS + place0 + place, mask=real)
    delta = tl.load(DELTA + place0 + place, mask=real, other=0.0)
    oldest = _first(FIRST, b, i, count, DOCUMENTS)
    newest = i
    if KEPT:
        newest = tl.minimum(i - window, oldest + keep - 1)
    else:
        oldest = tl.maximum(oldest, i - window + 1)
    newest = tl.where(real, newest, NOWHERE)
    visible = (slot[:, None] >= oldest[None, :]) & (slot[:, None] <= newest[None, :])
    return _add_key_gradients(dk, dv, k, v, q, dy, log_mass, delta, visible, scale)


@triton.jit(do_not_specialize=SIZES)
def key_gradient_kernel(
    Q, K, V, FIRST, LENGTHS, LOG_MASS, DY, DELTA, SUMS, DK_OUT, DV_OUT, count, window, keep, offset, scale,
    sqb, sqt, sqh, skb, skt, skh, svb, svt, svh,
    HKV: tl.constexpr, G: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr, DOCUMENTS: tl.constexpr, KEEP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys."""
    total = offset + count
    columns = tl.num_programs(0) // tl.cdiv(total, N)  # B * HKV
    tile, column = tl.program_id(0) // columns, tl.program_id(0) % columns  # those with kept tokens take long: first
    head, b = column % HKV, (column // HKV).to(tl.int64)
    length = _length(LENGTHS, b, count)
    key = tile * N + tl.arange(0, N)
    in_window = key >= tl.where(offset > 0, keep, 0)  # before them the state's kept tokens
    slot = tl.where(in_window, key - offset, _first(FIRST, b, 0, count, DOCUMENTS) + key)
    may_keep = in_window == (slot >= 0)  # the ring's tokens have their copies among the kept ones
    start, last = tl.maximum(tile * N - offset, 0), tl.maximum(tile * N + N - 1 - offset, 0)
    chunk = last // C
    k = _load(K + b * skb + head * skh, key.to(tl.int64) * skt, key < total, DK, BLOCK_DK)
    oldest = tl.maximum(_first(FIRST, b, 0, count, DOCUMENTS), tl.where(in_window, -window, NO_DOCUMENT))
    there = (key < total) & (in_window | may_keep) & (slot >= oldest)  # a state's other slots may hold anything
    v = _load(V + b * svb + head * svh, key.to(tl.int64) * svt, there, DV, BLOCK_DV)
    dk = tl.zeros([N, BLOCK_DK], tl.float32)
    dv = tl.zeros([N, BLOCK_DV], tl.float32)
    near = tl.where(in_window, slot, NOWHERE)
    stop = tl.minimum(last + window, length)
    for row0 in range(start * G, stop * G, M):
        dk, dv = _key_gradients(
            dk, dv, k, v, row0, stop, near, Q, FIRST, LOG_MASS, DY, DELTA, b, head, count, window, keep, scale, sqb,
            sqt, sqh, HKV, G, DK, DV, BLOCK_DK, BLOCK_DV, DOCUMENTS, False, M,
        )  # fmt: skip
    if KEEP:  # behind their windows, to the end of the chunk; what later chunks have summed is added below
        opened = _first(FIRST, b, tl.maximum(slot, 0), count, DOCUMENTS)
        kept = tl.max((may_keep & (slot - opened < keep) & (slot < length)).to(tl.int32), 0) > 0
        start = tl.where(tile * N < tl.where(offset > 0, keep, 0), 0, start + window)
        stop = tl.where(kept, tl.minimum(chunk * C + C, length), 0)
        near = tl.where(may_keep, slot, NOWHERE)
        for row0 in range(start * G, stop * G, M):
            dk, dv = _key_gradients(
                dk, dv, k, v, row0, stop, near, Q, FIRST, LOG_MASS, DY, DELTA, b, head, count, window, keep, scale, sqb,
                sqt, sqh, HKV, G, DK, DV, BLOCK_DK, BLOCK_DV, DOCUMENTS, True, M,
            )  # fmt: skip
    dk *= scale
    if KEEP:
        chunks = tl.cdiv(count, C) - 1
        for c in range(chunk + 1, tl.where(kept, tl.cdiv(length, C), 0)):
            r = slot - _first(FIRST, b, c * C, count, DOCUMENTS)
            place = (((b * HKV + head) * chunks + c - 1) * keep + r).to(tl.int64) * (DK + DV)
            mine = may_keep & (r >= 0) & (r < keep)
            dk += _load(SUMS, place, mine, DK, BLOCK_DK)
            dv += _load(SUMS, place + DK, mine, DV, BLOCK_DV)
    place = (b * total + key) * HKV + head
    _store(DK_OUT, place * DK, dk.to(DK_OUT.dtype.element_ty), key < total, DK, BLOCK_DK)
    _store(DV_OUT, place * DV, dv.to(DV_OUT.dtype.element_ty), key < total, DV, BLOCK_DV)
