"""Hypothesis strategies: shapes, regimes and seeds are drawn, tensors follow from the seed: shrinking is readable."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal, NamedTuple, Union

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from lizardzoo.config import MIXERS, PRESETS, MixerSpec
from lizardzoo.errors import LizardzooError
from lizardzoo.mixers.base import AttentionShape, MixerInputs

SHAPES = (
    AttentionShape(hidden_size=6, heads=1, kv_heads=1, head_dim=4, scale=0.5),
    AttentionShape(hidden_size=6, heads=3, kv_heads=1, head_dim=4, scale=0.5),
    AttentionShape(hidden_size=6, heads=4, kv_heads=2, head_dim=2, scale=0.7),
)
SIZES = {
    "feature_dim": (None, 1, 4, 6),
    "window": (1, 3, 5, 40),
    "keep": (0, 1, 3),
    "sinks": (0, 2),
    "heavy": (1, 2, 5),
}


class TokenFlags(NamedTuple):
    """Which tokens are real, and where documents begin."""

    mask: Tensor | None
    starts: Tensor | None


def specs(spec_class: type[MixerSpec]) -> st.SearchStrategy[MixerSpec]:
    """Valid specs of a class: its defaults and presets at small sizes, or drawn from the fields' own types.

    Raises:
        LizardzooError: a field has no default, and is of a type that nothing is drawn from (as str).
    """
    hints = typing.get_type_hints(spec_class)
    fields = {f.name: _values(f.name, hints[f.name], f.default) for f in dataclasses.fields(spec_class)}
    required = any(f.default is dataclasses.MISSING for f in dataclasses.fields(spec_class))
    named = [*([] if required else [spec_class()]), *(p for p in map(PRESETS.get, PRESETS) if type(p) is spec_class)]

    @st.composite
    def build(draw: st.DrawFn) -> MixerSpec:
        base = draw(st.sampled_from([None, *named]))
        chosen = {} if base is None else {name: getattr(base, name) for name in fields if name not in SIZES}
        chosen |= {name: draw(values) for name, values in fields.items() if name not in chosen}
        try:
            return spec_class(**chosen)
        except LizardzooError:
            assume(False)
            raise

    return build()


@st.composite
def layer_lists(draw: st.DrawFn, num_layers: int, always: type[MixerSpec] | None = None) -> list[MixerSpec]:
    """One spec per layer: all registered mixers in any order; or any ones, among them one of the class `always`."""
    classes = [MIXERS.get(name) for name in MIXERS]
    if always is None:
        order = draw(st.permutations(classes))
        return [draw(specs(order[index % len(order)])) for index in range(num_layers)]
    place = draw(st.integers(0, num_layers - 1))
    mixed = st.one_of(specs(always), *map(specs, classes))
    return [draw(specs(always) if index == place else mixed) for index in range(num_layers)]


@st.composite
def token_flags(
    draw: st.DrawFn, batch: int, length: int, *, documents: bool = True, always_padded: bool = False
) -> TokenFlags:
    """Any padding, inside rows too, and any packing."""
    flags = st.lists(st.booleans(), min_size=batch * length, max_size=batch * length)
    mask = torch.tensor(draw(flags)).view(batch, length) if always_padded or draw(st.booleans()) else None
    starts = torch.tensor(draw(flags)).view(batch, length) if documents and draw(st.booleans()) else None
    return TokenFlags(mask, starts)


def mixer_inputs(shape: AttentionShape, batch: int, length: int, seed: int, flags: TokenFlags) -> MixerInputs:
    """Random float64 inputs; positions count the real tokens of each document, as `generate` and packing do."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(batch, length, *size, generator=generator, dtype=torch.float64)

    mask = torch.ones(batch, length, dtype=torch.bool) if flags.mask is None else flags.mask
    starts = torch.zeros_like(mask) if flags.starts is None else flags.starts & mask
    count = mask.long().cumsum(1) - 1
    base = torch.where(starts, count, 0).cummax(1).values
    angle = (count - base).clamp(min=0)[..., None] * torch.tensor([1.0, 0.1, 0.01, 0.001])[
        : shape.head_dim // 2
    ].double()
    angle = torch.cat([angle, angle], -1)
    return MixerInputs(
        q=randn(shape.heads, shape.head_dim),
        k=randn(shape.kv_heads, shape.head_dim),
        v=randn(shape.kv_heads, shape.head_dim),
        x=randn(shape.hidden_size),
        cos=angle.cos(),
        sin=angle.sin(),
        mask=flags.mask,
        starts=flags.starts,
    )


def _values(name: str, hint: Any, default: Any) -> st.SearchStrategy[Any]:
    origin = typing.get_origin(hint)
    if name in SIZES:
        return st.sampled_from(SIZES[name])
    if origin is Literal:
        return st.sampled_from(typing.get_args(hint))
    if origin in (Union, types.UnionType):
        return st.one_of(*(_values("", option, default) for option in typing.get_args(hint)))
    if hint is type(None):
        return st.none()
    if hint is bool:
        return st.booleans()
    if hint is int:
        return st.integers(0, 6)
    if hint is float:
        return st.sampled_from([0.05, 0.5, 0.999])
    if default is dataclasses.MISSING:
        raise LizardzooError(
            f"no values can be drawn for the field {name!r} of type {hint}: give it a default, or a type such as int, "
            f"float, bool or Literal"
        )
    return st.just(default)
