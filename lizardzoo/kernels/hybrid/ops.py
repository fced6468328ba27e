"""The fused hybrid: one torch operator, whose kernels are those of its two branches.

With one denominator over both branches, the gradient of every weight is p (dy.v - delta) with the p, y and delta of the
whole: each branch's backward needs nothing of the other. The forward merges in the last kernel of the linear branch.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lizardzoo.kernels.gated_linear import launch
from lizardzoo.kernels.gated_linear import ops as gated_linear
from lizardzoo.kernels.gated_linear.launch import Gradients, Inputs
from lizardzoo.kernels.gated_linear.state import next_state as next_linear_state
from lizardzoo.kernels.hybrid import composed
from lizardzoo.kernels.hybrid.state import share
from lizardzoo.kernels.hybrid.step import OP, step
from lizardzoo.kernels.launching import eager, prepared, unit_stride
from lizardzoo.kernels.window import ops as window_ops
from lizardzoo.kernels.window.state import next_state as next_window_state

__all__ = ["chunked", "step"]

LINEAR = len(Inputs._fields)
NUMBERS = window_ops.NUMBERS.replace("offset", "near_offset").replace("scale", "near_scale")
SIGNATURE = (
    f"{gated_linear.SIGNATURE}, Tensor near_q, Tensor near_k, Tensor? near_v, Tensor? sink, Tensor? first,"
    f" Tensor? lengths, Tensor? log_scale, {NUMBERS}"
)


def _split(arguments: Any) -> tuple[Inputs, tuple[Any, ...], Tensor | None, tuple[Any, ...]]:
    """The linear branch's inputs, the window's, the log-scale, and the window's numbers."""
    linear, near, log_scale = Inputs(*arguments[:LINEAR]), arguments[LINEAR : LINEAR + 6], arguments[LINEAR + 6]
    q, k, v, *rest = near
    return linear, (q, k, linear.v if v is None else v, *rest), log_scale, arguments[LINEAR + 7 :]


def _ready(linear: Inputs, arguments: Any) -> tuple[Any, ...]:
    """All arguments as the kernels read them, the linear branch's being so already."""
    q, k, v, *rest = arguments[LINEAR : LINEAR + 6]
    log_scale = arguments[LINEAR + 6]
    near = (unit_stride(q), unit_stride(k), None if v is None else unit_stride(v), *rest)
    return *linear, *near, None if log_scale is None else log_scale.contiguous(), *arguments[LINEAR + 7 :]


def _launch(*arguments: Any) -> tuple[Tensor, ...]:
    linear, near, log_scale, numbers = _split(arguments)
    return launch.forward(linear, window_ops.attend(*near, *numbers), log_scale)


_forward = prepared(_launch)


def compute(*arguments: Any) -> tuple[Tensor, ...]:
    """y, log_mass, the last memory (kv, norm, scale), and what the backward reads.

    near_q, near_k, near_v: the window branch's, near_v None = v; log_scale [B, T, H] fp32 or None.
    """
    inputs = Inputs(*arguments[:LINEAR])
    settled = launch.ready(inputs)
    return *_forward(*_ready(settled, arguments)), *gated_linear.casts(inputs, settled)


def _launch_backward(*arguments: Any) -> tuple[Any, ...]:
    """`launch.Gradients` as they are before `launch.finish`, then those of near_q, near_k and near_v, and delta."""
    *inputs, saved, y, log_mass, own, d_y, d_log_mass, d_kv, d_norm, last_scale, d_q, d_k, d_window = arguments
    linear, near, _, numbers = _split(inputs)
    d_near: Any = (None, None, None)
    if d_window:
        *d_near, delta = window_ops.gradients(*near, y, log_mass, d_y, d_log_mass, *numbers)  # type: ignore[call-arg]
    else:
        delta = launch.deltas(y, d_y, d_log_mass)
    d_v = d_near[2] if inputs[LINEAR + 2] is None else None
    memory = (d_kv, d_norm, last_scale)
    found = launch.backward(linear, saved, own, delta, d_y, memory, d_v, (d_q, d_k))
    return *found, *d_near, None if near[3] is None else delta


_backward = prepared(_launch_backward)


def find_gradients(*arguments: Any) -> list[Tensor | None]:
    """Gradients of q, k, v, log_decay, log_input, both maps, kv, norm, near_q, near_k, near_v, sink and log_scale.

    wanted: of which a gradient is wanted; where none of the tokens' is, as in stage 1, the window's half of the work
    falls away.
    """
    *inputs, saved, y, log_mass, d_y, d_log_mass, d_kv, d_norm, last_scale, wanted = arguments
    linear, near, log_scale, _ = _split(inputs)
    d_y = torch.zeros_like(y) if d_y is None else d_y.contiguous()
    d_log_mass = None if d_log_mass is None else d_log_mass.contiguous()
    memory = gated_linear.memory_gradient(y, d_kv, d_norm, last_scale)
    d_window = any(wanted[place] for place in WINDOW)
    own = log_mass if log_scale is None else log_mass - log_scale
    *found, d_near_q, d_near_k, d_near_v, delta = _backward(
        *_ready(gated_linear.settled(linear, saved), inputs), saved[0], y, log_mass, own, d_y, d_log_mass, *memory,
        wanted[0], wanted[1], d_window,
    )  # fmt: skip
    shared = inputs[LINEAR + 2] is None
    whole = launch.finish(linear, Gradients(*found), d_near_v if shared else None)
    d_sink = window_ops.sink_gradient(near[3], log_mass, delta)
    rest = (d_near_q, d_near_k, None if shared else d_near_v, d_sink, None if log_scale is None else whole.sides)
    return [*whole[: len(gated_linear.PLACES)], *rest]


