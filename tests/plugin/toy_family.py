"""A third party's adapter, living outside the package: Gemma, whose layers share one causal mask as Llama's do."""

from huggingface_hub.dataclasses import strict
from transformers import GemmaConfig, GemmaForCausalLM, GemmaModel
from transformers.models.gemma.modeling_gemma import GemmaAttention, GemmaPreTrainedModel

from lizardzoo.adapters.base import (
    LizardConfigMixin,
    MixedAttention,
    MixedForCausalLM,
    MixedModel,
    MixedPreTrained,
    register_adapter,
)


@strict
class LizardGemmaConfig(LizardConfigMixin, GemmaConfig):
    model_type = "lizard_gemma"


class LizardGemmaAttention(MixedAttention, GemmaAttention):
    pass


class LizardGemmaPreTrainedModel(MixedPreTrained, GemmaPreTrainedModel):
    config: LizardGemmaConfig


class LizardGemmaModel(MixedModel, LizardGemmaPreTrainedModel, GemmaModel):
    attention_class = LizardGemmaAttention


@register_adapter("gemma")
class LizardGemmaForCausalLM(MixedForCausalLM, LizardGemmaPreTrainedModel, GemmaForCausalLM):
    base_model_class = LizardGemmaModel
