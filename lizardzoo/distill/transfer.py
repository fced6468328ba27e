"""Stage 1: each mixer learns to give what its layer's softmax attention gives, on the teacher's own input.

No second model is needed: the projections are the teacher's, so the student runs its softmax, and a hook on each
attention runs the mixer beside it and measures its error. Every layer therefore sees exactly what it sees in the
teacher, and no error is passed from layer to layer.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lizardzoo.adapters.base import is_new_parameter, softmax_mode
from lizardzoo.distill.recipe import Stage
from lizardzoo.distill.trainer import (
    StageTrainer,
    StepLog,
    activation_checkpointing,
    last_checkpoint,
    training,
)


class TeacherForcing:
    """Inside, a forward pass of the student is the teacher's; `errors` gets each mixer's error by layer."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.errors: dict[int, Tensor] = {}
        self.recording = True

    def __enter__(self) -> TeacherForcing:
        self._stack = ExitStack()
        self._stack.enter_context(softmax_mode(self.model))  # masks are the teacher's too
        for attention in self.model.attentions():
            if attention.mixer is not None:
                self._stack.callback(attention.register_forward_hook(self._hook, with_kwargs=True).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _hook(self, attention: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        target = output[0].detach()
        found, _ = attention.mixer_forward(*args, **kwargs)
        error = layer_error(found, target, kwargs.get("token_mask"))
        if self.recording:  # not when a checkpointed layer is computed again: that would keep its graph alive
            self.errors[attention.layer_idx] = error
        return target, output[1]


def layer_error(output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error over the target's variance, in fp32; 1 is what the target's mean would score.

    output, target: [B, T, hidden]; mask: [B, T] bool, True = counts. Without the normalization, the layers
    with the largest outputs would drown the others.
    """
    if mask is not None:
        output, target = output[mask], target[mask]
    output, target = output.float(), target.float()
    return (output - target).square().mean() / target.var(correction=0).clamp_min(1e-12)


class TransferTrainer(StageTrainer):
    """Trains on the mean of the layer errors."""

    forcing: TeacherForcing

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of one batch; names the layers whose error is not finite."""
        self.eval_attention()
        self.forcing.recording = True
        outputs = model(**inputs, use_cache=False, logits_to_keep=1)
        self.forcing.recording = False
        errors, self.forcing.errors = self.forcing.errors, {}
        stacked = torch.stack(list(errors.values()))
        values = {str(layer): error for layer, error in zip(errors, stacked.tolist())}
        if bad := [layer for layer, error in values.items() if not math.isfinite(error)]:
            self.stop(f"the error of layer {', '.join(bad)} is not finite")
        self.measure(layer_error=values)
        loss = stacked.mean()
        return (loss, outputs) if return_outputs else loss


def transfer(
    model: Any,
    stage: Stage,
    dataset: Any,
    arguments: Any,
    log: StepLog,
    *,
    gradient_checkpointing: bool = False,
) -> None:
    """Train the mixers in place; goes on from the last checkpoint in `arguments.output_dir`, if any."""
    names = [name for name, _ in model.named_parameters() if is_new_parameter(name)]
    with (
        training(model, names),
        activation_checkpointing(model, gradient_checkpointing),
        TeacherForcing(model) as forcing,
    ):
        trainer = TransferTrainer(model, stage, arguments, train_dataset=dataset, callbacks=[log])
        trainer.forcing = forcing
        checkpoint = last_checkpoint(Path(arguments.output_dir))
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            log.close()
