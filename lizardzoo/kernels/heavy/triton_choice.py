"""Triton kernels that choose what heavy attention holds: scores, lists of the best, and each token's time in them.

A line is a key head of a row. Its stream has at slot t the token that leaves the window there; places count the `heavy`
tokens of the past first, then the stream. Whole numbers are compared, so that any score, even NaN, has its place: a
key is the bits of a score, which is never negative, and above them the document; NOTHING where no token joins. Of equal
keys the later one beats the earlier one.

A list holds the best `heavy` of some chunks of C tokens, sorted. Log2(N) merges make, of each chunk's own, that of all
tokens up to its end.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from lizardzoo.kernels.window.triton import LOG2E, _dot, _first, _length, _load, _query_rows

NOTHING = tl.constexpr(-1)
UNROLLED = tl.constexpr(8)  # loads that are under way at once
NOWHERE = tl.constexpr(-(2**30))


@triton.jit
def settled(drawn, rank, fade):
    """As `reference.settled`."""
    return tl.log2(tl.maximum(drawn, 7.888609052210118e-31)) + 100.0 + rank.to(tl.float32) * fade


@triton.jit
def _document(first):
    """A number that grows with each document: 0 for the one that the state is in."""
    return tl.maximum(first, -1) + 1


@triton.jit(do_not_specialize=["count", "window", "keep", "offset"])
def drawn_kernel(
    Q, K, LOG_MASS, BEFORE, FIRST, LENGTHS, KEYS, DRAWN, count, window, keep, offset, fade, scale,
    sqb, sqt, sqh, skb, skt, skh,
    HKV: tl.constexpr, G: tl.constexpr, DK: tl.constexpr, BLOCK_DK: tl.constexpr, DOCUMENTS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """What a tile of tokens draws of all queries that see them, and with which key each enters the stream.

    The token at slot t of the texts (the ring's: -window .. -1) is row offset + t of K and joins at slot t + window.
    """
    total = window + count
    tiles = tl.cdiv(total, N)
    tile, head = tl.program_id(0) % tiles, (tl.program_id(0) // tiles) % HKV
    b = (tl.program_id(0) // tiles // HKV).to(tl.int64)
    length = _length(LENGTHS, b, count)
    joins = tile * N + tl.arange(0, N)
    slot = joins - window
    there = (joins < total) & (offset + slot >= 0)  # without a state nothing is before slot 0
    k = _load(K + b * skb + head * skh, (offset + slot).to(tl.int64) * skt, there, DK, BLOCK_DK)
    drawn = tl.zeros([N], tl.float32)
    if BEFORE is not None:
        drawn += tl.load(BEFORE + (b * window + joins) * HKV + head, mask=joins < window, other=0.0)
    young = tl.maximum(window // 8, 1)
    start = tl.maximum(tile * N - window + young, 0)
    stop = tl.minimum(tile * N + N - 1, length)
    visible = tl.where(there, slot, NOWHERE)
    for row0 in range(start * G, stop * G, M):
        i0, behind, g = _query_rows(G, M, row0)
        i = i0 + behind
        real = i < stop
        q0 = Q + b * sqb + i0.to(tl.int64) * sqt + head.to(tl.int64) * G * sqh
        q = _load(q0, behind.to(tl.int64) * sqt + g.to(tl.int64) * sqh, real, DK, BLOCK_DK)
        log_mass0 = LOG_MASS + (b * count + i0) * (HKV * G) + head * G
        log_mass = tl.load(log_mass0 + behind * (HKV * G) + g, mask=real, other=0.0)
        # Two comparisons a weight, no more: they and the exponential are what this kernel's time goes to.
        oldest = tl.maximum(_first(FIRST, b, i, count, DOCUMENTS), i - window + 1)
        newest = tl.where(real, i - young, NOWHERE)
        counts = (visible[:, None] >= oldest[None, :]) & (visible[:, None] <= newest[None, :])
        weights = tl.exp2(_dot(k, tl.trans(q)) * (scale * (2 * LOG2E)) - (log_mass * (2 * LOG2E))[None, :])
        drawn += tl.sum(tl.where(counts, weights, 0.0), 1)

    first = _first(FIRST, b, joins, count, DOCUMENTS)
    leaves = (joins < length) & (joins - first >= window + keep)
    score = settled(drawn, joins - first - window, fade)
    key = tl.maximum(score.to(tl.int32, bitcast=True), 0).to(KEYS.dtype.element_ty)
    if DOCUMENTS:
        key |= _document(first).to(tl.int64) << 32
    tl.store(KEYS + (b * HKV + head) * count + joins, tl.where(leaves, key, NOTHING), mask=joins < count)
    if DRAWN is not None:
        tl.store(DRAWN + (b * total + joins) * HKV + head, drawn, mask=joins < total)


@triton.jit
def _of_stream(stream, slot, count):
    """The key at one slot."""
    return tl.load(stream + slot, mask=slot < count, other=NOTHING)


@triton.jit
def _beats(other, time, key, own):
    """Whether a token that joins at `time` of its chunk beats those that joined at `own` (below 0: before it)."""
    return (other > key) | ((other == key) & (time > own))


@triton.jit(do_not_specialize=["count", "heavy"])
def sort_kernel(KEYS, PAST, LIST_KEYS, LIST_PLACES, count, heavy, C: tl.constexpr):
    """The lists of each chunk by itself, behind that of the past (PAST [lines, heavy], sorted; None: nothing)."""
    lists = tl.cdiv(count, C) + 1
    n, line = tl.program_id(0) % lists, (tl.program_id(0) // lists).to(tl.int64)
    at = (line * lists + n) * heavy
    j = tl.arange(0, C)
    if n == 0:
        for j0 in range(0, heavy, C):
            inside = j0 + j < heavy
            key = tl.full([C], NOTHING, LIST_KEYS.dtype.element_ty)
            if PAST is not None:
                key = tl.load(PAST + line * heavy + j0 + j, mask=inside, other=NOTHING)
            tl.store(LIST_KEYS + at + j0 + j, key, mask=inside)
            tl.store(LIST_PLACES + at + j0 + j, tl.where(key >= 0, j0 + j, NOTHING), mask=inside)
    else:
        t = (n - 1) * C + j
        key = tl.load(KEYS + line * count + t, mask=t < count, other=NOTHING)
        place = tl.zeros([C], tl.int32)
        for t0 in range(0, C, UNROLLED):
            for u in tl.static_range(UNROLLED):
                other = _of_stream(KEYS + line * count, (n - 1) * C + t0 + u, count)
                place += _beats(other, t0 + u, key, j).to(tl.int32)
        tl.store(LIST_KEYS + at + place, key, mask=place < heavy)
        tl.store(LIST_PLACES + at + place, tl.where(key >= 0, heavy + t, NOTHING), mask=place < heavy)
        for j0 in range(C, heavy, C):
            tl.store(LIST_KEYS + at + j0 + j, NOTHING, mask=j0 + j < heavy)
            tl.store(LIST_PLACES + at + j0 + j, NOTHING, mask=j0 + j < heavy)


@triton.jit
def _beaten(LIST, key, inside, heavy, OR_EQUAL: tl.constexpr):
    """How many of a sorted list are above each key, or as high."""
    low = tl.where(inside, 0, heavy)
    high = low * 0 + heavy
    width = heavy
    while width > 0:
        middle = (low + high) // 2
        other = tl.load(LIST + middle, mask=low < high, other=NOTHING)
        above = other > key
        if OR_EQUAL:
            above = other >= key
        above = above & (low < high)
        low, high = tl.where(above, middle + 1, low), tl.where(above, high, middle)
        width //= 2
    return low


@triton.jit(do_not_specialize=["lists", "heavy", "reach"])
def merge_kernel(IN_KEYS, IN_PLACES, OUT_KEYS, OUT_PLACES, lists, heavy, reach, J: tl.constexpr):
    """Each list becomes the best of itself and of the one `reach` chunks before it."""
    tiles = tl.cdiv(heavy, J)
    tile, n = tl.program_id(0) % tiles, (tl.program_id(0) // tiles) % lists
    late = ((tl.program_id(0) // tiles // lists).to(tl.int64) * lists + n) * heavy
    j = tile * J + tl.arange(0, J)
    inside = j < heavy
    key = tl.load(IN_KEYS + late + j, mask=inside, other=NOTHING)
    place = tl.load(IN_PLACES + late + j, mask=inside, other=NOTHING)
    if n < reach:
        tl.store(OUT_KEYS + late + j, key, mask=inside)
        tl.store(OUT_PLACES + late + j, place, mask=inside)
    else:
        early = late - reach * heavy.to(tl.int64)
        to = j + _beaten(IN_KEYS + early, key, inside, heavy, False)
        tl.store(OUT_KEYS + late + to, key, mask=to < heavy)
        tl.store(OUT_PLACES + late + to, place, mask=to < heavy)
        key = tl.load(IN_KEYS + early + j, mask=inside, other=NOTHING)
        place = tl.load(IN_PLACES + early + j, mask=inside, other=NOTHING)
        to = j + _beaten(IN_KEYS + late, key, inside, heavy, True)
        tl.store(OUT_KEYS + late + to, key, mask=to < heavy)
        tl.store(OUT_PLACES + late + to, place, mask=to < heavy)


@triton.jit(do_not_specialize=["count", "heavy"])
def times_kernel(
    KEYS, LIST_KEYS, FIRST, TIMES, NEXT, ENTRIES, COUNTS, count, heavy,
    HKV: tl.constexpr, DOCUMENTS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A chunk's candidates: those held when it begins, then those of its own that are ever seen, as they join.

    TIMES, NEXT [lines, N, heavy + C]: since << 16 | until, which of the chunk's tokens, 0 where there is no candidate;
    which candidate of the next chunk each is, NOTHING if none. ENTRIES [lines, T]: which candidate of its own chunk the
    token at each slot of the stream is. COUNTS [lines, N].
    """
    chunks, parts = tl.cdiv(count, C), tl.cdiv(heavy, C) + 1
    part, n = tl.program_id(0) % parts, (tl.program_id(0) // parts) % chunks  # part 0: the chunk's own
    line = (tl.program_id(0) // parts // chunks).to(tl.int64)
    held = LIST_KEYS + (line * (chunks + 1) + n) * heavy
    stream = KEYS + line * count
    time = tl.arange(0, C)
    slot, j = n * C + time, (part - 1) * C + time
    own = tl.where(part == 0, time, -1)
    joins = slot < tl.where(part == 0, count, 0)
    key = tl.load(held + j, mask=(j >= 0) & (j < heavy), other=NOTHING)
    key = tl.where(own < 0, key, tl.load(stream + slot, mask=joins, other=NOTHING))
    beaten = tl.where(own < 0, j, _beaten(held, key, joins, heavy, False))

    until = tl.zeros([C], tl.int32)
    same = tl.zeros([C], tl.int32)
    for t0 in range(0, C, UNROLLED):  # one after the other: no sums or scans over threads
        for u in tl.static_range(UNROLLED):
            t = n * C + t0 + u
            beaten += _beats(_of_stream(stream, t, count), t0 + u, key, own).to(tl.int32)
            until += (beaten < heavy).to(tl.int32)
            if DOCUMENTS:
                document = _document(_first(FIRST, line // HKV, t, count, DOCUMENTS)).to(tl.int64)
                same += ((document <= (key >> 32)) & (t < count)).to(tl.int32)
    if DOCUMENTS:  # what is held of an earlier document is seen up to the beginning of the next
        until = tl.minimum(until, same)
    following = tl.where((key >= 0) & (beaten < heavy), beaten, NOTHING)
    at = (line * chunks + n) * (heavy + C)
    if part > 0:
        tl.store(TIMES + at + j, tl.where(key >= 0, until, 0), mask=j < heavy)
        tl.store(NEXT + at + j, following, mask=j < heavy)
    else:
        seen = (key >= 0) & (until > time)
        entry = heavy + tl.cumsum(seen.to(tl.int32), 0) - 1
        stop = heavy + tl.sum(seen.to(tl.int32), 0)
        tl.store(TIMES + at + entry, time << 16 | until, mask=seen)
        tl.store(NEXT + at + entry, following, mask=seen)
        tl.store(TIMES + at + heavy + time, 0, mask=heavy + time >= stop)
        tl.store(NEXT + at + heavy + time, NOTHING, mask=heavy + time >= stop)
        tl.store(ENTRIES + line * count + slot, tl.where(seen, entry, NOTHING), mask=slot < count)
        tl.store(COUNTS + line * chunks + n, stop)
