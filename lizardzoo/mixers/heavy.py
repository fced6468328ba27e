"""A window, and the few tokens of the far past that drew most attention while they were in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lizardzoo.config import register_mixer
from lizardzoo.kernels import (
    HeavyState,
    WindowState,
    heavy_attention,
    heavy_attention_step,
    window_and_heavy_attention,
    window_and_heavy_step,
)
from lizardzoo.kernels.heavy import init_state as init_heavy_state
from lizardzoo.mixers.base import AttentionShape, Mixer, MixerInputs
from lizardzoo.mixers.branches import MAX_SIZE, WindowBranch, WindowFields
from lizardzoo.mixers.merge import Branch, joint, mass_shares


@register_mixer("heavy")
@dataclass(frozen=True)
class Heavy(WindowFields):
    """Softmax over a sliding window and over the tokens that mattered most, each exactly as the teacher has them.

    After H2O (arXiv:2306.14048). Nothing has to be learned; a text of window + keep + heavy tokens is the teacher's
    (RoPE, no sinks). Beside its own fields it has those of `WindowFields`.

    Attributes:
        heavy: tokens behind the window that are held, chosen by each key head for itself.
        half_life: tokens in which what a token drew counts half as much as what later ones do; None: it never fades.
    """

    continuous: ClassVar[bool] = False

    heavy: int = 128
    half_life: int | None = 256

    def validate(self) -> None:
        super().validate()
        self.require(1 <= self.heavy <= MAX_SIZE, "heavy", f"from 1 to {MAX_SIZE}")
        if self.half_life is not None:
            self.require(1 <= self.half_life <= MAX_SIZE, "half_life", f"from 1 to {MAX_SIZE}, or None")

    @property
    def exact_within(self) -> int:
        return self.window + self.keep + self.heavy if self.window_rope and not self.sinks else 0

    def build(self, shape: AttentionShape) -> HeavyMixer:
        return HeavyMixer(self, shape)


class HeavyMixerState(NamedTuple):
    """Both branches'."""

    window: WindowState
    heavy: HeavyState


class HeavyMixer(Mixer):
    """Two branches, "window" and "heavy", under one denominator."""

    branch_names = ("window", "heavy")
    turns_steps = True

    def __init__(self, spec: Heavy, shape: AttentionShape) -> None:
        super().__init__(spec, shape)
        self.window = WindowBranch(spec, shape)

    @property
    def kernels(self) -> dict[str, tuple[int, ...]]:
        head: tuple[int, ...] = (self.shape.head_dim,)
        before = {"rotate": head} if self.spec.window_rope else {}
        if self.switched_off:
            return before | {"window_attention": head, "heavy_attention": head}
        return before | {"window_and_heavy_attention": head}

    def forward(
        self, inputs: MixerInputs, state: HeavyMixerState | None = None, need_state: bool = False
    ) -> tuple[Tensor, HeavyMixerState | None]:
        """Both branches in one op where none is switched off."""
        if self.switched_off:
            return super().forward(inputs, state, need_state)
        tokens, options = self._tokens(inputs), self._options(inputs)
        if state is not None and inputs.starts is None and inputs.q.shape[1] == 1:
            y, _, near, far = window_and_heavy_step(*tokens, *state, **options, turn=inputs.turn)
            return y, HeavyMixerState(near, far)
        past, held = state if state is not None else (None, None)
        y, _, window, heavy = window_and_heavy_attention(
            *tokens, **options, window=self.spec.window, heavy=self.spec.heavy, starts=inputs.starts, past=past,
            state=held, return_state=need_state,
        )  # fmt: skip
        return y, None if window is None or heavy is None else HeavyMixerState(window, heavy)

    @torch.no_grad()
    def step_(self, inputs: MixerInputs, state: HeavyMixerState) -> Tensor:
        """Both branches in one kernel where none is switched off."""
        if self.switched_off or inputs.starts is not None:
            return super().step_(inputs, state)
        y, *_ = window_and_heavy_step(
            *self._tokens(inputs), *state, **self._options(inputs), turn=inputs.turn, in_place=True
        )
        return y

    def _tokens(self, inputs: MixerInputs) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as both branches take them."""
        q, k = inputs.rotated(self.impl) if self.spec.window_rope else (inputs.q, inputs.k)
        return q, k, inputs.v

    def _options(self, inputs: MixerInputs) -> dict[str, Any]:
        """What both branches take together, in a sequence and in a step."""
        return {
            "keep": self.spec.keep,
            "half_life": self.spec.half_life,
            "sinks": self.window.sink_logits(),
            "scale": self.shape.scale,
            "mask": inputs.mask,
            "impl": self.impl,
        }

    def branches(
        self, inputs: MixerInputs, state: HeavyMixerState | None, need_state: bool
    ) -> tuple[dict[str, Branch], HeavyMixerState | None]:
        spec = self.spec
        past, held = state if state is not None else (None, None)
        q, k, v = self._tokens(inputs)
        near, window_state = self.window(spec, inputs, (q, k), past, need_state, self.impl)
        if past is not None and held is not None and inputs.starts is None and q.shape[1] == 1:
            y, log_mass, held = heavy_attention_step(
                q, k, v, near.log_mass, past, held, keep=spec.keep, half_life=spec.half_life,
                scale=self.shape.scale, mask=inputs.mask, impl=self.impl,
            )  # fmt: skip
        else:
            y, log_mass, held = heavy_attention(
                q, k, v, near.log_mass, window=spec.window, heavy=spec.heavy, keep=spec.keep,
                half_life=spec.half_life, scale=self.shape.scale, mask=inputs.mask, starts=inputs.starts, past=past,
                state=held, return_state=need_state, impl=self.impl,
            )  # fmt: skip
        branches = {"window": near, "heavy": Branch(y, log_mass)}
        if window_state is None or held is None:
            return branches, None
        return branches, HeavyMixerState(window_state, held)

    def merge(self, branches: dict[str, Branch], x: Tensor) -> Tensor:
        return joint(list(branches.values()), branches[next(iter(branches))].y.dtype)

    def shares(self, branches: dict[str, Branch], x: Tensor) -> dict[str, Tensor]:
        return mass_shares(branches)

    def window_state(self, state: HeavyMixerState | None) -> WindowState | None:
        return state.window if state is not None and self.spec.window_rope else None

    def with_window(self, state: HeavyMixerState, window: WindowState) -> HeavyMixerState:
        return state._replace(window=window)

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> HeavyMixerState:
        spec, shape = self.spec, self.shape
        return HeavyMixerState(
            self.window.init_state(spec, batch, dtype, device),
            init_heavy_state(batch, shape.kv_heads, shape.head_dim, spec.window, spec.heavy, dtype, device),
        )
