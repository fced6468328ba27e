"""What hybrid attention remembers."""

from __future__ import annotations

from typing import NamedTuple

from lizardzoo.kernels.gated_linear.state import GatedLinearState
from lizardzoo.kernels.window.state import WindowState


class HybridState(NamedTuple):
    """Both branches' states, made by `share`: what both would hold is one tensor.

    Attributes:
        window: what the window remembers.
        linear: what the linear branch remembers.
    """

    window: WindowState
    linear: GatedLinearState


def share(window: WindowState, linear: GatedLinearState, same_keys: bool) -> HybridState:
    """Hold once what both branches hold.

    They see the same tokens, hence one `length`. With lag = window the tokens in the window are those that wait: one
    ring of values, and one of keys where both branches take the `same_keys`.
    """
    linear = linear._replace(length=window.length)
    if linear.v.shape[1] == window.v.shape[1]:
        linear = linear._replace(v=window.v, k=window.k if same_keys else linear.k)
    return HybridState(window, linear)
