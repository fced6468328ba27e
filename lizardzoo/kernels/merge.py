"""One denominator for branches over different tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NEG_INF = float("-inf")


def add_log_scale(log_mass: Tensor, log_scale: Tensor | None, mask: Tensor | None) -> Tensor:
    """log_mass + log_scale [B, T, H], which may be anything at padded tokens (mask [B, T]); -inf stays -inf."""
    if log_scale is None:
        return log_mass
    if mask is not None:
        log_scale = torch.where(mask[..., None], log_scale, 0.0)
    return torch.where(log_mass == NEG_INF, NEG_INF, log_mass + log_scale)


def joint(branches: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One denominator for all branches (LoLCATs, arXiv:2410.10254): sum_b e^{m_b} y_b / sum_b e^{m_b}.

    A branch that saw nothing (-inf) adds nothing and gets zero gradients.

    Args:
        branches: each branch's y [B, T, H, D] and log_mass m [B, T, H].

    Returns:
        y [B, T, H, D] and the log of the one denominator [B, T, H], both in log_mass's dtype; 0 and -inf where
        no branch saw anything.
    """
    masses = torch.stack([log_mass for _, log_mass in branches])
    peak = masses.detach().amax(0)
    peak = torch.where(peak == NEG_INF, 0.0, peak)
    shares = (masses - peak).exp()
    total = shares.sum(0)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    y = sum((share / total)[..., None] * y for share, (y, _) in zip(shares, branches, strict=True))
    assert isinstance(y, Tensor)
    return y, torch.where(empty, NEG_INF, total.log() + peak)
