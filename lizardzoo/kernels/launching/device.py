"""What a block may hold on the device that kernels are launched on; tables of tiles choose by it."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import TypeAlias, TypeVar

import torch

from lizardzoo.errors import LizardzooError

OLDEST = (8, 0)
"""Compute capability from which the kernels run: below it there are no products of bf16 and no asynchronous copies."""
SMALLER = (99, 163)
"""KB of shared memory a block, where it is less than Hopper's 227: of capability 8.6, 8.9 and 12.x; of 8.0 and 8.7."""
WHOLE = 227
"""Hopper's, and that of capability 10.x: the tables' own entries are for these."""
ON_CPU = WHOLE
"""Triton's interpreter has no limit; benchmarks put another device in its place."""
Key: TypeAlias = tuple[int, ...]
Entry = TypeVar("Entry")


def check_device(device: torch.device) -> None:
    """Raise on a CUDA device that is too old for the kernels."""
    if device.type != "cuda":  # Triton's interpreter
        return
    found = torch.cuda.get_device_capability(device)
    if found < OLDEST:
        raise LizardzooError(
            f"{torch.cuda.get_device_name(device)} ({device}) has compute capability {found[0]}.{found[1]}, and "
            f"lizardzoo's Triton kernels need {OLDEST[0]}.{OLDEST[1]} or newer; pass impl='reference' (in a model: "
            "mixer.impl = 'reference')"
        )


def shared_memory(device: torch.device) -> int:
    """KB that a block of this device may have."""
    if device.type != "cuda":
        return ON_CPU
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", WHOLE << 10)) >> 10


def table_key(table: Container[Key], size: int, dim: int, memory: int) -> Key:
    """Of the entry of a table of tiles for a device whose blocks have `memory` KB.

    A table has (bytes of a number, dim) -> the entry where 227 KB are there, and (bytes, dim, KB) -> the one for
    devices of that class of `SMALLER`, where the first would not fit them.
    """
    for limit, more in zip(SMALLER, (*SMALLER[1:], WHOLE), strict=True):
        if memory < more and (size, dim, limit) in table:
            return size, dim, limit
    return size, dim


def entry(table: Mapping[Key, Entry], size: int, dim: int, device: torch.device) -> Entry:
    """The entry of a table of tiles for a device; see `table_key`."""
    return table[table_key(table, size, dim, shared_memory(device))]
