"""Window and heavy attention under one denominator by the Triton kernels: one torch operator, nothing between them.

Forward: the window's kernel, the choice by its log_mass, and heavy attention's kernel, which goes on from the window's
softmax. With one denominator the gradient of every weight is p (dy.v - delta) with the p, y and delta of the whole:
backward, the kernels of either need nothing of the other, and heavy attention's add to what the window's have written.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from functools import partial
from typing import Any

import torch

from lizardzoo.kernels.heavy import ops
from lizardzoo.kernels.heavy.state import by_score
from lizardzoo.kernels.launching import eager, prepared, unit_stride
from lizardzoo.kernels.rows import arrange, unroll
from lizardzoo.kernels.window import ops as window_ops
from lizardzoo.kernels.window.state import next_state

check = ops.check
SIGNATURE = window_ops.SIGNATURE
NUMBERS = "SymInt window, SymInt keep, SymInt heavy, SymInt offset"
OUTPUTS = 2 + len(ops.Choice._fields)


def _launch(q, k, v, sink, first, lengths, before, past, window, keep, heavy, offset, fade, scale):
    near = window_ops.attend(q, k, v, sink, first, lengths, window, keep, offset, scale)
    choice = ops.choose(q, k, near[1], before, past, first, lengths, window, keep, heavy, offset, fade, scale)
    shift = offset - heavy - window
    found = ops.attend(q, k, v, *choice.candidates, lengths, shift, scale, near)  # type: ignore[call-arg]
    return *found, *choice


_forward = prepared(_launch)


def compute(q, k, v, *rest):
    """y, log_mass of both together, and what `ops.choose` gives; arguments as `window_ops.attend` and that take them.

    k, v [B, offset + T, Hkv, D]: with a state [kept | held | ring | new], so that one row serves both.
    """
    return _forward(unit_stride(q), unit_stride(k), unit_stride(v), *rest)


_attention = torch.library.custom_op(
    "lizardzoo::window_and_heavy_attention",
    compute,
    mutates_args=(),
    schema=f"({SIGNATURE}, Tensor? before, Tensor? past, {NUMBERS}, float fade, float scale)"
    f" -> ({', '.join(['Tensor'] * OUTPUTS)})",
)


@_attention.register_fake
def _(q, k, v, sink, first, lengths, before, past, window, keep, heavy, offset, fade, scale):
    y, log_mass = q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)
    return y, log_mass, *ops.fake_choice(q, k, first, window, heavy)


def _gradients(
    q, k, v, sink, first, lengths, places, times, following, entries, counts, y, log_mass, dy, dlog_mass, window, keep,
    heavy, offset, scale,
):  # fmt: skip
    near = window_ops.gradients(q, k, v, sink, first, lengths, y, log_mass, dy, dlog_mass, window, keep, offset, scale)
    whole = ops.gradients(
        q, k, v, places, times, following, entries, counts, lengths, y, log_mass, dy, dlog_mass,
        offset - heavy - window, scale, near,
    )  # fmt: skip
    return *whole, None if sink is None else near[3]


_backward = prepared(_gradients)


def compute_backward(
    q, k, v, sink, first, lengths, places, times, following, entries, counts, y, log_mass, dy, dlog_mass, *numbers
):
    """Gradients of q, k, v, and of sink (empty without one)."""
    dlog_mass = None if dlog_mass is None else dlog_mass.contiguous()
    dq, dk, dv, delta = _backward(
        unit_stride(q), unit_stride(k), unit_stride(v), sink, first, lengths, places, times, following, entries, counts,
        y, log_mass, dy.contiguous(), dlog_mass, *numbers,
    )  # fmt: skip
    dsink = window_ops.sink_gradient(sink, log_mass, delta)
    return dq, dk, dv, q.new_empty(0, dtype=torch.float32) if dsink is None else dsink


_backward_operator = torch.library.custom_op(
    "lizardzoo::window_and_heavy_attention_backward",
    compute_backward,
    mutates_args=(),
    schema=f"({SIGNATURE}, {ops.CANDIDATES}, Tensor y, Tensor log_mass, Tensor dy, Tensor? dlog_mass, {NUMBERS},"
    " float scale) -> (Tensor, Tensor, Tensor, Tensor)",
)


@_backward_operator.register_fake
def _(q, k, v, sink, *_):
    dsink = q.new_empty(0 if sink is None else sink.shape[0], dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsink


def _setup_context(ctx, inputs, output):
    q, k, v, sink, first, lengths, _, _, *sizes, _, scale = inputs
    y, log_mass, *choice = output
    ctx.numbers = (*sizes, scale)
    ctx.save_for_backward(q, k, v, sink, first, lengths, *ops.Choice(*choice).candidates, y, log_mass)
    ctx.mark_non_differentiable(*choice)
    ctx.set_materialize_grads(False)


def _autograd(backward, ctx, dy, dlog_mass, *_):
    q, k, v, sink, *rest, y, log_mass = ctx.saved_tensors
    dy = torch.zeros_like(y) if dy is None else dy
    dq, dk, dv, dsink = backward(q, k, v, sink, *rest, y, log_mass, dy, dlog_mass, *ctx.numbers)
    return dq, dk, dv, None if sink is None else dsink, *[None] * 10


_attention.register_autograd(partial(_autograd, _backward_operator), setup_context=_setup_context)


_eager = eager(compute, _setup_context, partial(_autograd, compute_backward))


def joint_chunked(
    q, k, v, window, keep, heavy, fade, sinks, scale, mask, starts, past, state, return_state
):  # fmt: skip
    """All tokens of a sequence; see `lizardzoo.kernels.heavy.window_and_heavy_attention`."""
    count, seen = q.shape[1], past.length if past is not None else None
    if past is None and not return_state and count <= window + keep:  # nothing can have left the window
        return *window_ops.chunked(q, k, v, window, keep, sinks, scale, mask, starts, None, False), None
    rows = held = before = keys_before = ranks = None
    if mask is not None or starts is not None:
        rows = arrange(q, mask, starts, seen)
        q, k, v = rows.pack(q), rows.pack(k), rows.pack(v)
    if seen is not None:
        *held, score, ranks = by_score(state)
        before, keys_before = unroll(state.drawn, seen), ops.keys_of(score, starts is not None)
    placed = window_ops.place(k, v, sinks, q.shape[2], rows, starts is not None, past, held)
    run: Any = _attention if torch.compiler.is_compiling() else _eager
    y, log_mass, *choice = run(
        q, *placed[:5], before, keys_before, window, keep, heavy, placed.offset, float(fade), float(scale)
    )
    new_past = new_state = None
    if return_state:
        new_past = next_state(k, v, rows, past, window, keep)
        shift = placed.offset - heavy - window
        new_state = ops.held_after(
            placed.k, placed.v, ops.Choice(*choice), rows, placed.first, seen, ranks, window, keep, shift
        )
    if rows is not None:
        y, log_mass = rows.unpack(y), rows.unpack(log_mass)
    return y, log_mass, new_past, new_state
