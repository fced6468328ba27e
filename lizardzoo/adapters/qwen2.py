"""Qwen2 and Qwen2.5: biases on q, k and v, and possibly sliding windows in the upper layers."""

from huggingface_hub.dataclasses import strict
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2PreTrainedModel

from lizardzoo.adapters.base import (
    LayerwiseMasks,
    LizardConfigMixin,
    MixedAttention,
    MixedForCausalLM,
    MixedModel,
    MixedPreTrained,
    register_adapter,
)


@strict
class LizardQwen2Config(LizardConfigMixin, Qwen2Config):
    """Qwen2Config with `layers`."""

    model_type = "lizard_qwen2"


class LizardQwen2Attention(MixedAttention, Qwen2Attention):
    """Qwen2's attention, or its projections (with their biases) around a mixer."""


class LizardQwen2PreTrainedModel(MixedPreTrained, Qwen2PreTrainedModel):
    """Start values and dtypes of the new parameters."""

    config: LizardQwen2Config


class LizardQwen2Model(MixedModel, LayerwiseMasks, LizardQwen2PreTrainedModel, Qwen2Model):
    """Qwen2Model with a mixer per layer."""

    attention_class = LizardQwen2Attention


@register_adapter("qwen2")
class LizardQwen2ForCausalLM(MixedForCausalLM, LizardQwen2PreTrainedModel, Qwen2ForCausalLM):
    """Qwen2ForCausalLM with a mixer per layer."""

    base_model_class = LizardQwen2Model
