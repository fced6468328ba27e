"""Sliding-window attention alone, with kept first tokens and meta memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lizardzoo.config import register_mixer
from lizardzoo.kernels import WindowState
from lizardzoo.mixers.base import AttentionShape, MixerInputs
from lizardzoo.mixers.branches import OneBranch, WindowBranch, WindowFields
from lizardzoo.mixers.merge import Branch


@register_mixer("window")
@dataclass(frozen=True)
class Window(WindowFields):
    """Softmax over a sliding window; on a prompt that fits the window it is the teacher (RoPE, no sinks).

    Its fields are those of `WindowFields`.
    """

    @property
    def exact_within(self) -> int:
        return self.window if self.window_rope and not self.sinks else 0

    @property
    def reach(self) -> int | None:
        return self.window if self.keep == 0 else None

    def build(self, shape: AttentionShape) -> WindowMixer:
        return WindowMixer(self, shape)


class WindowMixer(OneBranch):
    """One branch, "window"."""

    branch_names = ("window",)
    turns_steps = True

    def __init__(self, spec: Window, shape: AttentionShape) -> None:
        super().__init__(spec, shape)
        self.window = WindowBranch(spec, shape)

    @property
    def kernels(self) -> dict[str, tuple[int, ...]]:
        head: tuple[int, ...] = (self.shape.head_dim,)
        return ({"rotate": head} if self.spec.window_rope else {}) | {"window_attention": head}

    def branches(
        self, inputs: MixerInputs, state: WindowState | None, need_state: bool, in_place: bool = False
    ) -> tuple[dict[str, Branch], WindowState | None]:
        qk = inputs.rotated(self.impl) if self.spec.window_rope else (inputs.q, inputs.k)
        branch, state = self.window(self.spec, inputs, qk, state, need_state, self.impl, in_place)
        return {"window": branch}, state

    def merge(self, branches: dict[str, Branch], x: Tensor) -> Tensor:
        return branches["window"].y

    def window_state(self, state: WindowState | None) -> WindowState | None:
        return state if self.spec.window_rope else None

    def with_window(self, state: WindowState, window: WindowState) -> WindowState:
        return window

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> WindowState:
        return self.window.init_state(self.spec, batch, dtype, device)
