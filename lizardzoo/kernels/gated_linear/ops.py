"""Gated linear attention on the Triton kernels: what they need is made ready here, and they become torch operators."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lizardzoo.errors import LizardzooError
from lizardzoo.kernels.features import FeatureMap
from lizardzoo.kernels.gated_linear import triton as kernels
from lizardzoo.kernels.gated_linear import triton_step
from lizardzoo.kernels.rows import arrange, tail

NEG_INF = float("-inf")
MAX_SIZE = 128
"""Of head_dim and of features: larger tiles do not fit a multiprocessor's shared memory."""
PROGRAMS = 512
"""Programs that share a map's gradient: about four for each multiprocessor of a large GPU, each with its own part."""
Activation = str  # "softmax", "exp" or "none"; a plain string, as operators take no literals


class Blocks(NamedTuple):
    """Tile sizes of a launch, all powers of two: slots of a chunk, and the padded head_dim, features and value dim."""

    chunk: int
    head_dim: int
    features: int
    value_dim: int
    num_warps: int


def blocks(head_dim: int, features: int, value_dim: int, wide: bool) -> Blocks:
    """The table of tile sizes; `wide`: 4-byte operands.

    A program holds several tiles [chunk, features] and one [features, value_dim] in registers, and their operands in
    shared memory: with wider operands the chunk gets smaller.
    """
    dim, wide_features, value = (max(16, 1 << (n - 1).bit_length()) for n in (head_dim, features, value_dim))
    chunk = 64 if not wide else 32 if max(dim, value) <= 64 else 16
    return Blocks(chunk, dim, wide_features, value, num_warps=8 if max(dim, wide_features, value) > 64 else 4)


