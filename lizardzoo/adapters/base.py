"""How one Hugging Face architecture reaches a mixer, once for all of them.

An adapter file holds three subclasses of its family's own classes, each with the mixin below in front: config,
attention, model and causal LM. Nothing of a modeling file is copied: projections, norms, MLPs, RoPE, loss and
`generate` stay transformers' own, and a state dict has the base's names plus `...self_attn.mixer.*`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from lizardzoo import mixers as _builtin_mixers  # noqa: F401  registers the mixers that a config.json may name
from lizardzoo.cache import MIXER_LAYER_TYPE, SLIDING_MIXER_LAYER_TYPE, MixerCacheLayer
from lizardzoo.config import MixerSpec, resolve_layers
from lizardzoo.errors import LizardzooError
from lizardzoo.mixers.base import AttentionShape, Mixer, MixerInputs
from lizardzoo.registry import Registry

CACHE_KEYWORD = "cache" if "cache" in signature(create_causal_mask).parameters else "past_key_values"
"""What forwards, mask functions and outputs call the cache: transformers 5.24 renamed it, everywhere at once."""


class Adapter:
    """The classes of one family: `model_type` of the teacher, its linearized config and causal LM."""

    def __init__(self, model_type: str, config_class: Any, model_class: Any) -> None:
        self.model_type = model_type
        self.config_class = config_class
        self.model_class = model_class


ADAPTERS: Registry[Adapter] = Registry("architecture", group="lizardzoo.adapters")


def register_adapter(model_type: str, config_class: Any, model_class: Any) -> Adapter:
    """Make a family known: to `linearize` by its teacher's `model_type`, to transformers' Auto classes by its own."""
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, model_class.base_model_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    return ADAPTERS.add(model_type, Adapter(model_type, config_class, model_class))


def is_new_parameter(name: str) -> bool:
    """Whether a parameter name belongs to a mixer (and not to the teacher)."""
    return ".self_attn.mixer." in name


@dataclass(kw_only=True)
class LizardConfigMixin:
    """Adds to a family's config `layers`, one spec dict per layer (or a preset name for all; see `lizardzoo.config`).

    `layer_types` follows from it and from `teacher_layer_types`, which says what each layer was in the teacher.
    """

    base_model_tp_plan: ClassVar[Any] = None  # a plan would have to shard the mixers' per-head parameters too

    layers: list[Any] | str | None = None
    teacher_layer_types: list[str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.normalize_layers()

    def normalize_layers(self) -> None:
        """Write `layers` out as one full dict per layer, whatever form it was given in (None = all softmax)."""
        self.layers = [spec.to_dict() for spec in self.specs]

    @property
    def specs(self) -> list[MixerSpec]:
        """One spec per layer."""
        layers = "softmax" if self.layers is None else self.layers
        return resolve_layers(layers, self.num_hidden_layers)  # type: ignore[attr-defined]

    @property
    def layer_types(self) -> list[str]:
        """Which cache layer each layer gets: derived from `layers`, so that it can never be stale."""
        mixing = {"full_attention": MIXER_LAYER_TYPE, "sliding_attention": SLIDING_MIXER_LAYER_TYPE}
        return [own if spec.keeps_softmax else mixing[own] for own, spec in zip(self.own_layer_types, self.specs)]

    @layer_types.setter
    def layer_types(self, value: Any) -> None:
        """Ignored: `layers` says it (the families' own constructors set it)."""

    @property
    def own_layer_types(self) -> list[str]:
        """What each layer's attention is in the teacher: "full_attention" or "sliding_attention"."""
        if self.teacher_layer_types is not None:
            return list(self.teacher_layer_types)
        sliding = getattr(self, "sliding_window", None) is not None
        return ["sliding_attention" if sliding else "full_attention"] * self.num_hidden_layers  # type: ignore[attr-defined]

    def validate_layer_type(self) -> None:
        """transformers knows its own layer types only."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: the package's source is never copied next to a checkpoint."""


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
            self.mixer = spec.build(attention_shape(config))
            if config.own_layer_types[layer_idx] == "sliding_attention":
                self.sliding_window = config.sliding_window  # for `softmax_forward`

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, H, D], k, v [B, T, Hkv, D], before RoPE."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (proj(hidden_states).view(shape) for proj in (self.q_proj, self.k_proj, self.v_proj))  # type: ignore[operator]
        return q, k, v

    def inputs(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any) -> MixerInputs:
        """What the mixer gets of a layer's call; mask and starts come from `MixedModel.forward`."""
        q, k, v = self.project(hidden_states)
        cos, sin = position_embeddings
        return MixerInputs(q, k, v, hidden_states, cos, sin, kwargs.get("token_mask"), kwargs.get("document_starts"))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, hidden] -> [B, T, hidden], and attention weights (None for a mixer)."""
        if self.mixer is None or self.runs_softmax:
            return self.softmax_forward(hidden_states, position_embeddings, attention_mask, **kwargs)
        inputs = self.inputs(hidden_states, position_embeddings, **kwargs)
        cache = _cache(kwargs)
        if cache is not None:
            layers = cache.layers
            layer = layers[self.layer_idx] if self.layer_idx < len(layers) else None
            if not isinstance(layer, MixerCacheLayer):
                raise LizardzooError(
                    f"layer {self.layer_idx} needs a {MixerCacheLayer.__name__}, got {type(layer).__name__}; "
                    f"make the cache with DynamicCache(config=model.config)"
                )
            y = layer.advance(self.mixer, inputs)
        else:
            y, _ = self.mixer(inputs)
        return self.o_proj(y.flatten(2)), None  # type: ignore[operator]

    def softmax_forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """What the teacher's own attention gives with this layer's projections."""
        kwargs.pop("token_mask", None)
        kwargs.pop("document_starts", None)
        return super().forward(
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            **kwargs,
        )


class MixedModel(nn.Module):
    """Mixin in front of a family's base model: MixedAttention in every layer, and the padding mask handed to it."""

    attention_class: ClassVar[type]

    def __init__(self, config: Any) -> None:
        config.normalize_layers()
        super().__init__(config)
        for index, layer in enumerate(self.layers):  # type: ignore[arg-type]
            layer.self_attn = self.attention_class(config, index)
        self.post_init()  # type: ignore[operator]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the family's own; adds the two per-token flags that mixers need."""
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is not None:
            count = tokens.shape[1]
            cache = _cache(kwargs)
            kwargs["token_mask"] = _token_mask(attention_mask, tokens, cache)
            starts = None
            if attention_mask is None and cache is None:
                starts = _document_starts(position_ids, tokens.shape[0], count)
            if starts is not None:
                if use_cache:
                    raise LizardzooError(
                        "position_ids restart inside a row (packed documents), which cannot go on from a cache; "
                        "pass use_cache=False, or one document per row"
                    )
                use_cache = False
            kwargs["document_starts"] = starts
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )


