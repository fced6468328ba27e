"""One token of hybrid attention: the fused kernel where it applies, else the two branches' own."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
from torch import Tensor

from lizardzoo.kernels.gated_linear import ops as linear_ops
from lizardzoo.kernels.gated_linear.tables import tile_of
from lizardzoo.kernels.hybrid import composed, triton_step
from lizardzoo.kernels.launching import entry, launch, power_of_2, prepared
from lizardzoo.kernels.rotary import ops as rotary_ops
from lizardzoo.kernels.state import overwriting, writable
from lizardzoo.kernels.window import ops as window_ops

OP = "hybrid_attention"
# As the tables of gated linear attention. By 8 warps Triton 3.6 lays both halves of the memory out in shared memory.
WARPS = {(2, 64): 8, (2, 128): 8, (2, 128, 99): 4, (4, 64): 8, (4, 128): 8}


@prepared
def _launch(
    q, k, v, near_q, near_k, cos, sin, log_decay, log_input, log_scale, query_map, key_map, sinks, mask, ring_k, ring_v,
    kept_k, kept_v, kv, norm, memory_scale, waiting_k, ring_decay, ring_input, length, turn_cos, turn_sin, activation,
    lag, skip, scale,
):  # fmt: skip
    (batch, _, kv_heads, dim), window = k.shape, ring_k.shape[1]
    y, log_mass = q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=torch.float32)
    sizes = linear_ops.StepSizes.of(q, v, kv)
    width = power_of_2(dim)
    # 16 KB a tile: beside the maps and the memory more does not fit the registers
    slots = 16 if window_ops.INTERPRETED else min(128, 16384 // (max(width, sizes.BV) * q.element_size()))
    pointers = (
        q, k, v, near_q, near_k, cos, sin, log_decay, log_input, log_scale, query_map, key_map, sinks, mask, ring_k,
        ring_v, kept_k, kept_v, kv, norm, memory_scale, waiting_k, ring_decay, ring_input, length, turn_cos,
        turn_sin, y, log_mass,
    )  # fmt: skip
    numbers = (
        window, kept_k.shape[1], skip, 0 if sinks is None else sinks.shape[-1],
        0 if sinks is None or sinks.ndim == 1 else sinks.shape[-1], scale,
        window_ops.table_stride(cos), window_ops.table_stride(turn_cos), query_map.shape[0], key_map.shape[0],
    )  # fmt: skip
    constants = {
        "HKV": kv_heads, "DECAYS": 0 if log_decay is None else log_decay.shape[2],
        "ENTERS": 0 if log_input is None else log_input.shape[2], "LAG": lag > 0, "KEPT": kept_k.shape[1] > 0,
        **sizes._asdict(), "BD": width, "MAP": activation, "N": slots, "MORE": window > slots, "R": 16,
    }  # fmt: skip
    warps = entry(WARPS, *tile_of(q, sizes.V, sizes.F))
    launch(triton_step.step, (batch * kv_heads,), pointers, numbers, constants, num_warps=warps)
    return y, log_mass


def compute_step(
    q: Tensor, k: Tensor, v: Tensor, near_q: Tensor, near_k: Tensor, cos: Tensor | None, sin: Tensor | None,
    log_decay: Tensor | None, log_input: Tensor | None, log_scale: Tensor | None, query_map: Tensor, key_map: Tensor,
    sinks: Tensor | None, mask: Tensor | None, ring_k: Tensor, ring_v: Tensor, kept_k: Tensor, kept_v: Tensor,
    kv: Tensor, norm: Tensor, memory_scale: Tensor, waiting_k: Tensor | None, ring_decay: Tensor, ring_input: Tensor,
    length: Tensor, turn_cos: Tensor | None, turn_sin: Tensor | None, activation: str, lag: int, skip: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y, log_mass; the state moves on in place. All tensors are contiguous.

    cos, sin [B or 1, 1, D]: near_q and near_k are yet to be rotated by them; waiting_k None: it is ring_k, or no lag.
    turn_cos, turn_sin, likewise: of the kept keys.
    """
    return _launch(
        q, k, v, near_q, near_k, cos, sin, log_decay, log_input, log_scale, query_map, key_map, sinks, mask, ring_k,
        ring_v, kept_k, kept_v, kv, norm, memory_scale, waiting_k, ring_decay, ring_input, length, turn_cos,
        turn_sin, activation, lag, skip, scale,
    )  # fmt: skip


hybrid_step = torch.library.custom_op(
    "lizardzoo::hybrid_attention_step",
    compute_step,
    mutates_args=(
        "ring_k", "ring_v", "kept_k", "kept_v", "kv", "norm", "memory_scale", "waiting_k", "ring_decay", "ring_input",
        "length",
    ),
)  # fmt: skip


@hybrid_step.register_fake
def _(q, k, v, *_):
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


def step(
    q, k, v, log_decay, rotated, rope, log_input, log_scale, feature_map, keep, skip, sinks, scale, mask, turn, state,
    in_place,
):  # fmt: skip
    """One token; see `lizardzoo.kernels.hybrid.hybrid_attention_step`."""
    window, linear = state
    near_q, near_k = (q, k) if rotated is None else rotated
    cos, sin = (None, None) if rope is None else rope
    lag = linear.k.shape[1]
    inputs = (q, k, v, near_q, near_k, log_decay, log_input, log_scale, *(feature_map or ())[:2], sinks)
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*inputs, *window, *linear))
    linear_ops.check(OP, q, v, feature_map, linear)
    if learns or linear_ops.is_wide(q, v, feature_map) or not _fits(k, log_input, feature_map, state):
        return composed.step(
            window_ops, linear_ops, rotary_ops, q, k, v, log_decay, rotated, rope, log_input, log_scale, feature_map,
            keep, skip, sinks, scale, mask, turn, state, in_place,
        )  # fmt: skip
    state = writable(OP, state, in_place)
    window, linear = state
    gates = (None if x is None else x.float() for x in (log_decay, log_input, log_scale))
    inputs = (q, k, v, near_q, near_k, cos, sin, *gates, feature_map.query, feature_map.key, sinks, mask)
    y, log_mass = overwriting(
        hybrid_step, compute_step, state,
        *(None if x is None else x.contiguous() for x in inputs), *window[:4], linear.kv, linear.norm, linear.scale,
        None if lag == 0 or linear.k is window.k else linear.k, linear.log_decay, linear.log_input, window.length,
        *window_ops.turn_tables(turn, keep), feature_map.activation, lag, skip, float(scale),
    )  # fmt: skip
    return y, log_mass, state


def _fits(k, log_input, feature_map, state) -> bool:
    """Whether the fused kernel does it: gates that do not tell query heads apart, the window's own lag or none."""
    kv_heads, (window, linear) = k.shape[2], state
    waits = linear.k.shape[1] > 0
    return (
        feature_map is not None
        and linear.kv.shape[1] == kv_heads
        and (log_input is None or log_input.shape[2] == kv_heads)
        and linear.length is window.length
        and (linear.v is window.v or not waits)  # as `share` leaves it, which is with lag = window
    )
