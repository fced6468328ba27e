"""One token of heavy attention by its kernel, alone or with the window's."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
from torch import Tensor

from lizardzoo.kernels.dispatch import Impl
from lizardzoo.kernels.heavy import fused, ops, triton_step
from lizardzoo.kernels.launching import launch, power_of_2, prepared, unit_stride
from lizardzoo.kernels.state import overwriting, writable
from lizardzoo.kernels.window import as_held, turned
from lizardzoo.kernels.window import ops as window_ops

check = ops.check


@prepared
def _launch(
    q, k, v, given, ring_k, ring_v, kept_k, kept_v, length, held_k, held_v, score, rank, drawn, sinks, mask, cos, sin,
    fade, scale,
):  # fmt: skip
    (batch, _, heads, dim), kv_heads = q.shape, k.shape[2]
    y, log_mass = q.new_empty((batch, 1, heads, v.shape[3])), q.new_empty((batch, 1, heads), dtype=torch.float32)
    blocks = {"BLOCK_DK": power_of_2(dim), "BLOCK_DV": power_of_2(v.shape[3])}
    wide = max(blocks.values()) * q.element_size()  # N: what the shared memory holds, two stages
    pointers = (
        q, k, v, given, ring_k, ring_v, kept_k, kept_v, length, held_k, held_v, score, rank, drawn, sinks, mask, cos,
        sin, y, log_mass,
    )  # fmt: skip
    numbers = (
        ring_k.shape[1], kept_k.shape[1], held_k.shape[1], 0 if sinks is None else sinks.shape[-1], fade, scale,
        *(x.stride(axis) for x in (q, k, v) for axis in (0, 2)),
        0 if sinks is None or sinks.ndim == 1 else sinks.shape[-1], window_ops.table_stride(cos),
    )  # fmt: skip
    constants = {
        "HKV": kv_heads, "G": heads // kv_heads, "DK": dim, "DV": v.shape[3], **blocks,
        "M": power_of_2(heads // kv_heads), "N": 16 if ops.INTERPRETED else min(64, max(16, 8192 // wide)),
        "R": window_ops.KEPT_BLOCK, "H": 16 if ops.INTERPRETED else 256,
    }  # fmt: skip
    launch(
        triton_step.step_kernel, (batch * kv_heads,), pointers, numbers, constants, num_warps=8 if wide > 512 else 4,
        num_stages=2,
    )  # fmt: skip
    return y, log_mass


def compute_step(
    q: Tensor, k: Tensor, v: Tensor, given: Tensor, ring_k: Tensor, ring_v: Tensor, kept_k: Tensor, kept_v: Tensor,
    length: Tensor, held_k: Tensor, held_v: Tensor, score: Tensor, rank: Tensor, drawn: Tensor, mask: Tensor | None,
    fade: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y, log_mass behind the window's log_mass; heavy attention's own (contiguous) state moves on in place."""
    q, k, v, mask = unit_stride(q), unit_stride(k), unit_stride(v), None if mask is None else mask.contiguous()
    return _launch(
        q, k, v, given.contiguous(), ring_k, ring_v, kept_k, kept_v, length, held_k, held_v, score, rank, drawn, None,
        mask, None, None, fade, scale,
    )  # fmt: skip


def compute_joint_step(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, kept_k: Tensor, kept_v: Tensor, length: Tensor,
    held_k: Tensor, held_v: Tensor, score: Tensor, rank: Tensor, drawn: Tensor, sinks: Tensor | None,
    mask: Tensor | None, cos: Tensor | None, sin: Tensor | None, fade: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y, log_mass of the window and of heavy attention together; both (contiguous) states move on in place.

    cos, sin: see `window_ops.turn_tables`.
    """
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    sinks, mask = (None if x is None else x.contiguous() for x in (sinks, mask))
    y, log_mass = _launch(
        q, k, v, None, ring_k, ring_v, kept_k, kept_v, length, held_k, held_v, score, rank, drawn, sinks, mask, cos,
        sin, fade, scale,
    )  # fmt: skip
    length += 1 if mask is None else mask[:, 0]
    return y, log_mass


HELD = ("held_k", "held_v", "score", "rank", "drawn")
_heavy_step = torch.library.custom_op("lizardzoo::heavy_attention_step", compute_step, mutates_args=HELD)
_joint_step = torch.library.custom_op(
    "lizardzoo::window_and_heavy_step",
    compute_joint_step,
    mutates_args=("ring_k", "ring_v", "kept_k", "kept_v", "length", *HELD),
)


@_heavy_step.register_fake
@_joint_step.register_fake
def _(q, k, v, *_):
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


def _learns(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def step(q, k, v, log_mass, keep, fade, scale, mask, past, state, in_place):
    """One token; see `lizardzoo.kernels.heavy.heavy_attention_step`.

    One kernel launch, without a graph; where a gradient is wanted, the kernels of a whole sequence do it.
    """
    if _learns(q, k, v, *past, *state):
        sizes = past.k.shape[1], keep, state.k.shape[1]
        return ops.chunked(q, k, v, log_mass, *sizes, fade, scale, mask, None, past, state, True)
    state = writable(ops.OP, state, in_place)
    past = tuple(x.contiguous() for x in past)
    found = overwriting(
        _heavy_step, compute_step, state, q, k, v, log_mass.float(), *past, *state, mask, float(fade), float(scale)
    )
    return *found, state


def joint_step(q, k, v, keep, fade, sinks, scale, mask, turn, past, state, in_place):
    """One token of both branches; see `lizardzoo.kernels.heavy.window_and_heavy_step`."""
    if _learns(q, k, v, sinks, *past, *state):
        sizes = past.k.shape[1], keep, state.k.shape[1]
        near = turned(past, turn, Impl.TRITON)
        *found, new, state = fused.joint_chunked(q, k, v, *sizes, fade, sinks, scale, mask, None, near, state, True)
        return *found, new if near is past else as_held(new, past), state
    past, state = writable(ops.OP, past, in_place), writable(ops.OP, state, in_place)
    both, tables = (past, state), window_ops.turn_tables(turn, keep)
    found = overwriting(
        _joint_step, compute_joint_step, both, q, k, v, *past, *state, sinks, mask, *tables, float(fade), float(scale)
    )
    return *found, past, state
