"""An operator's eager twin: the same function and gradients, without the slow way through torch's dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def eager(
    compute: Callable[..., Any], setup_context: Callable[..., None], gradients: Callable[..., Any]
) -> Callable[..., Any]:
    """`compute` with its gradients, which have none of their own; plainly `compute` where gradients are off.

    Args:
        compute: of the inputs; a tensor, or a tuple of tensors.
        setup_context: of (ctx, inputs, output), as `torch.library.register_autograd` takes it.
        gradients: of (ctx, *gradients of the output); one for each input, None where there is none.
    """

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = compute(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *given: Any) -> Any:
            return gradients(ctx, *given)

    def run(*inputs: Any) -> Any:
        return Function.apply(*inputs) if torch.is_grad_enabled() else compute(*inputs)

    return run
