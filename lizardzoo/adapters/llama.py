"""Llama (and all that calls itself so: Llama 2 and 3, SmolLM)."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaPreTrainedModel

from lizardzoo.adapters.base import (
    ADAPTERS,
    Adapter,
    LizardConfigMixin,
    MixedAttention,
    MixedForCausalLM,
    MixedModel,
    MixedPreTrained,
)


@strict
class LizardLlamaConfig(LizardConfigMixin, LlamaConfig):
    """LlamaConfig with `layers`: one spec dict per layer, or a preset name for all (see `lizardzoo.config`)."""

    model_type = "lizard_llama"
    base_model_tp_plan: ClassVar[Any] = None  # a plan would have to shard the mixers' per-head parameters too

    layers: list[Any] | str | None = None


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

    def __init__(self, config: LizardLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)  # not LlamaForCausalLM's: it would build a LlamaModel first
        self.model = LizardLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


ADAPTERS.add("llama", Adapter("llama", LizardLlamaConfig, LizardLlamaForCausalLM))
AutoConfig.register("lizard_llama", LizardLlamaConfig, exist_ok=True)
AutoModel.register(LizardLlamaConfig, LizardLlamaModel, exist_ok=True)
AutoModelForCausalLM.register(LizardLlamaConfig, LizardLlamaForCausalLM, exist_ok=True)
