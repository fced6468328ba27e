"""How one Hugging Face architecture reaches a mixer, once for all of them.

An adapter file holds subclasses of its family's own classes, each with the mixin from here in front: config, attention
(`config.py`, `attention.py`), model and causal LM. Nothing of a modeling file is copied: projections, norms, MLPs,
RoPE, loss and `generate` stay transformers' own, and a state dict has the base's names plus `...self_attn.mixer.*`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils import can_return_tuple

from lizardzoo.adapters.attention import MixedAttention
from lizardzoo.adapters.config import MIXER_TYPES, LizardConfigMixin
from lizardzoo.adapters.limits import check_layers
from lizardzoo.adapters.masks import (
    CACHE_KEYWORD,
    TOKEN_MASK,
    cache_of,
    document_starts,
    refuse_static,
    softmax_masks,
    token_mask,
)
from lizardzoo.adapters.publishing import Published
from lizardzoo.cache import MixerCacheLayer
from lizardzoo.config import LINEARIZED
from lizardzoo.errors import LizardzooError
from lizardzoo.mixers import far
from lizardzoo.mixers.base import Mixer, Turns
from lizardzoo.registry import Registry

__all__ = [
    "ADAPTERS",
    "LayerwiseMasks",
    "LizardConfigMixin",
    "MixedAttention",
    "MixedForCausalLM",
    "MixedModel",
    "MixedPreTrained",
    "is_new_parameter",
    "register_adapter",
]

Model = TypeVar("Model", bound=type)

ADAPTERS: Registry[Any] = Registry("architecture", group="lizardzoo.adapters")
"""The linearized causal LM of each family, by the `model_type` of its teacher; `.config_class` is its config's."""


def register_adapter(model_type: str) -> Callable[[Model], Model]:
    """Class decorator of a family's causal LM: make it known under its teacher's `model_type`.

    `linearize` finds it by that, transformers' Auto classes by the `model_type` of its own config.

    Args:
        model_type: as the teacher's config.json has it.

    Raises:
        LizardzooError: another class has that model_type.
    """

    def decorate(model_class: Model) -> Model:
        model: Any = model_class
        ADAPTERS.add(model_type, model_class)
        if model.config_class.model_type != LINEARIZED + model_type:
            ADAPTERS.remove(model_type)
            raise LizardzooError(
                f"the config of the {model_type!r} adapter has model_type={model.config_class.model_type!r}; "
                f"name it {LINEARIZED + model_type!r}, by which its checkpoints are found"
            )
        for cls in (model.base_model_class, model):
            cls.published_classes = (model.config_class, model.base_model_class, model)
        AutoConfig.register(model.config_class.model_type, model.config_class, exist_ok=True)
        AutoModel.register(model.config_class, model.base_model_class, exist_ok=True)
        AutoModelForCausalLM.register(model.config_class, model, exist_ok=True)
        return model_class

    return decorate


def is_new_parameter(name: str) -> bool:
    """Whether a parameter name belongs to a mixer (and not to the teacher)."""
    return ".self_attn.mixer." in name


