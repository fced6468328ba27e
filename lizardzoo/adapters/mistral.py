"""Mistral: a head_dim of its own, and where the config says so a sliding window in every layer."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import MistralConfig, MistralForCausalLM, MistralModel
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralPreTrainedModel

from lizardzoo.adapters.base import (
    LizardConfigMixin,
    MixedAttention,
    MixedForCausalLM,
    MixedModel,
    MixedPreTrained,
    register_adapter,
)


@strict
class LizardMistralConfig(LizardConfigMixin, MistralConfig):
    """MistralConfig with `layers`: one spec dict per layer, or a preset name for all (see `lizardzoo.config`)."""

    model_type = "lizard_mistral"
    base_model_tp_plan: ClassVar[Any] = None  # a plan would have to shard the mixers' per-head parameters too

    layers: list[Any] | str | None = None
    teacher_layer_types: list[str] | None = None


class LizardMistralAttention(MixedAttention, MistralAttention):
    """Mistral's attention, or its projections around a mixer."""


class LizardMistralPreTrainedModel(MixedPreTrained, MistralPreTrainedModel):
    """Start values and dtypes of the new parameters."""

    config: LizardMistralConfig


class LizardMistralModel(MixedModel, LizardMistralPreTrainedModel, MistralModel):
    """MistralModel with a mixer per layer."""

    attention_class = LizardMistralAttention


class LizardMistralForCausalLM(MixedForCausalLM, LizardMistralPreTrainedModel, MistralForCausalLM):
    """MistralForCausalLM with a mixer per layer."""

    base_model_class = LizardMistralModel


register_adapter("mistral", LizardMistralConfig, LizardMistralForCausalLM)
