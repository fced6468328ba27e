"""The yardstick of the kernels' errors: their formulas as one writes them in PyTorch, dense and in the inputs' dtype.

Plain low precision is: products of bf16 (or fp16) matrices; sums, softmax and gates in fp32; and in the backward
dy.y from the output as it was rounded, as flash attention has it (with the exact one, gradients of gates, in which much
cancels, would err less than any kernel that does not keep the output twice). A kernel may err at most twice as much.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lizardzoo.kernels import FeatureMap


class _Attend(torch.autograd.Function):
    """softmax(scores) v: y and log_mass; rows of -inf alone give zero and -inf. v has the queries' heads."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, v: Tensor, rounded: torch.dtype) -> tuple[Tensor, Tensor]:
        some = torch.isfinite(scores).any(-1, keepdim=True)
        log_mass = torch.where(some, scores, 0.0).logsumexp(-1, keepdim=True)
        weights = torch.where(some, (scores - log_mass).exp(), 0.0)
        y = (weights[..., : v.shape[2]].to(v.dtype) @ v).to(rounded)
        ctx.save_for_backward(weights, v, y)
        return y, torch.where(some, log_mass, float("-inf"))

    @staticmethod
    def backward(ctx: Any, d_y: Tensor, d_log_mass: Tensor) -> tuple[Tensor, Tensor, None]:
        weights, v, y = ctx.saved_tensors
        d_y = d_y.to(v)
        delta = (d_y.to(weights) * y.to(weights)).sum(-1, keepdim=True) - d_log_mass
        slopes = (d_y @ v.transpose(2, 3)).to(weights.dtype)
        slopes = F.pad(slopes, (0, weights.shape[-1] - slopes.shape[-1]))  # sinks have no value
        return weights * (slopes - delta), weights[..., : v.shape[2]].to(v.dtype).transpose(2, 3) @ d_y, None


def attention(
    v: Tensor,
    near: tuple[Tensor, Tensor] | None,
    far: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, FeatureMap],
    *,
    window: int = 0,
    keep: int = 0,
    lag: int = 0,
    skip: int = 0,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
    starts: Tensor | None = None,
    rounded: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """y and log_mass under one denominator; near: q, k of the window; far: q, k, log_decay, log_input, log_scale and
    softmax maps of the linear branch. Other arguments as those of `hybrid_attention`; rounded: y's dtype, if not
    that of the inputs."""
    q, k, log_decay, log_input, log_scale, maps = far
    batch, count, heads, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    mask = torch.ones(batch, count, dtype=torch.bool, device=q.device) if mask is None else mask
    starts = torch.zeros_like(mask) if starts is None else starts & mask
    document, order = starts.long().cumsum(1), mask.long().cumsum(1)
    rank = order - torch.where(starts, order, 1).cummax(1).values
    distance = rank[:, :, None] - rank[:, None]
    together = mask[:, :, None] & mask[:, None] & (document[:, :, None] == document[:, None])

    def per_head(x: Tensor) -> Tensor:
        """[B, T, heads of a gate or of keys, ...] -> [B, H, T, ...]."""
        return x.repeat_interleave(heads // x.shape[2], 2).transpose(1, 2)

    def features(x: Tensor, weight: Tensor) -> Tensor:
        z = torch.einsum("bthd,hdf->bhtf", x, weight.to(x.dtype).expand(x.shape[2], -1, -1))
        phi = torch.cat([z.softmax(-1), (-z).softmax(-1)], -1)
        return phi.repeat_interleave(heads // x.shape[2], 1)

    product = (features(q, maps.query) @ features(k, maps.key).transpose(2, 3)).to(wide)
    seen = together & (distance >= lag) & (rank >= skip)[:, None]
    seen = seen[:, None] & (product > 0)
    scores = torch.where(seen, product, 1.0).log()
    if log_decay is not None:
        total = per_head(torch.where(mask[..., None], log_decay, 0.0).cumsum(1))
        scores = scores + torch.where(seen, total[..., :, None] - total[..., None, :], 0.0)
    if log_input is not None:
        scores = scores + per_head(log_input)[..., None, :]
    if log_scale is not None:
        scores = scores + per_head(log_scale)[..., :, None]
    parts = [scores.masked_fill(~seen, float("-inf"))]
    if near is not None:
        visible = together & (distance >= 0) & ((distance < window) | (rank < keep)[:, None])
        scores = (near[0].transpose(1, 2) @ per_head(near[1]).transpose(2, 3)).to(wide) * near[0].shape[3] ** -0.5
        parts.append(scores.masked_fill(~visible[:, None], float("-inf")))
    if sinks is not None:
        parts.append(sinks.to(wide).expand(heads, -1)[None, :, None].expand(batch, -1, count, -1))
    joined = torch.cat(parts, -1).masked_fill(~mask[:, None, :, None], float("-inf"))
    values = torch.cat([per_head(v)] * (1 + (near is not None)), 2)
    y, log_mass = _Attend.apply(joined, values, rounded or v.dtype)
    return y.transpose(1, 2), log_mass[..., 0].transpose(1, 2)
