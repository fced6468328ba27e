"""What sliding-window attention remembers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lizardzoo.kernels.rows import Rows, first_of, hold, is_whole, last_document, ring_of, ring_ranks


class WindowState(NamedTuple):
    """What later queries may still see: the last `window` tokens of the current document and its first `keep` ones.

    A slot that holds no token of the document yet may hold anything.

    Attributes:
        k: [B, window, Hkv, D], a ring (see `lizardzoo.kernels`), in the dtype of the keys given.
        v: [B, window, Hkv, Dv], likewise.
        kept_k: [B, keep, Hkv, D], by rank.
        kept_v: [B, keep, Hkv, Dv].
        length: [B] int64, real tokens of the document so far.
    """

    k: Tensor
    v: Tensor
    kept_k: Tensor
    kept_v: Tensor
    length: Tensor


def init_state(
    batch: int,
    kv_heads: int,
    head_dim: int,
    window: int,
    keep: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> WindowState:
    """The state before the first token."""

    def zeros(size: int) -> Tensor:
        return torch.zeros(batch, size, kv_heads, head_dim, dtype=dtype, device=device)

    length = torch.zeros(batch, dtype=torch.long, device=device)
    return WindowState(zeros(window), zeros(window), zeros(keep), zeros(keep), length)


def next_state(
    k: Tensor, v: Tensor, rows: Rows | None, state: WindowState | None, window: int, keep: int
) -> WindowState:
    """The state behind k, v [B, T, Hkv, D] (packed); rows None: all tokens are real and go on with the document."""
    if is_whole(rows, state):
        count = torch.full((k.shape[0],), k.shape[1], dtype=torch.long, device=k.device)
        return WindowState(ring_of(k, window), ring_of(v, window), first_of(k, keep), first_of(v, keep), count)
    ring_k, ring_v, kept_k, kept_v, length = state if state is not None else (None,) * 5
    if length is None:
        length = torch.zeros(k.shape[0], dtype=torch.long, device=k.device)
    first, length = last_document(rows, k.shape[1], length)
    ranks, kept = ring_ranks(length, window), torch.arange(keep, device=k.device).expand(len(length), -1)
    return WindowState(
        hold(ring_k, k, first, ranks),
        hold(ring_v, v, first, ranks),
        hold(kept_k, k, first, kept),
        hold(kept_v, v, first, kept),
        length,
    )
