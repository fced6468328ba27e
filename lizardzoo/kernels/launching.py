"""Launching a Triton kernel again without asking Triton which of its compiled forms is meant.

Triton looks at every argument of every launch, which takes longer than the launch itself; short sequences wait for the
host. Here the caller says once what decides the form.
"""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

FORMS = 10_000
_FORMS: dict[tuple[Any, ...], Any] = {}


def power_of_2(n: int) -> int:
    """The next one, at least 16: no product takes fewer."""
    return max(16, 1 << (n - 1).bit_length())


def unit_stride(x: Tensor) -> Tensor:
    """x with its numbers side by side along the last axis, as kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(*tensors: Tensor) -> tuple[int, ...]:
    """Of the first three axes, as kernels take them."""
    found: tuple[int, ...] = ()
    for x in tensors:
        found += x.stride()[:3]
    return found


def decisive(*tensors: Tensor | None) -> tuple[Any, ...]:
    """What a compiled form depends on: which tensors are there, dtypes, and strides."""
    return tuple([x if x is None else (x.dtype, x.stride()) for x in tensors])


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    form: tuple[Any, ...],
    pointers: tuple[Tensor | None, ...],
    numbers: tuple[float, ...],
    constants: dict[str, Any],
    **options: Any,
) -> None:
    """`kernel[grid](*pointers, *numbers, **constants, **options)`, on the device of the tensors.

    Args:
        form: all that decides the compiled form beside constants and options: `decisive` of the tensors that a caller
            gave, and the value of every number that the kernel specializes. (Their alignment is looked at here.)
        constants: the kernel's compile-time arguments, in its own order, behind all others.
    """
    device = (pointers[0] if pointers[0] is not None else next(x for x in pointers if x is not None)).get_device()
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, form, pointers, numbers, constants, **options)
    # addresses in place of tensors: Triton would ask each for it, and the driver whether it lies on the device
    addresses = [None if x is None else x.data_ptr() for x in pointers]
    aligned: Any = not reduce(or_, filter(None, addresses), 0) % 16
    if not aligned:
        aligned = tuple([x is None or x % 16 == 0 for x in addresses])
    key = (id(kernel), device, form, aligned, *constants.values(), *options.values())
    compiled = _FORMS.get(key)
    if compiled is not None:
        stream = torch._C._cuda_getCurrentRawStream(device)
        compiled[(*grid, 1, 1)[:3]](*addresses, *numbers, *constants.values(), stream=stream)
        return None
    names = kernel.arg_names[len(pointers) + len(numbers) :]
    assert names == list(constants), f"compile-time arguments are {names}, got {list(constants)}"
    compiled = kernel[grid](*pointers, *numbers, **constants, **options)
    if compiled is not None:  # Triton's interpreter compiles nothing
        if len(_FORMS) >= FORMS:  # every new length has strides of its own
            _FORMS.clear()
        _FORMS[key] = compiled
    return None
