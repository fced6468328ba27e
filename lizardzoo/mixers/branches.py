"""The two branches that mixers are made of: the fields that describe them and the modules that compute them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lizardzoo.config import MixerSpec
from lizardzoo.kernels import (
    GatedLinearState,
    Impl,
    WindowState,
    gated_linear_attention,
    gated_linear_attention_step,
    window_attention,
    window_attention_step,
)
from lizardzoo.kernels.features import Activation
from lizardzoo.kernels.gated_linear import init_state as init_linear_state
from lizardzoo.kernels.window import init_state as init_window_state
from lizardzoo.mixers.base import AttentionShape, Mixer, MixerInputs, start_value
from lizardzoo.mixers.feature_maps import HedgehogMap
from lizardzoo.mixers.gates import DecayGate, TokenGate, evaluate
from lizardzoo.mixers.merge import Branch

MAX_SIZE = 1 << 20
"""Bound on every size field, so that a config from a stranger cannot ask for absurd memory."""


@dataclass(frozen=True)
class WindowFields(MixerSpec):
    """Fields of a window branch (Lizard, arXiv:2507.09025, section 3.2).

    Attributes:
        window: keys a query sees, itself included; a run-time choice (`model.set_window`).
        keep: first tokens of the text that stay visible for ever.
        sinks: learned logits in the denominator (meta memory), per layer.
        window_rope: RoPE on the window's q and k.
    """

    window: int = 128
    keep: int = 4
    sinks: int = 0
    window_rope: bool = True

    def validate(self) -> None:
        super().validate()
        self.require(1 <= self.window <= MAX_SIZE, "window", f"from 1 to {MAX_SIZE}")
        self.require(0 <= self.keep <= MAX_SIZE, "keep", f"from 0 to {MAX_SIZE}")
        self.require(0 <= self.sinks <= MAX_SIZE, "sinks", f"from 0 to {MAX_SIZE}")


@dataclass(frozen=True)
class LinearFields(MixerSpec):
    """Fields of a gated linear branch (Lizard, arXiv:2507.09025, section 3.1).

    Attributes:
        feature_dim: width of a feature map's half (2 x feature_dim features); None = head_dim.
        activation: "softmax" over each half's features, or "exp".
        maps: one feature map per "head" or per "layer".
        feature_rope: feature maps after RoPE instead of before it.
        gate: one decay per "token", per token and "kv_head", or per token and "query_head"; None = no decay.
        gate_init: the decay at the start, between 0 and 1.
        input_gate: a learned weight per token and kv head with which it enters the memory.
    """

    feature_dim: int | None = None
    activation: Activation = "softmax"
    maps: Literal["head", "layer"] = "head"
    feature_rope: bool = False
    gate: Literal["token", "kv_head", "query_head"] | None = "kv_head"
    gate_init: float = 0.999
    input_gate: bool = True

    def validate(self) -> None:
        super().validate()
        if self.feature_dim is not None:
            self.require(1 <= self.feature_dim <= MAX_SIZE, "feature_dim", f"from 1 to {MAX_SIZE}, or None")
        self.require(0 < self.gate_init < 1, "gate_init", "between 0 and 1")


class Sinks(nn.Module):
    """Meta memory: `logits` [m] fp32, shared by the layer's heads. Called, so that offloaded ones are there."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.empty(count, dtype=torch.float32))

    def reset_parameters(self) -> None:
        """They start at zero."""
        start_value(self.logits, 0.0)

    def forward(self) -> Tensor:
        """The logits."""
        return self.logits


class WindowBranch(nn.Module):
    """Sliding-window softmax with kept tokens and meta memory."""

    def __init__(self, spec: WindowFields, shape: AttentionShape) -> None:
        super().__init__()
        self.shape = shape
        self.sinks = Sinks(spec.sinks) if spec.sinks else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Those of the sinks."""
        if self.sinks is not None:
            self.sinks.reset_parameters()

    def sink_logits(self) -> Tensor | None:
        """[m] fp32; None without sinks."""
        return None if self.sinks is None else self.sinks()

    def forward(
        self,
        spec: WindowFields,
        inputs: MixerInputs,
        qk: tuple[Tensor, Tensor],
        state: WindowState | None,
        need_state: bool,
        impl: Impl,
        in_place: bool = False,
    ) -> tuple[Branch, WindowState | None]:
        """The branch on q, k of the caller's choice (rotated or not)."""
        q, k = qk
        if state is not None and inputs.starts is None and q.shape[1] == 1:
            y, log_mass, state = window_attention_step(
                q, k, inputs.v, state, keep=spec.keep, sinks=self.sink_logits(), scale=self.shape.scale,
                mask=inputs.mask, turn=inputs.turn, in_place=in_place, impl=impl,
            )  # fmt: skip
        else:
            y, log_mass, state = window_attention(
                q, k, inputs.v, window=spec.window, keep=spec.keep, sinks=self.sink_logits(), scale=self.shape.scale,
                mask=inputs.mask, starts=inputs.starts, state=state, return_state=need_state, impl=impl,
            )  # fmt: skip
        return Branch(y, log_mass), state

    def init_state(self, spec: WindowFields, batch: int, dtype: torch.dtype, device: torch.device | str) -> WindowState:
        """Before the first token."""
        return init_window_state(batch, self.shape.kv_heads, self.shape.head_dim, spec.window, spec.keep, dtype, device)


