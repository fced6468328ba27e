"""Gates by the Triton kernels: launches, torch op with its gradients."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lizardzoo.errors import LizardzooError
from lizardzoo.kernels.launching import launch, power_of_2, prepared, unit_stride
from lizardzoo.kernels.token_gates import triton as kernels

INTERPRETED = kernels.INTERPRETED
MAX_COLUMNS = 128
"""Of the gates of one launch: a tile holds them side by side."""
FEW = 64
"""Rows up to which columns are spread over programs."""
PROGRAMS = 512
"""Programs that share a gradient, some for each multiprocessor."""


def evaluate(x, gates):
    """See `lizardzoo.kernels.token_gates.token_gates`."""
    each = [gate.bias.shape[0] for gate in gates]
    if gates[0].weight.dtype != torch.float32 or max(each) > MAX_COLUMNS:
        raise LizardzooError(
            f"token_gates: triton takes float32 weights for up to {MAX_COLUMNS} heads, got {gates[0].weight.dtype} for "
            f"{max(each)}; pass impl='reference'"
        )
    if sum(each) > MAX_COLUMNS:
        return tuple(y for gate in gates for y in evaluate(x, [gate]))
    rows = unit_stride(x).reshape(-1, x.shape[2])  # a view, unless the sequences' strides do not fold into one
    weights, biases = [g.weight.contiguous() for g in gates], [g.bias.contiguous() for g in gates]
    sigmoids = sum(gate.log_sigmoid << place for place, gate in enumerate(gates))
    if torch.compiler.is_compiling():
        found = _operator(rows, weights, biases, sigmoids)
    elif torch.is_grad_enabled():
        found = _Gates.apply(rows, sigmoids, *weights, *biases)
    else:
        found = compute(rows, weights, biases, sigmoids)
    return tuple(y.unflatten(0, x.shape[:2]) for y in found)


def _halves(parameters: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Two lists of one length that were given as one."""
    return list(parameters[: len(parameters) // 2]), list(parameters[len(parameters) // 2 :])


def _three(tensors: Any) -> tuple[Tensor, ...]:
    """Pointers for three gates; those of an absent gate are never read."""
    return (*tensors, *(tensors[0],) * (3 - len(tensors)))


def _sizes(x: Tensor, weights: list[Tensor], sigmoids: int) -> tuple[int, dict[str, Any]]:
    """All columns together, and the compile-time arguments of every kernel."""
    each = [weight.shape[1] for weight in weights] + [0] * (3 - len(weights))
    return sum(each), {"K": x.shape[1], "N0": each[0], "N1": each[1], "N2": each[2], "SIGMOIDS": sigmoids}


def _tile(x: Tensor, columns: int) -> tuple[str, dict[str, int]]:
    """Operands of the products, and the tile of a program."""
    if INTERPRETED:  # which gets products of bf16 wrong; small inputs have several tiles of 16
        operand, side = "fp32", 16
    else:
        operand, side = ("bf16", 64) if x.dtype == torch.bfloat16 else ("fp32", 32)
    return operand, {"BM": side, "BN": power_of_2(columns), "BK": side}


@prepared
def _launch(x, sigmoids, *parameters):
    weights, biases = _halves(parameters)
    count = x.shape[0]
    found = [x.new_empty((count, weight.shape[1]), dtype=torch.float32) for weight in weights]
    columns, sizes = _sizes(x, weights, sigmoids)
    pointers = (x, *_three(weights), *_three(biases), *_three(found))
    numbers, (operand, tile) = (count, x.stride(0)), _tile(x, columns)
    if not count:
        return tuple(found)
    if count <= FEW:
        tile = {"BM": 16, "BN": 2, "BK": 16 if INTERPRETED else 512}
        grid = (-(-columns // 2), -(-count // 16))
        launch(kernels.few_rows_kernel, grid, pointers, numbers, {**sizes, **tile}, num_warps=8)
    else:
        constants = {**sizes, "OPERAND": operand, **tile}
        grid = -(-count // tile["BM"]), 1
        launch(kernels.forward_kernel, grid, pointers, numbers, constants, num_warps=4, num_stages=1)
    return tuple(found)


def compute(x: Tensor, weights: list[Tensor], biases: list[Tensor], sigmoids: int) -> list[Tensor]:
    """Each gate's [M, heads] fp32 of x [M, hidden]; weights and biases are contiguous."""
    return list(_launch(x, sigmoids, *weights, *biases))


@prepared
def _launch_backward(x, sigmoids, tokens, *parameters):
    """Of x, and parts that sum to those of weights and biases."""
    (weights, found), given = _halves(parameters[: len(parameters) // 3 * 2]), parameters[len(parameters) // 3 * 2 :]
    count, (columns, sizes) = x.shape[0], _sizes(x, weights, sigmoids)
    operand, tile = _tile(x, columns)
    across, blocks = -(-x.shape[1] // tile["BK"]), max(1, -(-count // tile["BM"]))
    span = -(-blocks // max(1, PROGRAMS // across))
    parts = -(-blocks // span)
    d_x = x.new_empty(x.shape if tokens else (0,))
    d_w = x.new_empty((parts, x.shape[1], columns), dtype=torch.float32)
    d_b = x.new_empty((parts, columns), dtype=torch.float32)
    launch(
        kernels.gradient_kernel, (across, parts),
        (x, *_three(weights), *_three(found), *_three(given), d_x, d_w, d_b),
        (count, x.stride(0), span),
        {**sizes, "OPERAND": operand, "TOKENS": tokens, **tile}, num_warps=4, num_stages=1,
    )  # fmt: skip
    return d_x, d_w, d_b


def gradients(
    x: Tensor, weights: list[Tensor], found: list[Tensor], given: list[Tensor], sigmoids: int, tokens: bool
) -> list[Tensor]:
    """Of x (empty unless `tokens`), of all weights side by side [hidden, N], and of all biases [N]."""
    d_x, d_w, d_b = _launch_backward(x, sigmoids, tokens, *weights, *found, *given)
    return [d_x, d_w.sum(0), d_b.sum(0)]


_operator = torch.library.custom_op(
    "lizardzoo::token_gates",
    compute,
    mutates_args=(),
    schema="(Tensor x, Tensor[] weights, Tensor[] biases, int sigmoids) -> Tensor[]",
)
_backward = torch.library.custom_op(
    "lizardzoo::token_gates_backward",
    gradients,
    mutates_args=(),
    schema="(Tensor x, Tensor[] weights, Tensor[] found, Tensor[] given, int sigmoids, bool tokens) -> Tensor[]",
)


@_operator.register_fake
def _(x, weights, biases, sigmoids):
    return [x.new_empty(x.shape[0], weight.shape[1], dtype=torch.float32) for weight in weights]


@_backward.register_fake
def _(x, weights, found, given, sigmoids, tokens):
    columns = sum(weight.shape[1] for weight in weights)
    wide = [x.new_empty(shape, dtype=torch.float32) for shape in ((x.shape[1], columns), (columns,))]
    return [x.new_empty(x.shape if tokens else (0,)), *wide]


def _setup_context(ctx, inputs, output):
    x, weights, _, ctx.sigmoids = inputs
    ctx.save_for_backward(x, *weights, *output)


def _given(backward, ctx, given):
    """Gradients of x (None unless wanted), of each weight and of each bias."""
    x, *rest = ctx.saved_tensors
    weights, found = rest[: len(given)], rest[len(given) :]
    wanted = ctx.needs_input_grad[0]
    d_x, d_w, d_b = backward(x, weights, found, [g.contiguous() for g in given], ctx.sigmoids, wanted)
    each = [weight.shape[1] for weight in weights]
    return d_x if wanted else None, d_w.split(each, 1), d_b.split(each)


def _autograd(ctx, given):
    d_x, d_w, d_b = _given(_backward, ctx, given)
    return d_x, list(d_w), list(d_b), None


_operator.register_autograd(_autograd, setup_context=_setup_context)


class _Gates(torch.autograd.Function):
    """The same without an operator's slow way through torch's dispatcher."""

    @staticmethod
    def forward(ctx, x, sigmoids, *parameters):
        weights, biases = _halves(parameters)
        found = compute(x, weights, biases, sigmoids)
        _setup_context(ctx, (x, weights, biases, sigmoids), found)
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx, *given):
        d_x, d_w, d_b = _given(gradients, ctx, given)
        return d_x, None, *d_w, *d_b
