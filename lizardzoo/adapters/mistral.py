"""Mistral: a head_dim of its own, and where the config says so a sliding window in every layer."""

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
    """MistralConfig with `layers`."""

    model_type = "lizard_mistral"


class LizardMistralAttention(MixedAttention, MistralAttention):
    """Mistral's attention, or its projections around a mixer."""


class LizardMistralPreTrainedModel(MixedPreTrained, MistralPreTrainedModel):
    """Start values and dtypes of the new parameters."""

    config: LizardMistralConfig


class LizardMistralModel(MixedModel, LizardMistralPreTrainedModel, MistralModel):
    """MistralModel with a mixer per layer."""

    attention_class = LizardMistralAttention


@register_adapter("mistral")
class LizardMistralForCausalLM(MixedForCausalLM, LizardMistralPreTrainedModel, MistralForCausalLM):
    """MistralForCausalLM with a mixer per layer."""

    base_model_class = LizardMistralModel
