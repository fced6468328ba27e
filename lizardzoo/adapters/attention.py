"""The attention of a linearized layer: its family's projections around a mixer, or the family's own attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lizardzoo.adapters.masks import CACHE_KEYWORD, cache_of
from lizardzoo.cache import MixerCacheLayer, prefetch_next
from lizardzoo.errors import LizardzooError
from lizardzoo.mixers import far
from lizardzoo.mixers.base import AttentionShape, Mixer, MixerInputs

TOKEN_FLAGS = ("token_mask", "document_starts", "turns")
"""What `MixedModel.forward` hands to the layers for their mixers, in the order of `MixerInputs`."""


class MixedAttention(nn.Module):
    """Mixin in front of a family's attention: the same projections, then a mixer where the layer has one.

    `project` is what families differ in; Llama, Mistral and Qwen2 share this one.
    """

    mixer: Mixer | None
    layer_idx: int

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        spec = config.specs[layer_idx]
        self.mixer = None
        self.runs_softmax = spec.keeps_softmax  # `softmax_mode` sets it for a while
        if not spec.keeps_softmax:
            self.mixer = spec.build(self.attention_shape(config))
            if config.own_layer_types[layer_idx] == "sliding_attention":
                self.sliding_window = config.sliding_window  # for `softmax_forward`

    def attention_shape(self, config: Any) -> AttentionShape:
        """The shape of what the mixer replaces."""
        sizes: Any = (self.head_dim, self.scaling)  # the family's own, which its config need not hold
        return AttentionShape(config.hidden_size, config.num_attention_heads, config.num_key_value_heads, *sizes)

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, H, D], k, v [B, T, Hkv, D], before RoPE."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (proj(hidden_states).view(shape) for proj in (self.q_proj, self.k_proj, self.v_proj))  # type: ignore[operator]
        return q, k, v

    def inputs(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any) -> MixerInputs:
        """What the mixer gets of a layer's call; mask, starts and turns come from `MixedModel.forward`."""
        q, k, v = self.project(hidden_states)
        cos, sin = position_embeddings
        flags = (kwargs.get(name) for name in TOKEN_FLAGS)
        return MixerInputs(q, k, v, hidden_states, cos, sin, *flags)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, hidden] -> [B, T, hidden], and attention weights (None for a mixer)."""
        run = self.softmax_forward if self.mixer is None or self.runs_softmax else self.mixer_forward
        return run(hidden_states, position_embeddings, attention_mask, **kwargs)

    def mixer_forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """What the mixer gives, whichever of the two runs; the attention mask of softmax is none of its business."""
        assert self.mixer is not None
        inputs = self.inputs(hidden_states, position_embeddings, **kwargs)
        cache = cache_of(kwargs)
        if cache is not None:
            layers = cache.layers
            layer = layers[self.layer_idx] if self.layer_idx < len(layers) else None
            if not isinstance(layer, MixerCacheLayer):
                raise LizardzooError(
                    f"layer {self.layer_idx} needs a {MixerCacheLayer.__name__}, got {type(layer).__name__}; "
                    f"make the cache with DynamicCache(config=model.config)"
                )
            prefetch_next(cache, self.layer_idx, hidden_states.device)
            y = layer.advance(self.mixer, inputs)
        else:
            y, _ = far.run(self.mixer, inputs, None, need_state=False)
        return self.o_proj(y.flatten(2)), None  # type: ignore[operator]

    def softmax_forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """What the teacher's own attention gives with this layer's projections."""
        for name in TOKEN_FLAGS:
            kwargs.pop(name, None)
        layers = () if (cache := cache_of(kwargs)) is None else cache.layers
        if self.layer_idx < len(layers) and isinstance(layers[self.layer_idx], MixerCacheLayer):
            raise LizardzooError(
                f"inside softmax_mode, layer {self.layer_idx} cannot go on from a cache that holds its mixer's state; "
                f"pass use_cache=False, or {CACHE_KEYWORD}=DynamicCache(), which holds keys and values"
            )
        return super().forward(
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            **kwargs,
        )


@contextmanager
def softmax_mode(model: Any) -> Iterator[None]:
    """Inside, every layer runs the teacher's attention: with unchanged base weights, the model IS the teacher.

    Args:
        model: what `lizardzoo.linearize` returns. Call it inside with use_cache=False, or with a `DynamicCache()`
            of your own: the caches it makes are its mixers', and refused.
    """
    before = [(attention, attention.runs_softmax) for attention in model.attentions()]
    for attention, _ in before:
        attention.runs_softmax = True
    try:
        yield
    finally:
        for attention, flag in before:
            attention.runs_softmax = flag
