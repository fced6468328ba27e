"""Float64 oracles: literal loops over queries and keys, straight from the equations.

They have no trick in common with the kernels: slow, and right by inspection. They take whole sequences only; states are
tested by splitting a sequence.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lizardzoo.kernels import FeatureMap


def visible_pairs(
    mask: Tensor,
    starts: Tensor,
    batch: int,
    *,
    window: int | None = None,
    keep: int = 0,
    lag: int = 0,
    skip: int = 0,
) -> list[list[int]]:
    """For each query of a row, the key positions it sees.

    Args:
        mask, starts: [B, T] bool.
        batch: the row.
        window, keep: given: the softmax set; window None: the linear branch's, by lag and skip.
        lag, skip: see `lizardzoo.kernels`.
    """
    seen: list[list[int]] = []
    document: list[int] = []  # positions of the real tokens of the current document, in order
    for i in range(mask.shape[1]):
        if not mask[batch, i]:
            seen.append([])
            continue
        if starts[batch, i]:
            document = []
        document.append(i)
        rank = len(document) - 1
        if window is not None:
            seen.append([t for r, t in enumerate(document) if rank - r < window or r < keep])
        else:
            seen.append([t for r, t in enumerate(document) if r <= rank - lag and r >= skip])
    return seen


def window_oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    keep: int = 0,
    sinks: Tensor | None = None,
    scale: float | None = None,
    mask: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`lizardzoo.kernels.window_attention` from its equation, float64: the same arguments, y and log_mass."""
    sinks = None if sinks is None else sinks.expand(q.shape[2], -1)
    mask, starts = _flags(q, mask, starts)
    seen = [visible_pairs(mask, starts, b, window=window, keep=keep) for b in range(q.shape[0])]
    return _attend(q, v, seen, _softmax_scores(q, k, scale), sinks)


def gated_linear_oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    log_input: Tensor | None = None,
    feature_map: FeatureMap | None = None,
    lag: int = 0,
    skip: int = 0,
    mask: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`lizardzoo.kernels.gated_linear_attention` from its equation, float64: the same arguments, y and log_mass."""
    mask, starts = _flags(q, mask, starts)
    seen = [visible_pairs(mask, starts, b, lag=lag, skip=skip) for b in range(q.shape[0])]
    return _attend(q, v, seen, _linear_scores(q, k, log_decay, log_input, feature_map, mask), None)


def hybrid_oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    rotated: tuple[Tensor, Tensor],
    log_input: Tensor | None = None,
    log_scale: Tensor | None = None,
    feature_map: FeatureMap | None = None,
    window: int,
    keep: int = 0,
    lag: int,
    skip: int = 0,
    sinks: Tensor | None = None,
    scale: float | None = None,
    mask: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`lizardzoo.kernels.hybrid_attention` from its equation, float64: the same arguments, y and log_mass."""
    sinks = None if sinks is None else sinks.expand(q.shape[2], -1)
    mask, starts = _flags(q, mask, starts)
    rows = range(q.shape[0])
    near = [visible_pairs(mask, starts, b, window=window, keep=keep) for b in rows]
    far = [visible_pairs(mask, starts, b, lag=lag, skip=skip) for b in rows]
    near_scores = _softmax_scores(*rotated, scale)
    far_scores = _linear_scores(q, k, log_decay, log_input, feature_map, mask)

    def scores(b: int, h: int, i: int, _: list[int]) -> Tensor:
        found = [near_scores(b, h, i, near[b][i])]
        if far[b][i]:
            shift = q.new_zeros(()) if log_scale is None else log_scale[b, i, h]
            found.append(far_scores(b, h, i, far[b][i]) + shift)
        return torch.cat(found)

    both = [[s + f for s, f in zip(near[b], far[b], strict=True)] for b in rows]
    return _attend(q, v, both, scores, sinks)


