"""One layer's attention at a shape: its inputs, lizardzoo's ways through it, and PyTorch's softmax.

A maker takes `Inputs` (for their sizes, dtype and device) and gives a `Function`; a contender is two makers: what is
timed, and the same formula in plain PyTorch, which float64 inputs make exact. Projections are no part of any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from lizardzoo.config import MixerSpec
from lizardzoo.kernels import (
    FeatureMap,
    Impl,
    gated_linear_attention,
    hybrid_attention,
    window_and_heavy_attention,
    window_attention,
)
from lizardzoo.mixers import AttentionShape, Heavy, Hybrid, MixerInputs
from lizardzoo.mixers.merge import Branch, joint

WINDOW, KEEP, HEAVY, HALF_LIFE = 128, 4, 128, 256.0


class Shape(NamedTuple):
    """Query heads, key heads, head_dim, and features per half of a Hedgehog map."""

    heads: int
    kv_heads: int
    head_dim: int
    feature_dim: int


SHAPES = {"1b": Shape(32, 8, 64, 64), "8b": Shape(32, 8, 128, 128), "smollm2": Shape(9, 3, 64, 64)}


class Inputs(NamedTuple):
    """q, k before RoPE and after it, v, the layer's input x: in the model's dtype; gates and feature maps: fp32."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_rot: Tensor
    k_rot: Tensor
    x: Tensor
    cos: Tensor
    sin: Tensor
    log_decay: Tensor
    log_input: Tensor
    log_scale: Tensor
    map_query: Tensor
    map_key: Tensor

    @property
    def maps(self) -> FeatureMap:
        """Softmax features, one map per head."""
        return FeatureMap(self.map_query, self.map_key, "softmax")

    def leaves(self, **to: Any) -> Inputs:
        """The same numbers, moved, as leaves that get gradients (the RoPE tables do not)."""
        moved = [x.detach().to(**to).requires_grad_(name not in ("cos", "sin")) for name, x in self._asdict().items()]
        return Inputs(*moved)

    def detached(self) -> Inputs:
        """The same without gradients."""
        return Inputs(*(x.detach() for x in self))


