"""One decoding step of a layer, replayed from a CUDA graph: ours behind contexts of any length, and the peers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from contenders import HALF_LIFE, KEEP, Shape, build_mixer, draw
from measure import captured, relative_error, timed
from torch import Tensor

from lizardzoo.kernels import hybrid_attention_step, window_and_heavy_step
from lizardzoo.mixers import MixerInputs

DEVICE = "cuda"
BATCH = 16
CONTEXTS = (256, 32768)
CACHES = (2048, 32768)
PIECE = 2048
"""Tokens of a context that are read at once."""
COLD = 256 * 2**20
"""Bytes of state that a graph goes through, so that no step finds its own in the L2 cache."""
TOLERANCE = 2e-2


def replayed(step: Callable[[int], Any], state_bytes: int) -> float:
    """Milliseconds of `step(layer)`, each layer with a state of its own, out of one graph of up to 32 layers."""
    layers = layers_for(state_bytes)

    def all_layers() -> None:
        for layer in range(layers):
            step(layer)

    return timed(captured(all_layers, warm_up=2).replay) / layers


def layers_for(state_bytes: int) -> int:
    """How many states fill more than the cache."""
    return max(1, min(32, COLD // state_bytes))


def inputs_of(shape: Shape, tokens: int, batch: int = BATCH) -> MixerInputs:
    """Random inputs of a mixer."""
    i = draw(shape, batch, tokens, DEVICE).detached()
    return MixerInputs(i.q, i.k, i.v, i.x, i.cos, i.sin)


def tensors(state: Any) -> list[Tensor]:
    """The tensors of a (nested) state; those held twice count once."""
    if isinstance(state, Tensor):
        return [state]
    found = [tensor for part in state for tensor in tensors(part)] if isinstance(state, tuple) else []
    return list({tensor.data_ptr(): tensor for tensor in found if tensor.numel()}.values())


def size_of(state: Any) -> int:
    """Bytes."""
    return sum(tensor.nbytes for tensor in tensors(state))


@torch.no_grad()
def verify_step(kind: str, shape: Shape, impl: str, tokens: int = 300) -> dict[str, float]:
    """Relative error of single steps in place, from the first token on, against the whole sequence in float64."""
    inputs = inputs_of(shape, tokens, 2)
    hidden = shape.heads * shape.head_dim
    stepping, exact = (build_mixer(kind, shape, hidden, DEVICE, i) for i in (impl, "reference"))
    expected = exact.double()(inputs.each(torch.Tensor.double))[0]
    state = stepping.init_state(2, inputs.q.dtype, DEVICE)
    steps = [stepping.step_(inputs.tokens(t, t + 1), state) for t in range(tokens)]
    return {"error": relative_error(torch.cat(steps, 1), expected)}


@torch.no_grad()
def mixer_step(kind: str, shape: Shape, impl: str, context: int) -> dict[str, float]:
    """A mixer's step in place, with RoPE and gates."""
    mixer, states = read(kind, shape, impl, context)
    token = inputs_of(shape, 1)
    size = size_of(states[0])
    return {"ms": replayed(lambda layer: mixer.step_(token, states[layer]), size), "MiB": size / 2**20}


@torch.no_grad()
def kernel_step(kind: str, shape: Shape, impl: str, context: int) -> dict[str, float]:
    """The step of a mixer's kernel in place, gates and rotated q and k given."""
    _, states = read(kind, shape, impl, context)
    i = draw(shape, BATCH, 1, DEVICE).detached()
    size = size_of(states[0])

    def hybrid(layer: int) -> None:
        hybrid_attention_step(
            i.q, i.k, i.v, i.log_decay, states[layer], rotated=(i.q_rot, i.k_rot), log_input=i.log_input,
            log_scale=i.log_scale, feature_map=i.maps, keep=KEEP, skip=KEEP, in_place=True, impl=impl,
        )  # fmt: skip

    def heavy(layer: int) -> None:
        window_and_heavy_step(
            i.q_rot, i.k_rot, i.v, *states[layer], keep=KEEP, half_life=HALF_LIFE, in_place=True, impl=impl
        )

    return {"ms": replayed({"hybrid": hybrid, "heavy": heavy}[kind], size), "MiB": size / 2**20}


def read(kind: str, shape: Shape, impl: str, context: int) -> tuple[Any, list[Any]]:
    """A mixer, and as many states behind a context as a graph takes."""
    mixer = build_mixer(kind, shape, shape.heads * shape.head_dim, DEVICE, impl)
    state = mixer.init_state(BATCH, torch.bfloat16, DEVICE)
    for start in range(0, context, PIECE):
        _, state = mixer(inputs_of(shape, min(PIECE, context - start)), state, need_state=True)
    return mixer, [copied(state, {}) for _ in range(layers_for(size_of(state)))]


def copied(state: Any, seen: dict[int, Tensor]) -> Any:
    """A state with tensors of its own; what was held once stays held once."""
    if isinstance(state, Tensor):
        return seen.setdefault(state.data_ptr(), state.clone()) if state.numel() else state.clone()
    if isinstance(state, tuple):
        return type(state)(*(copied(part, seen) for part in state))
    return state


@torch.no_grad()
def fla_recurrent(shape: Shape) -> dict[str, float]:
    """fla's recurrent kernel alone, on features: no maps, no window; a column of ones in v makes the normalizer."""
    from fla.ops.simple_gla import fused_recurrent_simple_gla

    heads, _, dim, feature_dim = shape
    q, k = (torch.rand(BATCH, 1, heads, 2 * feature_dim, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    v = torch.randn(BATCH, 1, heads, dim + 1, device=DEVICE, dtype=torch.bfloat16)
    decay = F.logsigmoid(torch.randn(BATCH, 1, heads, device=DEVICE) + 5)
    size = 4 * BATCH * heads * 2 * feature_dim * (dim + 1)
    states = [
        torch.randn(BATCH, heads, 2 * feature_dim, dim + 1, device=DEVICE) for _ in range(layers_for(size))
    ]  # fmt: skip

    def step(layer: int) -> None:
        _, states[layer] = fused_recurrent_simple_gla(
            q, k, v, g=decay, scale=1.0, initial_state=states[layer], output_final_state=True
        )

    return {"ms": replayed(step, size), "MiB": size / 2**20}


@torch.no_grad()
def cached_softmax(shape: Shape, context: int) -> dict[str, float]:
    """Softmax over a KV cache of `context` tokens."""
    heads, kv_heads, dim, _ = shape
    q = torch.randn(BATCH, heads, 1, dim, device=DEVICE, dtype=torch.bfloat16)
    size = 2 * 2 * BATCH * kv_heads * context * dim
    caches = [
        torch.randn(2, BATCH, kv_heads, context, dim, device=DEVICE, dtype=torch.bfloat16)
        for _ in range(layers_for(size))
    ]

    def step(layer: int) -> None:
        k, v = caches[layer]
        F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return {"ms": replayed(step, size), "MiB": size / 2**20}
