"""Heavy attention in Triton: one token and the state, in place; with the window before it, in one kernel.

A program holds one key head of a row, and nothing that it reads is written by another one. Its own writes come behind a
barrier, when all of its threads have read what was there.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from lizardzoo.kernels.heavy.triton_choice import settled
from lizardzoo.kernels.window.triton import LOG2E, _attend, _dot, _load, _store
from lizardzoo.kernels.window.triton_step import step_masses, write_token

LARGEST = tl.constexpr(2**63 - 1)


@triton.jit
def _bits(score):
    """Scores as whole numbers in the same order; -1: nothing is held."""
    return tl.where(score == float("-inf"), -1, tl.maximum(score.to(tl.int32, bitcast=True), 0))


@triton.jit(do_not_specialize=["window", "keep", "heavy", "sinks", "stb"])
def step_kernel(
    Q, K, V, GIVEN, RING_K, RING_V, KEPT_K, KEPT_V, LENGTH, HELD_K, HELD_V, SCORE, RANK, DRAWN, SINKS, MASK, COS,
    SIN, Y, LOG_MASS, window, keep, heavy, sinks, fade, scale, sqb, sqh, skb, skh, svb, svh, ssh, stb,
    HKV: tl.constexpr, G: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr, M: tl.constexpr, N: tl.constexpr, R: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """One token of one key head; see `step.py`.

    GIVEN [B, 1, H]: the window's log_mass; then the window stays as it is. None: the token sees the window as well,
    under the same denominator, and enters it; COS, SIN: the kept keys are turned by them.
    """
    head, b = tl.program_id(0) % HKV, (tl.program_id(0) // HKV).to(tl.int64)
    g = tl.arange(0, M)
    inside, heads = g < G, head * G + g
    real = 1
    if MASK is not None:
        real = tl.load(MASK + b).to(tl.int32)
    length = tl.load(LENGTH + b)  # the new token's rank
    q = _load(Q + b * sqb, heads * sqh, inside, DK, BLOCK_DK)
    d, dv = tl.arange(0, BLOCK_DK), tl.arange(0, BLOCK_DV)
    k_new = tl.load(K + b * skb + head * skh + d, mask=d < DK, other=0.0)
    v_new = tl.load(V + b * svb + head * svh + dv, mask=dv < DV, other=0.0)

    # The token that leaves takes the place of the worst one held, the oldest of those, unless it is worse itself.
    worst, lowest = 0, (length * 0).to(tl.int64) + LARGEST
    for h0 in range(0, heavy, H):
        h = h0 + tl.arange(0, H)
        place = (b * heavy + h) * HKV + head
        score = tl.load(SCORE + place, mask=h < heavy, other=float("-inf"))
        rank = tl.load(RANK + place, mask=h < heavy, other=0)
        key = (_bits(score).to(tl.int64) << 32) | tl.maximum(rank, 0).to(tl.int64)
        key = tl.where(h < heavy, key, LARGEST)
        least = tl.min(key, 0)
        at = tl.min(tl.where(key == least, h, heavy), 0)
        worst, lowest = tl.where(least < lowest, at, worst), tl.minimum(least, lowest)
    slot = length % window
    leaving = (b * window + slot) * HKV + head
    new_score = settled(tl.load(DRAWN + leaving), length - window, fade)
    taken = tl.where((length >= window + keep) & (_bits(new_score) >= (lowest >> 32)), real, 0)
    into = tl.where(taken > 0, worst, -1)
    k_old = tl.load(RING_K + leaving * DK + d, mask=d < DK * taken, other=0.0)
    v_old = tl.load(RING_V + leaving * DV + dv, mask=dv < DV * taken, other=0.0)

    peak = tl.full([M], float("-inf"), tl.float32)
    mass = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, BLOCK_DV], tl.float32)
    if GIVEN is None:
        peak, mass, acc = step_masses(
            peak, mass, acc, q, k_new, v_new, RING_K, RING_V, KEPT_K, KEPT_V, SINKS, COS, SIN, b, head, heads, inside,
            length, window, keep, sinks, scale, ssh, stb, HKV, DK, DV, BLOCK_DK, BLOCK_DV, N, R,
        )  # fmt: skip
        log_mass = tl.where(inside, peak, 0.0) + tl.log2(tl.where(inside, mass, 1.0))
    else:
        log_mass = tl.load(GIVEN + b * (HKV * G) + heads, mask=inside, other=0.0) * LOG2E
    for h0 in range(0, heavy, N):
        h = h0 + tl.arange(0, N)
        place = (b * heavy + h) * HKV + head
        here = h == into
        there = (tl.load(SCORE + place, mask=h < heavy, other=float("-inf")) > float("-inf")) | here
        k = tl.where(here[:, None], k_old[None, :], _load(HELD_K, place * DK, there, DK, BLOCK_DK))
        v = tl.where(here[:, None], v_old[None, :], _load(HELD_V, place * DV, there, DV, BLOCK_DV))
        scores = _dot(q, tl.trans(k)) * (scale * LOG2E)
        peak, mass, acc = _attend(peak, mass, acc, scores, there[None, :] & inside[:, None], v)
    seen = inside & (real != 0) & (mass > 0.0)
    mass = tl.where(seen, mass, 1.0)
    answers = b * (HKV * G) + heads
    y = tl.where(seen[:, None], acc / mass[:, None], 0.0)
    _store(Y, answers * DV, y.to(Y.dtype.element_ty), inside, DV, BLOCK_DV)
    tl.store(LOG_MASS + answers, tl.where(seen, (peak + tl.log2(mass)) / LOG2E, float("-inf")), mask=inside)

    tl.debug_barrier()
    young = tl.maximum(window // 8, 1)
    for j0 in range(0, window, N):
        j = j0 + tl.arange(0, N)
        age = (length + window - j) % window
        counts = (j < window) & (age >= young) & (age <= length)
        place = (b * window + j) * HKV + head
        k = _load(RING_K, place * DK, counts, DK, BLOCK_DK)
        weights = tl.exp2((_dot(q, tl.trans(k)) * (scale * LOG2E) - log_mass[:, None]) * 2)
        more = tl.sum(tl.where(counts[None, :] & inside[:, None], weights, 0.0), 0)
        before = tl.load(DRAWN + place, mask=(j < window) & (j != slot), other=0.0)  # the new token begins with nothing
        tl.store(DRAWN + place, before + more, mask=j < window * real)
    home = (b * heavy + worst) * HKV + head
    tl.store(HELD_K + home * DK + d, k_old, mask=d < DK * taken)
    tl.store(HELD_V + home * DV + dv, v_old, mask=dv < DV * taken)
    tl.store(SCORE + home, new_score, mask=taken > 0)
    tl.store(RANK + home, (length - window).to(tl.int32), mask=taken > 0)
    if GIVEN is None:
        write_token(
            k_new, v_new, RING_K, RING_V, KEPT_K, KEPT_V, b, head, length, window, keep, real, HKV, DK, DV, BLOCK_DK,
            BLOCK_DV,
        )  # fmt: skip