def draw(shape: Shape, batch: int, tokens: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """Fresh random inputs. Gates decay by about 0.7% a token; feature maps are near the identity."""
    heads, kv_heads, dim, feature_dim = shape

    def tokenwise(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(batch, tokens, *size, device=device, dtype=dtype)

    def weights(count: int) -> Tensor:
        return torch.eye(dim, feature_dim, device=device) + 0.1 * torch.randn(count, dim, feature_dim, device=device)

    frequencies = 10000.0 ** -(torch.arange(0, dim, 2, device=device) / dim)
    angles = (torch.arange(tokens, device=device)[:, None] * frequencies).repeat(1, 2)[None]
    q, q_rot = (tokenwise(heads, dim, dtype=dtype) for _ in range(2))
    k, k_rot, v = (tokenwise(kv_heads, dim, dtype=dtype) for _ in range(3))
    return Inputs(
        q, k, v, q_rot, k_rot,
        x=tokenwise(heads * dim, dtype=dtype), cos=angles.cos().to(dtype), sin=angles.sin().to(dtype),
        log_decay=F.logsigmoid(tokenwise(kv_heads) + 5), log_input=tokenwise(kv_heads), log_scale=tokenwise(heads) - 2,
        map_query=weights(heads), map_key=weights(kv_heads),
    ).leaves()  # fmt: skip


class Function(NamedTuple):
    """`run` gives [B, T, H, D]; gradients go to the inputs named and to the parameters, by name."""

    run: Callable[[Inputs], Tensor]
    names: tuple[str, ...]
    parameters: Mapping[str, Tensor] = MappingProxyType({})

    def learns(self, inputs: Inputs) -> dict[str, Tensor]:
        """What gets a gradient."""
        return {**{name: getattr(inputs, name) for name in self.names}, **self.parameters}


Maker: TypeAlias = Callable[[Inputs], Function]


class Contender(NamedTuple):
    """What is timed, and its formula in plain PyTorch.

    `note` says what is known to be wrong with its gradients: it stands beside their time, and does not disqualify.
    `tunes`: its backward tries many settings at the first call, which takes minutes.
    """

    make: Maker
    formula: Maker
    note: str = ""
    tunes: bool = False


ROTATED = ("q_rot", "k_rot", "v")
LINEAR = ("q", "k", "v", "log_decay", "log_input", "map_query", "map_key")
BOTH = ("q_rot", "k_rot", *LINEAR, "log_scale")


def softmax(_: Inputs) -> Function:
    """Causal softmax attention: torch's flash kernel in bf16."""

    def run(i: Inputs) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (i.q_rot, i.k_rot, i.v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    return Function(run, ROTATED)


def window_branch(i: Inputs, impl: str, keep: int) -> Branch:
    """The window; without kept tokens it is what flex_attention computes."""
    y, log_mass, _ = window_attention(
        i.q_rot, i.k_rot, i.v, window=WINDOW, keep=keep, return_state=False, impl=impl
    )  # fmt: skip
    return Branch(y, log_mass)


def linear_branch(i: Inputs, impl: str, lag: int, skip: int) -> Branch:
    """Gated linear attention; without a lag it is what fla computes."""
    y, log_mass, _ = gated_linear_attention(
        i.q, i.k, i.v, i.log_decay, log_input=i.log_input, feature_map=i.maps, lag=lag, skip=skip,
        return_state=False, impl=impl,
    )  # fmt: skip
    return Branch(y, log_mass)


def window(_: Inputs, impl: str, keep: int = KEEP) -> Function:
    """Our window."""
    return Function(lambda i: window_branch(i, impl, keep).y, ROTATED)


def heavy(_: Inputs, impl: str) -> Function:
    """Our window and the tokens that drew most attention in it, fused: as `recommended` has them."""

    def run(i: Inputs) -> Tensor:
        return window_and_heavy_attention(
            i.q_rot, i.k_rot, i.v, window=WINDOW, heavy=HEAVY, keep=KEEP, half_life=HALF_LIFE, return_state=False,
            impl=impl,
        )[0]  # fmt: skip

    return Function(run, ROTATED)


def gated_linear(_: Inputs, impl: str, lag: int = WINDOW, skip: int = KEEP) -> Function:
    """Our linear branch."""
    return Function(lambda i: linear_branch(i, impl, lag, skip).y, LINEAR)


def composition(_: Inputs, impl: str = "reference", keep: int = KEEP, lag: int = WINDOW) -> Function:
    """Both branches under one denominator, one after the other: what the fused hybrid has to equal."""

    def run(i: Inputs) -> Tensor:
        linear = linear_branch(i, impl, lag, keep)
        linear = Branch(linear.y, linear.log_mass + i.log_scale)
        return joint([linear, window_branch(i, impl, keep)], i.q.dtype)

    return Function(run, BOTH)


def hybrid(_: Inputs, impl: str) -> Function:
    """Our fused hybrid."""

    def run(i: Inputs) -> Tensor:
        return hybrid_attention(
            i.q, i.k, i.v, i.log_decay, rotated=(i.q_rot, i.k_rot), log_input=i.log_input, log_scale=i.log_scale,
            feature_map=i.maps, window=WINDOW, keep=KEEP, lag=WINDOW, skip=KEEP, return_state=False, impl=impl,
        )[0]  # fmt: skip

    return Function(run, BOTH)


MIXERS = ("hybrid", "heavy")


def mixer(i: Inputs, impl: str, kind: str | MixerSpec) -> Function:
    """A mixer with RoPE, and with gates computed from x if it has any: the layer without its projections."""
    shape = Shape(i.q.shape[2], i.k.shape[2], *i.map_query.shape[1:])
    module = build_mixer(kind, shape, i.x.shape[2], i.q.device, impl)
    if i.q.dtype == torch.float64:
        module.double()

    def run(i: Inputs) -> Tensor:
        return module(MixerInputs(i.q, i.k, i.v, i.x, i.cos, i.sin))[0]

    names = ("q", "k", "v", *(["x"] if "token_gates" in module.kernels else []))
    return Function(run, names, dict(module.named_parameters()))


def build_mixer(kind: str | MixerSpec, shape: Shape, hidden: int, device: torch.device | str, impl: str) -> Any:
    """One of `MIXERS`, or of any spec: always the same random weights, near the start values."""
    if isinstance(kind, MixerSpec):
        spec = kind
    elif kind == "heavy":
        spec = Heavy(window=WINDOW, keep=KEEP, heavy=HEAVY, half_life=int(HALF_LIFE))
    else:
        spec = Hybrid(window=WINDOW, keep=KEEP, feature_dim=shape.feature_dim)
    module = spec.build(AttentionShape(hidden, shape.heads, shape.kv_heads, shape.head_dim, shape.head_dim**-0.5))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    module.impl = Impl(impl)
    return module.to(device)


def ours(impl: str) -> dict[str, Contender]:
    """Softmax, and everything of ours, in the order of the tables."""
    makers: dict[str, Any] = {
        "window": window,
        "gated linear": gated_linear,
        "hybrid": hybrid,
        "heavy": heavy,
        **{f"{kind} mixer": partial(mixer, kind=kind) for kind in MIXERS},
    }
    found = {"sdpa": Contender(softmax, softmax)}
    for name, make in makers.items():
        formula = partial(composition if make is hybrid else make, impl="reference")
        found[f"lizardzoo {name}"] = Contender(partial(make, impl=impl), formula)
    return found
