"""Stage 2: the student learns to speak like its teacher: LoRA on the projections, mixers go on training.

loss = ce_weight * cross-entropy + kl_weight * KL(teacher || student). Logits are computed from the last
hidden states a slice of positions at a time, forward and backward: positions x vocabulary never exists at
once. Without a teacher the student's own base is the teacher: its softmax attention, without LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lizardzoo.adapters.attention import softmax_mode
from lizardzoo.adapters.base import is_new_parameter
from lizardzoo.distill.lora import check_targets, merge_lora, with_lora
from lizardzoo.distill.processes import any_process, sharded
from lizardzoo.distill.recipe import Finetune
from lizardzoo.distill.trainer import (
    StageTrainer,
    StepLog,
    activation_checkpointing,
    last_checkpoint,
    training,
)

Teacher: TypeAlias = "tuple[Tensor, nn.Linear] | None"

SLICE_NUMBERS = 2**24
"""Logits that exist at once: 64 MiB in fp32 (341 positions of SmolLM2's vocabulary), a few times over."""


class LogitLosses(torch.autograd.Function):
    """Sums over positions of cross-entropy and KL, from hidden states.

    The gradient of each slice is taken at once, in the forward pass, and only that [N, hidden] is kept: a
    checkpoint would keep as much, and project onto the vocabulary a second time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: nn.Linear,
        labels: Tensor,
        teacher: Teacher,
        weights: Tensor,
        size: int,
    ) -> tuple[Tensor, Tensor]:
        """Of `hidden` [N, hidden] and `labels` [N] (-100 = none); `weights` [2] of the sums in the loss."""
        sums = torch.zeros(2, dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden)
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            target = None if teacher is None else teacher[1](teacher[0][part])
            with torch.enable_grad():
                states = hidden[part].detach().requires_grad_()
                losses = _losses(head(states), labels[part], target)
                (gradient[part],) = torch.autograd.grad((losses * weights).sum(), states)
            sums += losses.detach()
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(sums)
        return (sums * weights).sum(), sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
        """The kept gradient, scaled."""
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None, None, None, None


def _losses(logits: Tensor, labels: Tensor, teacher_logits: Tensor | None) -> Tensor:
    """[2]: the sums of cross-entropy and KL over positions; logits [N, vocabulary]."""
    log_p = logits.float().log_softmax(-1)
    cross_entropy = F.nll_loss(log_p, labels, ignore_index=-100, reduction="sum")
    if teacher_logits is None:
        return torch.stack([cross_entropy, torch.zeros_like(cross_entropy)])
    log_t = teacher_logits.float().log_softmax(-1)
    return torch.stack([cross_entropy, F.kl_div(log_p, log_t, reduction="sum", log_target=True)])


def logit_losses(
    hidden: Tensor,
    head: nn.Linear,
    labels: Tensor,
    teacher: Teacher = None,
    *,
    ce_weight: float,
    kl_weight: float,
    size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, cross-entropy, KL) per token.

    hidden [B, T, hidden]; labels [B, T]: the token that position t is to predict, -100 = none; teacher: its
    hidden states [B, T, its hidden size] and head. The cross-entropy is a mean over labels, the KL over all
    positions (0 without a teacher). Only `hidden` gets a gradient, not the head. size: positions in a slice.
    """
    labels, hidden = labels.flatten(), hidden.flatten(0, 1)
    if teacher is not None:
        teacher = teacher[0].flatten(0, 1), teacher[1]
    counts = torch.tensor([int((labels >= 0).sum()) or 1, len(hidden)], device=hidden.device)
    weights = torch.tensor([ce_weight, kl_weight], device=hidden.device) / counts
    size = size or max(1, SLICE_NUMBERS // head.weight.shape[0])
    loss, sums = LogitLosses.apply(hidden, head, labels, teacher, weights, size)
    means = sums / counts
    return loss, means[0], means[1]


def next_tokens(input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """[B, T]: the token after each; -100 for the last, and where the next one begins another document."""
    labels = torch.full_like(input_ids, -100)
    labels[:, :-1] = input_ids[:, 1:]
    if position_ids is not None:
        labels[:, :-1][position_ids[:, 1:] == 0] = -100
    return labels


def last_hidden_states(call: Callable[..., Any], model: Any, inputs: dict[str, Any]) -> Tensor:
    """[B, T, hidden] before the head of `model`, through `call`: the model, or what wraps it."""
    caught: list[Tensor] = []
    handle = model.get_decoder().register_forward_hook(lambda _, __, output: caught.append(output[0]))
    try:
        call(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    return caught[0]


class FinetuneTrainer(StageTrainer):
    """Trains LoRA and the mixers on the logits; `teacher` None is the student's own base."""

    stage: Finetune
    lora: Any
    """peft's LoraModel around the student, to switch LoRA off."""
    teacher: Any

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of one batch."""
        self.eval_attention()
        teacher = None
        if self.stage.kl_weight > 0:  # first, because it switches LoRA's requires_grad off and on
            teacher = self.teacher_states(inputs)
        hidden = last_hidden_states(model, self.model, inputs)
        loss, cross_entropy, kl = logit_losses(
            hidden,
            self.model.get_output_embeddings(),
            next_tokens(inputs["input_ids"], inputs.get("position_ids")),
            teacher,
            ce_weight=self.stage.ce_weight,
            kl_weight=self.stage.kl_weight,
        )
        bad = not loss.isfinite()
        if any_process(bad, self.args.device):  # all of them look: sharded, a forward pass takes them all
            where = self.first_bad_layer(inputs)
            self.stop_if_any(where if bad else None)
        self.measure(cross_entropy=cross_entropy.item(), **({} if teacher is None else {"kl": kl.item()}))
        return (loss, {"hidden_states": hidden}) if return_outputs else loss

    @torch.no_grad()
    def teacher_states(self, inputs: dict[str, Any]) -> tuple[Tensor, nn.Linear]:
        """The teacher's last hidden states and its head."""
        if self.teacher is not None:
            hidden = last_hidden_states(self.teacher, self.teacher, inputs)
            return hidden, self.teacher.get_output_embeddings()
        self.lora.disable_adapter_layers()
        try:
            with softmax_mode(self.model):
                hidden = last_hidden_states(self.model, self.model, inputs)
        finally:
            self.lora.enable_adapter_layers()
        return hidden, self.model.get_output_embeddings()

    @torch.no_grad()
    def first_bad_layer(self, inputs: dict[str, Any]) -> str:
        """Where a loss stopped being finite: one more forward pass that looks at every layer's output."""
        bad: list[int] = []

        def look(index: int) -> Callable[..., None]:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                output = output[0] if isinstance(output, tuple) else output
                if not output.isfinite().all():
                    bad.append(index)

            return hook

        layers = self.model.get_decoder().layers
        handles = [layer.register_forward_hook(look(index)) for index, layer in enumerate(layers)]
        try:
            self.model(**inputs, use_cache=False, logits_to_keep=1)
        finally:
            for handle in handles:
                handle.remove()
        if bad:
            return f"the loss is not finite, first in the output of layer {bad[0]}"
        return "the loss is not finite, though every layer's output is: look at the teacher and the logits"


def finetune(
    model: Any,
    stage: Finetune,
    dataset: Any,
    arguments: Any,
    log: StepLog,
    *,
    teacher: Any = None,
    gradient_checkpointing: bool = False,
    shard: bool = False,
) -> None:
    """Train in place and merge LoRA; goes on from the last checkpoint in `arguments.output_dir`, if any.

    If it stops early, LoRA is taken out again and the base weights are as they were.
    """
    check_targets(model, stage)
    torch.manual_seed(arguments.seed)  # LoRA's start is random
    with training(model, []):
        lora = with_lora(model, stage)
        try:
            names = [name for name, p in model.named_parameters() if p.requires_grad or is_new_parameter(name)]
            with (
                training(model, names),
                _placed(lora, arguments.device, shard) as working,
                _as_reference(teacher, arguments.device, shard) as reference,
                activation_checkpointing(working.model, gradient_checkpointing),
            ):
                trainer = FinetuneTrainer(
                    working.model, stage, arguments, train_dataset=dataset, callbacks=[log], shard=shard
                )
                trainer.lora, trainer.teacher = working, reference
                checkpoint = last_checkpoint(Path(arguments.output_dir))
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            model.low_rank_updates = {**model.low_rank_updates, **merge_lora(model)}
        finally:
            log.close()
            lora.unload()


@contextmanager
def _as_reference(teacher: Any, device: torch.device, shard: bool) -> Iterator[Any]:
    """A teacher (or None) on the device, frozen."""
    if teacher is None:
        yield None
        return
    with training(teacher.eval(), []), _placed(teacher, device, shard) as placed:
        yield placed


def _placed(model: nn.Module, device: torch.device, shard: bool) -> AbstractContextManager[Any]:
    """A model where it is to compute: whole, or shared out among the processes."""
    return sharded(model, device) if shard else nullcontext(model.to(device))
