"""The hybrid of both branches: every reading of the papers is an option (facts in `docs` and README's design section)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lizardzoo.config import register_mixer
from lizardzoo.errors import LizardzooError
from lizardzoo.kernels import GatedLinearState, WindowState, window_attention
from lizardzoo.mixers.base import AttentionShape, Mixer, MixerInputs, start_value
from lizardzoo.mixers.branches import LinearBranch, LinearFields, WindowBranch, WindowFields
from lizardzoo.mixers.gates import TokenGate
from lizardzoo.mixers.merge import Branch, Merge, joint, unnormalized

LOG_SCALE_START = 0.0


@register_mixer("hybrid")
@dataclass(frozen=True)
class Hybrid(LinearFields, WindowFields):
    """A window for what is near, gated linear attention for what is far. The defaults are the recommended hybrid.

    disjoint: the linear branch sees only what the window does not (tokens t <= i - window, less the kept ones);
        otherwise all t <= i (Lizard).
    merge: "joint" = one denominator for both branches (LoLCATs); "sum" = y_linear + alpha y_window (Lizard, parallel
        form); "none" = the same with an unnormalized linear branch (Lizard, recurrent form).
    alpha: for sum and none: one learned weight per layer or per head; None = 1.
    log_scale: for joint: the linear branch's mass is scaled by exp(c_h) ("head"), exp(c_h + x.u_h) ("token") or 1 (None).
    """

    disjoint: bool = True
    merge: Merge = "joint"
    alpha: Literal["layer", "head"] | None = "layer"
    log_scale: Literal["token", "head"] | None = "token"

    def build(self, shape: AttentionShape) -> HybridMixer:
        return HybridMixer(self, shape)


class HybridState(NamedTuple):
    """Both branches' states. With disjoint branches the window's tokens are those that wait: they are held once."""

    window: WindowState
    linear: GatedLinearState


class HybridMixer(Mixer):
    """Two branches, "linear" and "window"."""

    branch_names = ("linear", "window")

    def __init__(self, spec: Hybrid, shape: AttentionShape) -> None:
        super().__init__(spec, shape)
        self.window = WindowBranch(spec, shape)
        self.linear = LinearBranch(spec, shape)
        self.alpha: nn.Parameter | None = None
        self.log_scale: TokenGate | None = None
        if spec.merge == "joint" and spec.log_scale is not None:
            self.log_scale = TokenGate(
                shape.hidden_size, shape.heads, start=LOG_SCALE_START, per_token=spec.log_scale == "token"
            )
        elif spec.merge != "joint" and spec.alpha is not None:
            count = shape.heads if spec.alpha == "head" else 1
            self.alpha = nn.Parameter(torch.empty(count, dtype=torch.float32))
            start_value(self.alpha, 1.0)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.alpha is not None:
            start_value(self.alpha, 1.0)

    def branches(
        self, inputs: MixerInputs, state: HybridState | None, need_state: bool
    ) -> tuple[dict[str, Branch], HybridState | None]:
        spec = self.spec
        plain, rotated = (inputs.q, inputs.k), inputs.rotated()
        lag, skip = (spec.window, spec.keep) if spec.disjoint else (0, 0)
        window, window_state = self.window(
            spec, inputs, rotated if spec.window_rope else plain, state and state.window, need_state, self.impl
        )
        linear, linear_state = self.linear(
            inputs, rotated if spec.feature_rope else plain, lag, skip, state and state.linear, need_state, self.impl
        )
        if self.log_scale is not None:
            linear = Branch(linear.y, linear.log_mass + self.log_scale(inputs.x))
        branches = {"linear": linear, "window": window}
        if window_state is None or linear_state is None:
            return branches, None
        return branches, self._share(HybridState(window_state, linear_state))

    def merge(self, branches: dict[str, Branch], x: Tensor) -> Tensor:
        if self.spec.merge == "joint":
            return joint(list(branches.values()), branches[next(iter(branches))].y.dtype)
        total: Tensor | float = 0.0
        if "linear" in branches:
            linear = branches["linear"]
            total = linear.y if self.spec.merge == "sum" else unnormalized(linear)
        if "window" in branches:
            alpha = 1.0 if self.alpha is None else self.alpha[:, None]
            total = total + alpha * branches["window"].y
        assert isinstance(total, Tensor)
        return total

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> HybridState:
        lag = self.spec.window if self.spec.disjoint else 0
        window = self.window.init_state(self.spec, batch, dtype, device)
        return self._share(HybridState(window, self.linear.init_state(lag, batch, dtype, device)))

    def _share(self, state: HybridState) -> HybridState:
        """The tokens in the window are the ones that wait to enter the memory: hold their values (and keys) once."""
        if not self.spec.disjoint:
            return HybridState(state.window, state.linear._replace(length=state.window.length))
        window = state.window
        shared = {"v": window.v, "valid": window.valid, "length": window.length}
        if self.spec.feature_rope == self.spec.window_rope:
            shared["k"] = window.k
        return HybridState(window, state.linear._replace(**shared))

    @torch.no_grad()
    def calibrate(self, inputs: MixerInputs) -> None:
        """Start the log-scale so that each head's linear branch has the mass the teacher puts beyond the window.

        Finds, by bisection, the shift c with mean_i sigmoid(far_i + c - near_i) = mean_i p_i, where p_i is the teacher's
        attention beyond the window, over the positions that have anything there.
        """
        spec = self.spec
        if self.log_scale is None or not spec.disjoint:
            return
        branches, _ = self.branches(inputs, None, False)
        near, far = branches["window"].log_mass, branches["linear"].log_mass
        q, k = inputs.rotated()
        _, total, _ = window_attention(
            q, k, inputs.v, window=q.shape[1], scale=self.shape.scale, mask=inputs.mask, starts=inputs.starts,
            return_state=False, impl=self.impl,
        )  # fmt: skip
        _, seen, _ = window_attention(
            q, k, inputs.v, window=spec.window, keep=spec.keep, scale=self.shape.scale, mask=inputs.mask,
            starts=inputs.starts, return_state=False, impl=self.impl,
        )  # fmt: skip
        count = torch.isfinite(far)
        if not count.any():
            raise LizardzooError(
                f"the calibration text has no sequence longer than window + keep = {spec.window + spec.keep} tokens; "
                f"give a longer text, or none"
            )
        zero = torch.zeros_like(far)
        share = torch.where(count, 1 - (seen - total).exp(), zero).clamp(0, 1)
        margin = torch.where(count, far - near, zero).float()
        number = count.sum((0, 1)).clamp(min=1)
        target = share.sum((0, 1)) / number
        low, high = torch.full_like(target, -40.0), torch.full_like(target, 40.0)
        for _ in range(60):
            middle = (low + high) / 2
            mean = torch.where(count, (margin + middle).sigmoid(), zero).sum((0, 1)) / number
            low, high = torch.where(mean < target, middle, low), torch.where(mean < target, high, middle)
        # A head that never looks beyond the window would be sent to -40, where nothing can be learned any more.
        self.log_scale.bias += ((low + high) / 2).clamp(-12, 12).to(self.log_scale.bias.dtype)
