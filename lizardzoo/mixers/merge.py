"""A branch's result, and the three ways the papers merge two of them."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Merge = Literal["sum", "none", "joint"]


class Branch(NamedTuple):
    """y [B, T, H, D], normalized; log_mass [B, T, H], the log of its denominator (-inf: it saw nothing)."""

    y: Tensor
    log_mass: Tensor


def joint(branches: list[Branch], dtype: torch.dtype) -> Tensor:
    """One denominator for all branches (LoLCATs): sum_b e^{m_b} y_b / sum_b e^{m_b}; log-scales are in the masses."""
    masses = torch.stack([branch.log_mass for branch in branches])
    peak = masses.detach().amax(0)
    shares = (masses - torch.where(peak == float("-inf"), 0.0, peak)).exp()
    total = shares.sum(0)
    shares = shares / torch.where(total == 0, 1.0, total)
    y = sum(share[..., None] * branch.y for share, branch in zip(shares, branches, strict=True))
    assert isinstance(y, Tensor)
    return y.to(dtype)


def unnormalized(branch: Branch) -> Tensor:
    """The linear branch without its denominator (Lizard's recurrent form)."""
    return branch.log_mass.exp()[..., None] * branch.y
