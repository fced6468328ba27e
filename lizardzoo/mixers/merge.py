"""A branch's result, and the three ways the papers merge two of them."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lizardzoo.kernels import merge

Merge = Literal["sum", "none", "joint"]


class Branch(NamedTuple):
    """What a branch returns.

    Attributes:
        y: [B, T, H, D], normalized: a weighted mean of values; 0 where it saw nothing.
        log_mass: [B, T, H], fp32: the log of its denominator; -inf where it saw nothing.
    """

    y: Tensor
    log_mass: Tensor


def joint(branches: list[Branch], dtype: torch.dtype) -> Tensor:
    """One denominator for all branches (LoLCATs); log-scales are in the masses."""
    return merge.joint(branches)[0].to(dtype)


def mass_shares(branches: dict[str, Branch]) -> dict[str, Tensor]:
    """Under one denominator a branch's part of the output is its part of the mass; [B, T, H] each."""
    masses = torch.stack([branch.log_mass for branch in branches.values()])
    return dict(zip(branches, masses.softmax(0)))


def unnormalized(branch: Branch) -> Tensor:
    """The linear branch without its denominator (Lizard's recurrent form)."""
    return branch.log_mass.exp()[..., None] * branch.y
