"""Sliding-window attention in plain PyTorch: banded tiles, memory linear in the length."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lizardzoo.kernels.dispatch import Impl, compute_dtype
from lizardzoo.kernels.rows import arrange, take_tokens, unroll
from lizardzoo.kernels.state import overwrite
from lizardzoo.kernels.window.state import WindowState, next_state
from lizardzoo.kernels.window.turning import turned

CHUNK = 64  # queries a tile; a tile holds CHUNK x (window + CHUNK) scores
NEG_INF = float("-inf")


def chunked(q, k, v, window, keep, sinks, scale, mask, starts, state, return_state):  # type: ignore[no-untyped-def]
    """All tokens of a sequence; see `lizardzoo.kernels.window.window_attention`."""
    batch, count, heads, dim = q.shape
    kv_heads, groups = k.shape[2], q.shape[2] // k.shape[2]
    dtype = compute_dtype(q)
    past_k = past_v = past_valid = kept_k = kept_v = length = None
    if state is not None:
        ring_k, ring_v, kept_k, kept_v, length = state
        past_k, past_v = unroll(ring_k, length), unroll(ring_v, length)
        past_valid = torch.arange(-window, 0, device=q.device) >= -length[:, None]
    rows = arrange(q, mask, starts, length)
    q, k, v = rows.pack(q), rows.pack(k), rows.pack(v)

    # Tiles: `chunk` queries against the `reach + chunk` slots that end with the tile's last query.
    reach = window if state is not None else min(window - 1, count - 1)
    chunk = min(CHUNK, count)
    tiles = -(-count // chunk)
    fill = tiles * chunk - count

    def extend(new: Tensor, past: Tensor | None) -> Tensor:
        before = new.new_zeros(batch, reach, *new.shape[2:]) if past is None else past
        after = new.new_zeros(batch, fill, *new.shape[2:])
        return torch.cat([before, new, after], 1)

    def key_tiles(x: Tensor) -> Tensor:  # [B, reach + T, ...] -> [B, tiles, ..., reach + chunk]
        return x.unfold(1, reach + chunk, chunk)

    qs = F.pad(q, (0, 0, 0, 0, 0, fill)).to(dtype) * scale
    qs = qs.view(batch, tiles, chunk, kv_heads, groups, dim).permute(0, 1, 3, 4, 2, 5)  # [B, tiles, Hkv, G, chunk, D]
    ks, vs = (
        key_tiles(extend(k, past_k).to(dtype)),
        key_tiles(extend(v, past_v).to(dtype)),
    )  # [.., Hkv, D, reach+chunk]
    scores = (qs.flatten(3, 4) @ ks).unflatten(3, (groups, chunk))

    distance = torch.arange(chunk, device=q.device)[:, None] + reach - torch.arange(reach + chunk, device=q.device)
    visible = (distance >= 0) & (distance < window)
    visible = visible & key_tiles(extend(rows.valid, past_valid))[:, :, None]
    if starts is not None:
        # Behind the last slot any document will do: those queries are cut off below.
        document = F.pad(rows.document, (0, fill)).view(batch, tiles, chunk, 1)
        visible = visible & (document == key_tiles(extend(rows.document, None))[:, :, None])
    scores = scores.masked_fill(~visible[:, :, None, None], NEG_INF)

    if keep:
        kept_scores, kept_values = _kept(qs, k, v, kept_k, kept_v, rows, keep, window, starts is not None, fill)
        scores = torch.cat([scores, kept_scores], -1)
    weights, log_mass = softmax(scores, sinks)
    y = (weights[..., : reach + chunk].flatten(3, 4) @ vs.transpose(-1, -2)).unflatten(3, (groups, chunk))
    if keep:
        y = y + _kept_sum(weights[..., reach + chunk :], kept_values)

    y = y.permute(0, 1, 4, 2, 3, 5).reshape(batch, tiles * chunk, heads, -1)[:, :count]
    log_mass = log_mass.permute(0, 1, 4, 2, 3).reshape(batch, tiles * chunk, heads)[:, :count]
    y = torch.where(rows.valid[..., None, None], y, 0.0)
    log_mass = torch.where(rows.valid[..., None], log_mass, NEG_INF)
    new_state = next_state(k, v, rows, state, window, keep) if return_state else None
    return rows.unpack(y).to(q.dtype), rows.unpack(log_mass), new_state


def step(q, k, v, keep, sinks, scale, mask, turn, state, in_place):  # type: ignore[no-untyped-def]
    """One token; see `lizardzoo.kernels.window.window_attention_step`."""
    ring_k, ring_v, kept_k, kept_v, length = state
    dtype = compute_dtype(q)
    kv_heads, groups = k.shape[2], q.shape[2] // k.shape[2]
    window = ring_k.shape[1]
    real = torch.ones_like(q[:, :1, 0, 0], dtype=torch.bool) if mask is None else mask  # [B, 1]
    rank = length[:, None]
    slots, ranks = torch.arange(window, device=q.device), torch.arange(keep, device=q.device)

    def write(past: Tensor, new: Tensor, here: Tensor) -> Tensor:
        return torch.where((here & real)[..., None, None], new, past)

    ring_k, ring_v = (write(past, new, slots == rank % window) for past, new in ((ring_k, k), (ring_v, v)))
    kept_k, kept_v = (write(past, new, ranks == rank) for past, new in ((kept_k, k), (kept_v, v)))
    new = WindowState(ring_k, ring_v, kept_k, kept_v, length + real[:, 0].long())
    read_k = turned(new, turn, Impl.REFERENCE).kept_k
    keys, values = torch.cat([ring_k, read_k], 1).to(dtype), torch.cat([ring_v, kept_v], 1).to(dtype)
    visible = torch.cat([slots <= rank, ranks <= rank - window], 1) & real

    qs = q[:, 0].to(dtype).unflatten(1, (kv_heads, groups)) * scale
    scores = torch.einsum("bhgd,bshd->bhgs", qs, keys).masked_fill(~visible[:, None, None], NEG_INF)
    weights, log_mass = softmax(scores[..., None, :], sinks)
    values = torch.where(visible[..., None, None], values, 0.0)
    y = torch.einsum("bhgs,bshd->bhgd", weights[..., 0, :], values).flatten(1, 2)[:, None]
    log_mass = torch.where(real[..., None], log_mass.flatten(1, 2)[:, None, :, 0], NEG_INF)
    return y.to(q.dtype), log_mass, overwrite(state, new) if in_place else new


def softmax(scores: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weights and log of the denominator over the last axis of scores [..., Hkv, G, queries, keys].

    The maximum is taken over scores and sinks, else a large sink overflows.
    """
    peak = scores.detach().amax(-1)
    if sinks is not None:
        kv_heads, groups = scores.shape[-4:-2]
        sinks = sinks.to(scores.dtype).expand(kv_heads * groups, -1).view(kv_heads, groups, 1, -1)
        peak = torch.maximum(peak, sinks.detach().amax(-1))
    peak = torch.where(peak == NEG_INF, 0.0, peak)
    weights = (scores - peak[..., None]).exp()
    mass = weights.sum(-1)
    if sinks is not None:
        mass = mass + (sinks - peak[..., None]).exp().sum(-1)
    empty = mass == 0
    safe = torch.where(empty, 1.0, mass)
    log_mass = torch.where(empty, NEG_INF, safe.log() + peak)
    return weights / safe[..., None], log_mass


