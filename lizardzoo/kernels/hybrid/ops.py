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
from lizardzoo.kernels.gated_linear.launch import Inputs, Saved
from lizardzoo.kernels.gated_linear.state import next_state as next_linear_state
from lizardzoo.kernels.hybrid.state import share
from lizardzoo.kernels.hybrid.step import step
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


def compute(*arguments: Any) -> tuple[Tensor, ...]:
    """y, log_mass, the last memory (kv, norm, scale), and what `Saved` holds.

    near_q, near_k, near_v: the window branch's, near_v None = v; log_scale [B, T, H] fp32 or None.
    """
    linear, near, log_scale, numbers = _split(arguments)
    beside = window_ops.attend(*near, *numbers)
    y, log_mass, last, saved = launch.forward(linear, beside, None if log_scale is None else log_scale.contiguous())
    return y, log_mass, *last, *saved


def compute_backward(*arguments: Any) -> list[Tensor]:
    """Gradients of q, k, v, log_decay, log_input, both maps, kv, norm, near_q, near_k, near_v, sink and log_scale.

    Empty for those that are not there. wanted: of which a gradient is wanted; where none of the tokens' is, as in stage
    1, the window's half of the work falls away.
    """
    *inputs, saved, y, log_mass, d_y, d_log_mass, d_kv, d_norm, last_scale, wanted = arguments
    linear, near, log_scale, numbers = _split(inputs)
    d_y = torch.zeros_like(y) if d_y is None else d_y.contiguous()
    d_log_mass = None if d_log_mass is None else d_log_mass.contiguous()
    d_near: list[Any] = [None] * 3
    if any(wanted[place] for place in WINDOW):
        *d_near, delta = window_ops.gradients(*near, y, log_mass, d_y, d_log_mass, *numbers)  # type: ignore[call-arg]
    else:
        delta = launch.deltas(y, d_y, d_log_mass)
    d_sink = window_ops.sink_gradient(near[3], log_mass, delta)
    own = log_mass if log_scale is None else log_mass - log_scale
    shared = inputs[LINEAR + 2] is None
    memory = gated_linear.memory_gradient(y, d_kv, d_norm, last_scale)
    d_v, tokens = d_near[2] if shared else None, (wanted[0], wanted[1])
    found = launch.backward(linear, Saved(*saved), own, delta, d_y, memory, d_v, tokens)
    rest = (*d_near[:2], None if shared else d_near[2], d_sink, None if log_scale is None else found.sides)
    return [y.new_empty(0) if x is None else x for x in (*found[:-1], *rest)]


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


_eager = gated_linear.eager(compute, compute_backward, PLACES)


def hybrid(*arguments: Any) -> tuple[Tensor, ...]:
    """y, log_mass, the last memory, ...: an operator for torch.compile, a plain function otherwise."""
    return operator(*arguments) if torch.compiler.is_compiling() else _eager(*arguments)


def chunked(
    q, k, v, log_decay, rotated, log_input, log_scale, feature_map, window, keep, lag, skip, sinks, scale, mask, starts,
    state, return_state,
):  # fmt: skip
    """All tokens of a sequence; see `lizardzoo.kernels.hybrid.hybrid_attention`."""
    near, far = (None, None) if state is None else state
    gated_linear.check(q, v, feature_map, far)
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
