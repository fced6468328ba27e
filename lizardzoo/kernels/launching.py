"""Launching a Triton kernel again without asking Triton which of its compiled forms is meant.

Triton looks at every argument of every launch, which takes longer than the launch itself; short sequences wait for the
host. Here the caller says once what decides the form.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_FORMS: dict[tuple[Any, ...], Any] = {}


def power_of_2(n: int) -> int:
    """The next one, at least 16: no product takes fewer."""
    return max(16, 1 << (n - 1).bit_length())


def unit_stride(x: Tensor) -> Tensor:
    """x with its numbers side by side along the last axis, as kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(*tensors: Tensor) -> tuple[int, ...]:
    """Of the first three axes, as kernels take them."""
    return tuple(stride for x in tensors for stride in x.stride()[:3])


def decisive(*tensors: Tensor | None) -> tuple[Any, ...]:
    """What a compiled form depends on: which tensors are there, dtypes, what Triton asks of the strides."""
    return tuple(x if x is None else (x.dtype, *((s == 1, s % 16 == 0, s >> 31) for s in x.stride())) for x in tensors)


def launch(
    kernel: Any, grid: tuple[int, ...], form: tuple[Any, ...], arguments: tuple[Any, ...], constants: dict[str, Any],
    **options: Any,
) -> None:  # fmt: skip
    """`kernel[grid](*arguments, **constants, **options)`.

    Args:
        form: all that decides the compiled form beside constants and options: `decisive` of the tensors that a caller
            gave, and the value of every number that the kernel specializes. (Their alignment is looked at here.)
        constants: the kernel's compile-time arguments, in its own order, behind all others.
    """
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    aligned = tuple([x.data_ptr() % 16 == 0 for x in arguments if isinstance(x, Tensor)])
    key = (id(kernel), device, form, aligned, *constants.values(), *options.values())
    compiled = _FORMS.get(key)
    if compiled is None:
        names = kernel.arg_names[len(arguments) :]
        assert names == list(constants), f"compile-time arguments are {names}, got {list(constants)}"
        compiled = kernel[grid](*arguments, **constants, **options)
        if compiled is not None:  # Triton's interpreter compiles nothing
            _FORMS[key] = compiled
    else:
        compiled[(*grid, 1, 1)[:3]](*arguments, *constants.values())
