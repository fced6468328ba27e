"""Kernel launches that are worked out once for each kind of arguments and then run by address.

A call on a short sequence waits for Python, not for the device: sizes, grids, a tensor for each piece of scratch
memory, and Triton's look at every argument of every launch take longer than the kernels. See `prepared`.
"""

from __future__ import annotations

from lizardzoo.kernels.launching.device import entry, shared_memory, table_key
from lizardzoo.kernels.launching.eager import eager
from lizardzoo.kernels.launching.program import ALIGNED, PROGRAMS, Program, forget, launch, prepared
from lizardzoo.kernels.launching.sizes import power_of_2, strides, unit_stride

__all__ = [
    "ALIGNED",
    "PROGRAMS",
    "Program",
    "eager",
    "entry",
    "forget",
    "launch",
    "power_of_2",
    "prepared",
    "shared_memory",
    "strides",
    "table_key",
    "unit_stride",
]
