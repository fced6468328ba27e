"""Sliding-window attention in Triton: one token and the state, in place. `ops.py` launches it.

Its parts serve the fused steps as well, of heavy and of hybrid attention.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from lizardzoo.kernels.window.triton import LOG2E, _attend, _dot, _load, _store


@triton.jit
def sink_masses(peak, mass, acc, SINKS, heads, inside, ssh, sinks, R: tl.constexpr):
    """Add the sinks of each row's head to the denominators; see `_attend`."""
    for s0 in range(0, sinks, R):
        s = s0 + tl.arange(0, R)
        there = (s < sinks)[None, :] & inside[:, None]
        logits = tl.load(SINKS + heads[:, None] * ssh + s[None, :], mask=there, other=float("-inf"))
        logits = logits.to(tl.float32) * LOG2E
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        finite = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        decay = tl.exp2(peak - finite)
        mass = mass * decay + tl.sum(tl.exp2(logits - finite[:, None]), 1)
        peak, acc = new_peak, acc * decay[:, None]
    return peak, mass, acc


@triton.jit
def half_turns(COS, SIN, at, D: tl.constexpr, BLOCK: tl.constexpr):
    """cos, sin of the D numbers of a head (negative in the first half) in fp32, and where each one's partner stands."""
    d = tl.arange(0, BLOCK)
    cos = tl.load(COS + at + d, mask=d < D, other=0.0).to(tl.float32)
    sin = tl.load(SIN + at + d, mask=d < D, other=0.0).to(tl.float32)
    return cos, tl.where(d < D // 2, -sin, sin), tl.where(d < D // 2, d + D // 2, d - D // 2)


@triton.jit
def rotated(x, partner, cos, sin):
    """Numbers rotated with their partners of the other half; see `half_turns`. Rounded once."""
    return (x.to(tl.float32) * cos + partner.to(tl.float32) * sin).to(x.dtype)


@triton.jit
def kept_keys(KEPT_K, COS, SIN, at, offsets, there, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Keys at KEPT_K + offsets, turned by COS and SIN at `at` where these are given."""
    k = _load(KEPT_K, offsets, there, DIM, BLOCK)
    if COS is not None:
        cos, sin, partner = half_turns(COS, SIN, at, DIM, BLOCK)
        mask = there[:, None] & (tl.arange(0, BLOCK) < DIM)[None, :]
        other = tl.load(KEPT_K + offsets[:, None] + partner[None, :], mask=mask, other=0.0)
        k = rotated(k, other, cos[None, :], sin[None, :])
    return k


@triton.jit
def step_masses(
    peak, mass, acc, q, k_new, v_new, RING_K, RING_V, KEPT_K, KEPT_V, SINKS, COS, SIN, b, head, heads, inside, length,
    window, keep, sinks, scale, ssh, stb, HKV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """What one token sees in the window, itself in its slot, of the kept tokens and of the sinks; see `_attend`.

    COS, SIN: the kept keys are turned by them; None: not at all.
    """
    for j0 in range(0, window, N):
        j = j0 + tl.arange(0, N)
        there = (j < window) & (j <= length)
        place = ((b * window + j) * HKV + head).to(tl.int64)
        here = (j == length % window)[:, None]
        k = tl.where(here, k_new[None, :], _load(RING_K, place * DK, there, DK, BLOCK_DK))
        v = tl.where(here, v_new[None, :], _load(RING_V, place * DV, there, DV, BLOCK_DV))
        scores = _dot(q, tl.trans(k)) * (scale * LOG2E)
        peak, mass, acc = _attend(peak, mass, acc, scores, there[None, :] & inside[:, None], v)
    for r0 in range(0, keep, R):
        r = r0 + tl.arange(0, R)
        there = (r < keep) & (r <= length - window)
        place = ((b * keep + r) * HKV + head).to(tl.int64)
        k = kept_keys(KEPT_K, COS, SIN, b * stb, place * DK, there, DK, BLOCK_DK)
        v = _load(KEPT_V, place * DV, there, DV, BLOCK_DV)
        scores = _dot(q, tl.trans(k)) * (scale * LOG2E)
        peak, mass, acc = _attend(peak, mass, acc, scores, there[None, :] & inside[:, None], v)
    if SINKS is not None:
        peak, mass, acc = sink_masses(peak, mass, acc, SINKS, heads, inside, ssh, sinks, R)
    return peak, mass, acc


@triton.jit
def write_token(
    k_new, v_new, RING_K, RING_V, KEPT_K, KEPT_V, b, head, length, window, keep, real, HKV: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """A token (nothing unless `real`) into its slots of the ring and of the kept ones."""
    d, dv = tl.arange(0, BLOCK_DK), tl.arange(0, BLOCK_DV)
    place = (b * window + length % window) * HKV + head
    tl.store(RING_K + place * DK + d, k_new, mask=d < DK * real)
    tl.store(RING_V + place * DV + dv, v_new, mask=dv < DV * real)
    kept = tl.where(length < keep, real, 0)
    place = (b * keep + length) * HKV + head
    tl.store(KEPT_K + place * DK + d, k_new, mask=d < DK * kept)
    tl.store(KEPT_V + place * DV + dv, v_new, mask=dv < DV * kept)


@triton.jit(do_not_specialize=["window", "keep", "sinks", "stb"])
def step_kernel(
    Q, K, V, RING_K, RING_V, KEPT_K, KEPT_V, LENGTH, SINKS, MASK, COS, SIN, Y, LOG_MASS, window, keep, sinks, scale,
    sqb, sqh, skb, skh, svb, svh, ssh, stb,
    HKV: tl.constexpr, G: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr, M: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """One token of one key head: attend, and write the token into its slots.

    A slot that is written is not read: the new token stands there already, in registers.
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
    peak = tl.full([M], float("-inf"), tl.float32)
    mass = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, BLOCK_DV], tl.float32)

    peak, mass, acc = step_masses(
        peak, mass, acc, q, k_new, v_new, RING_K, RING_V, KEPT_K, KEPT_V, SINKS, COS, SIN, b, head, heads, inside,
        length, window, keep, sinks, scale, ssh, stb, HKV, DK, DV, BLOCK_DK, BLOCK_DV, N, R,
    )  # fmt: skip
    answers = inside & (real != 0)
    mass = tl.where(answers, mass, 1.0)
    y = tl.where(answers[:, None], acc / mass[:, None], 0.0)
    place = b * (HKV * G) + heads
    _store(Y, place * DV, y.to(Y.dtype.element_ty), inside, DV, BLOCK_DV)
    tl.store(LOG_MASS + place, tl.where(answers, (peak + tl.log2(mass)) / LOG2E, float("-inf")), mask=inside)
    write_token(
        k_new, v_new, RING_K, RING_V, KEPT_K, KEPT_V, b, head, length, window, keep, real, HKV, DK, DV, BLOCK_DK,
        BLOCK_DV,
    )  # fmt: skip
