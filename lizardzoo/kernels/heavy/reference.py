"""Heavy attention in plain PyTorch: chunks of queries against what is held; memory linear in the length."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lizardzoo.kernels.dispatch import compute_dtype
from lizardzoo.kernels.heavy.selection import select, visible
from lizardzoo.kernels.heavy.state import HeavyState, by_score, drawn_ring, init_state, next_state
from lizardzoo.kernels.merge import joint
from lizardzoo.kernels.rows import Rows, arrange, last_document, ring_ranks, take_tokens, unroll
from lizardzoo.kernels.state import overwrite
from lizardzoo.kernels.window import init_state as init_window_state
from lizardzoo.kernels.window import reference as window_reference
from lizardzoo.kernels.window.reference import softmax

CHUNK = 128
LEAST = 100.0
"""A token that drew less than 2 ** -LEAST drew nothing: scores are never negative."""
NEG_INF = float("-inf")


def young(window: int) -> int:
    """The age in tokens from which attention counts: what is read at once is mostly what is near, not what matters."""
    return max(1, window // 8)


def settled(drawn: Tensor, rank: Tensor, fade: float) -> Tensor:
    """The score with which a token leaves the window, in base 2.

    All scores halve in 1 / fade tokens. That changes no order among those that are there already, so that instead of
    what is held, what comes later counts for more.
    """
    return drawn.clamp(min=2.0**-LEAST).log2() + LEAST + rank.to(drawn) * fade


def chunked(q, k, v, log_mass, window, keep, heavy, fade, scale, mask, starts, past, state, return_state):  # type: ignore[no-untyped-def]
    """All tokens of a sequence; see `lizardzoo.kernels.heavy.heavy_attention`."""
    (batch, count), kv_heads = q.shape[:2], k.shape[2]
    if state is None and not return_state and count <= window + keep:  # nothing can have left the window
        return q.new_zeros(*q.shape[:3], v.shape[-1]), torch.full_like(log_mass, NEG_INF), None
    if past is None or state is None:
        sizes = (batch, kv_heads, k.shape[-1], window)
        past = init_window_state(*sizes, keep, k.dtype, k.device)
        state = init_state(*sizes, heavy, k.dtype, k.device, v.shape[3])
        past = past._replace(v=v.new_zeros(batch, window, *v.shape[2:]))
    rows = arrange(q, mask, starts, past.length)
    q, k, v, log_mass = (rows.pack(x) for x in (q, k, v, log_mass))
    # What leaves the window at slot i is place i of the window's past and the new tokens in one row.
    keys, values = torch.cat([unroll(past.k, past.length), k], 1), torch.cat([unroll(past.v, past.length), v], 1)
    before = F.pad(unroll(state.drawn, past.length), (0, 0, 0, count))
    drawn = before + _drawn(q, keys, log_mass, window, scale, rows)
    leaves = rows.valid & (rows.rank >= window + keep)
    scores = torch.where(leaves[..., None], settled(drawn[:, :count], (rows.rank - window)[..., None], fade), NEG_INF)

    held_k, held_v, held_score, held_rank = by_score(state)
    chunk = min(CHUNK, count)
    fill = -count % chunk
    rank = torch.cat([held_rank, (rows.rank - window).to(held_rank.dtype)[..., None].expand(-1, -1, kv_heads)], 1)
    score = F.pad(torch.cat([held_score, scores], 1), (0, 0, 0, fill), value=NEG_INF)
    order_by = score.transpose(1, 2)  # [B, Hkv, heavy + T]
    document = None
    if starts is not None:  # a later document's tokens beat all of an earlier one's
        document = torch.cat([F.pad(rows.document, (heavy, 0)), rows.last_document().expand(-1, fill)], 1)
        order_by = order_by.double() + 2.0**20 * document[:, None]  # more than any score
    chosen = select(order_by, heavy, chunk)

    until = chosen.until
    if document is not None:  # what is held of an earlier document is seen up to the beginning of the next
        own = document[:, None, heavy:].expand(-1, kv_heads, -1).unflatten(2, (-1, chunk))
        theirs = document[:, None].expand(-1, kv_heads, -1).gather(2, chosen.held.flatten(2)).view(chosen.held.shape)
        ends = torch.searchsorted(own.contiguous(), torch.cat([theirs, own], -1), right=True, out_int32=True)
        until = until.minimum(ends)

    all_k, all_v = torch.cat([held_k, keys[:, :count]], 1), torch.cat([held_v, values[:, :count]], 1)
    arguments = (q, all_k, all_v, chosen.held, until, scale)
    if torch.is_grad_enabled() and any(x.requires_grad for x in arguments[:3]):
        # The scores of all queries would outweigh the rest of the layer.
        y, mass = checkpoint(_attend, *arguments, use_reentrant=False)
    else:
        y, mass = _attend(*arguments)
    y = torch.where(rows.valid[..., None, None], y, 0.0)
    mass = torch.where(rows.valid[..., None], mass, NEG_INF)

    new_state = None
    if return_state:
        last, there = (x.transpose(1, 2) for x in (chosen.last, chosen.any_last))  # [B, heavy, Hkv]
        if document is not None:
            of = document[..., None].expand_as(score).gather(1, last)
            there = there & (of == rows.last_document()[..., None])
        kept = torch.where(there, score.gather(1, last), NEG_INF)
        last = last.clamp(max=rank.shape[1] - 1)  # behind them, where the last chunk was filled up, is no token
        began, length = last_document(rows, count, past.length)
        ring = drawn_ring(drawn, began, length, window)
        new_state = next_state(all_k, all_v, last, kept, rank.gather(1, last), ring)
    return rows.unpack(y).to(q.dtype), rows.unpack(mass), new_state


def step(q, k, v, log_mass, keep, fade, scale, mask, past, state, in_place):  # type: ignore[no-untyped-def]
    """One token; see `lizardzoo.kernels.heavy.heavy_attention_step`."""
    dtype = compute_dtype(q)
    kv_heads, groups, window = k.shape[2], q.shape[2] // k.shape[2], past.k.shape[1]
    real = torch.ones_like(q[:, :1, 0, 0], dtype=torch.bool) if mask is None else mask  # [B, 1]
    rank = past.length[:, None]
    mine = (torch.arange(window, device=q.device) == rank % window)[..., None]  # the slot of the new token, [B, w, 1]
    leaving = rank % window

    # The token that leaves takes the place of the worst one held, unless it is worse itself.
    new_score = settled(take_tokens(state.drawn, leaving), (rank - window)[..., None], fade)  # [B, 1, Hkv]
    joins = (real & (rank >= window + keep))[..., None]
    lowest = state.score == state.score.amin(1, keepdim=True)
    worst = torch.where(lowest, state.rank, torch.iinfo(state.rank.dtype).max).argmin(1, keepdim=True)
    slots = torch.arange(state.rank.shape[1], device=q.device)[:, None]
    here = (slots == worst) & joins & (new_score >= state.score.gather(1, worst))
    score = torch.where(here, new_score, state.score)
    ranks = torch.where(here, (rank - window).to(state.rank.dtype)[..., None], state.rank)
    keys, values = (
        torch.where(here[..., None], take_tokens(ring, leaving), held)
        for ring, held in ((past.k, state.k), (past.v, state.v))
    )

    qs = (torch.where(real[..., None, None], q, 0.0)[:, 0].to(dtype) * scale).unflatten(1, (kv_heads, groups))
    ring = torch.where(mine[..., None], k, past.k).to(dtype)
    age = rank - ring_ranks(past.length + 1, window)  # [B, w]; more than rank where there is no token
    counts = (age >= young(window)) & (age <= rank) & real
    logits = (
        torch.einsum("bhgd,bshd->bhgs", qs, ring) - log_mass[:, 0].to(dtype).unflatten(1, (kv_heads, groups))[..., None]
    )
    drawn = torch.where(counts[:, None, None], 2 * logits, NEG_INF).exp().sum(2).transpose(1, 2)
    drawn = torch.where(mine & real[..., None], 0.0, state.drawn) + drawn

    there = (score > NEG_INF) & real[..., None]
    logits = torch.einsum("bhgd,bshd->bhgs", qs, keys.to(dtype))
    logits = torch.where(there.transpose(1, 2)[:, :, None], logits, NEG_INF)
    weights, mass = softmax(logits)
    y = torch.einsum("bhgs,bshd->bhgd", weights, torch.where(there[..., None], values, 0.0).to(dtype))
    new = HeavyState(keys, values, score, ranks, drawn)
    y, mass = y.flatten(1, 2)[:, None].to(q.dtype), mass.flatten(1, 2)[:, None]
    return y, mass, overwrite(state, new) if in_place else new


def joint_chunked(  # type: ignore[no-untyped-def]
    q, k, v, window, keep, heavy, fade, sinks, scale, mask, starts, past, state, return_state
):
    """All tokens of a sequence; see `lizardzoo.kernels.heavy.window_and_heavy_attention`."""
    *near, new_past = window_reference.chunked(q, k, v, window, keep, sinks, scale, mask, starts, past, return_state)
    *far, new_state = chunked(
        q, k, v, near[1], window, keep, heavy, fade, scale, mask, starts, past, state, return_state
    )
    y, log_mass = joint([(near[0], near[1]), (far[0], far[1])])
    return y.to(q.dtype), log_mass, new_past, new_state


def joint_step(q, k, v, keep, fade, sinks, scale, mask, turn, past, state, in_place):  # type: ignore[no-untyped-def]
    """One token of both branches; see `lizardzoo.kernels.heavy.window_and_heavy_step`."""
    *near, new_past = window_reference.step(q, k, v, keep, sinks, scale, mask, turn, past, False)
    *far, new_state = step(q, k, v, near[1], keep, fade, scale, mask, past, state, False)
    y, log_mass = joint([(near[0], near[1]), (far[0], far[1])])
    if in_place:
        new_past, new_state = overwrite(past, new_past), overwrite(state, new_state)
    return y.to(q.dtype), log_mass, new_past, new_state


def _attend(q: Tensor, k: Tensor, v: Tensor, held: Tensor, until: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Every chunk's queries on what was held at its start and on what has joined since.

    q [B, T, H, D]; k, v [B, heavy + T, Hkv, D]; held [B, Hkv, N, heavy]; until [B, Hkv, N, heavy + C].
    """
    dtype = compute_dtype(q)
    batch, count, heads, dim = q.shape
    kv_heads, chunks, heavy = held.shape[1:]
    chunk, groups = until.shape[-1] - heavy, heads // kv_heads
    fill = chunks * chunk - count

    def candidates(x: Tensor) -> Tensor:  # [B, Hkv, N, heavy + C, D]
        x = F.pad(x, (0, 0, 0, 0, 0, fill)).transpose(1, 2)
        old = x.gather(2, held.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])).unflatten(2, (chunks, heavy))
        return torch.cat([old, x[:, :, heavy:].unflatten(2, (chunks, chunk))], 3).to(dtype)

    qs = F.pad(q, (0, 0, 0, 0, 0, fill)).to(dtype) * scale
    qs = qs.view(batch, chunks, chunk, kv_heads, groups, dim).permute(0, 3, 1, 4, 2, 5)  # [B, Hkv, N, G, C, D]
    logits = (qs.flatten(3, 4) @ candidates(k).transpose(-1, -2)).unflatten(3, (groups, chunk))
    weights, mass = softmax(logits.masked_fill(~visible(until, heavy)[:, :, :, None], NEG_INF))
    y = (weights.flatten(3, 4) @ candidates(v)).unflatten(3, (groups, chunk))
    y = y.permute(0, 2, 4, 1, 3, 5).reshape(batch, chunks * chunk, heads, -1)[:, :count]
    return y, mass.permute(0, 2, 4, 1, 3).reshape(batch, chunks * chunk, heads)[:, :count]


