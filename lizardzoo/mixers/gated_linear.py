"""Gated linear attention alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lizardzoo.config import register_mixer
from lizardzoo.kernels import GatedLinearState
from lizardzoo.mixers.base import AttentionShape, MixerInputs
from lizardzoo.mixers.branches import LinearBranch, LinearFields, OneBranch
from lizardzoo.mixers.gates import kernels as gate_kernels
from lizardzoo.mixers.merge import Branch, unnormalized


@register_mixer("gated_linear")
@dataclass(frozen=True)
class GatedLinear(LinearFields):
    """Gated linear attention over the whole past (Lizard, arXiv:2507.09025, section 3.1).

    Beside its own field it has those of `LinearFields`.

    Attributes:
        normalize: divide by the denominator (the paper's parallel form); False leaves it out (its recurrent form).
    """

    normalize: bool = True

    def build(self, shape: AttentionShape) -> GatedLinearMixer:
        return GatedLinearMixer(self, shape)


class GatedLinearMixer(OneBranch):
    """One branch, "linear"."""

    branch_names = ("linear",)

    def __init__(self, spec: GatedLinear, shape: AttentionShape) -> None:
        super().__init__(spec, shape)
        self.linear = LinearBranch(spec, shape)

    @property
    def kernels(self) -> dict[str, tuple[int, ...]]:
        before: dict[str, tuple[int, ...]] = {"rotate": (self.shape.head_dim,)} if self.spec.feature_rope else {}
        before |= gate_kernels([self.linear.decay, self.linear.input_gate])
        return before | {"gated_linear_attention": (self.shape.head_dim, self.linear.feature_dim)}

    def branches(
        self, inputs: MixerInputs, state: GatedLinearState | None, need_state: bool, in_place: bool = False
    ) -> tuple[dict[str, Branch], GatedLinearState | None]:
        qk = inputs.rotated(self.impl) if self.spec.feature_rope else (inputs.q, inputs.k)
        branch, state = self.linear(inputs, qk, 0, 0, state, need_state, self.impl, in_place)
        return {"linear": branch}, state

    def merge(self, branches: dict[str, Branch], x: Tensor) -> Tensor:
        branch = branches["linear"]
        return branch.y if self.spec.normalize else unnormalized(branch)

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> GatedLinearState:
        return self.linear.init_state(0, batch, dtype, device)
