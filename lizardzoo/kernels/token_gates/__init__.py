"""Functions of the layer's input, one number per token and head: x W + b, or its log sigmoid, for several W at once.

W has few columns, so all the time goes into reading x: whoever reads it once for all gates is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lizardzoo.errors import LizardzooError
from lizardzoo.kernels.dispatch import Impl, implementation
from lizardzoo.kernels.token_gates import reference

__all__ = ["Gate", "token_gates"]

OP = "token_gates"
MOST = 3
"""Gates of a call."""


class Gate(NamedTuple):
    """weight [hidden, heads] and bias [heads], fp32 (or both float64); log_sigmoid: of x W + b."""

    weight: Tensor
    bias: Tensor
    log_sigmoid: bool = False


def token_gates(x: Tensor, gates: Sequence[Gate], impl: Impl | str = Impl.AUTO) -> tuple[Tensor, ...]:
    """Evaluate gates on the layer's input.

    Args:
        x: [B, T, hidden], of any floating-point dtype.
        gates: at most three.

    Returns:
        For each gate [B, T, heads] in the dtype of its weight. Triton takes the weights of bf16 tokens as two bf16
        terms (16 bits), and others' in fp32.

    Raises:
        LizardzooError: shapes or dtypes that do not fit.
    """
    if not gates:
        return ()
    _check(x, gates)
    return implementation(OP, impl, x.device, reference, _triton).evaluate(x, gates)


def _triton() -> Any:
    from lizardzoo.kernels.token_gates import ops

    return ops


def _check(x: Tensor, gates: Sequence[Gate]) -> None:
    if x.ndim != 3 or not x.dtype.is_floating_point:
        raise LizardzooError(f"{OP}: x is [B, T, hidden], floating-point; got {x.dtype} {list(x.shape)}")
    if len(gates) > MOST:
        raise LizardzooError(f"{OP}: {MOST} gates at most in a call, got {len(gates)}; call it twice")
    for weight, bias, _ in gates:
        fits = weight.ndim == 2 and weight.shape[0] == x.shape[2] and bias.shape == weight.shape[1:]
        if not fits or not weight.dtype == bias.dtype == gates[0].weight.dtype:
            raise LizardzooError(
                f"{OP}: a gate is a weight [{x.shape[2]}, heads] and a bias [heads] of one dtype for all, "
                f"got {weight.dtype} {list(weight.shape)} and {bias.dtype} {list(bias.shape)}"
            )
        if torch.promote_types(x.dtype, weight.dtype) != weight.dtype:
            raise LizardzooError(f"{OP}: weights are {weight.dtype}, less than the tokens' {x.dtype}; cast the tokens")
