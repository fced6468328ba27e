"""What heavy attention remembers beside the window's own state."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lizardzoo.kernels.rows import ring_ranks, take_tokens


class HeavyState(NamedTuple):
    """The tokens that are held, in any order, and how much attention those of the window have drawn so far.

    Attributes:
        k: [B, heavy, Hkv, D], in the dtype of the keys given.
        v: [B, heavy, Hkv, Dv], likewise.
        score: [B, heavy, Hkv], with which each left the window (`reference.settled`); -inf where nothing is held.
        rank: [B, heavy, Hkv] int32, the place of each held token among the real tokens of its document.
        drawn: [B, window, Hkv], a ring (see `lizardzoo.kernels`): the squared weights of the window's tokens until now.
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
    value_dim: int | None = None,
) -> HeavyState:
    """The state before the first token; value_dim: if it is another than head_dim."""
    wide = torch.promote_types(dtype, torch.float32)
    held_k, held_v = (
        torch.zeros(batch, heavy, kv_heads, dim, dtype=dtype, device=device)
        for dim in (head_dim, value_dim or head_dim)
    )
    return HeavyState(
        held_k,
        held_v,
        torch.full((batch, heavy, kv_heads), float("-inf"), dtype=wide, device=device),
        torch.zeros(batch, heavy, kv_heads, dtype=torch.int32, device=device),
        torch.zeros(batch, window, kv_heads, dtype=wide, device=device),
    )


def by_score(state: HeavyState) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k, v, score and rank, best first; of equal scores, the later token first."""
    order = state.rank.argsort(dim=1, descending=True)
    order = order.gather(1, state.score.gather(1, order).argsort(dim=1, descending=True, stable=True))
    k, v = (x.gather(1, order[..., None].expand_as(x)) for x in (state.k, state.v))
    return k, v, state.score.gather(1, order), state.rank.gather(1, order)


def next_state(k: Tensor, v: Tensor, index: Tensor, score: Tensor, rank: Tensor, drawn: Tensor) -> HeavyState:
    """The state that holds the rows index [B, heavy, Hkv] of k and v; score, rank: likewise; drawn: its ring."""
    held_k, held_v = (x.gather(1, index[..., None].expand(*index.shape, x.shape[-1])) for x in (k, v))
    state = HeavyState(held_k, held_v, score, rank.int(), drawn)
    return HeavyState(*(x.contiguous() for x in state))  # for steps in place


def drawn_ring(drawn: Tensor, began: Tensor, length: Tensor, window: int) -> Tensor:
    """The ring of what the window's tokens have drawn, of drawn [B, window + T, Hkv]: its past's, oldest first, and the
    new tokens'. began, length: see `last_document`."""
    return take_tokens(drawn, (began[:, None] + ring_ranks(length, window) + window).clamp(min=0))