class LinearBranch(nn.Module):
    """Gated linear attention with Hedgehog features."""

    def __init__(self, spec: LinearFields, shape: AttentionShape) -> None:
        super().__init__()
        self.shape = shape
        self.feature_dim = spec.feature_dim or shape.head_dim
        query_heads, key_heads = (shape.heads, shape.kv_heads) if spec.maps == "head" else (1, 1)
        self.feature_map = HedgehogMap(query_heads, key_heads, shape.head_dim, self.feature_dim, spec.activation)
        gates = {"token": 1, "kv_head": shape.kv_heads, "query_head": shape.heads, None: 0}
        self.decay_heads = gates[spec.gate]
        self.input_heads = shape.kv_heads if spec.input_gate else 0
        hidden = shape.hidden_size
        self.decay = DecayGate(hidden, self.decay_heads, start=spec.gate_init) if self.decay_heads else None
        self.input_gate = TokenGate(hidden, self.input_heads) if self.input_heads else None

    def reset_parameters(self) -> None:
        """Identity maps, constant gates."""
        for child in self.children():
            child.reset_parameters()  # type: ignore[operator]

    def gates(self, x: Tensor, impl: Impl = Impl.AUTO) -> tuple[Tensor | None, Tensor | None]:
        """log_decay and log_input [B, T, heads] of the layer's input x; None where there is no such gate."""
        log_decay, log_input = evaluate(x, [self.decay, self.input_gate], impl)
        return log_decay, log_input

    def forward(
        self,
        inputs: MixerInputs,
        qk: tuple[Tensor, Tensor],
        lag: int,
        skip: int,
        state: GatedLinearState | None,
        need_state: bool,
        impl: Impl,
        in_place: bool = False,
    ) -> tuple[Branch, GatedLinearState | None]:
        """The branch on q, k of the caller's choice (rotated or not)."""
        q, k = qk
        log_decay, log_input = self.gates(inputs.x, impl)
        maps = self.feature_map()
        if state is not None and inputs.starts is None and q.shape[1] == 1:
            y, log_mass, state = gated_linear_attention_step(
                q, k, inputs.v, log_decay, state, log_input=log_input, feature_map=maps, skip=skip,
                mask=inputs.mask, in_place=in_place, impl=impl,
            )  # fmt: skip
        else:
            y, log_mass, state = gated_linear_attention(
                q, k, inputs.v, log_decay, log_input=log_input, feature_map=maps, lag=lag, skip=skip,
                mask=inputs.mask, starts=inputs.starts, state=state, return_state=need_state, impl=impl,
            )  # fmt: skip
        return Branch(y, log_mass), state

    def init_state(self, lag: int, batch: int, dtype: torch.dtype, device: torch.device | str) -> GatedLinearState:
        """Before the first token."""
        shape = self.shape
        return init_linear_state(
            batch, shape.heads, shape.kv_heads, shape.head_dim, 2 * self.feature_dim, lag, self.decay_heads,
            self.input_heads, dtype, device,
        )  # fmt: skip


class OneBranch(Mixer):
    """A mixer of one of them, whose state moves on in place where it can."""

    def branches(
        self, inputs: MixerInputs, state: Any | None, need_state: bool, in_place: bool = False
    ) -> tuple[dict[str, Branch], Any | None]:
        raise NotImplementedError

    @torch.no_grad()
    def step_(self, inputs: MixerInputs, state: Any) -> Tensor:
        if inputs.starts is not None:
            return super().step_(inputs, state)
        branches, _ = self.branches(inputs, state, True, in_place=True)
        return self.output(branches, inputs)