def compute_backward(*arguments: Any) -> list[Tensor]:
    """The same with empty tensors for gradients that are not there, as an operator returns them."""
    return [arguments[0].new_empty(0) if x is None else x for x in find_gradients(*arguments)]


operator = torch.library.custom_op(
    "lizardzoo::hybrid_attention", compute, mutates_args=(), schema=f"({SIGNATURE}) -> ({gated_linear.OUTPUTS})"
)
backward_operator = torch.library.custom_op(
    "lizardzoo::hybrid_attention_backward",
    compute_backward,
    mutates_args=(),
    schema=f"({SIGNATURE}, Tensor[] saved, Tensor y, Tensor log_mass, Tensor? d_y, Tensor? d_log_mass, Tensor? d_kv,"
    " Tensor? d_norm, Tensor last_scale, bool[] wanted) -> Tensor[]",
)


@operator.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    return gated_linear.fake(Inputs(*arguments[:LINEAR]))


@backward_operator.register_fake
def _(*arguments: Any) -> list[Tensor]:
    wanted, likes = arguments[-1], [arguments[place] for place in PLACES[-5:]]
    if not any(wanted[place] for place in WINDOW):
        likes[:3] = [None] * 3
    return [
        *gated_linear.fake_gradients(Inputs(*arguments[:LINEAR]), wanted),
        *(arguments[0].new_empty(0) if x is None else x.new_empty(x.shape) for x in likes),
    ]


PLACES = [*gated_linear.PLACES, *(LINEAR + n for n in (0, 1, 2, 3, 6))]
"""Of the inputs that have gradients."""
WINDOW = (2, *range(len(gated_linear.PLACES), len(gated_linear.PLACES) + 3))
"""Among those, the ones that the window's backward gives: v (which it may share), near_q, near_k, near_v."""
operator.register_autograd(
    partial(gated_linear.gradients, backward_operator, PLACES), setup_context=gated_linear.setup_context
)


_eager = eager(compute, gated_linear.setup_context, partial(gated_linear.gradients, find_gradients, PLACES))


def hybrid(*arguments: Any) -> tuple[Tensor, ...]:
    """y, log_mass, the last memory, ...: an operator for torch.compile, a plain function otherwise."""
    return operator(*arguments) if torch.compiler.is_compiling() else _eager(*arguments)


def chunked(
    q, k, v, log_decay, rotated, log_input, log_scale, feature_map, window, keep, lag, skip, sinks, scale, mask, starts,
    state, return_state,
):  # fmt: skip
    """All tokens of a sequence; see `lizardzoo.kernels.hybrid.hybrid_attention`."""
    near, far = (None, None) if state is None else state
    gated_linear.check(OP, q, v, feature_map, far)
    if gated_linear.is_wide(q, v, feature_map):
        return composed.chunked(
            window_ops, gated_linear, q, k, v, log_decay, rotated, log_input, log_scale, feature_map, window, keep, lag,
            skip, sinks, scale, mask, starts, state, return_state,
        )  # fmt: skip
    prepared = gated_linear.prepare(q, k, v, log_decay, log_input, feature_map, lag, skip, mask, starts, far)
    rows, (_, values, _, _) = prepared.rows, prepared.tokens
    near_q, near_k = rotated
    log_scale = None if log_scale is None else log_scale.float()
    if rows is not None:
        near_q, near_k = rows.pack(near_q), rows.pack(near_k)
        log_scale = None if log_scale is None else rows.pack(log_scale)
    placed = window_ops.place(near_k, values, sinks, q.shape[2], rows, starts is not None, near)
    y, log_mass, kv, norm, memory_scale = hybrid(
        *prepared.inputs, near_q, placed.k, None if state is None else placed.v, placed.sink, placed.first,
        placed.lengths, log_scale, window, keep, placed.offset, float(scale),
    )[:5]  # fmt: skip
    new_state = None
    if return_state:
        new_state = share(
            next_window_state(near_k, values, rows, near, window, keep),
            next_linear_state((kv, norm, memory_scale), *prepared.tokens, rows, far, lag),  # type: ignore[call-arg]
            rotated[1] is k,
        )
    return *prepared.unpack(y, log_mass), new_state
