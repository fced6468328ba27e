"""Gates of the layer's input: against the formula head by head, and what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lizardzoo import LizardzooError
from lizardzoo.kernels import token_gates
from lizardzoo.kernels.token_gates import Gate


def gate(heads: int, log_sigmoid: bool = False, hidden: int = 5, dtype: torch.dtype = torch.float64) -> Gate:
    return Gate(torch.randn(hidden, heads, dtype=dtype), torch.randn(heads, dtype=dtype), log_sigmoid)


def test_each_head_of_each_token_is_a_scalar_product() -> None:
    torch.manual_seed(0)
    x, gates = torch.randn(2, 3, 5, dtype=torch.float64), [gate(2, True), gate(1), gate(4)]
    for found, (weight, bias, log_sigmoid) in zip(token_gates(x, gates), gates, strict=True):
        for b, t, h in torch.cartesian_prod(*map(torch.arange, found.shape)).tolist():
            z = sum(x[b, t, d] * weight[d, h] for d in range(5)) + bias[h]
            expected = (1 / (1 + (-z).exp())).log() if log_sigmoid else z
            torch.testing.assert_close(found[b, t, h], expected, rtol=1e-12, atol=1e-12)


def test_bf16_tokens_meet_fp32_weights_in_fp32() -> None:
    x, given = torch.randn(1, 4, 5).bfloat16(), gate(2, dtype=torch.float32)
    (found,) = token_gates(x, [given])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, x.float() @ given.weight + given.bias)


def test_no_gate_is_no_work() -> None:
    assert token_gates(torch.randn(1, 2, 3), []) == ()


@pytest.mark.parametrize(
    ("x", "gates", "message"),
    [
        (torch.zeros(2, 5), [gate(1)], r"x is \[B, T, hidden\]"),
        (torch.zeros(1, 2, 5, dtype=torch.int), [gate(1)], "floating-point"),
        (torch.zeros(1, 2, 4), [gate(1)], r"a weight \[4, heads\]"),
        (torch.zeros(1, 2, 5), [gate(1)._replace(bias=torch.zeros(2, dtype=torch.float64))], r"a bias \[heads\]"),
        (torch.zeros(1, 2, 5), [gate(1), gate(1, dtype=torch.float32)], "one dtype"),
        (torch.zeros(1, 2, 5, dtype=torch.float64), [gate(1, dtype=torch.float32)], "cast the tokens"),
        (torch.zeros(1, 2, 5), [gate(1)] * 4, "3 gates at most"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(x: Any, gates: list[Gate], message: str) -> None:
    with pytest.raises(LizardzooError, match=message):
        token_gates(x, gates)
