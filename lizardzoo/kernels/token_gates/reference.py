"""Gates in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from lizardzoo.kernels.token_gates import Gate


def evaluate(x: Tensor, gates: Sequence[Gate]) -> tuple[Tensor, ...]:
    """See `lizardzoo.kernels.token_gates.token_gates`."""
    x = x.to(gates[0].weight.dtype)
    return tuple(F.logsigmoid(x @ g.weight + g.bias) if g.log_sigmoid else x @ g.weight + g.bias for g in gates)
