"""Llama (and all that calls itself so: Llama 2 and 3, SmolLM)."""

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaPreTrainedModel

from lizardzoo.adapters.base import (
    LizardConfigMixin,
    MixedAttention,
    MixedForCausalLM,
    MixedModel,
    MixedPreTrained,
    register_adapter,
)


@strict
class LizardLlamaConfig(LizardConfigMixin, LlamaConfig):
    """LlamaConfig with `layers`."""

    model_type = "lizard_llama"


class LizardLlamaAttention(MixedAttention, LlamaAttention):
    """Llama's attention, or its projections around a mixer."""


class LizardLlamaPreTrainedModel(MixedPreTrained, LlamaPreTrainedModel):
    """Start values and dtypes of the new parameters."""

    config: LizardLlamaConfig


class LizardLlamaModel(MixedModel, LizardLlamaPreTrainedModel, LlamaModel):
    """LlamaModel with a mixer per layer."""

    attention_class = LizardLlamaAttention


@register_adapter("llama")
class LizardLlamaForCausalLM(MixedForCausalLM, LizardLlamaPreTrainedModel, LlamaForCausalLM):
    """LlamaForCausalLM with a mixer per layer."""

    base_model_class = LizardLlamaModel
