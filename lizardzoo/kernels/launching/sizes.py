"""Sizes and strides as kernels take them."""

from __future__ import annotations

from torch import Tensor


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
