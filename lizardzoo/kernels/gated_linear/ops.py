"""Gated linear attention by the Triton kernels: checks, torch operators with gradients, states, steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lizardzoo.errors import LizardzooError
from lizardzoo.kernels.dispatch import even_sizes
from lizardzoo.kernels.features import FeatureMap
from lizardzoo.kernels.gated_linear import launch, triton_step, wide
from lizardzoo.kernels.gated_linear.launch import NEG_INF, Gradients, Inputs, Launch
from lizardzoo.kernels.gated_linear.state import next_state
from lizardzoo.kernels.gated_linear.tables import widest
from lizardzoo.kernels.launching import eager, power_of_2, prepared
from lizardzoo.kernels.launching import launch as start
from lizardzoo.kernels.rows import Rows, arrange, unroll
from lizardzoo.kernels.state import overwrite, overwriting, writable

OP = "gated_linear_attention"
MAX_SIZE = 256
"""Of head_dim and of a half's features; what is wider than a tile takes several calls of the kernels, see `wide`."""
SIGNATURE = (
    "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? log_input, Tensor? allowed, Tensor? document,"
    " Tensor? query_map, Tensor? key_map, Tensor? kv, Tensor? norm, Tensor? scale, str activation, SymInt lag,"
    " SymInt offset, SymInt skip"
)
SAVED = 3
"""Outputs behind the memory that only the backward reads: the bytes of `launch.Saved`, and both maps in bf16."""
OUTPUTS = ", ".join(["Tensor"] * (5 + SAVED))


_forward = prepared(lambda *inputs: launch.forward(Inputs(*inputs)))


def compute(*inputs: Any) -> tuple[Tensor, ...]:
    """y, log_mass, the last memory (kv, norm, scale), and what the backward reads; arguments as in `Inputs`."""
    settled = launch.ready(Inputs(*inputs))
    return *_forward(*settled), *casts(Inputs(*inputs), settled)


def casts(inputs: Inputs, settled: Inputs) -> list[Tensor]:
    """Both maps in bf16; empty where products take them as they are, or where there are none."""
    maps = ((inputs.query_map, settled.query_map), (inputs.key_map, settled.key_map))
    return [inputs.q.new_empty(0) if x is None or cast is None or cast.dtype == x.dtype else cast for x, cast in maps]


operator = torch.library.custom_op(
    "lizardzoo::gated_linear", compute, mutates_args=(), schema=f"({SIGNATURE}) -> ({OUTPUTS})"
)


def fake(inputs: Inputs) -> tuple[Tensor, ...]:
    """Empty outputs as those of the kernels."""
    call = Launch(inputs)
    y = call.empty(*call.inputs.q.shape[:3], call.value_dim, dtype=call.inputs.q.dtype)
    maps = (inputs.query_map, inputs.key_map)
    narrow = [inputs.q.new_empty(0) if x is None or x.dtype == call.operand else x.to(call.operand) for x in maps]
    return y, call.empty(*y.shape[:3]), *call.memory(), call.empty(call.saved_bytes()[0], dtype=torch.uint8), *narrow


@operator.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    return fake(Inputs(*inputs))


