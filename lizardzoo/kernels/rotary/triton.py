"""One Triton kernel rotates q and k, and its transpose their gradients: each number is read once and written once.

A program takes ROWS consecutive rows of one sequence, a row being a head of a token, of q or of k.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _wide(x):
    """fp32, or float64 as it is."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@triton.jit
def _rotate(
    x, y, cos, sin, b, block, count, sxb, sxt, sxh, scb, sct, ssb, sst,
    H: tl.constexpr, HALF: tl.constexpr, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows block * ROWS ... of sequence b; y is contiguous. Offsets of 64 bits: a batch may have 2^31 numbers."""
    row = block * ROWS + tl.arange(0, ROWS)
    t, h, d = (row // H).to(tl.int64), (row % H).to(tl.int64), tl.arange(0, BLOCK)
    mask = (row < count * H)[:, None] & (d < HALF)[None, :]
    first = x + b * sxb + (t * sxt + h * sxh)[:, None] + d[None, :]
    cos += b * scb + (t * sct)[:, None] + d[None, :]
    sin += b * ssb + (t * sst)[:, None] + d[None, :]
    x1, x2 = _wide(tl.load(first, mask, 0.0)), _wide(tl.load(first + HALF, mask, 0.0))
    cos1, cos2 = _wide(tl.load(cos, mask, 0.0)), _wide(tl.load(cos + HALF, mask, 0.0))
    sin1, sin2 = _wide(tl.load(sin, mask, 0.0)), _wide(tl.load(sin + HALF, mask, 0.0))
    if TRANSPOSED:
        sin1, sin2 = -sin2, -sin1
    to = y + (b * count * H + row)[:, None] * (2 * HALF) + d[None, :]
    tl.store(to, (x1 * cos1 - x2 * sin1).to(y.dtype.element_ty), mask)
    tl.store(to + HALF, (x2 * cos2 + x1 * sin2).to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["count"])  # a new length never recompiles
def rotate_kernel(
    q, k, cos, sin, q_out, k_out, count, sqb, sqt, sqh, skb, skt, skh, scb, sct, ssb, sst,
    H: tl.constexpr, HKV: tl.constexpr, HALF: tl.constexpr, TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: for each sequence, the blocks of q's rows and then those of k's."""
    blocks_q, blocks_k = tl.cdiv(count * H, ROWS), tl.cdiv(count * HKV, ROWS)
    program = tl.program_id(0)
    b, block = (program // (blocks_q + blocks_k)).to(tl.int64), program % (blocks_q + blocks_k)
    if block < blocks_q:
        _rotate(
            q, q_out, cos, sin, b, block, count, sqb, sqt, sqh, scb, sct, ssb, sst,
            H, HALF, TRANSPOSED, ROWS, BLOCK,
        )  # fmt: skip
    else:
        _rotate(
            k, k_out, cos, sin, b, block - blocks_q, count, skb, skt, skh, scb, sct, ssb, sst,
            HKV, HALF, TRANSPOSED, ROWS, BLOCK,
        )  # fmt: skip
