"""Gated linear attention on the Triton kernels: sizes and launches, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lizardzoo.kernels.gated_linear import triton as kernels
from lizardzoo.kernels.gated_linear import triton_backward
from lizardzoo.kernels.gated_linear.state import state_heads
from lizardzoo.kernels.gated_linear.tables import (
    HOLDS,
    LAUNCHES,
    MAP_TILES,
    NARROWEST,
    PROGRAMS,
    SCANS,
    chunk_size,
    scan_key,
    tile_of,
)
from lizardzoo.kernels.launching import ALIGNED, entry, launch, power_of_2, strides, unit_stride

NEG_INF = float("-inf")
INTERPRETED = kernels.INTERPRETED


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
    """What the forward leaves for the backward: the states before each chunk, the gates by slot [B, Hs, T], and the
    decays of the chunks [B * Hs, N]. They are parts of one tensor: one allocation for the host, not six."""

    kv: Tensor
    norm: Tensor
    scale: Tensor
    sums: Tensor
    weight: Tensor
    carry: Tensor


def operand(q: Tensor) -> torch.dtype:
    """What products take: fp16 does not have the range of weights, and Triton's interpreter gets products of bf16
    wrong."""
    return torch.bfloat16 if q.dtype == torch.bfloat16 and not INTERPRETED else torch.float32


def ready(inputs: Inputs, casts: Sequence[Tensor | None] = (None, None)) -> Inputs:
    """The inputs as kernels read them: strides, and the maps as products take them, which `casts` may be already."""
    q, k, v, *rest = inputs[:12]
    maps = [x if cast is None else cast for x, cast in zip(rest[4:6], casts, strict=True)]
    maps = [None if x is None else x.to(operand(q)).contiguous() for x in maps]
    gates, memory = ([None if x is None else x.contiguous() for x in part] for part in (rest[:4], rest[6:]))
    return Inputs(unit_stride(q), unit_stride(k), unit_stride(v), *gates, *maps, *memory, *inputs[12:])  # type: ignore[call-arg, arg-type]


class Launch:
    """One call's sizes, and the arguments that its kernels share; the inputs are `ready`."""

    def __init__(self, inputs: Inputs):
        self.inputs = inputs
        q, v = inputs.q, inputs.v
        self.batch, self.count, self.heads, self.head_dim = q.shape
        self.kv_heads, self.value_dim = v.shape[2], v.shape[3]
        gates = (inputs.log_decay, inputs.log_input)
        self.decays, self.enters = (0 if gate is None else gate.shape[2] for gate in gates)
        self.state_heads = state_heads(self.heads, self.kv_heads, self.decays, self.enters)
        self.groups, self.repeats = self.heads // self.state_heads, self.state_heads // self.kv_heads
        mapped = inputs.key_map is not None
        self.half = inputs.key_map.shape[2] if inputs.key_map is not None else self.head_dim
        self.features = self.half * (1 + mapped)
        self.scales = 1 if mapped and inputs.activation == "softmax" else self.features
        self.tile = tile_of(q, self.value_dim, self.half)
        self.chunk = chunk_size(*self.tile)
        self.chunks = -(-self.count // self.chunk)
        self.rows = self.batch * self.state_heads
        maps = (inputs.query_map, inputs.key_map)
        self.map_heads = tuple(1 if x is None else x.shape[0] for x in maps)
        self.operand = operand(q)
        narrowest = NARROWEST if mapped and not INTERPRETED else 1  # without a map, features are q's own columns
        self.sizes = {
            "D": self.head_dim, "F": self.half, "V": self.value_dim, "BD": power_of_2(self.head_dim),
            "BF": power_of_2(max(self.half, narrowest)), "BV": power_of_2(self.value_dim), "C": self.chunk,
            "HALVES": 1 + mapped, "MAP": inputs.activation if mapped else "none", "SCALES": self.scales,
            "PACKED": inputs.document is not None,
            "OPERAND": "bf16" if self.operand == torch.bfloat16 else "fp32", "PRECISION": "tf32x3",
        }  # fmt: skip
        self.shift = inputs.lag - inputs.offset
        self.groups_and_heads = (self.groups, self.state_heads, self.repeats)

    def run(self, kernel: Any, pointers: tuple[Tensor | None, ...], numbers: tuple[int, ...], **more: bool) -> None:
        """Launch a kernel of the tables, a program for each chunk and head."""
        warps, stages, registers = entry(LAUNCHES[kernel.fn.__name__], *self.tile)
        constants = {**self.sizes, **more}
        options = {"num_warps": warps, "num_stages": stages, "maxnreg": registers}
        launch(kernel, (self.chunks, self.rows), pointers, numbers, constants, **options)

    def through_map(
        self, x: Tensor, weight: Tensor, d_z: Tensor, heads: int, end: int, tokens: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of x (None unless `tokens`) and of its map, from that of the logits z = x W [B, T, heads, F],
        which is known before `end`. The map's [parts, heads, D, F] is yet to be summed over parts; without maps x is z.
        """
        if self.inputs.key_map is None:
            return d_z if tokens else None, None
        batch, count = d_z.shape[:2]
        tile = entry(MAP_TILES, *self.tile)
        tiles = -(-count // tile)
        span = -(-tiles // max(1, PROGRAMS // (batch * heads)))
        parts = -(-tiles // span)
        in_place = self.half == self.head_dim and d_z.dtype == x.dtype
        d_x = None
        if tokens:
            d_x = d_z if in_place else self.empty(*d_z.shape[:3], self.head_dim, dtype=x.dtype)
        d_maps = self.empty(parts * batch, heads, self.head_dim, self.half)
        names = ("D", "F", "BD", "BF", "C", "OPERAND", "PRECISION")
        warps, stages, _ = entry(LAUNCHES["map_gradients"], *self.tile)
        numbers = (weight.shape[0], count, end, span, heads, heads // x.shape[2])
        launch(
            triton_backward.map_gradients, (parts, batch * heads), (x, weight, d_z, d_x, d_maps),
            (*strides(x), *numbers),
            {**{name: self.sizes[name] for name in names}, "C": tile}, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        return d_x, d_maps

    def maps(self) -> tuple[Tensor, Tensor]:
        """Both maps; without them, something never read."""
        query, key = self.inputs.query_map, self.inputs.key_map
        return (self.inputs.q, self.inputs.q) if query is None or key is None else (query, key)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.inputs.q.new_empty(shape, dtype=dtype)

    def saved_bytes(self) -> tuple[int, list[tuple[int, tuple[int, ...], torch.dtype]]]:
        """Bytes that `Saved` takes, and where each of its parts begins, its shape and its dtype."""
        gate = ((self.batch, self.state_heads, self.count), torch.float32)
        parts, end = [], 0
        for shape, dtype in (*self.state_shapes(), gate, gate, ((self.rows, self.chunks), torch.float32)):
            parts.append((end, shape, dtype))
            end += -(-prod(shape) * dtype.itemsize // ALIGNED) * ALIGNED
        return end, parts

    def saved(self, whole: Any = None) -> tuple[Any, Saved]:
        """The bytes that hold it all (new ones unless given), and its parts; in a `prepared` function."""
        size, parts = self.saved_bytes()
        whole = self.empty(size, dtype=torch.uint8) if whole is None else whole
        return whole, Saved(*(whole.part(*part) for part in parts))

    def memory(self) -> list[Tensor]:
        """A memory as it comes in and goes out: kv [B, Hs, 2F, D], norm and scale [B, Hs, 2F]."""
        shape = (self.batch, self.state_heads, self.features)
        return [self.empty(*shape, self.value_dim), self.empty(*shape), self.empty(*shape)]

    def state_shapes(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Of a state for each chunk, as products take them: kv [B, Hs, N, D, 2F], norm [B, Hs, N, 2F], scale [B, Hs, N,
        1 or 2F]."""
        shape, exact = (self.batch, self.state_heads, self.chunks), torch.float32
        kv = (*shape, self.value_dim, self.features)
        return [(kv, self.operand), ((*shape, self.features), exact), ((*shape, self.scales), exact)]

    def states(self) -> list[Tensor]:
        """A state for each chunk."""
        return [self.empty(*shape, dtype=dtype) for shape, dtype in self.state_shapes()]

    def scan(
        self, added: list[Tensor], carry: Tensor, start: Sequence[Tensor | None], each: Sequence[Tensor],
        before: Sequence[Tensor] | None = None,
    ) -> tuple[list[Tensor], Tensor | None]:  # fmt: skip
        """Into `each` the states before each chunk, and the last one.

        With `before`, those states, `added` are gradients: into `each` the gradients behind each chunk, that of the
        first state, and what passes through each chunk [B * Hs, N, parts that sum to it].
        """
        last = self.memory()
        size, stages = SCANS[scan_key(self.rows)]
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
        launch(kernels.scan, grid, pointers, (self.chunks,), constants, num_warps=max(1, size // 256))
        return last, through


def forward(
    inputs: Inputs, near: tuple[Tensor, Tensor] | None = None, log_scale: Tensor | None = None
) -> tuple[Tensor, ...]:
    """y, log_mass, the last memory (kv, norm, scale), and the bytes that hold `Saved`; in a `prepared` function.

    near: y, log_mass of another branch that is to share the denominator; log_scale [B, T, H]: of this branch's mass.
    """
    call = Launch(inputs)
    q, k, v = inputs[:3]
    batch, count, heads = q.shape[:3]
    bytes_, saved = call.saved()
    launch(
        kernels.gates, (call.chunks, call.rows),
        (inputs.log_decay, inputs.log_input, inputs.allowed, saved.sums, saved.weight),
        (count, inputs.lag, inputs.offset, inputs.skip, call.state_heads, call.decays, call.enters),
        {"C": call.chunk, "BLOCK": 128}, num_warps=1,
    )  # fmt: skip
    gates = (saved.sums, saved.weight, inputs.document)
    maps, (query_heads, key_heads) = call.maps(), call.map_heads
    added, sizes = call.states(), (count, call.chunks, call.shift)
    call.run(
        kernels.chunk_states,
        (k, v, *gates, maps[1], *added, saved.carry),
        (*strides(k, v), key_heads, *sizes, call.state_heads, call.repeats),
    )
    last, _ = call.scan(added, saved.carry, (inputs.kv, inputs.norm, inputs.scale), saved[:3])
    y, log_mass = call.empty(batch, count, heads, call.value_dim, dtype=q.dtype), call.empty(batch, count, heads)
    beside = (*(near or (None, None)), log_scale)
    call.run(
        kernels.outputs,
        (q, k, v, *gates, *maps, *saved[:3], *beside, y, log_mass),
        (*strides(q, k, v), query_heads, key_heads, *sizes, *call.groups_and_heads),
        HELD=entry(HOLDS, *call.tile),
    )
    return y, log_mass, *last, bytes_


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
    kv: Tensor | None
    norm: Tensor | None
    scale: Tensor | None
    """That of kv and norm, which are of exp(-scale) S."""
    sides: Tensor


def backward(
    inputs: Inputs,
    saved: Tensor,
    log_mass: Tensor,
    delta: Tensor,
    d_y: Tensor,
    d_memory: tuple[Tensor | None, Tensor | None, Tensor | None],
    d_v: Tensor | None,
    tokens: tuple[bool, bool],
) -> Gradients:
    """From the log of the (whole) denominator less the branch's log-scale, delta = dy.y - dlog_mass, and dy.

    In a `prepared` function; `finish` makes whole what it returns.

    d_memory: gradients of the last memory's kv and norm, and its scale; d_v: what to add the values' gradient to, if
    it has the heads of the state; tokens: whether the gradients of q and k are wanted.
    """
    call = Launch(inputs)
    _, before = call.saved(saved)
    q, k, v = inputs[:3]
    batch, count, heads, _ = q.shape
    gates = (before.sums, before.weight, inputs.document)
    maps, (query_heads, key_heads) = call.maps(), call.map_heads
    added, after = call.states(), call.states()
    call.run(
        triton_backward.state_gradients,
        (q, d_y, *gates, maps[0], log_mass, delta, *added),
        (*strides(q), query_heads, count, call.chunks, call.groups, call.state_heads),
    )
    first, through = call.scan(added, before.carry, d_memory, after, before[:3])
    assert through is not None
    numbers = (count, call.chunks, call.shift)
    heads_of = (*strides(q, k, v), query_heads, key_heads)
    z_dtype = torch.float32 if q.dtype == torch.float16 else q.dtype  # gradients of far tokens' logits vanish in fp16
    d_z, sides = call.empty(*q.shape[:3], call.half, dtype=z_dtype), call.empty(*log_mass.shape)
    call.run(
        triton_backward.query_gradients,
        (q, k, v, *gates, *maps, *before[:3], d_y, log_mass, delta, d_z, sides),
        (*heads_of, *numbers, *call.groups_and_heads),
    )
    adds = d_v is not None and call.repeats == 1
    shape = (batch, k.shape[1], call.state_heads)
    own_v = d_v if adds and d_v is not None else call.empty(*shape, call.value_dim, dtype=v.dtype)
    d_features = call.empty(call.rows, call.chunks, call.chunk, call.features, dtype=call.operand)
    call.run(
        triton_backward.near_key_gradients,
        (q, k, v, *gates, *maps, d_y, log_mass, delta, d_features, own_v),
        (*heads_of, *numbers, k.shape[1], *call.groups_and_heads),
        ADD=adds,
    )
    d_q, d_query_map = call.through_map(q, maps[0], d_z, heads, count, tokens[0])
    d_z = call.empty(*shape, call.half, dtype=z_dtype)
    d_sums, d_weight = call.empty(*before.sums.shape), call.empty(*before.weight.shape)
    call.run(
        triton_backward.key_gradients,
        (k, v, *gates, maps[1], *after, through, sides, d_features, d_z, own_v, d_sums, d_weight),
        (*strides(k, v), key_heads, *numbers, k.shape[1], through.shape[2], *call.groups_and_heads),
    )
    d_k, d_key_map = call.through_map(k, maps[1], d_z, call.state_heads, max(count - call.shift, 0), tokens[1])
    d_decay, d_enter = (None if gate is None else call.empty(*shape) for gate in (inputs.log_decay, inputs.log_input))
    if d_decay is not None or d_enter is not None:
        launch(
            triton_backward.gate_gradients, (-(-k.shape[1] // 64), call.rows), (d_sums, d_weight, d_decay, d_enter),
            (count, inputs.lag, inputs.offset, call.state_heads), {"C": 64, "BLOCK": 128}, num_warps=1,
        )  # fmt: skip
    d_kv, d_norm, scale = (None, None, None) if inputs.kv is None else first
    return Gradients(d_q, d_k, own_v, d_decay, d_enter, d_query_map, d_key_map, d_kv, d_norm, scale, sides)


def finish(inputs: Inputs, found: Gradients, d_v: Tensor | None = None) -> Gradients:
    """What `backward` found, with all that is left to plain torch: sums over parts and over heads that share.

    d_v: what the values' gradient was to be added to; the same tensor where it was.
    """
    q, k, v, log_decay, log_input, _, _, query_map, key_map = inputs[:9]
    entered = max(k.shape[1] - inputs.lag, 0)  # the last keys and values have not entered
    d_q, d_k, own_v, d_kv, d_norm, scale = found.q, found.k, found.v, found.kv, found.norm, found.scale
    if inputs.lag and own_v is not d_v:
        own_v[:, entered:] = 0
    if key_map is None and d_q is not None:
        d_q = d_q.to(q.dtype)
    if key_map is None and d_k is not None:
        d_k[:, entered:] = 0
        d_k = d_k.to(k.dtype)
    if own_v.shape[2] > v.shape[2]:  # a gate per query head: its heads read the same keys
        own_v = own_v.unflatten(2, (v.shape[2], -1)).sum(3)
        own_v = own_v if d_v is None else own_v + d_v
        d_k = None if d_k is None else d_k.unflatten(2, (v.shape[2], -1)).sum(3)
    if inputs.scale is not None and d_kv is not None and d_norm is not None and scale is not None:
        rescale = torch.where(torch.isinf(scale) | torch.isinf(inputs.scale), 0.0, (scale + inputs.scale).exp())
        d_kv, d_norm = d_kv * rescale[..., None], d_norm * rescale
    return Gradients(
        d_q, d_k, own_v, _shared_gradient(found.log_decay, log_decay), _shared_gradient(found.log_input, log_input),
        _map_gradient(found.query_map, query_map), _map_gradient(found.key_map, key_map), d_kv, d_norm, scale,
        found.sides,
    )  # fmt: skip


def _map_gradient(parts: Tensor | None, weight: Tensor | None) -> Tensor | None:
    """Summed over parts, and over the heads that share a map."""
    if parts is None or weight is None:
        return None
    total = parts.sum(0)
    return total if total.shape[0] == weight.shape[0] else total.unflatten(0, (weight.shape[0], -1)).sum(1)


def _shared_gradient(gradient: Tensor | None, gate: Tensor | None) -> Tensor | None:
    """Summed over the heads of the state that share a gate."""
    if gradient is None or gate is None or gradient.shape[2] == gate.shape[2]:
        return gradient
    return gradient.unflatten(2, (gate.shape[2], -1)).sum(3)


def deltas(y: Tensor, d_y: Tensor, d_log_mass: Tensor | None) -> Tensor:
    """dy.y - dlog_mass, [B, T, H]; in a `prepared` function."""
    delta = y.new_empty(y.shape[:3], dtype=torch.float32)
    sizes = {"V": y.shape[3], "BV": power_of_2(y.shape[3]), "ROWS": 64}
    pointers, numbers = (y, d_y, d_log_mass, delta), (delta.numel(),)
    launch(triton_backward.deltas, (-(-delta.numel() // 64),), pointers, numbers, sizes)
    return delta
