"""Rotary position embedding by the Triton kernel: launch, torch op with its gradient."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
from torch import Tensor

from lizardzoo.kernels.launching import launch, prepared, strides, unit_stride
from lizardzoo.kernels.rotary import triton as kernels

INTERPRETED = kernels.INTERPRETED.value  # TRITON_INTERPRET=1
TILE = 128 if INTERPRETED else 1024
"""Numbers of a half that a program rotates: with 4 warps each thread reads 16 bytes of bf16 at once."""


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `lizardzoo.kernels.rotary.rotate`."""
    if torch.compiler.is_compiling():
        return _rotate(q, k, cos, sin, False)
    return (_Rotate.apply if torch.is_grad_enabled() else compute)(q, k, cos, sin, False)


@prepared
def _launch(q, k, cos, sin, transposed):
    q_out, k_out = (x.new_empty(x.shape) for x in (q, k))
    (batch, count, heads, dim), kv_heads = q.shape, k.shape[2]
    block = 1 << (dim // 2 - 1).bit_length()
    rows = max(1, TILE // block)
    grid = batch * (-(-count * heads // rows) - (-count * kv_heads // rows))
    tables = [stride for x in (cos, sin) for stride in (x.stride(0) if x.shape[0] > 1 else 0, x.stride(1))]
    if grid:
        launch(
            kernels.rotate_kernel, (grid,), (q, k, cos, sin, q_out, k_out),
            (count, *strides(q, k), *tables),
            {"H": heads, "HKV": kv_heads, "HALF": dim // 2, "TRANSPOSED": transposed, "ROWS": rows, "BLOCK": block},
        )  # fmt: skip
    return q_out, k_out


def compute(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """q and k rotated forth, or back by the transpose."""
    q, k = _launch(unit_stride(q), unit_stride(k), unit_stride(cos), unit_stride(sin), transposed)
    return q, k


_rotate = torch.library.custom_op("lizardzoo::rotate", compute, mutates_args=())


@_rotate.register_fake
def _(q, k, cos, sin, transposed):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _setup_context(ctx, inputs, output):
    _, _, cos, sin, ctx.transposed = inputs
    ctx.save_for_backward(cos, sin)


def _autograd(ctx, dq, dk):
    dq, dk = _rotate(dq, dk, *ctx.saved_tensors, not ctx.transposed)
    return dq, dk, None, None, None


_rotate.register_autograd(_autograd, setup_context=_setup_context)


class _Rotate(torch.autograd.Function):
    """The same without an operator's slow way through torch's dispatcher."""

    @staticmethod
    def forward(ctx, *inputs):
        output = compute(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, dq, dk):
        return *_Rotate.apply(dq, dk, *ctx.saved_tensors, not ctx.transposed), None, None, None
