"""Llama (and all that calls itself so: Llama 2 and 3, SmolLM)."""

from typing import Any, ClassVar

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
    """LlamaConfig with `layers`: one spec dict per layer, or a preset name for all (see `lizardzoo.config`)."""

    model_type = "lizard_llama"
    base_model_tp_plan: ClassVar[Any] = None  # a plan would have to shard the mixers' per-head parameters too

    layers: list[Any] | str | None = None
    teacher_layer_types: list[str] | None = None


class LizardLlamaAttention(MixedAttention, LlamaAttention):
    """Llama's attention, or its projections around a mixer."""


class LizardLlamaPreTrainedModel(MixedPreTrained, LlamaPreTrainedModel):
    """Start values and dtypes of the new parameters."""

    config: LizardLlamaConfig


class LizardLlamaModel(MixedModel, LizardLlamaPreTrainedModel, LlamaModel):
    """LlamaModel with a mixer per layer."""

    attention_class = LizardLlamaAttention


class LizardLlamaForCausalLM(MixedForCausalLM, LizardLlamaPreTrainedModel, LlamaForCausalLM):
    """LlamaForCausalLM with a mixer per layer."""

    base_model_class = LizardLlamaModel


register_adapter("llama", LizardLlamaConfig, LizardLlamaForCausalLM)
