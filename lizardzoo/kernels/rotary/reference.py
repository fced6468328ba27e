"""Rotary position embedding in plain PyTorch, operation by operation as transformers' Llama has it."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `lizardzoo.kernels.rotary.rotate`."""
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return (q * cos + _rotate_half(q) * sin).to(q.dtype), (k * cos + _rotate_half(k) * sin).to(k.dtype)


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)