class _Launch:
    """The arguments that the kernels of one call share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, key_map: Tensor, activation: Activation):
        self.batch, self.count, self.heads, self.head_dim = q.shape
        self.kv_heads, self.value_dim, self.state_heads = k.shape[2], v.shape[3], decay.shape[2]
        self.features = key_map.shape[2]
        wide = q.dtype != torch.bfloat16
        self.block = blocks(self.head_dim, self.features, self.value_dim, wide)
        self.chunks = -(-self.count // self.block.chunk)
        self.groups, self.repeats = self.heads // self.state_heads, self.state_heads // self.kv_heads
        self.map_heads = key_map.shape[0]
        self.width = self.block.value_dim if self.value_dim % 64 else min(self.block.value_dim, 64)
        self.activation, self.device = activation, q.device
        narrow = "bf16" if not wide and not kernels.INTERPRETED else "fp32"
        precise = q.dtype == torch.float32 or kernels.INTERPRETED
        self.precision = {
            "LOGITS": "tf32x3" if precise else "tf32" if wide else "bf16x2",
            "TERMS": 1 if precise or wide else 2,
            "OPERAND": narrow,
            "PRECISION": "tf32x3" if precise else "tf32",
        }

    def sizes(self, packed: bool) -> dict[str, Any]:
        """Compile-time arguments."""
        block = self.block
        return {
            "D": self.head_dim, "F2": self.features, "V": self.value_dim, "BD": block.head_dim, "BF": block.features,
            "BV": block.value_dim, "C": block.chunk, "MAP": self.activation, "PACKED": packed,
            "num_warps": block.num_warps, "num_stages": 1, **self.precision,
        }  # fmt: skip

    def columns(self, packed: bool) -> dict[str, Any]:
        """The same for programs that each take some columns of the values."""
        return {**self.sizes(packed), "BV": self.width, "WIDTH": min(self.width, self.value_dim)}

    def parts(self, heads: int) -> tuple[int, int]:
        """Programs along the sequence for a kernel that keeps a map's gradient, and the chunks of each."""
        span = -(-self.chunks // max(1, PROGRAMS // (self.batch * heads)))
        return -(-self.chunks // span), span

    def maps(self, *weights: Tensor) -> list[Tensor]:
        """As the kernels take them: [heads, terms, D, 2F]."""
        if self.precision["TERMS"] == 1:
            return [w.contiguous() for w in weights]
        high = [w.bfloat16() for w in weights]
        return [torch.stack([h, (w - h.float()).bfloat16()], 1) for w, h in zip(weights, high, strict=True)]

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def states(self, *shape: int, narrow: bool = False) -> list[Tensor]:
        """kv, norm, scale; narrow: kv as products take it."""
        shape = (self.batch, self.state_heads, *shape, self.features)
        dtype = torch.bfloat16 if narrow and self.precision["OPERAND"] == "bf16" else torch.float32
        return [self.empty(*shape, self.value_dim, dtype=dtype), self.empty(*shape), self.empty(*shape)]


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _states(
    launch: _Launch,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    weight: Tensor,
    document: Tensor | None,
    key_map: Tensor,
    initial: list[Tensor | None],
    shift: int,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The states before each chunk, the one at the end, and the chunks' decays."""
    added, before, last = launch.states(launch.chunks), launch.states(launch.chunks, narrow=True), launch.states()
    carry = launch.empty(launch.batch, launch.state_heads, launch.chunks)
    rows = launch.batch * launch.state_heads
    kernels.chunk_states[launch.chunks, rows, -(-launch.value_dim // launch.width)](
        k, v, decay, weight, document, key_map, None, None, *added, carry, *_strides(k, v),
        launch.map_heads, launch.count, launch.chunks, shift, 1, launch.state_heads, launch.repeats,
        QUERY=False, **launch.columns(document is not None),
    )  # fmt: skip
    kernels.scan[rows, _scan_blocks(launch)](
        *added, carry, *initial, *last, *before, *before, *last, None, launch.chunks,
        F2=launch.features, V=launch.value_dim, SF=_scan_rows(launch), BV=launch.block.value_dim,
        START=initial[0] is not None, REVERSE=False, num_warps=1,
    )  # fmt: skip
    return before, last, carry


def _scan_rows(launch: _Launch) -> int:
    """Features of a program of the scan: 512 numbers in its hands, so that many programs share the matrix."""
    return max(1, 512 // launch.block.value_dim)


def _scan_blocks(launch: _Launch) -> int:
    return -(-launch.features // _scan_rows(launch))


@torch.library.custom_op("lizardzoo::gated_linear", mutates_args=())
def gated_linear(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, weight: Tensor, document: Tensor | None,
    query_map: Tensor, key_map: Tensor, kv: Tensor | None, norm: Tensor | None,
    scale: Tensor | None, activation: str, shift: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, log_mass and the last state (kv, norm, scale).

    The key that enters at slot i is k[:, i - shift]; decay, weight [B, T, Hs]: log-decay of a slot, log-weight of the
    key that enters there (-inf: none); document [B, T] int32 or None; maps [1 or heads, D, 2F] hold [W, -W].
    """
    launch = _Launch(q, k, v, decay, key_map, activation)
    query_map, key_map = launch.maps(query_map, key_map)
    before, last, _ = _states(launch, k, v, decay, weight, document, key_map, [kv, norm, scale], shift)
    y = launch.empty(*q.shape[:3], launch.value_dim, dtype=q.dtype)
    log_mass = launch.empty(*q.shape[:3])
    kernels.outputs[launch.chunks, launch.batch * launch.state_heads](
        q, k, v, decay, weight, document, query_map, key_map, *before, y, log_mass, *_strides(q, k, v),
        query_map.shape[0], launch.map_heads, launch.count, launch.chunks, shift,
        launch.groups, launch.state_heads, launch.repeats, **launch.sizes(document is not None),
    )  # fmt: skip
    kv, norm, scale = last
    return y, log_mass, kv, norm, scale


@gated_linear.register_fake
def _(q, k, v, decay, weight, document, query_map, key_map, kv, norm, scale, activation, shift):  # type: ignore[no-untyped-def]
    features = key_map.shape[2]
    state = (q.shape[0], decay.shape[2], features)
    y = q.new_empty(*q.shape[:3], v.shape[3])
    kv, norm, scale = decay.new_empty(*state, v.shape[3]), decay.new_empty(state), decay.new_empty(state)
    return y, decay.new_empty(q.shape[:3]), kv, norm, scale


@torch.library.custom_op("lizardzoo::gated_linear_backward", mutates_args=())
def gated_linear_backward(
    d_y: Tensor, d_log_mass: Tensor, d_kv: Tensor | None, d_norm: Tensor | None, last_scale: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, weight: Tensor, document: Tensor | None,
    query_map: Tensor, key_map: Tensor, kv: Tensor | None, norm: Tensor | None,
    scale: Tensor | None, y: Tensor, log_mass: Tensor, activation: str, shift: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, decay, weight, both maps, kv and norm (empty where there is none)."""
    launch = _Launch(q, k, v, decay, key_map, activation)
    query_map, key_map = launch.maps(query_map, key_map)
    batch, count, heads, head_dim = q.shape
    packed = document is not None
    before, last, carry = _states(launch, k, v, decay, weight, document, key_map, [kv, norm, scale], shift)
    delta = torch.empty_like(log_mass)
    kernels.deltas[-(-delta.numel() // 64),](
        y, d_y, log_mass, d_log_mass, delta, delta.numel(), V=launch.value_dim, BV=launch.block.value_dim, ROWS=64
    )
    added, after, first = launch.states(launch.chunks), launch.states(launch.chunks, narrow=True), launch.states()
    rows = batch * launch.state_heads
    query_heads = query_map.shape[0]
    kernels.chunk_states[launch.chunks, rows, -(-launch.value_dim // launch.width)](
        q, d_y, decay, weight, document, query_map, log_mass, delta, *added, carry, *_strides(q, d_y),
        query_heads, count, launch.chunks, 0, launch.groups, launch.state_heads, 1,
        QUERY=True, **launch.columns(packed),
    )  # fmt: skip
    products = launch.empty(batch, launch.state_heads, launch.chunks, _scan_blocks(launch))
    kernels.scan[rows, _scan_blocks(launch)](
        *added, carry, d_kv, d_norm, last_scale, *first, *after, *before, *last, products, launch.chunks,
        F2=launch.features, V=launch.value_dim, SF=_scan_rows(launch), BV=launch.block.value_dim,
        START=d_kv is not None, REVERSE=True, num_warps=1,
    )  # fmt: skip
    products = products.sum(-1)

    strides = _strides(q, k, v)
    shared = (query_heads, launch.map_heads, count, launch.chunks, shift)
    groups = (launch.groups, launch.state_heads, launch.repeats)
    d_q, sides = launch.empty(*q.shape, dtype=q.dtype), torch.empty_like(log_mass)
    parts, span = launch.parts(heads)
    d_query_map = launch.empty(parts, batch, heads, head_dim, launch.features)
    kernels.query_gradients[parts, batch * heads](
        q, k, v, decay, weight, document, query_map, key_map, *before, d_y, log_mass, delta, d_q, d_query_map, sides,
        *strides, *shared, span, *groups, **launch.sizes(packed),
    )  # fmt: skip
    d_k = launch.empty(batch, count, launch.state_heads, head_dim, dtype=k.dtype)
    d_v = launch.empty(batch, count, launch.state_heads, launch.value_dim, dtype=v.dtype)
    if shift:  # the last keys have not entered
        d_k[:, max(count - shift, 0) :] = 0
        d_v[:, max(count - shift, 0) :] = 0
    d_decay, d_weight = torch.empty_like(decay), torch.empty_like(weight)
    parts, span = launch.parts(launch.state_heads)
    d_key_map = launch.empty(parts, batch, launch.state_heads, head_dim, launch.features)
    kernels.key_gradients[parts, rows](
        q, k, v, decay, weight, document, query_map, key_map, *after, d_y, log_mass, delta, sides,
        products, d_k, d_v, d_key_map, d_decay, d_weight,
        *strides, *shared, span, *groups, **launch.sizes(packed),
    )  # fmt: skip
    if launch.repeats > 1:  # a gate per query head: its heads read the same keys
        d_k = d_k.unflatten(2, (launch.kv_heads, -1)).sum(3)
        d_v = d_v.unflatten(2, (launch.kv_heads, -1)).sum(3)
    if activation == "none":
        d_query_map, d_key_map = torch.zeros_like(d_query_map), torch.zeros_like(d_key_map)
    maps = (_map_gradient(d_query_map, query_heads, heads), _map_gradient(d_key_map, launch.map_heads, launch.kv_heads))
    return d_q, d_k, d_v, d_decay, d_weight, *maps, first[0], first[1]


def _map_gradient(parts: Tensor, map_heads: int, heads: int) -> Tensor:
    """Parts [programs, B, heads of the launch, D, 2F], summed: [map_heads, D, 2F]."""
    total = parts.sum((0, 1)).unflatten(0, (heads, -1)).sum(1)
    return total.sum(0, keepdim=True) if map_heads == 1 else total


@gated_linear_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    d_y, d_log_mass, d_kv, d_norm, last_scale, q, k, v, decay, weight, document, query_map, key_map, kv, norm, scale,
    y, log_mass, activation, shift,
):  # fmt: skip
    features = key_map.shape[2]
    state = (q.shape[0], decay.shape[2], features)
    maps = [decay.new_empty(m.shape[0], q.shape[3], features) for m in (query_map, key_map)]
    contiguous = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, decay, weight)]
    return *contiguous, *maps, decay.new_empty(*state, v.shape[3]), decay.new_empty(state)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.activation, ctx.shift = inputs
    y, log_mass, _, _, scale = output
    ctx.save_for_backward(*tensors, y, log_mass, scale)
    ctx.set_materialize_grads(False)


def _backward(ctx, d_y, d_log_mass, d_kv, d_norm, _):  # type: ignore[no-untyped-def]
    *tensors, y, log_mass, last_scale = ctx.saved_tensors
    d_y = torch.zeros_like(y) if d_y is None else d_y.contiguous()
    d_log_mass = torch.zeros_like(log_mass) if d_log_mass is None else d_log_mass.contiguous()
    if d_kv is None and d_norm is None:
        last_scale = None
    else:
        empty = [last_scale.new_zeros(*last_scale.shape, y.shape[3]), torch.zeros_like(last_scale)]
        d_kv, d_norm = (zero if g is None else g.contiguous() for g, zero in zip((d_kv, d_norm), empty, strict=True))
    found = gated_linear_backward(
        d_y, d_log_mass, d_kv, d_norm, last_scale, *tensors, y, log_mass, ctx.activation, ctx.shift
    )
    *gradients, d_kv, d_norm = found
    q, k, v, decay, weight, *maps = gradients
    states = [None, None] if tensors[8] is None else [d_kv, d_norm]
    return q, k, v, decay, weight, None, *maps, *states, None, None, None


gated_linear.register_autograd(_backward, setup_context=_setup_context)


def chunked(q, k, v, log_decay, log_input, feature_map, lag, skip, mask, starts, state, return_state):  # type: ignore[no-untyped-def]
    """All tokens of a sequence; see `lizardzoo.kernels.gated_linear.gated_linear_attention`."""
    check(q, v, feature_map, state)
    batch, count, heads, _ = q.shape
    past = state if state is not None else (None,) * 9
    kv, norm, scale, past_k, past_v, past_decay, past_input, past_valid, length = past
    log_decay = q.new_zeros(batch, count, 0, dtype=torch.float32) if log_decay is None else log_decay.float()
    log_input = q.new_zeros(batch, count, 0, dtype=torch.float32) if log_input is None else log_input.float()
    kv_heads = k.shape[2]
    state_heads = heads if max(log_decay.shape[2], log_input.shape[2]) > kv_heads else kv_heads
    rows = arrange(q, mask, starts, length)
    q, k, v, log_decay, log_input = (rows.pack(x) for x in (q, k, v, log_decay, log_input))

    # The key that enters at a slot stands `lag` slots earlier: the kernels look there, unless it came with a state.
    def delayed(past: Tensor | None, new: Tensor) -> Tensor:
        before = new.new_zeros(batch, lag, *new.shape[2:]) if past is None else past
        return torch.cat([before, new], 1)[:, :count]

    weight = _per_head(delayed(past_input, log_input), state_heads)
    if lag and log_decay.shape[2]:
        before = log_decay.new_zeros(batch, lag, log_decay.shape[2]) if past_decay is None else past_decay
        # fp64: it grows with the length; along the last axis, which is many times faster
        total = torch.cat([before, log_decay], 1).double().transpose(1, 2).contiguous().cumsum(2)
        lost = (total[..., lag:] - total[..., :-lag]).float().transpose(1, 2)
        weight = weight + _per_head(lost, state_heads)
    slots = torch.arange(count, device=q.device)
    enters = slots >= lag + skip
    if mask is not None or starts is not None or state is not None:
        first = torch.where(rows.document[:, :1] == 0, rows.rank[:, :1], 0)
        rank = delayed(first - lag + torch.arange(lag, device=q.device), rows.rank)
        enters = delayed(past_valid, rows.valid) & (delayed(None, rows.document) == rows.document) & rows.valid
        enters = enters & (rank >= skip)
    weight = weight.masked_fill(~enters[..., None], NEG_INF)
    keys, values, shift = k, v, lag
    if state is not None:
        keys, values, shift = delayed(past_k, k), delayed(past_v, v), 0

    if feature_map is None:
        activation = "none"
        query_map = key_map = torch.zeros(1, q.shape[3], q.shape[3], device=q.device)  # its shape is used
    else:
        activation = feature_map.activation
        query_map, key_map = (torch.cat([w, -w], 2).float() for w in (feature_map.query, feature_map.key))
    document = rows.document.int().contiguous() if starts is not None else None
    y, log_mass, *memory = gated_linear(
        *(x if x.stride(3) == 1 else x.contiguous() for x in (q, keys, values)),
        _per_head(log_decay, state_heads).contiguous(), weight.contiguous(), document, query_map, key_map,
        *(None if x is None else x.contiguous() for x in (kv, norm, scale)), activation, shift,
    )  # fmt: skip
    if mask is not None:
        y = torch.where(rows.valid[..., None, None], y, 0.0)
        log_mass = torch.where(rows.valid[..., None], log_mass, NEG_INF)
    new_state = None
    if return_state:
        waiting = (past_k, k), (past_v, v), (past_decay, log_decay), (past_input, log_input)
        ends_in = rows.last_document()
        past_valid = None if past_valid is None else past_valid & (ends_in == 0)
        valid = tail(past_valid, rows.valid & (rows.document == ends_in), rows.lengths, lag)
        length = rows.next_length(torch.zeros_like(rows.lengths) if length is None else length)
        new_state = (*memory, *(tail(a, b, rows.lengths, lag) for a, b in waiting), valid, length)
    return rows.unpack(y), rows.unpack(log_mass), new_state


@torch.library.custom_op("lizardzoo::gated_linear_step", mutates_args=())
def gated_linear_step(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, enter: Tensor | None, query_map: Tensor,
    key_map: Tensor, mask: Tensor | None, kv: Tensor, norm: Tensor, scale: Tensor, old_k: Tensor, old_v: Tensor,
    old_decay: Tensor, old_enter: Tensor, old_valid: Tensor, length: Tensor, activation: str, skip: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, log_mass and the nine tensors of the next state, from one kernel. Maps [1 or heads, D, F], W alone."""
    outputs = _step_outputs(q, v, kv, norm, scale, old_k, old_v, old_decay, old_enter, old_valid, length)
    batch, _, heads, head_dim = q.shape
    features, value_dim, state_heads = kv.shape[2], v.shape[3], kv.shape[1]
    block = blocks(head_dim, features, value_dim, True)
    width = max(16, 1 << (min(value_dim, 32) - 1).bit_length())
    triton_step.step[batch * state_heads, -(-value_dim // width)](
        q, k, v, decay, enter, query_map, key_map, mask, kv, norm, scale, old_k, old_v, old_decay, old_enter,
        old_valid, length, *outputs, query_map.shape[0], key_map.shape[0], old_k.shape[1], skip,
        heads // state_heads, state_heads, state_heads // k.shape[2],
        DECAYS=old_decay.shape[2], ENTERS=old_enter.shape[2], D=head_dim, F2=features, V=value_dim,
        BD=block.head_dim, BF=block.features, BV=width, MAP=activation, MASKED=mask is not None, BLOCK=1024,
        num_warps=4,
    )  # fmt: skip
    return outputs


def _step_outputs(q: Tensor, v: Tensor, *state: Tensor) -> tuple[Any, ...]:
    y = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)
    log_mass = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    return y, log_mass, *(torch.empty_like(x) for x in state)


@gated_linear_step.register_fake
def _(q, k, v, decay, enter, query_map, key_map, mask, kv, *rest):  # type: ignore[no-untyped-def]
    return _step_outputs(q, v, kv, *rest[:8])


def step(q, k, v, log_decay, log_input, feature_map, skip, mask, state):  # type: ignore[no-untyped-def]
    """One token; see `lizardzoo.kernels.gated_linear.gated_linear_attention_step`."""
    check(q, v, feature_map, state)
    maps = () if feature_map is None else (feature_map.query, feature_map.key)
    inputs = (q, k, v, log_decay, log_input, *maps, *state[:7])
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        lag = state[3].shape[1]
        return chunked(q, k, v, log_decay, log_input, feature_map, lag, skip, mask, None, state, True)
    query_map, key_map = (m.contiguous() for m in maps) if maps else (q.new_zeros(1), q.new_zeros(1))
    gates = (None if x is None else x.float().contiguous() for x in (log_decay, log_input))
    mask = None if mask is None else mask.contiguous()
    y, log_mass, *new = gated_linear_step(
        q.contiguous(), k.contiguous(), v.contiguous(), *gates, query_map, key_map, mask,
        *(x.contiguous() for x in state), "none" if feature_map is None else feature_map.activation, skip,
    )  # fmt: skip
    return y, log_mass, tuple(new)


def check(q: Tensor, v: Tensor, feature_map: FeatureMap | None, state: Any) -> None:
    """What the kernels do not do."""
    features = q.shape[3] if feature_map is None else 2 * feature_map.key.shape[2]
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise LizardzooError(
            f"gated_linear_attention: triton takes float32, bfloat16 and float16, got {q.dtype}; pass impl='reference'"
        )
    if max(q.shape[3], v.shape[3], features) > MAX_SIZE:
        raise LizardzooError(
            f"gated_linear_attention: triton takes head_dim and both halves of the features up to {MAX_SIZE}, "
            f"got {q.shape[3]}, {v.shape[3]} and {features}; pass impl='reference'"
        )
    if state is not None and state[0].dtype != torch.float32:
        raise LizardzooError(
            f"gated_linear_attention: triton goes on from a float32 state, got {state[0].dtype}; pass impl='reference'"
        )


def _per_head(gate: Tensor, state_heads: int) -> Tensor:
    """A gate of 0, 1, Hkv or H heads for each head of the state; no gate is a zero."""
    if gate.shape[2] == 0:
        return gate.new_zeros(*gate.shape[:2], state_heads)
    if gate.shape[2] == 1:
        return gate.expand(-1, -1, state_heads)
    return gate if gate.shape[2] == state_heads else gate.repeat_interleave(state_heads // gate.shape[2], 2)