def memory_gradient(
    y: Tensor, d_kv: Tensor | None, d_norm: Tensor | None, scale: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of the last memory, whole, with its scale; None where there are none."""
    if d_kv is None and d_norm is None:
        return None, None, None
    norm = torch.zeros_like(scale) if d_norm is None else d_norm.contiguous()
    kv = scale.new_zeros(*scale.shape, y.shape[3]) if d_kv is None else d_kv.contiguous()
    return kv, norm, scale


def _gradients(*arguments: Any) -> tuple[Any, ...]:
    """`launch.Gradients` as they are before `launch.finish`."""
    *inputs, saved, y, log_mass, d_y, d_log_mass, d_kv, d_norm, last_scale, d_q, d_k = arguments
    delta, memory = launch.deltas(y, d_y, d_log_mass), (d_kv, d_norm, last_scale)
    return launch.backward(Inputs(*inputs), saved, log_mass, delta, d_y, memory, None, (d_q, d_k))


_backward = prepared(_gradients)


def find_gradients(*arguments: Any) -> list[Tensor | None]:
    """Gradients of q, k, v, log_decay, log_input, both maps, kv and norm.

    wanted: of which a gradient is wanted; stage 1 wants none of q, k and v.
    """
    *given, saved, y, log_mass, d_y, d_log_mass, d_kv, d_norm, last_scale, wanted = arguments
    inputs = Inputs(*given)
    d_y = torch.zeros_like(y) if d_y is None else d_y.contiguous()
    d_log_mass = None if d_log_mass is None else d_log_mass.contiguous()
    memory = memory_gradient(y, d_kv, d_norm, last_scale)
    found = _backward(
        *settled(inputs, saved), saved[0], y, log_mass, d_y, d_log_mass, *memory, wanted[0], wanted[1]
    )  # fmt: skip
    return list(launch.finish(inputs, Gradients(*found))[: len(PLACES)])


def settled(inputs: Inputs, saved: Sequence[Tensor]) -> Inputs:
    """The inputs ready, by the maps that the forward has cast."""
    narrow = inputs.query_map is not None and inputs.query_map.dtype != launch.operand(inputs.q)
    return launch.ready(inputs, saved[1:] if narrow else (None, None))


def compute_backward(*arguments: Any) -> list[Tensor]:
    """The same with empty tensors for gradients that are not there, as an operator returns them."""
    return [arguments[0].new_empty(0) if x is None else x for x in find_gradients(*arguments)]


backward_operator = torch.library.custom_op(
    "lizardzoo::gated_linear_backward",
    compute_backward,
    mutates_args=(),
    schema=f"({SIGNATURE}, Tensor[] saved, Tensor y, Tensor log_mass, Tensor? d_y, Tensor? d_log_mass, Tensor? d_kv,"
    " Tensor? d_norm, Tensor last_scale, bool[] wanted) -> Tensor[]",
)


def fake_gradients(inputs: Inputs, wanted: Sequence[bool]) -> list[Tensor]:
    """Empty gradients as those of the kernels."""
    given = (inputs.q, inputs.k, inputs.v, inputs.log_decay, inputs.log_input, inputs.query_map, inputs.key_map)
    there = [*wanted[:2], *(x is not None for x in given[2:])]
    likes = [
        x.new_empty(x.shape) if is_there and x is not None else inputs.q.new_empty(0)
        for x, is_there in zip(given, there, strict=True)
    ]
    return [*likes, *(inputs.q.new_empty(0) if x is None else torch.empty_like(x) for x in (inputs.kv, inputs.norm))]


@backward_operator.register_fake
def _(*arguments: Any) -> list[Tensor]:
    return fake_gradients(Inputs(*arguments[: len(Inputs._fields)]), arguments[-1])


PLACES = [Inputs._fields.index(name) for name in Gradients._fields[:-2]]
"""Of the inputs that have gradients."""


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the inputs, the outputs that the backward needs, and what is no tensor."""
    tensors = [x for x in inputs if x is None or isinstance(x, Tensor)]
    ctx.others = {place: x for place, x in enumerate(inputs) if not (x is None or isinstance(x, Tensor))}
    y, log_mass, _, _, scale, *saved = output
    ctx.save_for_backward(*tensors, y, log_mass, scale, *saved)
    ctx.mark_non_differentiable(scale, *saved)
    ctx.set_materialize_grads(False)


def gradients(
    backward: Callable[..., Sequence[Tensor | None]], places: list[int], ctx: Any, *given: Any
) -> tuple[Any, ...]:
    """The gradient of every input: those at `places` come from `backward`."""
    kept = ctx.saved_tensors
    *tensors, y, log_mass, scale = kept[:-SAVED]
    rest, count = iter(tensors), len(tensors) + len(ctx.others)
    inputs = [ctx.others[place] if place in ctx.others else next(rest) for place in range(count)]
    wanted = [ctx.needs_input_grad[place] for place in places]
    found = backward(*inputs, list(kept[-SAVED:]), y, log_mass, *given[:4], scale, wanted)
    result: list[Tensor | None] = [None] * count
    for place, gradient, is_wanted in zip(places, found, wanted, strict=True):
        result[place] = gradient if is_wanted else None
    return tuple(result)


operator.register_autograd(partial(gradients, backward_operator, PLACES), setup_context=setup_context)


_eager = eager(compute, setup_context, partial(gradients, find_gradients, PLACES))


def gated_linear(*inputs: Any) -> tuple[Tensor, ...]:
    """y, log_mass, the last memory, ...: an operator for torch.compile, a plain function otherwise."""
    return operator(*inputs) if torch.compiler.is_compiling() else _eager(*inputs)


def is_wide(q: Tensor, v: Tensor, feature_map: FeatureMap | None) -> bool:
    """Whether it takes several calls of the kernels."""
    return max(sizes_of(q, v, feature_map)) > widest(q)


def sizes_of(q: Tensor, v: Tensor, feature_map: FeatureMap | None) -> tuple[int, int, int]:
    """head_dim, that of the values, and a half's features."""
    return q.shape[3], v.shape[3], q.shape[3] if feature_map is None else feature_map.key.shape[2]


class Prepared(NamedTuple):
    """A call's inputs for the kernels, how its rows were packed (None: they were not), and what waits behind it."""

    inputs: Inputs
    rows: Rows | None
    tokens: tuple[Any, ...]

    def unpack(self, y: Tensor, log_mass: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs at the places of their tokens, nothing at padded ones."""
        if self.rows is None:
            return y, log_mass
        y = torch.where(self.rows.valid[..., None, None], y, 0.0)
        return self.rows.unpack(y), self.rows.unpack(torch.where(self.rows.valid[..., None], log_mass, NEG_INF))


def prepare(q, k, v, log_decay, log_input, feature_map, lag, skip, mask, starts, state) -> Prepared:  # type: ignore[no-untyped-def]
    """Pack the rows, put a state's waiting tokens before them, and say which keys may enter where."""
    log_decay, log_input = (None if x is None else x.float() for x in (log_decay, log_input))
    memory: tuple[Tensor | None, ...] = (None, None, None)
    past: tuple[Tensor | None, ...] = (None,) * 4
    allowed = document = rows = None
    if mask is not None or starts is not None or state is not None:
        rows = arrange(q, mask, starts, None if state is None else state.length)
        q, k, v = rows.pack(q), rows.pack(k), rows.pack(v)
        log_decay, log_input = (None if x is None else rows.pack(x) for x in (log_decay, log_input))
        if state is not None:
            memory, past = state[:3], tuple(unroll(ring, state.length) for ring in state[3:7])
        allowed = _allowed(rows, lag, skip)
        document = rows.document.int().contiguous() if starts is not None else None
    tokens = (k, v, log_decay, log_input)
    behind = (new if old is None or new is None else torch.cat([old, new], 1) for old, new in zip(past, tokens))
    maps = (None, None) if feature_map is None else (feature_map.query.float(), feature_map.key.float())
    activation = "none" if feature_map is None else feature_map.activation
    offset = 0 if state is None else lag
    given: tuple[Any, ...] = (q, *behind, allowed, document, *maps, *memory, activation, lag, offset, skip)
    inputs = Inputs(*given)
    return Prepared(inputs, rows, tokens)


def _allowed(rows: Rows, lag: int, skip: int) -> Tensor:
    """[B, T] bool: whether the key `lag` slots earlier, of this call or waiting in its state, enters at a slot."""
    count = rows.rank.shape[1]
    ago = torch.arange(-lag, 0, device=rows.rank.device)
    first = torch.where(rows.document[:, :1] == 0, rows.rank[:, :1], 0)
    rank = torch.cat([first + ago, rows.rank], 1)[:, :count]  # a waiting token is older than all of this call
    document = torch.cat([torch.zeros_like(first + ago), rows.document], 1)[:, :count]
    return (rank >= skip) & (document == rows.document) & rows.valid


def chunked(q, k, v, log_decay, log_input, feature_map, lag, skip, mask, starts, state, return_state):  # type: ignore[no-untyped-def]
    """All tokens of a sequence; see `lizardzoo.kernels.gated_linear.gated_linear_attention`."""
    check(OP, q, v, feature_map, state)
    prepared = prepare(q, k, v, log_decay, log_input, feature_map, lag, skip, mask, starts, state)
    if is_wide(q, v, feature_map):
        y, log_mass, kv, norm, scale = wide.in_slabs(gated_linear, prepared.inputs, widest)
    else:
        y, log_mass, kv, norm, scale = gated_linear(*prepared.inputs)[:5]
    memory, tokens = (kv, norm, scale), prepared.tokens
    new_state = next_state(memory, *tokens, prepared.rows, state, lag) if return_state else None  # type: ignore[call-arg]
    return *prepared.unpack(y, log_mass), new_state


class StepSizes(NamedTuple):
    """Compile-time arguments of the step's kernels; DEPTH: rows of W that a program holds at once, of all its heads."""

    D: int
    F: int
    F2: int
    V: int
    BF: int
    BV: int
    G: int
    ROWS: int
    TIMES: int
    DEPTH: int
    PRECISION: str

    @classmethod
    def of(cls, q: Tensor, v: Tensor, kv: Tensor) -> StepSizes:
        """For q [B, 1, H, D], v [B, 1, Hkv, V] and the memory kv [B, Hs, 2F, V]."""
        dim, value_dim, features = q.shape[3], v.shape[3], kv.shape[2]
        half = -(-features // 2)
        groups = q.shape[2] // kv.shape[1]
        rows = 1 << (groups - 1).bit_length()
        depth = max(1, min(power_of_2(dim), 16384 // (rows * power_of_2(half))))
        times = max(1, 16 // rows)  # no product takes fewer than 16 rows
        blocks = power_of_2(half), power_of_2(value_dim)
        precision = "tf32x3" if q.dtype == torch.float32 else "tf32"
        return cls(dim, half, features, value_dim, *blocks, groups, rows, times, depth, precision)


@prepared
def _launch_step(  # type: ignore[no-untyped-def]
    q, k, v, log_decay, log_input, query_map, key_map, mask, kv, norm, scale, ring_k, ring_v, ring_decay, ring_input,
    length, activation, skip,
):  # fmt: skip
    (batch, state_heads), kv_heads, lag = kv.shape[:2], k.shape[2], ring_k.shape[1]
    y, log_mass = q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=torch.float32)
    gates = {"DECAYS": ring_decay.shape[2], "ENTERS": ring_input.shape[2]}
    tokens, rings = (k, v, log_decay, log_input), (ring_k, ring_v, ring_decay, ring_input, length)
    start(
        triton_step.step, (batch * state_heads,),
        (q, *tokens, query_map, key_map, mask, kv, norm, scale, *rings, y, log_mass),
        (lag, skip, *(1 if x is None else x.shape[0] for x in (query_map, key_map))),
        {"HS": state_heads, "R": state_heads // kv_heads, **gates, "LAG": lag > 0, **StepSizes.of(q, v, kv)._asdict(),
         "MAP": activation, "N": 128}, num_warps=8,
    )  # fmt: skip
    sizes = {"KEYS": kv_heads * k.shape[3], "VALUES": kv_heads * v.shape[3], **gates, "BLOCK": 1024}
    start(triton_step.push, (batch,), (*tokens, mask, *rings), (lag,), sizes, num_warps=4)
    return y, log_mass


def compute_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, log_input: Tensor | None, query_map: Tensor | None,
    key_map: Tensor | None, mask: Tensor | None, kv: Tensor, norm: Tensor, scale: Tensor, ring_k: Tensor,
    ring_v: Tensor, ring_decay: Tensor, ring_input: Tensor, length: Tensor, activation: str, skip: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y, log_mass; the state moves on in place. All tensors are contiguous."""
    return _launch_step(
        q, k, v, log_decay, log_input, query_map, key_map, mask, kv, norm, scale, ring_k, ring_v, ring_decay,
        ring_input, length, activation, skip,
    )  # fmt: skip


gated_linear_step = torch.library.custom_op(
    "lizardzoo::gated_linear_step",
    compute_step,
    mutates_args=("kv", "norm", "scale", "ring_k", "ring_v", "ring_decay", "ring_input", "length"),
)


@gated_linear_step.register_fake
def _(q, k, v, *_):  # type: ignore[no-untyped-def]
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


def step(q, k, v, log_decay, log_input, feature_map, skip, mask, state, in_place):  # type: ignore[no-untyped-def]
    """One token; see `lizardzoo.kernels.gated_linear.gated_linear_attention_step`."""
    check(OP, q, v, feature_map, state)
    maps = (None, None) if feature_map is None else (feature_map.query, feature_map.key)
    inputs = (q, k, v, log_decay, log_input, *maps)
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*inputs, *state[:7]))
    if learns or is_wide(q, v, feature_map):
        lag = state.k.shape[1]
        y, log_mass, new = chunked(q, k, v, log_decay, log_input, feature_map, lag, skip, mask, None, state, True)
        return y, log_mass, overwrite(state, new) if in_place else new
    activation = "none" if feature_map is None else feature_map.activation
    log_decay, log_input = (None if x is None else x.float() for x in (log_decay, log_input))
    inputs = (q, k, v, log_decay, log_input, *maps, mask)
    state = writable(OP, state, in_place)
    ready = [None if x is None else x.contiguous() for x in inputs]
    y, log_mass = overwriting(gated_linear_step, compute_step, state, *ready, *state, activation, skip)
    return y, log_mass, state


def check(op: str, q: Tensor, v: Tensor, feature_map: FeatureMap | None, state: Any) -> None:
    """What the kernels do not do; `op` is named."""
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise LizardzooError(f"{op}: triton takes float32, bfloat16 and float16, got {q.dtype}; pass impl='reference'")
    sizes = sizes_of(q, v, feature_map)
    # On a device only what tests/gpu has seen right: with 20 features in bf16, code that Triton 3.6 compiles leaves
    # shared memory (compute-sanitizer), or is wrong.
    odd = q.is_cuda and not even_sizes(sizes)
    if max(sizes) > MAX_SIZE or odd:
        raise LizardzooError(
            f"{op}: triton takes as head_dim and feature_dim powers of two and multiples of 16, "
            f"up to {MAX_SIZE}; got {sizes[0]}, {sizes[1]} and {sizes[2]}; pass impl='reference'"
        )
    if state is not None and state[0].dtype != torch.float32:
        raise LizardzooError(f"{op}: triton goes on from a float32 state, got {state[0].dtype}; pass impl='reference'")
