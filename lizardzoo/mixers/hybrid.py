"""The hybrid of both branches: every reading of the papers is an option."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lizardzoo.config import register_mixer
from lizardzoo.errors import LizardzooError
from lizardzoo.kernels import HybridState, WindowState, hybrid_attention, hybrid_attention_step
from lizardzoo.kernels.hybrid import share
from lizardzoo.mixers.base import AttentionShape, Mixer, MixerInputs, start_value
from lizardzoo.mixers.branches import LinearBranch, LinearFields, WindowBranch, WindowFields
from lizardzoo.mixers.gates import TokenGate, evaluate
from lizardzoo.mixers.gates import kernels as gate_kernels
from lizardzoo.mixers.merge import Branch, Merge, joint, mass_shares, unnormalized

LOG_SCALE_START = -2.0
"""Where an uncalibrated log-scale starts: low enough for the linear branch to help before it is trained (SmolLM2-135M,
2,048 tokens of a novel: KL to the teacher 0.131 at -2 and 0.152 at 0, against 0.134 without the branch)."""


@register_mixer("hybrid")
@dataclass(frozen=True)
class Hybrid(LinearFields, WindowFields):
    """A window for what is near, gated linear attention for what is far. The defaults are the preset `hybrid`.

    After Lizard (arXiv:2507.09025, section 3) and LoLCATs (arXiv:2410.10254). Beside its own fields it has those of
    `WindowFields` and `LinearFields`.

    Attributes:
        disjoint: the linear branch sees only what the window does not (tokens t <= i - window, less the kept ones);
            otherwise all t <= i (Lizard).
        merge: "joint" = one denominator for both branches (LoLCATs); "sum" = y_linear + alpha y_window (Lizard,
            parallel form); "none" = the same with an unnormalized linear branch (Lizard, recurrent form).
        alpha: for sum and none: one learned weight per layer or per head; None = 1.
        log_scale: for joint: the linear branch's mass is scaled by exp(c_h) ("head"), exp(c_h + x.u_h) ("token"), or
            1 (None).
    """

    disjoint: bool = True
    merge: Merge = "joint"
    alpha: Literal["layer", "head"] | None = "layer"
    log_scale: Literal["token", "head"] | None = "token"

    @property
    def exact_within(self) -> int:
        alone = self.merge == "joint" and self.disjoint  # there the window has all tokens and the whole denominator
        return self.window if alone and self.window_rope and not self.sinks else 0

    def build(self, shape: AttentionShape) -> HybridMixer:
        return HybridMixer(self, shape)


class HybridMixer(Mixer):
    """Two branches, "linear" and "window"."""

    branch_names = ("linear", "window")
    turns_steps = True

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

    @property
    def kernels(self) -> dict[str, tuple[int, ...]]:
        head, both = (self.shape.head_dim,), (self.shape.head_dim, self.linear.feature_dim)
        before: dict[str, tuple[int, ...]] = {"rotate": head} if self.spec.window_rope or self.spec.feature_rope else {}
        before |= gate_kernels(self._gates())
        if self._fused():
            return before | {"hybrid_attention": both}
        return before | {"window_attention": head, "gated_linear_attention": both}

    def forward(
        self, inputs: MixerInputs, state: HybridState | None = None, need_state: bool = False
    ) -> tuple[Tensor, HybridState | None]:
        """Both branches in one kernel where they share a denominator and none is switched off."""
        if not self._fused():
            return super().forward(inputs, state, need_state)
        if state is not None and inputs.starts is None and inputs.q.shape[1] == 1:
            y, _, state = hybrid_attention_step(**self._step_arguments(inputs), state=state)
        else:
            arguments = self._arguments(inputs, *self._queries_and_keys(inputs))
            y, _, state = hybrid_attention(
                **arguments, window=self.spec.window, lag=self._lag_and_skip()[0], starts=inputs.starts, state=state,
                return_state=need_state,
            )  # fmt: skip
        return y, state

    @torch.no_grad()
    def step_(self, inputs: MixerInputs, state: HybridState) -> Tensor:
        if not self._fused() or inputs.starts is not None:
            return super().step_(inputs, state)
        y, *_ = hybrid_attention_step(**self._step_arguments(inputs), state=state, in_place=True)
        return y

    def _fused(self) -> bool:
        return self.spec.merge == "joint" and not self.switched_off

    def _gates(self) -> list[TokenGate | None]:
        return [self.linear.decay, self.linear.input_gate, self.log_scale]

    def _step_arguments(self, inputs: MixerInputs) -> dict[str, Any]:
        """What a step of `hybrid_attention` takes: it rotates by itself where only the window wants it."""
        turn = {"turn": inputs.turn}
        if not self.spec.window_rope or self.spec.feature_rope:
            return self._arguments(inputs, *self._queries_and_keys(inputs)) | turn
        return self._arguments(inputs, None, (inputs.q, inputs.k)) | turn | {"rope": (inputs.cos, inputs.sin)}

    def _arguments(
        self, inputs: MixerInputs, window: tuple[Tensor, Tensor] | None, features: tuple[Tensor, Tensor]
    ) -> dict[str, Any]:
        """What `hybrid_attention` and its step take, from q and k of either branch."""
        q, k = features
        log_decay, log_input, log_scale = evaluate(inputs.x, self._gates(), self.impl)  # x is read once for all
        return {
            "q": q,
            "k": k,
            "v": inputs.v,
            "rotated": window,
            "log_decay": log_decay,
            "log_input": log_input,
            "log_scale": log_scale,
            "feature_map": self.linear.feature_map(),
            "keep": self.spec.keep,
            "skip": self._lag_and_skip()[1],
            "sinks": self.window.sink_logits(),
            "scale": self.shape.scale,
            "mask": inputs.mask,
            "impl": self.impl,
        }

    def _queries_and_keys(self, inputs: MixerInputs) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """q and k of the window and of the linear branch, rotated where the spec says so."""
        spec, plain = self.spec, (inputs.q, inputs.k)
        rotated = inputs.rotated(self.impl) if spec.window_rope or spec.feature_rope else plain
        return rotated if spec.window_rope else plain, rotated if spec.feature_rope else plain

    def _lag_and_skip(self) -> tuple[int, int]:
        return (self.spec.window, self.spec.keep) if self.spec.disjoint else (0, 0)

    def branches(
        self, inputs: MixerInputs, state: HybridState | None, need_state: bool
    ) -> tuple[dict[str, Branch], HybridState | None]:
        near, far = self._queries_and_keys(inputs)
        window, window_state = self.window(self.spec, inputs, near, state and state.window, need_state, self.impl)
        linear, linear_state = self.linear(
            inputs, far, *self._lag_and_skip(), state and state.linear, need_state, self.impl
        )
        (log_scale,) = evaluate(inputs.x, [self.log_scale], self.impl)
        if log_scale is not None:
            linear = Branch(linear.y, linear.log_mass + log_scale)
        branches = {"linear": linear, "window": window}
        if window_state is None or linear_state is None:
            return branches, None
        return branches, share(window_state, linear_state, near[1] is far[1])

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

    def shares(self, branches: dict[str, Branch], x: Tensor) -> dict[str, Tensor]:
        if self.spec.merge != "joint":
            return super().shares(branches, x)
        return mass_shares(branches)

    def window_state(self, state: HybridState | None) -> WindowState | None:
        return state.window if state is not None and self.spec.window_rope else None

    def with_window(self, state: HybridState, window: WindowState) -> HybridState:
        return state._replace(window=window)

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> HybridState:
        window = self.window.init_state(self.spec, batch, dtype, device)
        linear = self.linear.init_state(self._lag_and_skip()[0], batch, dtype, device)
        return share(window, linear, self.spec.window_rope == self.spec.feature_rope)

    @torch.no_grad()
    def calibrate(self, inputs: MixerInputs) -> None:
        """Start the log-scale where the mixer's output is closest to the teacher's attention, head by head.

        One number per head, searched on a grid: the branches themselves do not change with it. Giving the linear branch
        the very mass that the teacher puts beyond the window is NOT the best start: untrained features spread that mass
        almost evenly, and too much of an average hurts more than too little of it.
        """
        spec = self.spec
        if self.log_scale is None or not spec.disjoint:
            return
        q, k = (x.transpose(1, 2) for x in inputs.rotated())
        teacher = F.scaled_dot_product_attention(
            q, k, inputs.v.transpose(1, 2), is_causal=True, enable_gqa=True, scale=self.shape.scale
        ).transpose(1, 2)
        branches, _ = self.branches(inputs, None, False)
        near, far = branches["window"], branches["linear"]
        sees_far = torch.isfinite(far.log_mass)
        if not sees_far.any():
            raise LizardzooError(
                f"the calibration text has no sequence longer than window + keep = {spec.window + spec.keep} tokens; "
                f"give a longer text, or none"
            )
        margin = torch.where(sees_far, far.log_mass - near.log_mass, float("-inf"))
        step, error = (far.y - near.y).float(), (near.y - teacher).float()
        # |near + p (far - near) - teacher|^2 as a polynomial in the linear branch's share p of the output
        square, cross = step.square().sum(-1), 2 * (step * error).sum(-1)
        shifts = torch.arange(-10.0, 10.25, 0.25, device=margin.device)
        errors = []
        for shift in shifts:
            share = (margin + shift).sigmoid().float()
            errors.append((square * share.square() + cross * share).sum((0, 1)))
        self.log_scale.bias.add_(shifts[torch.stack(errors).argmin(0)].to(self.log_scale.bias))