class LayerwiseMasks(nn.Module):
    """Mixin behind MixedModel for families whose layers look their mask up by layer type (Qwen): adds the mixers'."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the family's own, given the masks it would have made."""
        config: Any = self.config
        use_cache = config.use_cache if use_cache is None else use_cache
        if inputs_embeds is None and input_ids is not None:
            inputs_embeds, input_ids = self.embed_tokens(input_ids), None  # type: ignore[operator]
        if inputs_embeds is not None:
            cache = _cache(kwargs)
            if use_cache and cache is None:
                cache = kwargs[CACHE_KEYWORD] = DynamicCache(config=config)
            if position_ids is None:
                seen = cache.get_seq_length() if cache is not None else 0
                position_ids = torch.arange(seen, seen + inputs_embeds.shape[1], device=inputs_embeds.device)[None]
            given = {
                "config": config,
                "inputs_embeds": inputs_embeds,
                "attention_mask": attention_mask,
                CACHE_KEYWORD: cache,
                "position_ids": position_ids,
            }
            full = create_causal_mask(**given)
            attention_mask = {"full_attention": full, MIXER_LAYER_TYPE: full}  # type: ignore[assignment]
            if "sliding_attention" in config.own_layer_types:
                sliding = create_sliding_window_causal_mask(**given)
                attention_mask |= {"sliding_attention": sliding, SLIDING_MIXER_LAYER_TYPE: sliding}  # type: ignore[operator]
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )


