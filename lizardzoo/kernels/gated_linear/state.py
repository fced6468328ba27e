"""What gated linear attention remembers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lizardzoo.kernels.rows import Rows, hold, is_whole, last_document, ring_of, ring_ranks


class GatedLinearState(NamedTuple):
    """The memory, and the last `lag` tokens of the current document, which wait to enter it.

    The memory is fp32 (float64 for float64 inputs) and belongs to the Hs = Hkv key heads, or to H where a gate is per
    query head. What waits is in rings (see `lizardzoo.kernels`); a slot that holds no token of the document yet may
    hold anything.

    Attributes:
        kv: [B, Hs, F, Dv]; times exp(scale) it is the sum of features x values.
        norm: [B, Hs, F]; times exp(scale) it is the sum of features.
        scale: [B, Hs, F], a logarithm; -inf: nothing yet.
        k: [B, lag, Hkv, D], in the dtype of the keys given.
        v: [B, lag, Hkv, Dv], likewise.
        log_decay: [B, lag, heads of the gate], or [B, lag, 0] without one.
        log_input: [B, lag, heads of the gate], or [B, lag, 0] without one.
        length: [B] int64, real tokens of the document so far.
    """

    kv: Tensor
    norm: Tensor
    scale: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    log_input: Tensor
    length: Tensor


def state_heads(heads: int, kv_heads: int, decay_heads: int, input_heads: int) -> int:
    """Heads of the memory: those of the keys, unless a gate tells the query heads apart."""
    return heads if max(decay_heads, input_heads) > kv_heads else kv_heads


def init_state(
    batch: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    features: int,
    lag: int,
    decay_heads: int,
    input_heads: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> GatedLinearState:
    """The state before the first token; decay_heads, input_heads: last axis of the gates, 0 without."""
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    memory_heads = state_heads(heads, kv_heads, decay_heads, input_heads)

    def zeros(*shape: int, dtype: torch.dtype = accumulate) -> Tensor:
        return torch.zeros(batch, *shape, dtype=dtype, device=device)

    return GatedLinearState(
        kv=zeros(memory_heads, features, head_dim),
        norm=zeros(memory_heads, features),
        scale=torch.full((batch, memory_heads, features), float("-inf"), dtype=accumulate, device=device),
        k=zeros(lag, kv_heads, head_dim, dtype=dtype),
        v=zeros(lag, kv_heads, head_dim, dtype=dtype),
        log_decay=zeros(lag, decay_heads),
        log_input=zeros(lag, input_heads),
        length=zeros(dtype=torch.long),
    )


def next_state(
    memory: Sequence[Tensor],
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    log_input: Tensor | None,
    rows: Rows | None,
    state: GatedLinearState | None,
    lag: int,
) -> GatedLinearState:
    """The state behind k, v, log_decay, log_input [B, T, ...] (packed), which left `memory` (kv, norm, scale).

    rows None: all tokens are real and go on with the document.
    """
    batch, count = k.shape[:2]
    kv, norm, scale = memory
    length = torch.zeros(batch, dtype=torch.long, device=k.device) if state is None else state.length
    first, length = last_document(rows, count, length)
    ranks = None if is_whole(rows, state) else ring_ranks(length, lag)

    def wait(ring: Tensor | None, new: Tensor | None) -> Tensor:
        new = kv.new_zeros(batch, count, 0) if new is None else new
        return ring_of(new, lag) if ranks is None else hold(ring, new, first, ranks)

    return GatedLinearState(
        kv,
        norm,
        scale,
        wait(state and state.k, k),
        wait(state and state.v, v),
        wait(state and state.log_decay, log_decay),
        wait(state and state.log_input, log_input),
        length,
    )
