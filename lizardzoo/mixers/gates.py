"""Functions of the layer's input, one number per token and head: decay, input gate, log-scale. All start constant."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lizardzoo.mixers.base import start_value


class TokenGate(nn.Module):
    """x.W + b: [B, T, hidden] -> [B, T, heads], fp32. W starts at zero; without `per_token` there is no W."""

    def __init__(self, hidden_size: int, heads: int, *, start: float = 0.0, per_token: bool = True) -> None:
        super().__init__()
        self.start = start
        self.weight = nn.Parameter(torch.empty(hidden_size, heads, dtype=torch.float32)) if per_token else None
        self.bias = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero weights, and the bias at its start."""
        if self.weight is not None:
            start_value(self.weight, 0.0)
        start_value(self.bias, self.start)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, heads]."""
        if self.weight is None:
            return self.bias.expand(*x.shape[:2], -1)
        return x.to(self.weight.dtype) @ self.weight + self.bias


class DecayGate(TokenGate):
    """log sigmoid(x.W + b): the log-decay of the memory, started at log(start), 0 < start < 1."""

    def __init__(self, hidden_size: int, heads: int, *, start: float) -> None:
        super().__init__(hidden_size, heads, start=math.log(start / (1 - start)))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, heads], <= 0."""
        return F.logsigmoid(super().forward(x))
