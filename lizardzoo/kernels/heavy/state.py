"""What heavy attention remembers beside the window's own state."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class HeavyState(NamedTuple):
    """The tokens that are held, in any order, and how much attention those of the window have drawn so far.

    Attributes:
        k: [B, heavy, Hkv, D], in the dtype of the keys given.
        v: [B, heavy, Hkv, Dv], likewise.
        score: [B, heavy, Hkv]; -inf where nothing is held.
        rank: [B, heavy, Hkv] int32, the place of each held token among the real tokens of its document.
        drawn: [B, window, Hkv], a ring (see `lizardzoo.kernels`): the scores of the window's tokens until now.
    """

    k: Tensor
    v: Tensor
    score: Tensor
    rank: Tensor
    drawn: Tensor


def init_state(
    batch: int,
    kv_heads: int,
    head_dim: int,
    window: int,
    heavy: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> HeavyState:
    """The state before the first token."""
    wide = torch.promote_types(dtype, torch.float32)
    held = torch.zeros(batch, heavy, kv_heads, head_dim, dtype=dtype, device=device)
    return HeavyState(
        held,
        held.clone(),
        torch.full((batch, heavy, kv_heads), float("-inf"), dtype=wide, device=device),
        torch.zeros(batch, heavy, kv_heads, dtype=torch.int32, device=device),
        torch.zeros(batch, window, kv_heads, dtype=wide, device=device),
    )
