"""Gated linear attention in plain PyTorch: chunked over the sequence, memory linear in the length.

Everything is kept relative to a running maximum, as in online softmax, so that exp features and learned input gates of
any size neither overflow nor vanish: each feature of the state has a scale of its own, each query row a peak.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lizardzoo.kernels.dispatch import compute_dtype
from lizardzoo.kernels.features import FeatureMap, log_features
from lizardzoo.kernels.gated_linear.state import GatedLinearState, next_state, state_heads
from lizardzoo.kernels.rows import arrange, take_tokens, unroll
from lizardzoo.kernels.state import overwrite

CHUNK = 64  # tokens a tile; a tile holds CHUNK x CHUNK weights
NEG_INF = float("-inf")


def chunked(q, k, v, log_decay, log_input, feature_map, lag, skip, mask, starts, state, return_state):  # type: ignore[no-untyped-def]
    """All tokens of a sequence; see `lizardzoo.kernels.gated_linear.gated_linear_attention`."""
    batch, count, heads, _ = q.shape
    dtype = compute_dtype(q)
    past: Any = (None,) * 8 if state is None else state
    kv, norm, scale, *rings, length = past
    past_k, past_v, past_decay, past_input = (None if x is None else unroll(x, length) for x in rings)
    log_decay = q.new_zeros(batch, count, 0, dtype=dtype) if log_decay is None else log_decay.to(dtype)
    log_input = q.new_zeros(batch, count, 0, dtype=dtype) if log_input is None else log_input.to(dtype)
    memory_heads = state_heads(heads, k.shape[2], log_decay.shape[2], log_input.shape[2])

    rows = arrange(q, mask, starts, length)
    q, k, v, log_decay, log_input = (rows.pack(x) for x in (q, k, v, log_decay, log_input))

    # The token that enters the memory at each step stands `lag` slots earlier.
    def delayed(past: Tensor | None, new: Tensor) -> Tensor:
        before = new.new_zeros(batch, lag, *new.shape[2:]) if past is None else past
        return torch.cat([before, new], 1)[:, :count]

    keys, values = delayed(past_k, k), delayed(past_v, v)
    weight = _per_head(delayed(past_input, log_input), memory_heads) + _waited(past_decay, log_decay, lag, memory_heads)
    # A waiting token of the incoming state is of document 0 and older than all that is new; a rank below 0 is none.
    rank = delayed(_past_ranks(rows, lag), rows.rank)
    enters = (rank >= skip) & (delayed(None, rows.document) == rows.document) & rows.valid
    weight = weight.masked_fill(~enters[..., None], NEG_INF)

    chunk = min(CHUNK, count)
    fill = -count % chunk

    def tiles(x: Tensor, value: float = 0.0) -> Tensor:  # [B, T, heads, ...] -> [B, tiles, heads, chunk, ...]
        padded = F.pad(x, (0, 0) * (x.ndim - 2) + (0, fill), value=value)
        return padded.unflatten(1, (-1, chunk)).movedim(3, 2)

    log_q, log_k = _logs(q, k=keys, feature_map=feature_map, dtype=dtype)
    log_q = tiles(log_q).unflatten(2, (memory_heads, -1))  # [B, N, Hs, G, C, F]
    log_k = _share(tiles(log_k), memory_heads)  # [B, N, Hs, C, F]
    value = _share(tiles(values.to(dtype)), memory_heads)  # [B, N, Hs, C, D]
    weight = tiles(weight, NEG_INF)  # [B, N, Hs, C]
    decay = tiles(_per_head(log_decay, memory_heads)).cumsum(-1)  # within the chunk: no exponent above 0
    document = torch.cat([rows.document, rows.last_document().expand(-1, fill)], 1).unflatten(
        1, (-1, chunk)
    )  # [B, N, C]
    last = document[:, :, -1]
    previous = F.pad(last[:, :-1], (1, 0))  # the document the memory is in when the chunk begins

    # What each chunk leaves in the memory, and the scan that carries it on.
    leaves = (decay[..., -1:] - decay + weight)[..., None] + log_k
    leaves = leaves.masked_fill((document != last[..., None])[:, :, None, :, None], NEG_INF)
    peak = leaves.detach().amax(3)  # [B, N, Hs, F]
    leaves = (leaves - _finite(peak)[..., None, :]).exp()
    chunk_kv, chunk_norm = leaves.transpose(-1, -2) @ value, leaves.sum(3)
    carry = decay[..., -1].masked_fill((previous != last)[..., None], NEG_INF)  # [B, N, Hs]
    if kv is None:
        kv = q.new_zeros(batch, memory_heads, log_k.shape[-1], value.shape[-1], dtype=dtype)
        norm = kv[..., 0]
        scale = torch.full_like(norm, NEG_INF)
    before = []
    for n in range(log_k.shape[1]):
        before.append((kv, norm, scale))
        kv, norm, scale = _add(kv, norm, scale, carry[:, n], chunk_kv[:, n], chunk_norm[:, n], peak[:, n])
    old_kv, old_norm, old_scale = (torch.stack(part, 1) for part in zip(*before, strict=True))

    # Each query: the memory before its chunk, and the keys of its chunk up to its own step.
    peak_q, peak_k = _finite(log_q.detach().amax(-1)), _finite(log_k.detach().amax(-1))
    read = decay.masked_fill((document != previous[..., None])[:, :, None], NEG_INF)
    read = read[:, :, :, None, :, None] + (log_q - peak_q[..., None]) + old_scale[:, :, :, None, None]
    phi_q, phi_k = log_q - peak_q[..., None], log_k - peak_k[..., None]
    if feature_map is None or feature_map.activation == "exp":
        # With logits of +-80 the largest and the smallest product are e^320 apart; so are their gradients.
        phi_q, phi_k = phi_q.double(), phi_k.double()
    phi_q, phi_k = phi_q.exp(), phi_k.exp()
    product = (phi_q.flatten(3, 4) @ phi_k.transpose(-1, -2)).unflatten(3, log_q.shape[3:5])  # [B, N, Hs, G, C, C]
    nothing = product == 0
    score = torch.where(nothing, NEG_INF, torch.where(nothing, 1.0, product).log()).to(dtype)
    between = decay[..., :, None] - decay[..., None, :] + (weight + peak_k)[..., None, :]
    seen = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    seen = seen & (document[..., :, None] == document[..., None, :])
    score = (score + between[:, :, :, None]).masked_fill(~seen[:, :, None, None], NEG_INF)
    top = _finite(torch.maximum(score.detach().amax(-1), read.detach().amax(-1)))
    score, read = (score - top[..., None]).exp(), (read - top[..., None]).exp()
    mass = score.sum(-1) + (read * old_norm[:, :, :, None, None]).sum(-1)
    total = (score.flatten(3, 4) @ value + read.flatten(3, 4) @ old_kv).unflatten(3, log_q.shape[3:5])
    y, log_mass = _normalize(total, mass, top + peak_q)

    def untile(x: Tensor) -> Tensor:  # [B, N, Hs, G, C, ...] -> [B, T, H, ...]
        return x.flatten(2, 3).movedim(2, 3).flatten(1, 2)[:, :count]

    y = torch.where(rows.valid[..., None, None], untile(y), 0.0)
    log_mass = torch.where(rows.valid[..., None], untile(log_mass), NEG_INF)
    new_state = None
    if return_state:
        new_state = next_state((kv, norm, scale), k, v, log_decay, log_input, rows, state, lag)
    return rows.unpack(y).to(q.dtype), rows.unpack(log_mass), new_state


def step(q, k, v, log_decay, log_input, feature_map, skip, mask, state, in_place):  # type: ignore[no-untyped-def]
    """One token, as the recurrence says; see `lizardzoo.kernels.gated_linear.gated_linear_attention_step`."""
    kv, norm, scale, *rings, length = state
    dtype = compute_dtype(q)
    lag, memory_heads = rings[0].shape[1], kv.shape[1]
    log_decay = kv.new_zeros(q.shape[0], 1, 0) if log_decay is None else log_decay.to(dtype)
    log_input = kv.new_zeros(q.shape[0], 1, 0) if log_input is None else log_input.to(dtype)
    real = torch.ones_like(q[:, :, 0, 0], dtype=torch.bool) if mask is None else mask  # [B, 1]

    # The entering token is the oldest, whose slot the new one takes; without a lag it is the new one itself.
    token = (k, v, log_decay, log_input)
    place = length[:, None] % max(lag, 1)
    entering = [take_tokens(ring, place) for ring in rings] if lag else token
    here = torch.arange(lag, device=q.device) == place

    def write(ring: Tensor, new: Tensor) -> Tensor:
        return torch.where(here.view(here.shape + (1,) * (ring.ndim - 2)), new, ring)

    ring_k, ring_v, ring_decay, ring_input = (write(ring, x) for ring, x in zip(rings, token, strict=True))
    # fp64 as in `_waited`
    waited = _per_head(ring_decay.double().sum(1, keepdim=True).to(dtype), memory_heads)[:, 0]
    weight = _per_head(entering[3], memory_heads)[:, 0] + waited
    enters = real & (length[:, None] - lag >= skip)
    log_q, log_k = _logs(q, k=entering[0], feature_map=feature_map, dtype=dtype)
    log_q = log_q[:, 0].unflatten(1, (memory_heads, -1))  # [B, Hs, G, F]
    log_k = _share(log_k, memory_heads)[:, 0]  # [B, Hs, F]
    value = _share(entering[1].to(dtype), memory_heads)[:, 0]  # [B, Hs, D]

    enter = (weight[..., None] + log_k).masked_fill(~enters[..., None], NEG_INF)
    keep = _per_head(log_decay, memory_heads)[:, 0]
    new_kv, new_norm, new_scale = _add(kv, norm, scale, keep, value[:, :, None], torch.ones_like(norm), enter)
    read = log_q + new_scale[:, :, None]
    top = _finite(read.detach().amax(-1))
    read = (read - top[..., None]).exp()
    y, log_mass = _normalize(read @ new_kv, (read * new_norm[:, :, None]).sum(-1), top)
    y = torch.where(real[..., None], y.flatten(1, 2), 0.0)[:, None]
    log_mass = torch.where(real, log_mass.flatten(1, 2), NEG_INF)[:, None]

    new = GatedLinearState(new_kv, new_norm, new_scale, ring_k, ring_v, ring_decay, ring_input, length + 1)
    if mask is not None:  # a padded token changes nothing
        pairs = zip(state, new, strict=True)
        new = GatedLinearState(*(torch.where(real.view(-1, *[1] * (b.ndim - 1)), b, a) for a, b in pairs))
    return y.to(q.dtype), log_mass, overwrite(state, new) if in_place else new


def _logs(q: Tensor, k: Tensor, feature_map: FeatureMap | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if feature_map is None:
        return q.to(dtype), k.to(dtype)
    query, key = feature_map.query.to(dtype), feature_map.key.to(dtype)
    return log_features(q, query, feature_map.activation), log_features(k, key, feature_map.activation)


def _waited(past: Tensor | None, log_decay: Tensor, lag: int, memory_heads: int) -> Tensor:
    """L_j - L_{j - lag}: what a token lost while it waited; [B, T, Hs]. The cumsum needs fp64: it grows with T."""
    if lag == 0 or log_decay.shape[2] == 0:
        return log_decay.new_zeros(*log_decay.shape[:2], memory_heads)
    past = log_decay.new_zeros(log_decay.shape[0], lag, log_decay.shape[2]) if past is None else past
    total = torch.cat([past, log_decay], 1).double().cumsum(1)
    return _per_head((total[:, lag:] - total[:, :-lag]).to(log_decay.dtype), memory_heads)


def _past_ranks(rows, lag: int) -> Tensor:  # type: ignore[no-untyped-def]
    """Ranks of the waiting tokens in document 0: they precede slot 0 of that document."""
    first = torch.where(rows.document[:, :1] == 0, rows.rank[:, :1], 0)
    return first - lag + torch.arange(lag, device=first.device)


def _per_head(gate: Tensor, memory_heads: int) -> Tensor:
    """A gate [B, T, 0, 1, Hkv or H] for each head of the memory; no gate is a zero."""
    if gate.shape[2] == 0:
        return gate.new_zeros(*gate.shape[:2], memory_heads)
    return gate.repeat_interleave(memory_heads // gate.shape[2], 2)


def _share(x: Tensor, memory_heads: int) -> Tensor:
    """Key-side tensors [B, N, Hkv, ...] for each head of the memory: copied only where a gate is per query head."""
    return x if x.shape[2] == memory_heads else x.repeat_interleave(memory_heads // x.shape[2], 2)


def _finite(x: Tensor) -> Tensor:
    return torch.where(x == NEG_INF, 0.0, x)


def _add(kv, norm, scale, carry, new_kv, new_norm, new_scale):  # type: ignore[no-untyped-def]
    """exp(carry) * memory + exp(new_scale) * new, at a new common scale per feature."""
    kept = scale + carry[..., None]
    total = torch.maximum(kept.detach(), new_scale.detach())
    old, new = (kept - _finite(total)).exp(), (new_scale - _finite(total)).exp()
    return old[..., None] * kv + new[..., None] * new_kv, old * norm + new * new_norm, total


def _normalize(total: Tensor, mass: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    empty = mass == 0
    safe = torch.where(empty, 1.0, mass)
    y = torch.where(empty[..., None], 0.0, total / safe[..., None])
    return y, torch.where(empty, NEG_INF, safe.log() + log_scale)
