"""Hybrid attention as the composition of its branches, each by kernels of its own."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from lizardzoo.kernels.hybrid.state import share
from lizardzoo.kernels.merge import add_log_scale, joint
from lizardzoo.kernels.state import overwrite


def chunked(
    near_kernels, far_kernels, q, k, v, log_decay, rotated, log_input, log_scale, feature_map, window, keep, lag, skip,
    sinks, scale, mask, starts, state, return_state,
):  # fmt: skip
    """All tokens of a sequence, by the window's kernels and those of gated linear attention; see
    `lizardzoo.kernels.hybrid.hybrid_attention`."""
    near_q, near_k = rotated
    *near, window_state = near_kernels.chunked(
        near_q, near_k, v, window, keep, sinks, scale, mask, starts, state and state.window, return_state
    )
    *far, linear_state = far_kernels.chunked(
        q, k, v, log_decay, log_input, feature_map, lag, skip, mask, starts, state and state.linear, return_state
    )
    new = share(window_state, linear_state, near_k is k) if return_state else None
    return *_merge(near, far, log_scale, mask, q.dtype), new


def step(
    near_kernels, far_kernels, rotary, q, k, v, log_decay, rotated, rope, log_input, log_scale, feature_map, keep, skip,
    sinks, scale, mask, turn, state, in_place,
):  # fmt: skip
    """One token, likewise, and by the kernels of the rotation; see `lizardzoo.kernels.hybrid.hybrid_attention_step`."""
    near_q, near_k = rotated if rope is None else rotary.rotate(q, k, *rope)
    *near, window_state = near_kernels.step(near_q, near_k, v, keep, sinks, scale, mask, turn, state.window, False)
    *far, linear_state = far_kernels.step(q, k, v, log_decay, log_input, feature_map, skip, mask, state.linear, False)
    new = share(window_state, linear_state, near_k is k)
    return *_merge(near, far, log_scale, mask, q.dtype), overwrite(state, new) if in_place else new


def _merge(near, far, log_scale, mask, dtype):
    y, log_mass = joint([near, (far[0], add_log_scale(far[1], log_scale, mask))])
    return y.to(dtype), log_mass