class MixedModel(nn.Module):
    """Mixin in front of a family's base model: MixedAttention in every layer, and the per-token flags handed to it."""

    attention_class: ClassVar[type]

    def __init__(self, config: Any) -> None:
        config.normalize_layers()
        super().__init__(config)
        for index, layer in enumerate(self.layers):  # type: ignore[arg-type]
            layer.self_attn = self.attention_class(config, index)
        self.post_init()  # type: ignore[operator]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the family's own; adds what mixers need to know of each token.

        `attentions` has one entry per layer, None where a mixer is.
        """
        tokens = input_ids if input_ids is not None else inputs_embeds
        kinds: list[str] = self.config.own_layer_types  # type: ignore[assignment, union-attr]
        attentions: list[Any] = [layer.self_attn for layer in self.running()]
        mixing = [attention.mixer is not None and not attention.runs_softmax for attention in attentions]
        if kwargs.get("output_attentions", self.config.output_attentions) and all(mixing):  # type: ignore[union-attr]
            raise LizardzooError(
                "output_attentions=True, but all layers of this model are mixers, which have no attention weights; "
                "leave it out, or look at the teacher's with lizardzoo.softmax_mode(model)"
            )
        if not all(mixing) and self.config._attn_implementation == "flex_attention":  # type: ignore[union-attr]
            refuse_static(cache_of(kwargs))
        masks = attention_mask if isinstance(attention_mask, dict) else None  # of `create_masks_for_generate`
        if masks is not None and TOKEN_MASK in masks:
            kwargs["token_mask"] = masks[TOKEN_MASK]
        elif masks is not None:
            raise LizardzooError(
                f"a linearized model takes a padding mask [batch, length], got masks for {', '.join(masks)}; "
                f"arbitrary attention patterns need softmax"
            )
        elif tokens is not None and (any(mixing) or attention_mask is None or attention_mask.ndim == 2):
            kwargs["token_mask"] = token_mask(attention_mask, tokens, cache_of(kwargs))
            if attention_mask is None and cache_of(kwargs) is None:
                starts = kwargs["document_starts"] = document_starts(position_ids, *tokens.shape[:2])
                if starts is not None:
                    use_cache = _without_cache(use_cache)
        if tokens is not None and any(mixing):
            kwargs["turns"] = self.turns(
                tokens, cache_of(kwargs), kwargs.get("token_mask"), kwargs.get("document_starts")
            )
        if tokens is not None and all(mixing):
            # Nobody looks at a causal mask, which would be [B, 1, T, T]; one of 4 dimensions is taken as it is. It fits
            # no scores: whoever calls softmax_forward all the same gets an error, and not attention without a mask.
            masks = dict.fromkeys(kinds, tokens.new_empty((1, 1, 0, 0), dtype=torch.bool))
        if masks is not None:
            attention_mask = masks if isinstance(self, LayerwiseMasks) else masks[kinds[0]]
        output = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        if any(mixing) and output.get("attentions"):
            weights = iter(output.attentions)
            output.attentions = tuple(None if mixes else next(weights) for mixes in mixing)
        return output

    def running(self) -> Any:
        """The layers of a call: all, or the first ones while `generate` asks those (`assistant_early_exit`)."""
        model: Any = self
        return model.layers[: model.config.num_hidden_layers]

    def turns(self, tokens: Tensor, cache: Any, mask: Tensor | None, starts: Tensor | None) -> Turns | None:
        """How kept tokens are brought near for tokens [B, T, ...]; None where none can be beyond the positions known.

        A family whose rotary embedding is not at `rotary_emb` overrides it.
        """
        model: Any = self
        keeping = next((layer.self_attn for layer in self.running() if far.keeps(layer.self_attn.mixer)), None)
        if keeping is None:
            return None
        (batch, count), positions = tokens.shape[:2], model.config.max_position_embeddings
        layer: Any = cache.layers[keeping.layer_idx] if cache is not None and cache.layers else None
        held = layer if isinstance(layer, MixerCacheLayer) else None
        if count + (0 if held is None else held.most_seen()) <= far.grid(positions)[0]:
            return None
        window = None if held is None else keeping.mixer.window_state(held.state)
        length = tokens.new_zeros(batch, dtype=torch.long) if window is None else window.length.to(tokens.device)
        frequencies = model.rotary_emb.inv_freq.to(tokens.device)
        return far.turns(positions, frequencies, length, count, mask, starts)


class LayerwiseMasks(nn.Module):
    """Mixin behind MixedModel for families whose layers look their mask up by layer type (Qwen): adds the mixers'."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
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
            cache = cache_of(kwargs)
            if use_cache and cache is None:
                cache = kwargs[CACHE_KEYWORD] = DynamicCache(config=config)
            if position_ids is None:
                seen = cache.get_seq_length() if cache is not None else 0
                position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen)[None]
            if not isinstance(attention_mask, dict):
                attention_mask = softmax_masks(config, inputs_embeds, attention_mask, position_ids, cache)
            attention_mask |= {MIXER_TYPES[k]: mask for k, mask in attention_mask.items() if k in MIXER_TYPES}
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )


