"""Gates by Triton: all columns of up to three weights side by side, so that the tokens are read once.

Column c belongs to gate 0 below N0, to gate 1 below N0 + N1, to gate 2 below N0 + N1 + N2. SIGMOIDS: bit i is set
where gate i is a log sigmoid. Rows are tokens [M, K]. OPERAND: bf16 (a weight or gradient is then two terms) or fp32.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1


@triton.jit
def _owners(c, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr):
    """Which columns belong to which gate."""
    return c < N0, (c >= N0) & (c < N0 + N1), (c >= N0 + N1) & (c < N0 + N1 + N2)


@triton.jit
def _load(p0, p1, p2, row, c, there, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr):
    """The tile [rows, columns] of three matrices [., N0], [., N1], [., N2] side by side; 0 where there is nothing."""
    first, second, third = _owners(c, N0, N1, N2)
    tile = tl.load(p0 + row * N0 + c, there & first, 0.0)
    if N1 > 0:
        tile += tl.load(p1 + row * N1 + (c - N0), there & second, 0.0)
    if N2 > 0:
        tile += tl.load(p2 + row * N2 + (c - N0 - N1), there & third, 0.0)
    return tile


@triton.jit
def _is_sigmoid(c, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, SIGMOIDS: tl.constexpr):
    first, second, third = _owners(c, N0, N1, N2)
    return (first & (SIGMOIDS % 2 > 0)) | (second & (SIGMOIDS // 2 % 2 > 0)) | (third & (SIGMOIDS // 4 > 0))


@triton.jit
def _log_sigmoid(z):
    """Exact to the last digits where it is nearly 0, as log(1 + e^-z) is not: a memory that forgets little lives there.

    log(1 + t) = 2 artanh(t / (2 + t)).
    """
    t = tl.exp(-tl.abs(z))
    s = t / (2.0 + t)
    u = s * s  # at most 1/9
    series = 1.0 + u * (1 / 3 + u * (1 / 5 + u * (1 / 7 + u * (1 / 9 + u * (1 / 11 + u * (1 / 13 + u / 15))))))
    return tl.minimum(z, 0.0) - 2.0 * s * series


@triton.jit
def _less_than_one(y):
    """1 - e^y for y <= 0, exact where it is nearly 0."""
    series = 1.0 + y / 2 * (1.0 + y / 3 * (1.0 + y / 4 * (1.0 + y / 5 * (1.0 + y / 6))))
    return tl.where(y > -0.25, -y * series, 1.0 - tl.exp(y))


@triton.jit
def _finish(
    z, b0, b1, b2, y0, y1, y2, rows, c, M,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, SIGMOIDS: tl.constexpr,
):  # fmt: skip
    """Add the bias, take the log sigmoid where one is wanted, store."""
    z += _load(b0, b1, b2, c * 0, c, c >= 0, N0, N1, N2)[None, :]
    y = tl.where(_is_sigmoid(c, N0, N1, N2, SIGMOIDS)[None, :], _log_sigmoid(z), z)
    first, second, third = _owners(c, N0, N1, N2)
    row, there = rows.to(tl.int64)[:, None], (rows < M)[:, None]
    tl.store(y0 + row * N0 + c[None, :], y, there & first[None, :])
    if N1 > 0:
        tl.store(y1 + row * N1 + (c - N0)[None, :], y, there & second[None, :])
    if N2 > 0:
        tl.store(y2 + row * N2 + (c - N0 - N1)[None, :], y, there & third[None, :])


@triton.jit
def _two_terms(x):
    """x as a sum of two numbers of bf16."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit(do_not_specialize=["M"])