class MixedPreTrained:
    """Mixin for a family's PreTrainedModel: start values and dtype of the new parameters."""

    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["self_attn.mixer"]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, Mixer):
            module.reset_parameters()

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing: the package's source is never copied next to a checkpoint."""


class MixedForCausalLM:
    """Mixin for the causal LM: what users ask a linearized model for."""

    base_model_class: ClassVar[type]

    def __init__(self, config: Any) -> None:
        PreTrainedModel.__init__(self, config)  # not the family's own, which would build a model of its own first
        self.model = self.base_model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[attr-defined]

    def attentions(self) -> list[Any]:
        """All layers' attentions; `.mixer` is None where softmax is kept."""
        return [layer.self_attn for layer in self.model.layers]

    def mixers(self) -> dict[int, Mixer]:
        """The mixers by layer index; softmax layers are absent."""
        return {a.layer_idx: a.mixer for a in self.attentions() if a.mixer is not None}

    def set_window(self, window: int | Sequence[int]) -> None:
        """Run the same weights with another window (one for all layers, or one per layer that has a window).

        A window is a run-time choice: a wider one is closer to the teacher, at the price of state. A cache that was
        begun with another window cannot go on.
        """
        specs = self.config.specs  # type: ignore[attr-defined]
        targets = [i for i, spec in enumerate(specs) if hasattr(spec, "window")]
        windows = [window] * len(targets) if isinstance(window, int) else list(window)
        if len(windows) != len(targets):
            raise LizardzooError(f"the model has {len(targets)} layers with a window, got {len(windows)} windows")
        for index, size in zip(targets, windows, strict=True):
            specs[index] = replace(specs[index], window=size)
        for index, mixer in self.mixers().items():
            mixer.spec = specs[index]
        self.config.layers = [spec.to_dict() for spec in specs]  # type: ignore[attr-defined]


@contextmanager
def softmax_mode(model: Any) -> Iterator[None]:
    """Inside, every layer runs the teacher's attention: with unchanged base weights, the model IS the teacher."""
    before = [(attention, attention.runs_softmax) for attention in model.attentions()]
    for attention, _ in before:
        attention.runs_softmax = True
    try:
        yield
    finally:
        for attention, flag in before:
            attention.runs_softmax = flag


def attention_shape(config: Any) -> AttentionShape:
    """The shape of a family's attention from its config."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return AttentionShape(
        hidden_size=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
    )


def _cache(kwargs: dict[str, Any]) -> Cache | None:
    """The cache among a forward's keywords; its old name too, which transformers goes on to take from users."""
    return kwargs.get(CACHE_KEYWORD, kwargs.get("past_key_values"))


def _token_mask(attention_mask: Tensor | None, tokens: Tensor, cache: Cache | None) -> Tensor | None:
    """[B, T] bool of this call's tokens; None when all are real."""
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        raise LizardzooError(
            f"a linearized model takes a padding mask [batch, length], got shape {list(attention_mask.shape)}; "
            f"arbitrary attention patterns need softmax"
        )
    batch, count = tokens.shape[:2]
    seen = cache.get_seq_length() if cache is not None else 0
    if attention_mask.shape[0] != batch or attention_mask.shape[1] != seen + count:
        raise LizardzooError(
            f"attention_mask is [{attention_mask.shape[0]}, {attention_mask.shape[1]}], expected "
            f"[{batch}, {seen + count}]: {seen} tokens in the cache and {count} new ones"
        )
    mask = attention_mask[:, -count:].to(torch.bool)
    return None if bool(mask.all()) else mask


def _document_starts(position_ids: Tensor | None, batch: int, count: int) -> Tensor | None:
    """[B, T] bool: where positions restart, as transformers reads packed sequences; None when they do not."""
    if position_ids is None or position_ids.shape[-1] < 2:
        return None
    starts = torch.zeros(position_ids.shape, dtype=torch.bool, device=position_ids.device)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return starts.expand(batch, count) if bool(starts.any()) else None
