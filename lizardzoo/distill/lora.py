"""LoRA by peft around a student for stage 2, and its merge, which keeps the factors: a difference holds them alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lizardzoo.distill.recipe import Finetune
from lizardzoo.errors import LizardzooError
from lizardzoo.hub.low_rank import LowRank

NAME = "default"


def with_lora(model: Any, stage: Finetune) -> Any:
    """peft's LoraModel around a model, which now has LoRA in its projections."""
    from peft import LoraConfig, LoraModel

    config = LoraConfig(
        r=stage.lora_rank,
        lora_alpha=stage.lora_alpha,
        target_modules=list(stage.lora_targets),
        exclude_modules=r".*\.self_attn\.mixer\..*",  # mixers train whole
    )
    # Not get_peft_model: its PeftModel meets deprecations of transformers 5.20, and renames parameters.
    return LoraModel(model, config, NAME)


@torch.no_grad()
def merge_lora(model: Any) -> dict[str, LowRank]:
    """Add what LoRA learnt to the weights under it; the updates, by the names of the weights once LoRA is taken out.

    Not peft's merge: its product of matrices is rounded otherwise on another machine (see `lizardzoo.hub.low_rank`).
    """
    from peft.tuners.lora import LoraLayer

    updates = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            weight = layer.get_base_layer().weight
            a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight.double() * layer.scaling[NAME]
            update = LowRank(a.detach().float().cpu(), b.detach().float().cpu(), weight.dtype)
            weight.copy_(update.merged(weight))
            updates[f"{name}.weight"] = update
    return updates


def check_targets(model: Any, stage: Finetune) -> None:
    """Every LoRA target is a linear module of the decoder's layers."""
    linear = {
        name.rpartition(".")[2]
        for name, module in model.get_decoder().layers.named_modules()
        if isinstance(module, nn.Linear) and ".mixer." not in name
    }
    if unknown := [name for name in stage.lora_targets if name not in linear]:
        raise LizardzooError(
            f"lora_targets names {unknown[0]!r}, which is no linear module of the model's layers; "
            f"there are: {', '.join(sorted(linear))}"
        )
