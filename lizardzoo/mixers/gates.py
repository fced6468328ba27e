"""Functions of the layer's input, one number per token and head: decay, input gate, log-scale. All start constant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from lizardzoo.kernels import Impl, token_gates
from lizardzoo.kernels.token_gates import Gate
from lizardzoo.mixers.base import start_value


class TokenGate(nn.Module):
    """x.W + b: [B, T, hidden] -> [B, T, heads], fp32. W starts at zero; without `per_token` there is no W."""

    log_sigmoid: ClassVar[bool] = False

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

    def forward(self) -> tuple[Tensor | None, Tensor]:
        """W and b; as a call of the module, so that hooks of whoever moves or gathers parameters are asked."""
        return self.weight, self.bias


class DecayGate(TokenGate):
    """log sigmoid(x.W + b): the log-decay of the memory, started at log(start), 0 < start < 1."""

    log_sigmoid = True

    def __init__(self, hidden_size: int, heads: int, *, start: float) -> None:
        super().__init__(hidden_size, heads, start=math.log(start / (1 - start)))


def evaluate(x: Tensor, gates: Sequence[TokenGate | None], impl: Impl | str = Impl.AUTO) -> list[Tensor | None]:
    """[B, T, heads] of each gate that is there, from the layer's input x [B, T, hidden], which is read once for all."""
    found = [None if gate is None else (*gate(), gate.log_sigmoid) for gate in gates]
    read = [Gate(*parts) for parts in found if parts is not None and parts[0] is not None]
    values = iter(token_gates(x, read, impl))
    return [
        None if parts is None else parts[1].expand(*x.shape[:2], -1) if parts[0] is None else next(values)
        for parts in found
    ]


def kernels(gates: Sequence[TokenGate | None]) -> dict[str, tuple[int, ...]]:
    """The op that evaluates gates which read the layer's input, and the heads of each; see `Mixer.kernels`."""
    heads = tuple(gate.bias.shape[0] for gate in gates if gate is not None and gate.weight is not None)
    return {"token_gates": heads} if heads else {}
