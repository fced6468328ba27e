"""Kept keys brought nearer to a query: rotated where they are read, held as they were."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from lizardzoo.kernels.dispatch import Impl
from lizardzoo.kernels.rotary import rotate
from lizardzoo.kernels.window.state import WindowState

Turn: TypeAlias = tuple[Tensor, Tensor]
"""cos and sin [B or 1, 1, D]."""


def turned(state: WindowState, turn: Turn | None, impl: Impl | str) -> WindowState:
    """The state with its kept keys rotated by `turn` from where they stand, in their own dtype; see `rotate`."""
    keep = state.kept_k.shape[1]
    if turn is None or keep == 0:
        return state
    cos, sin = (x.expand(-1, keep, -1) for x in turn)
    return state._replace(kept_k=rotate(state.kept_k, state.kept_k, cos, sin, impl)[0])


def as_held(new: WindowState, before: WindowState, starts: Tensor | None = None) -> WindowState:
    """The state behind a call that began with `turned(before, ...)`: what was kept before stands as it stood.

    starts [B, T]: of that call; where a document has begun, nothing of before is kept.
    """
    ranks = torch.arange(before.kept_k.shape[1], device=before.length.device)
    there = ranks < before.length[:, None]
    if starts is not None:
        there = there & ~starts.any(1, keepdim=True)
    return new._replace(kept_k=torch.where(there[..., None, None], before.kept_k, new.kept_k))