def heavy_oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_mass: Tensor,
    *,
    window: int,
    heavy: int,
    keep: int = 0,
    half_life: float | None = None,
    scale: float | None = None,
    mask: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`lizardzoo.kernels.heavy_attention` from its equation, float64: the same arguments, y and log_mass."""
    mask, starts = _flags(q, mask, starts)
    scores = _softmax_scores(q, k, scale)
    groups, found = q.shape[2] // k.shape[2], []
    for head in range(k.shape[2]):
        queries = range(head * groups, (head + 1) * groups)
        seen = []
        for b in range(q.shape[0]):
            drawn: dict[int, float] = {}
            candidates = visible_pairs(mask, starts, b, lag=window, skip=keep)
            older = visible_pairs(mask, starts, b, lag=max(1, window // 8))
            near = visible_pairs(mask, starts, b, window=window)
            for i in range(q.shape[1]):
                for t in set(older[i]) & set(near[i]):
                    weights = (scores(b, h, i, [t]) - log_mass[b, i, h] for h in queries)
                    drawn[t] = drawn.get(t, 0.0) + sum((2 * w).exp().item() for w in weights)
            whole = visible_pairs(mask, starts, b)
            growth = 1.0 if half_life is None else 2 ** (1 / half_life)
            score = {t: max(drawn.get(t, 0.0), 2.0**-100) * growth ** len(whole[t]) for t in range(q.shape[1])}
            seen.append([sorted(each, key=lambda t: (score[t], t))[-heavy:] for each in candidates])
        own_q, own_k, own_v = q[:, :, queries.start : queries.stop], k[:, :, [head]], v[:, :, [head]]
        found.append(_attend(own_q, own_v, seen, _softmax_scores(own_q, own_k, scale), None))
    return torch.cat([y for y, _ in found], 2), torch.cat([m for _, m in found], 2)


Scores = Callable[[int, int, int, list[int]], Tensor]
"""The logarithms of the weights of the keys seen by query i of head h in row b."""


def _softmax_scores(q: Tensor, k: Tensor, scale: float | None) -> Scores:
    groups = q.shape[2] // k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def scores(b: int, h: int, i: int, seen: list[int]) -> Tensor:
        return torch.stack([scale * (q[b, i, h] * k[b, t, h // groups]).sum() for t in seen])

    return scores


def _linear_scores(
    q: Tensor,
    k: Tensor,
    log_decay: Tensor | None,
    log_input: Tensor | None,
    feature_map: FeatureMap | None,
    mask: Tensor,
) -> Scores:
    heads, groups = q.shape[2], q.shape[2] // k.shape[2]

    def per_head(gate: Tensor | None) -> Tensor:
        zero = q.new_zeros(*q.shape[:3])
        return zero if gate is None else zero + gate.repeat_interleave(heads // gate.shape[2], 2)

    def log_phi(x: Tensor, weight: Tensor, head: int) -> Tensor:
        logits = x @ weight[head if weight.shape[0] > 1 else 0]
        halves = [logits, -logits]
        assert feature_map is not None
        if feature_map.activation == "softmax":
            halves = [half - half.exp().sum().log() for half in halves]
        return torch.cat(halves)

    decay, weight = per_head(log_decay), per_head(log_input)

    def scores(b: int, h: int, i: int, seen: list[int]) -> Tensor:
        out = []
        for t in seen:
            fq, fk = q[b, i, h], k[b, t, h // groups]
            if feature_map is not None:
                fq, fk = log_phi(fq, feature_map.query, h), log_phi(fk, feature_map.key, h // groups)
            lost = sum((decay[b, step, h] for step in range(t + 1, i + 1) if mask[b, step]), q.new_zeros(()))
            out.append(torch.logsumexp(fq + fk, 0) + lost + weight[b, t, h])
        return torch.stack(out)

    return scores


def _flags(q: Tensor, mask: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    mask = torch.ones(q.shape[:2], dtype=torch.bool) if mask is None else mask
    starts = torch.zeros(q.shape[:2], dtype=torch.bool) if starts is None else starts
    return mask, starts


def _attend(q, v, seen, scores, sinks):  # type: ignore[no-untyped-def]
    """y and log-mass from the scores of each query against the keys it sees."""
    groups = q.shape[2] // v.shape[2]
    ys, log_masses = [], []
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            for h in range(q.shape[2]):
                y, logits = q.new_zeros(v.shape[-1]), q.new_zeros(0)
                if seen[b][i]:
                    logits = scores(b, h, i, seen[b][i])
                total = logits
                if sinks is not None and seen[b][i]:
                    total = torch.cat([logits, sinks[h].to(q)])
                if total.numel() == 0:
                    ys.append(y)
                    log_masses.append(q.new_full((), float("-inf")))
                    continue
                log_mass = total.logsumexp(0)
                for logit, t in zip(logits, seen[b][i], strict=True):
                    y = y + (logit - log_mass).exp() * v[b, t, h // groups]
                ys.append(y)
                log_masses.append(log_mass)
    shape = q.shape[:3]
    return torch.stack(ys).view(*shape, -1), torch.stack(log_masses).view(shape)
