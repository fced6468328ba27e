"""Stage 1: each mixer learns to give what its layer's softmax attention gives, on the teacher's own input.

No second model is needed: the projections are the teacher's, so the student runs its softmax, and a hook on each
attention runs the mixer beside it and measures its error. Every layer therefore sees exactly what it sees in the
teacher, and no error is passed from layer to layer. So each layer's gradient can be taken while the layer computes, and
its activations go before the next layer's come: memory is that of one layer, whatever the depth.
"""

from __future__ import annotations

import math
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lizardzoo.adapters.attention import softmax_mode
from lizardzoo.adapters.base import is_new_parameter
from lizardzoo.distill.processes import sharded
from lizardzoo.distill.recipe import Stage
from lizardzoo.distill.trainer import StageTrainer, StepLog, last_checkpoint, training


class KeptGradients(torch.autograd.Function):
    """An error whose gradients by the parameters are known already: [] -> []."""

    @staticmethod
    def forward(ctx: Any, error: Tensor, gradients: tuple[Tensor | None, ...], *parameters: Tensor) -> Tensor:
        """The error itself."""
        ctx.gradients = gradients
        return error.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The kept gradients, scaled."""
        return None, None, *(None if g is None else grad * g for g in ctx.gradients)


class TeacherForcing:
    """Inside, a forward pass of the student is the teacher's; `errors` gets each mixer's error by layer.

    An error's graph holds its gradients by the mixer's parameters, and no activations.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.errors: dict[int, Tensor] = {}

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
        if error.requires_grad:
            learns = [parameter for parameter in attention.mixer.parameters() if parameter.requires_grad]
            gradients = torch.autograd.grad(error, learns, allow_unused=True)
            error = KeptGradients.apply(error.detach(), gradients, *learns)
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
        outputs = model(**inputs, use_cache=False, logits_to_keep=1)
        errors, self.forcing.errors = self.forcing.errors, {}
        stacked = torch.stack(list(errors.values()))
        values = {str(layer): error for layer, error in zip(errors, stacked.tolist())}
        bad = [layer for layer, error in values.items() if not math.isfinite(error)]
        self.stop_if_any(f"the error of layer {', '.join(bad)} is not finite" if bad else None)
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
    shard: bool = False,
) -> None:
    """Train the mixers in place; goes on from the last checkpoint in `arguments.output_dir`, if any."""
    names = [name for name, _ in model.named_parameters() if is_new_parameter(name)]
    with (
        training(model, names),
        sharded(model, arguments.device) if shard else nullcontext(model) as working,
        TeacherForcing(working) as forcing,
    ):
        trainer = TransferTrainer(working, stage, arguments, train_dataset=dataset, callbacks=[log], shard=shard)
        trainer.forcing = forcing
        checkpoint = last_checkpoint(Path(arguments.output_dir))
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            log.close()
