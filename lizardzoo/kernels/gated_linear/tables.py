"""Sizes of the tiles of gated linear attention's Triton kernels, and how each is launched."""

from __future__ import annotations

import torch
from torch import Tensor

from lizardzoo.kernels.launching import entry, power_of_2, shared_memory

PROGRAMS = 1024
"""Programs that share a map's gradient: some for each multiprocessor of a large GPU, each with its own part."""
# (bytes of a number, head_dim or feature_dim up to) -> tokens of a tile of those. A third number here and below: for
# devices with less shared memory (`launching.device`), by what it holds (benchmarks/shared_memory.py).
MAP_TILES = {(2, 64): 64, (2, 128): 64, (4, 64): 64, (4, 128): 64, (4, 128, 163): 16}
# The same -> slots of a chunk. A program holds several tiles of [chunk, features] in registers, and their operands in
# shared memory.
CHUNKS = {(2, 64): 64, (2, 128): 64, (2, 128, 99): 32, (4, 64): 32, (4, 128): 16}
# The same -> whether `outputs` holds a state in shared memory for all heads that read it.
HOLDS = {(2, 64): True, (2, 128): True, (2, 128, 99): False, (4, 64): False, (4, 128): False}
# Kernel -> the same -> warps, stages, registers of a thread at most (None: the compiler's choice).
LAUNCHES: dict[str, dict[tuple[int, ...], tuple[int, int, int | None]]] = {
    # a second stage reads the next head's tiles meanwhile: 206 us for 222 (outputs, 1B shape, 16K tokens, H100)
    "chunk_states": {(2, 64): (4, 2, None), (2, 128): (4, 1, None), (4, 64): (4, 1, None), (4, 128): (8, 1, None)},
    # 255: left to itself, ptxas takes 32 registers for fp32 and spills 15 KB a thread
    "outputs": {(2, 64): (4, 2, None), (2, 128): (4, 1, None), (4, 64): (4, 1, 255), (4, 128): (8, 1, 255)},
    "state_gradients": {(2, 64): (4, 2, None), (2, 128): (8, 1, None), (4, 64): (4, 1, None), (4, 128): (8, 1, None)},
    "query_gradients": {(2, 64): (4, 1, None), (2, 128): (8, 1, None), (4, 64): (4, 1, 255), (4, 128): (8, 1, None)},
    "near_key_gradients": {
        (2, 64): (4, 2, None),
        (2, 128): (8, 1, None),
        (4, 64): (4, 1, None),
        (4, 128): (8, 1, None),
    },
    "key_gradients": {(2, 64): (4, 1, None), (2, 128): (8, 1, None), (4, 64): (4, 1, None), (4, 128): (8, 1, None)},
    "map_gradients": {(2, 64): (4, 2, None), (2, 128): (4, 1, None), (4, 64): (4, 1, None), (4, 128): (8, 1, None)},
}
NARROWEST = 64
"""Columns of a tile of features at least, the rest zeros. Of tiles of 32 the assembler of Triton 3.6 makes code for
Hopper that reads a register which nothing has written, and then anywhere in memory (benchmarks/machine_code.py)."""
# Rows of states at least -> numbers of a program of the scan, and steps that are read ahead: with few rows, more
# programs share a matrix.
SCANS = {128: (1024, 4), 32: (256, 4), 0: (128, 8)}


def widest(q: Tensor) -> int:
    """The largest head_dim, width of values and number of a half's features of one call: what a block can hold.

    A map, or a half of the state, has the product of two of these in numbers: in fp32 64 KB at 128. See `wide`.
    """
    return 64 if _bytes(q) == 4 and shared_memory(q.device) < 163 else 128


def tile_of(q: Tensor, value_dim: int, half: int) -> tuple[int, int, torch.device]:
    """What tables are asked for: bytes of an operand, size up to, device."""
    return _bytes(q), power_of_2(max(64, q.shape[3], half, value_dim)), q.device


def _bytes(q: Tensor) -> int:
    """Of a number in a product; fp16 does not have the range of weights."""
    return 2 if q.dtype == torch.bfloat16 else 4


def chunk_size(size: int, dim: int, device: torch.device) -> int:
    """Slots of a chunk."""
    return entry(CHUNKS, size, dim, device)


def scan_key(rows: int) -> int:
    """Of `SCANS`, for this many rows of states."""
    return max(least for least in SCANS if least <= rows)
