"""Gated linear attention on the Triton kernels: sizes, tables and launches, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lizardzoo.kernels.gated_linear import triton as kernels
from lizardzoo.kernels.gated_linear import triton_backward
from lizardzoo.kernels.gated_linear.state import state_heads
from lizardzoo.kernels.launching import decisive, launch, power_of_2, strides, unit_stride

NEG_INF = float("-inf")
INTERPRETED = kernels.INTERPRETED
PROGRAMS = 1024
"""Programs that share a map's gradient: some for each multiprocessor of a large GPU, each with its own part."""
MAP_TILE = 64
"""Tokens of a tile of those."""
# (bytes of a number, head_dim or feature_dim up to) -> slots of a chunk. A program holds several tiles of [chunk,
# features] in registers, and their operands in shared memory.
CHUNKS = {(2, 64): 64, (2, 128): 64, (4, 64): 32, (4, 128): 16}
# Kernel -> the same -> warps, stages, registers of a thread at most (None: the compiler's choice).
LAUNCHES: dict[str, dict[tuple[int, int], tuple[int, int, int | None]]] = {
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
# Numbers of a program of the scan, and steps that are read ahead: with few rows, more programs share a matrix.
SCANS = ((1024, 4), (256, 4), (128, 8))


class Inputs(NamedTuple):
    """What a call takes: keys and gates begin `offset` slots before the first query, with those that a state held.

    q [B, T, H, D], k, v [B, offset + T, Hkv, D]; log_decay, log_input [B, offset + T, heads of the gate] fp32 or None;
    allowed [B, T] bool, whether a key may enter at a slot (None: from slot lag + skip on); document [B, T] int32 or
    None; maps [1 or heads, D, F] fp32, or None for log-features; kv, norm, scale: the incoming memory, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    log_input: Tensor | None
    allowed: Tensor | None
    document: Tensor | None
    query_map: Tensor | None
    key_map: Tensor | None
    kv: Tensor | None
    norm: Tensor | None
    scale: Tensor | None
    activation: str
    lag: int
    offset: int
    skip: int


class Saved(NamedTuple):
    """What the forward leaves for the backward.

    The states before each chunk, the gates by slot [B, Hs, T], the decays of the chunks [B * Hs, N], and the maps in
    bf16 (empty where products take them as they are).
    """

    kv: Tensor
    norm: Tensor
    scale: Tensor
    sums: Tensor
    weight: Tensor
    carry: Tensor
    query_map: Tensor
    key_map: Tensor


class Launch:
    """One call's sizes, and the arguments that its kernels share."""

    def __init__(self, inputs: Inputs):
        self.inputs = inputs = inputs._replace(
            q=unit_stride(inputs.q), k=unit_stride(inputs.k), v=unit_stride(inputs.v)
        )
        q, v = inputs.q, inputs.v
        self.batch, self.count, self.heads, self.head_dim = q.shape
        self.kv_heads, self.value_dim, self.device = v.shape[2], v.shape[3], q.device
        gates = (inputs.log_decay, inputs.log_input)
        self.decays, self.enters = (0 if gate is None else gate.shape[2] for gate in gates)
        self.state_heads = state_heads(self.heads, self.kv_heads, self.decays, self.enters)
        self.groups, self.repeats = self.heads // self.state_heads, self.state_heads // self.kv_heads
        mapped = inputs.key_map is not None
        self.half = inputs.key_map.shape[2] if inputs.key_map is not None else self.head_dim
        self.features = self.half * (1 + mapped)
        self.scales = 1 if mapped and inputs.activation == "softmax" else self.features
        size = 2 if q.dtype == torch.bfloat16 else 4  # bytes of an operand: fp16 does not have the range of weights
        self.tile = size, power_of_2(max(64, self.head_dim, self.half, self.value_dim))
        self.chunk = chunk_size(*self.tile)
        self.chunks = -(-self.count // self.chunk)
        self.rows = self.batch * self.state_heads
        maps = (inputs.query_map, inputs.key_map)
        self.map_heads = tuple(1 if x is None else x.shape[0] for x in maps)
        narrow = size == 2 and not INTERPRETED  # Triton's interpreter gets products of bf16 wrong
        self.operand = torch.bfloat16 if narrow else torch.float32
        self.sizes = {
            "D": self.head_dim, "F": self.half, "V": self.value_dim, "BD": power_of_2(self.head_dim),
            "BF": power_of_2(self.half), "BV": power_of_2(self.value_dim), "C": self.chunk, "HALVES": 1 + mapped,
            "MAP": inputs.activation if mapped else "none", "SCALES": self.scales,
            "PACKED": inputs.document is not None,
            "OPERAND": "bf16" if narrow else "fp32", "PRECISION": "tf32x3",
        }  # fmt: skip
        self.shift = inputs.lag - inputs.offset
        self.groups_and_heads = (self.groups, self.state_heads, self.repeats)

    @cached_property
    def form(self) -> tuple[Any, ...]:
        """What of the inputs decides the compiled form of a kernel; see `lizardzoo.kernels.launching`."""
        absent = tuple(x is None for x in self.inputs[3:12])
        heads = (*self.groups_and_heads, *self.map_heads, self.decays, self.enters)
        return (*decisive(*self.inputs[:3]), *absent, *heads)

    def run(
        self, kernel: Any, pointers: tuple[Tensor | None, ...], numbers: tuple[int, ...],
        form: tuple[Any, ...] = (), **more: bool,
    ) -> None:  # fmt: skip
        """Launch a kernel of the tables, a program for each chunk and head; form: what beside the inputs decides."""
        warps, stages, registers = LAUNCHES[kernel.fn.__name__][self.tile]
        constants = {**self.sizes, **more}
        options = {"num_warps": warps, "num_stages": stages, "maxnreg": registers}
        launch(kernel, (self.chunks, self.rows), (*self.form, *form), pointers, numbers, constants, **options)

    def through_map(
        self, x: Tensor, weight: Tensor, d_z: Tensor, heads: int, end: int, tokens: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of x (None unless `tokens`) and of its map, from that of the logits z = x W [B, T, heads, F],
        which is known before `end`."""
        if self.inputs.key_map is None:
            d_z[:, end:] = 0
            return d_z.to(x.dtype) if tokens else None, None
        batch, count = d_z.shape[:2]
        tiles = -(-count // MAP_TILE)
        span = -(-tiles // max(1, PROGRAMS // (batch * heads)))
        parts = -(-tiles // span)
        in_place = self.half == self.head_dim and d_z.dtype == x.dtype
        d_x = None
        if tokens:
            d_x = d_z if in_place else self.empty(*d_z.shape[:3], self.head_dim, dtype=x.dtype)
        d_maps = self.empty(parts * batch, heads, self.head_dim, self.half)
        names = ("D", "F", "BD", "BF", "C", "OPERAND", "PRECISION")
        warps, stages, _ = LAUNCHES["map_gradients"][self.tile]
        numbers = (weight.shape[0], count, end, span, heads, heads // x.shape[2])
        launch(
            triton_backward.map_gradients, (parts, batch * heads), (*decisive(x), tokens, numbers[0], *numbers[4:]),
            (x, weight, d_z, d_x, d_maps), (*strides(x), *numbers),
            {**{name: self.sizes[name] for name in names}, "C": MAP_TILE}, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        total = d_maps.sum(0)
        shares = total.shape[0] != weight.shape[0]
        return d_x, total.unflatten(0, (weight.shape[0], -1)).sum(1) if shares else total

    def casts(self) -> tuple[Tensor, Tensor]:
        """Both maps in bf16; empty where products take them as they are, or where there are none."""
        query, key = self.inputs.query_map, self.inputs.key_map
        if query is None or key is None or query.dtype == self.operand:
            return self.empty(0), self.empty(0)
        return query.to(self.operand).contiguous(), key.to(self.operand).contiguous()

    def maps(self, casts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Both maps as products take them; without maps, something never read."""
        query, key = self.inputs.query_map, self.inputs.key_map
        if query is None or key is None:
            return self.inputs.q, self.inputs.q
        return casts if query.dtype != self.operand else (query.contiguous(), key.contiguous())

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def saved(self) -> Saved:
        """Empty, as the fake operators give it."""
        gates = [self.empty(self.batch, self.state_heads, self.count) for _ in range(2)]
        maps = self.casts()
        return Saved(*self.states(), *gates, self.empty(self.rows, self.chunks), *maps)  # type: ignore[call-arg]

    def memory(self) -> list[Tensor]:
        """A memory as it comes in and goes out: kv [B, Hs, 2F, D], norm and scale [B, Hs, 2F]."""
        shape = (self.batch, self.state_heads, self.features)
        return [self.empty(*shape, self.value_dim), self.empty(*shape), self.empty(*shape)]

    def states(self) -> list[Tensor]:
        """One for each chunk, as products take them: kv [B, Hs, N, D, 2F], norm [B, Hs, N, 2F], scale [B, Hs, N, 1 or
        2F]."""
        shape = (self.batch, self.state_heads, self.chunks)
        vectors = [self.empty(*shape, size) for size in (self.features, self.scales)]
        return [self.empty(*shape, self.value_dim, self.features, dtype=self.operand), *vectors]

    def scan(
        self, added: list[Tensor], carry: Tensor, start: Sequence[Tensor | None], before: Sequence[Tensor] | None = None
    ) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
        """The states before each chunk, and the last one.

        With `before`, those states, `added` are gradients: the gradients behind each chunk, that of the first state,
        and what passes through each chunk [B * Hs, N, parts that sum to it].
        """
        each, last = self.states(), self.memory()
        size, stages = SCANS[0] if self.rows >= 128 else SCANS[1] if self.rows >= 32 else SCANS[2]
        width = min(64, power_of_2(self.features))
        height = max(1, size // width)
        grid = (self.rows, -(-self.value_dim // height), -(-self.features // width))
        through = None if before is None else self.empty(self.rows, self.chunks, grid[1] * grid[2])
        constants = {
            "F2": self.features, "V": self.value_dim, "SCALES": self.scales, "SV": height, "SF": width,
            "BF2": power_of_2(self.features), "START": start[0] is not None, "REVERSE": before is not None,
            "STAGES": stages,
        }  # fmt: skip
        pointers = (*added, carry, *start, *last, *each, *(before or (None,) * 3), through)
        launch(
            kernels.scan, grid, (added[0].dtype,), pointers, (self.chunks,), constants, num_warps=max(1, size // 256)
        )
        return each, last, through


def chunk_size(bytes_: int, dim: int) -> int:
    """Slots of a chunk."""
    return CHUNKS[bytes_, dim]


def forward(
    inputs: Inputs, near: tuple[Tensor, Tensor] | None = None, log_scale: Tensor | None = None
) -> tuple[Tensor, Tensor, list[Tensor], Saved]:
    """y, log_mass, the last memory, and what the backward needs.

    near: y, log_mass of another branch that is to share the denominator; log_scale [B, T, H]: of this branch's mass.
    """
    call = Launch(inputs)
    q, k, v = call.inputs[:3]
    batch, count, heads = q.shape[:3]
    sums, weight = (call.empty(batch, call.state_heads, count) for _ in range(2))
    decay, enter = (None if x is None else x.contiguous() for x in (inputs.log_decay, inputs.log_input))
    allowed = None if inputs.allowed is None else inputs.allowed.contiguous()
    launch(
        kernels.gates, (call.chunks, call.rows), call.form,
        (decay, enter, allowed, sums, weight),
        (count, inputs.lag, inputs.offset, inputs.skip, call.state_heads, call.decays, call.enters),
        {"C": call.chunk, "BLOCK": 128}, num_warps=1,
    )  # fmt: skip
    gates = (sums, weight, inputs.document)
    casts = call.casts()
    maps, (query_heads, key_heads) = call.maps(casts), call.map_heads
    added, carry = call.states(), call.empty(call.rows, call.chunks)
    sizes = (count, call.chunks, call.shift)
    call.run(
        kernels.chunk_states,
        (k, v, *gates, maps[1], *added, carry),
        (*strides(k, v), key_heads, *sizes, call.state_heads, call.repeats),
    )
    start = [None if x is None else x.contiguous() for x in (inputs.kv, inputs.norm, inputs.scale)]
    before, last, _ = call.scan(added, carry, start)
    y, log_mass = call.empty(batch, count, heads, call.value_dim, dtype=q.dtype), call.empty(batch, count, heads)
    beside = (*(near or (None, None)), log_scale)
    call.run(
        kernels.outputs,
        (q, k, v, *gates, *maps, *before, *beside, y, log_mass),
        (*strides(q, k, v), query_heads, key_heads, *sizes, *call.groups_and_heads),
        form=tuple(x is None for x in beside),
    )  # fmt: skip
    return y, log_mass, last, Saved(*before, sums, weight, carry, *casts)  # type: ignore[call-arg]


class Gradients(NamedTuple):
    """Of the inputs' tensors, q's and k's where they are wanted; `sides` [B, T, H]: of a log-scale of the branch's
    mass."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor
    log_decay: Tensor | None
    log_input: Tensor | None
    query_map: Tensor | None
    key_map: Tensor | None
    kv: Tensor
    norm: Tensor
    sides: Tensor


def backward(
    inputs: Inputs,
    saved: Saved,
    log_mass: Tensor,
    delta: Tensor,
    d_y: Tensor,
    d_memory: tuple[Tensor, Tensor, Tensor] | None = None,
    d_v: Tensor | None = None,
    tokens: tuple[bool, bool] = (True, True),
) -> Gradients:
    """From the log of the (whole) denominator less the branch's log-scale, delta = dy.y - dlog_mass, and dy.

    d_memory: gradients of the last memory's kv and norm, and its scale; d_v: what to add the values' gradient to;
    tokens: whether the gradients of q and k are wanted.
    """
    call = Launch(inputs)
    q, k, v = call.inputs[:3]
    batch, count, heads, _ = q.shape
    gates = (saved.sums, saved.weight, inputs.document)
    maps, (query_heads, key_heads) = call.maps(saved[-2:]), call.map_heads
    added, form = call.states(), decisive(d_y)
    call.run(
        triton_backward.state_gradients,
        (q, d_y, *gates, maps[0], log_mass, delta, *added),
        (*strides(q), query_heads, count, call.chunks, call.groups, call.state_heads),
        form,
    )  # fmt: skip
    after, first, through = call.scan(added, saved.carry, d_memory or (None,) * 3, saved[:3])
    d_kv, d_norm, scale = first
    assert through is not None
    parts = through.shape[2]
    if inputs.scale is not None:  # of exp(-scale) S at the start
        rescale = torch.where(torch.isinf(scale) | torch.isinf(inputs.scale), 0.0, (scale + inputs.scale).exp())
        d_kv, d_norm = d_kv * rescale[..., None], d_norm * rescale

    numbers = (count, call.chunks, call.shift)
    heads_of = (*strides(q, k, v), query_heads, key_heads)
    z_dtype = torch.float32 if q.dtype == torch.float16 else q.dtype  # gradients of far tokens' logits vanish in fp16
    d_z, sides = call.empty(*q.shape[:3], call.half, dtype=z_dtype), torch.empty_like(log_mass)
    call.run(
        triton_backward.query_gradients,
        (q, k, v, *gates, *maps, *saved[:3], d_y, log_mass, delta, d_z, sides),
        (*heads_of, *numbers, *call.groups_and_heads),
        form,
    )  # fmt: skip
    if d_v is not None and call.repeats == 1:
        adds, own_v = True, d_v
    else:
        adds, own_v = False, call.empty(batch, k.shape[1], call.state_heads, call.value_dim, dtype=v.dtype)
    if inputs.lag and not adds:  # the last values have not entered
        own_v[:, max(count - call.shift, 0) :] = 0
    d_features = torch.empty(call.rows, call.chunks, call.chunk, call.features, dtype=saved.kv.dtype, device=q.device)
    call.run(
        triton_backward.near_key_gradients,
        (q, k, v, *gates, *maps, d_y, log_mass, delta, d_features, own_v),
        (*heads_of, *numbers, k.shape[1], *call.groups_and_heads),
        form, ADD=adds,
    )  # fmt: skip
    d_q, d_query_map = call.through_map(q, maps[0], d_z, heads, count, tokens[0])
    d_z = call.empty(batch, k.shape[1], call.state_heads, call.half, dtype=z_dtype)
    d_sums, d_weight = torch.empty_like(saved.sums), torch.empty_like(saved.weight)
    call.run(
        triton_backward.key_gradients,
        (k, v, *gates, maps[1], *after, through, sides, d_features, d_z, own_v, d_sums, d_weight),
        (*strides(k, v), key_heads, *numbers, k.shape[1], parts, *call.groups_and_heads),
    )  # fmt: skip
    d_k, d_key_map = call.through_map(k, maps[1], d_z, call.state_heads, max(count - call.shift, 0), tokens[1])
    if call.repeats > 1:  # a gate per query head: its heads read the same keys
        own_v = own_v.unflatten(2, (call.kv_heads, -1)).sum(3)
        own_v = own_v if d_v is None else own_v + d_v
        d_k = None if d_k is None else d_k.unflatten(2, (call.kv_heads, -1)).sum(3)
    d_decay, d_enter = (
        None if gate is None else call.empty(batch, k.shape[1], call.state_heads)
        for gate in (inputs.log_decay, inputs.log_input)
    )
    if d_decay is not None or d_enter is not None:
        launch(
            triton_backward.gate_gradients, (-(-k.shape[1] // 64), call.rows), call.form,
            (d_sums, d_weight, d_decay, d_enter), (count, inputs.lag, inputs.offset, call.state_heads),
            {"C": 64, "BLOCK": 128}, num_warps=1,
        )  # fmt: skip
    return Gradients(
        d_q, d_k, own_v, _shared_gradient(d_decay, call.decays), _shared_gradient(d_enter, call.enters),
        d_query_map, d_key_map, d_kv, d_norm, sides,
    )  # fmt: skip


def _shared_gradient(gradient: Tensor | None, heads: int) -> Tensor | None:
    """Summed over the heads of the state that share a gate."""
    if gradient is None or gradient.shape[2] == heads:
        return gradient
    return gradient.unflatten(2, (heads, -1)).sum(3)


def deltas(y: Tensor, d_y: Tensor, d_log_mass: Tensor | None) -> Tensor:
    """dy.y - dlog_mass, [B, T, H]."""
    delta = torch.empty(y.shape[:3], dtype=torch.float32, device=y.device)
    sizes = {"V": y.shape[3], "BV": power_of_2(y.shape[3]), "ROWS": 64}
    pointers, numbers = (y, d_y, d_log_mass, delta), (delta.numel(),)
    launch(triton_backward.deltas, (-(-delta.numel() // 64),), decisive(y, d_y, d_log_mass), pointers, numbers, sizes)
    return delta