def forward_kernel(
    x, w0, w1, w2, b0, b1, b2, y0, y1, y2, M, sx, K: tl.constexpr,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, SIGMOIDS: tl.constexpr, OPERAND: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of rows."""
    rows, c = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BN)
    row = rows.to(tl.int64)[:, None] * sx
    z = tl.zeros([BM, BN], tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        tokens = tl.load(x + row + k[None, :], (rows < M)[:, None] & (k < K)[None, :], 0.0)
        weights = _load(w0, w1, w2, k[:, None], c[None, :], (k < K)[:, None], N0, N1, N2)
        if OPERAND == "bf16":
            high, low = _two_terms(weights)
            z = tl.dot(tokens, high, z)
            z = tl.dot(tokens, low, z)
        else:
            z = tl.dot(tokens.to(tl.float32), weights, z, input_precision="tf32x3")
    _finish(z, b0, b1, b2, y0, y1, y2, rows, c, M, N0, N1, N2, SIGMOIDS)


@triton.jit(do_not_specialize=["M"])
def few_rows_kernel(
    x, w0, w1, w2, b0, b1, b2, y0, y1, y2, M, sx, K: tl.constexpr,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, SIGMOIDS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of a few columns, blocks of rows: with few rows (a decode step) the columns keep the device busy."""
    rows, c = tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    row = rows.to(tl.int64)[:, None] * sx
    products = tl.zeros([BM, BK, BN], tl.float32)  # summed once: a sum over threads in every turn takes longer than all
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        tokens = tl.load(x + row + k[None, :], (rows < M)[:, None] & (k < K)[None, :], 0.0).to(tl.float32)
        weights = _load(w0, w1, w2, k[:, None], c[None, :], (k < K)[:, None], N0, N1, N2)
        products += tokens[:, :, None] * weights[None, :, :]
    z = tl.sum(products, 1)
    _finish(z, b0, b1, b2, y0, y1, y2, rows, c, M, N0, N1, N2, SIGMOIDS)


@triton.jit(do_not_specialize=["M", "span"])
def gradient_kernel(
    x, w0, w1, w2, y0, y1, y2, g0, g1, g2, d_x, d_w, d_b, M, sx, span, K: tl.constexpr,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, SIGMOIDS: tl.constexpr, OPERAND: tl.constexpr,
    TOKENS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of K, parts of `span` blocks of rows. TOKENS: whether d_x [M, K] is wanted.

    d_w [parts, K, N], d_b [parts, N] with N = N0 + N1 + N2: a part's sum. g: gradients of y; d log sigmoid(z) / dz =
    1 - e^y.
    """
    k, c = tl.program_id(0) * BK + tl.arange(0, BK), tl.arange(0, BN)
    part, count = tl.program_id(1), N0 + N1 + N2
    sigmoid = _is_sigmoid(c, N0, N1, N2, SIGMOIDS)[None, :]
    # [columns, K]: as the product with the gradients takes it
    weights = _load(w0, w1, w2, k[None, :], c[:, None], (k < K)[None, :], N0, N1, N2)
    sums, bias = tl.zeros([BK, BN], tl.float32), tl.zeros([BN], tl.float32)
    for block in range(part * span, tl.minimum((part + 1) * span, tl.cdiv(M, BM))):
        rows = block * BM + tl.arange(0, BM)
        row, there = rows.to(tl.int64)[:, None], (rows < M)[:, None]
        d_z = _load(g0, g1, g2, row, c[None, :], there, N0, N1, N2)
        if SIGMOIDS > 0:
            y = _load(y0, y1, y2, row, c[None, :], there & sigmoid, N0, N1, N2)
            d_z = tl.where(sigmoid, d_z * _less_than_one(tl.minimum(y, 0.0)), d_z)
        tokens = tl.load(x + row * sx + k[None, :], there & (k < K)[None, :], 0.0)
        bias += tl.sum(d_z, 0)
        if OPERAND == "bf16":
            high, low = _two_terms(d_z)
            sums = tl.dot(tl.trans(tokens), high, sums)
            sums = tl.dot(tl.trans(tokens), low, sums)
        else:
            sums = tl.dot(tl.trans(tokens.to(tl.float32)), d_z, sums, input_precision="tf32x3")
        if TOKENS:
            if OPERAND == "bf16":
                d_tokens = tl.dot(low, weights.to(tl.bfloat16), tl.dot(high, weights.to(tl.bfloat16)))
            else:
                d_tokens = tl.dot(d_z, weights, input_precision="tf32x3")
            tl.store(d_x + row * K + k[None, :], d_tokens.to(d_x.dtype.element_ty), there & (k < K)[None, :])
    to = (part.to(tl.int64) * K + k)[:, None] * count + c[None, :]
    tl.store(d_w + to, sums, (k < K)[:, None] & (c < count)[None, :])
    if tl.program_id(0) == 0:
        tl.store(d_b + part * count + c, bias, c < count)
