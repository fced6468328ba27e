"""A third party's mixer, living outside the package: the decayed mean of the values seen so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import lizardzoo as lz
from lizardzoo.mixers import AttentionShape, Mixer, MixerInputs
from lizardzoo.mixers.base import start_value
from lizardzoo.mixers.merge import Branch


@lz.register_mixer("toy_mean")
@dataclass(frozen=True)
class ToyMean(lz.MixerSpec):
    """y_i = sum_t d^(i-t) v_t / sum_t d^(i-t), d = sigmoid(a learned number)."""

    start: float = 0.9

    def validate(self) -> None:
        self.require(0 < self.start < 1, "start", "between 0 and 1")

    def build(self, shape: AttentionShape) -> ToyMixer:
        return ToyMixer(self, shape)


class ToyState(NamedTuple):
    total: Tensor  # [B, Hkv, D]
    mass: Tensor  # [B]


class ToyMixer(Mixer):
    branch_names = ("mean",)

    def __init__(self, spec: ToyMean, shape: AttentionShape) -> None:
        super().__init__(spec, shape)
        self.logit = nn.Parameter(torch.empty((), dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        start_value(self.logit, torch.tensor(self.spec.start).logit())

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> ToyState:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        shape = (batch, self.shape.kv_heads, self.shape.head_dim)
        return ToyState(torch.zeros(shape, dtype=wide, device=device), torch.zeros(batch, dtype=wide, device=device))

    def branches(self, inputs: MixerInputs, state: Any, need_state: bool) -> tuple[dict[str, Branch], Any]:
        batch, count, heads, _ = inputs.q.shape
        total, mass = state or self.init_state(batch, inputs.v.dtype, inputs.v.device)
        decay = self.logit.sigmoid()
        ys, masses = [], []
        for t in range(count):
            real = torch.ones(batch, dtype=torch.bool) if inputs.mask is None else inputs.mask[:, t]
            keep = decay
            if inputs.starts is not None:
                keep = torch.where(inputs.starts[:, t], 0.0, decay)
            fresh_total = keep.view(-1, 1, 1) * total + inputs.v[:, t].to(total.dtype)
            total = torch.where(real[:, None, None], fresh_total, total)
            mass = torch.where(real, keep * mass + 1, mass)
            ys.append(total / mass.clamp(min=1)[:, None, None])
            masses.append(mass)
        y = torch.stack(ys, 1).repeat_interleave(heads // self.shape.kv_heads, 2)
        log_mass = torch.stack(masses, 1).log()[..., None].expand(-1, -1, heads)
        return {"mean": Branch(y, log_mass)}, ToyState(total, mass)
