"""Qwen3: q and k are normed per head before RoPE; possibly sliding windows in the upper layers."""

from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3PreTrainedModel

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
class LizardQwen3Config(LizardConfigMixin, Qwen3Config):
    """Qwen3Config with `layers`."""

    model_type = "lizard_qwen3"


class LizardQwen3Attention(MixedAttention, Qwen3Attention):
    """Qwen3's attention, or its projections and norms around a mixer."""

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q and k after their norms."""
        q, k, v = super().project(hidden_states)
        return self.q_norm(q), self.k_norm(k), v  # type: ignore[operator]


class LizardQwen3PreTrainedModel(MixedPreTrained, Qwen3PreTrainedModel):
    """Start values and dtypes of the new parameters."""

    config: LizardQwen3Config


class LizardQwen3Model(MixedModel, LayerwiseMasks, LizardQwen3PreTrainedModel, Qwen3Model):
    """Qwen3Model with a mixer per layer."""

    attention_class = LizardQwen3Attention


@register_adapter("qwen3")
class LizardQwen3ForCausalLM(MixedForCausalLM, LizardQwen3PreTrainedModel, Qwen3ForCausalLM):
    """Qwen3ForCausalLM with a mixer per layer."""

    base_model_class = LizardQwen3Model