@torch.no_grad()
def _drawn(q: Tensor, keys: Tensor, log_mass: Tensor, window: int, scale: float, rows: Rows) -> Tensor:
    """What this call's queries add to the score of each key [B, window + T, Hkv]: the sum of their squared weights.

    keys [B, window + T, Hkv, D]: the window's past and the new ones. Weights are those within the window.
    """
    dtype = compute_dtype(q)
    batch, count, heads, dim = q.shape
    kv_heads, groups = keys.shape[2], heads // keys.shape[2]
    chunk = min(CHUNK, count)
    tiles, fill = -(-count // chunk), -count % chunk
    q = F.pad(q, (0, 0, 0, 0, 0, fill)).to(dtype) * scale
    q = q.view(batch, tiles, chunk, kv_heads, groups, dim).permute(0, 1, 3, 4, 2, 5)
    tile = F.pad(keys, (0, 0, 0, 0, 0, fill)).unfold(1, window + chunk, chunk).to(dtype)  # [B, tiles, Hkv, D, w + C]
    logits = (q.flatten(3, 4) @ tile).unflatten(3, (groups, chunk))
    log_mass = F.pad(log_mass, (0, 0, 0, fill)).to(dtype)
    logits = logits - log_mass.view(batch, tiles, chunk, kv_heads, groups).permute(0, 1, 3, 4, 2)[..., None]

    place = torch.arange(chunk, device=q.device)[:, None]
    age = place + window - torch.arange(window + chunk, device=q.device)  # [C, w + C]
    counts = (age >= young(window)) & (age < window)
    of_query = [F.pad(x, (0, fill)).view(batch, tiles, chunk, 1) for x in (rows.rank, rows.valid)]
    counts = counts & (age <= of_query[0]) & of_query[1]  # of its own document, and a real one
    weights = torch.where(counts[:, :, None, None], 2 * logits, NEG_INF).exp().sum((3, 4))  # [B, tiles, Hkv, w + C]

    parts = F.pad(weights, (0, -window % chunk)).unflatten(-1, (-1, chunk))
    total = weights.new_zeros(batch, tiles + parts.shape[3] - 1, kv_heads, chunk)
    for part in range(parts.shape[3]):  # in a fixed order: scores, and so the choice, are the same in every run
        total[:, part : part + tiles] += parts[:, :, :, part]
    return total.transpose(2, 3).flatten(1, 2)[:, : window + count]
