"""The hybrid as the papers' training code computes it: whole [T, T] matrices of every head, quadratic in the length.

After what was published with LoLCATs (arXiv:2410.10254, `hybrid_attention_quadratic`): keys and values are repeated for
every query head, in fp32; the scores of the window and the products of the features are both computed for all pairs of
tokens, masked, and added. Lizard's gates (arXiv:2507.09025, section 3.1) become one more such matrix, of cumulated
log-gates. It is a mixer of a third party: a spec that is registered, and a module, with no line of the package changed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import lizardzoo as lz
from lizardzoo.config import PRESETS
from lizardzoo.errors import LizardzooError
from lizardzoo.kernels.dispatch import compute_dtype
from lizardzoo.kernels.features import log_features
from lizardzoo.mixers import AttentionShape, Hybrid, MixerInputs
from lizardzoo.mixers.gates import evaluate
from lizardzoo.mixers.hybrid import HybridMixer


@lz.register_mixer("dense")
@dataclass(frozen=True)
class Dense(Hybrid):
    """`Hybrid`, field by field the same function; for training on whole sequences without padding."""

    def build(self, shape: AttentionShape) -> DenseMixer:
        return DenseMixer(self, shape)


def dense_of(preset: str) -> Dense:
    """The dense computation of a preset that is a `Hybrid`."""
    return Dense(**asdict(PRESETS.get(preset)))


class DenseMixer(HybridMixer):
    """The parameters of `HybridMixer`, its function in plain PyTorch."""

    def forward(self, inputs: MixerInputs, state: Any = None, need_state: bool = False) -> tuple[Tensor, None]:
        """y [B, T, H, D] in q's dtype; all else is fp32 (float64 for float64 inputs)."""
        if state is not None or need_state or inputs.mask is not None or inputs.starts is not None:
            raise LizardzooError(
                "the dense mixer was given a state, padding or packed documents; it computes whole sequences of "
                "single documents: use the preset that it was made of"
            )
        dtype, heads = compute_dtype(inputs.q), self.shape.heads
        (near_q, near_k), (far_q, far_k) = self._queries_and_keys(inputs)
        v = per_head(inputs.v.to(dtype), heads)
        log_decay, log_input, log_scale = evaluate(inputs.x, self._gates(), self.impl)
        near, far = self.masks(inputs.q.shape[1], inputs.q.device)

        scores = products(near_q.to(dtype), near_k.to(dtype), heads) * self.shape.scale
        scores = scores.masked_fill(~near, float("-inf"))
        sinks = self.window.sink_logits()
        peak = scores.detach().amax(-1, keepdim=True)  # [B, H, T, 1]
        if sinks is not None:
            peak = peak.maximum(sinks.detach().amax())
        window = (scores - peak).exp()
        window_sum = window.sum(-1, keepdim=True)
        if sinks is not None:
            window_sum = window_sum + (sinks - peak).exp().sum(-1, keepdim=True)

        maps = self.linear.feature_map()
        phi_q, phi_k = (
            log_features(x, weight.to(dtype), maps.activation).exp()
            for x, weight in ((far_q, maps.query), (far_k, maps.key))
        )
        linear = products(phi_q, phi_k, heads)
        if log_decay is None and log_input is None:
            linear = linear.masked_fill(~far, 0.0)
        else:
            linear = linear * gate_matrix(log_decay, log_input, far, heads)
        linear_sum = linear.sum(-1, keepdim=True)

        if self.spec.merge == "joint":
            factor = torch.zeros_like(peak) if log_scale is None else log_scale.transpose(1, 2)[..., None]
            factor = (factor - peak).exp()
            y = (window + factor * linear) @ v / (window_sum + factor * linear_sum)
        else:
            y = linear @ v
            if self.spec.merge == "sum":
                y = y / linear_sum.clamp_min(1e-30)  # nothing is seen at first where the branches are disjoint
            alpha = 1.0 if self.alpha is None else self.alpha[:, None, None]
            y = y + alpha * (window @ v / window_sum)
        return y.transpose(1, 2).to(inputs.q.dtype), None

    def masks(self, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """[T, T] bool: the keys that a query's window sees, and those of the linear branch."""
        spec, index = self.spec, torch.arange(tokens, device=device)
        distance, lag_and_skip = index[:, None] - index, self._lag_and_skip()
        near = (distance >= 0) & ((distance < spec.window) | (index < spec.keep))
        return near, (distance >= lag_and_skip[0]) & (index >= lag_and_skip[1])


def per_head(x: Tensor, heads: int) -> Tensor:
    """[B, T, h, D] -> [B, H, T, D]: copied until each query head has its own."""
    return x.repeat_interleave(heads // x.shape[2], 2).transpose(1, 2)


def products(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """Of all pairs of tokens: [B, T, h, D] -> [B, H, T, T]."""
    return per_head(q, heads) @ per_head(k, heads).transpose(-1, -2)


def gate_matrix(log_decay: Tensor | None, log_input: Tensor | None, seen: Tensor, heads: int) -> Tensor:
    """exp(L_i - L_t + a_t) where a query sees a key, else 0: [B, H, T, T]; [B, 1, T, T] of one gate for all heads."""

    def wide(gate: Tensor) -> Tensor:  # [B, T, h] -> [B, H or 1, T]
        return gate.repeat_interleave(heads // gate.shape[2] if gate.shape[2] > 1 else 1, 2).transpose(1, 2)

    logs = torch.zeros((), device=seen.device)
    if log_decay is not None:
        total = wide(log_decay.cumsum(1))
        logs = total[..., :, None] - total[..., None, :]
    if log_input is not None:
        logs = logs + wide(log_input)[..., None, :]
    return logs.masked_fill(~seen, float("-inf")).exp()