def _first_slot(rows):  # type: ignore[no-untyped-def]
    """Slot at which each token's document began; negative for the document of the incoming state."""
    slots = torch.arange(rows.rank.shape[1], device=rows.rank.device)
    return slots - rows.rank


def _gather_kept(first: Tensor, new: Tensor, kept: Tensor | None, keep: int) -> Tensor:
    """The first `keep` tokens of the documents that begin at slot `first` [B, S]: [B, S, keep, ...]."""
    if kept is None:
        kept = new.new_zeros(new.shape[0], keep, *new.shape[2:])
    ranks = torch.arange(keep, device=new.device)
    slot = first[..., None] + ranks
    index = torch.where(slot < 0, ranks, (slot + keep).clamp(max=keep + new.shape[1] - 1))
    return take_tokens(torch.cat([kept, new], 1), index.flatten(1)).unflatten(1, index.shape[1:])


def _kept(qs, k, v, kept_k, kept_v, rows, keep, window, packed, fill):  # type: ignore[no-untyped-def]
    """Scores [B, tiles, Hkv, G, chunk, keep] of the kept tokens that have left the window, and their values."""
    tiles, chunk = qs.shape[1], qs.shape[4]
    first = _first_slot(rows)
    rank = F.pad(rows.rank, (0, fill)).view(-1, tiles, chunk)
    ranks = torch.arange(keep, device=k.device)
    visible = ranks <= (rank - window)[..., None]  # [B, tiles, chunk, keep]
    if packed:  # each query has the kept tokens of its own document
        first = F.pad(first, (0, fill))
        keys = _gather_kept(first, k, kept_k, keep).unflatten(1, (tiles, chunk))
        values = _gather_kept(first, v, kept_v, keep).unflatten(1, (tiles, chunk)).to(qs.dtype)
        scores = torch.einsum("bnhgcd,bncshd->bnhgcs", qs, keys.to(qs.dtype))
    else:
        keys = _gather_kept(first[:, :1], k, kept_k, keep)[:, 0]
        values = _gather_kept(first[:, :1], v, kept_v, keep)[:, 0].to(qs.dtype)
        scores = torch.einsum("bnhgcd,bshd->bnhgcs", qs, keys.to(qs.dtype))
    return scores.masked_fill(~visible[:, :, None, None], NEG_INF), values


def _kept_sum(weights: Tensor, values: Tensor) -> Tensor:
    per_query = values.ndim == 6
    return torch.einsum("bnhgcs,bncshd->bnhgcd" if per_query else "bnhgcs,bshd->bnhgcd", weights, values)