class MixedPreTrained(Published):
    """Mixin for a family's PreTrainedModel: start values and dtype of the new parameters, and how it is published."""

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
    config: Any

    def __init__(self, config: Any) -> None:
        PreTrainedModel.__init__(self, config)  # not the family's own, which would build a model of its own first
        self.model = self.base_model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[attr-defined]

    def create_masks_for_generate(
        self,
        config: Any,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """All masks of one call at sizes that do not change: `generate` asks for them before a compiled forward."""
        cache, shape = cache_of(kwargs), inputs_embeds.shape[:2]
        real = inputs_embeds.new_ones(shape) if attention_mask is None else attention_mask[:, -shape[1] :]
        masks: dict[str, Any] = {TOKEN_MASK: real.to(torch.bool)}  # always: a compiled forward is made for one case
        if any(attention.mixer is None for attention in self.attentions()):
            masks |= softmax_masks(config, inputs_embeds, attention_mask, position_ids, cache)
        return masks

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', where all layers keep softmax: `generate_batch` deals pages of keys and values out."""
        if self.mixers():
            raise LizardzooError(
                "continuous batching (generate_batch) is made of pages of keys and values, which a mixer has not; give "
                "generate a batch padded on the left"
            )
        return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]

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

        Args:
            window: tokens, the current one included.

        Raises:
            LizardzooError: a list of another length, a window that is no whole number or below 1, no layer that has
                one; nothing is changed then.
        """
        self._set_size("window", "a window", window)

    def set_heavy(self, heavy: int | Sequence[int]) -> None:
        """Run the same weights with other numbers of heavy tokens (one for all layers, or one per layer that has them).

        A run-time choice like the window. Begin a new cache: one begun with another number keeps it in its steps.

        Args:
            heavy: tokens behind the window that a layer holds.

        Raises:
            LizardzooError: as `set_window`.
        """
        self._set_size("heavy", "heavy tokens", heavy)

    def _set_size(self, field: str, name: str, size: int | Sequence[int]) -> None:
        """Another value for a field that changes no weights, in every layer that has it."""
        call, specs = f"set_{field}({size!r})", list(self.config.specs)
        targets = [i for i, spec in enumerate(specs) if hasattr(spec, field)]
        if not targets:
            raise LizardzooError(f"{call}: no layer of this model has {name}; convert its teacher anew")
        if isinstance(size, str) or not isinstance(size, (int, Sequence)):
            raise LizardzooError(
                f"{call}: {field} is a whole number of tokens; give one for all layers, "
                f"or a list of {len(targets)}, one for each layer that has {name}"
            )
        sizes = [size] * len(targets) if isinstance(size, int) else list(size)
        if len(sizes) != len(targets):
            raise LizardzooError(
                f"set_{field}: the model has {len(targets)} layers with {name}, got {len(sizes)} numbers"
            )
        for index, value in zip(targets, sizes, strict=True):
            specs[index] = replace(specs[index], **{field: value})
        check_layers(specs, self.config.max_position_embeddings)
        for index, mixer in self.mixers().items():
            mixer.spec = specs[index]
        self.config.layers = [spec.to_dict() for spec in specs]


def _without_cache(use_cache: bool | None) -> bool:
    """use_cache of a call whose rows hold several documents: none, unless it was asked for."""
    if use_cache:
        raise LizardzooError(
            "position_ids restart inside a row (packed documents; under torch.compile they always may), which cannot "
            "go on from a cache; pass use_cache=False, or one document per row"
        )
    return False
