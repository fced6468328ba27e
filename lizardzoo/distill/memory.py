"""What training takes of a device's memory, known before any weight is loaded.

Weights and optimizer are a matter of counting. Activations are counted too: a forward pass on the meta device keeps the
very tensors for its backward pass that it would keep on a device, without computing any. It runs the reference kernels;
the Triton kernels keep less.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lizardzoo.adapters.base import is_new_parameter
from lizardzoo.adapters.masks import TOKEN_MASK
from lizardzoo.distill.finetune import SLICE_NUMBERS
from lizardzoo.distill.lora import with_lora
from lizardzoo.distill.recipe import Recipe
from lizardzoo.distill.trainer import training
from lizardzoo.distill.transfer import TeacherForcing

ATTENTION = "lizardzoo_memory"
"""Of kept softmax layers, for transformers."""
LEARNING = 16
"""Bytes of a number that trains, fp32: itself, its gradient, and AdamW's two moments."""
LOGITS = 32
"""Bytes of a logit, with everything that the losses and their gradients make of it, while its slice is computed."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on a device, by what they are for; temporaries within a layer come on top."""

    option: str
    """The stage, and what saves memory in it."""
    weights: int
    """Frozen, in the model's dtype; sharded, each of N processes has an N-th of these."""
    learning: int
    """Parameters that train, their gradients and the optimizer."""
    activations: int
    """Kept for the backward pass, of one micro batch."""
    logits: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.learning + self.activations + self.logits


def training_memory(model: Any, recipe: Recipe, micro_batch_size: int = 1) -> list[TrainingMemory]:
    """Each stage's, and with gradient checkpointing. `model`: on the meta device; it is left as it is."""
    model = copy.deepcopy(model)
    model.config._attn_implementation = ATTENTION
    options = []
    names = [name for name, _ in model.named_parameters() if is_new_parameter(name)]
    if names:
        kept = Kept(model)
        with training(model, names), TeacherForcing(model), kept.counting():
            forward(model, micro_batch_size, recipe.transfer.sequence_length)
        options.append(_option("transfer", model, names, kept.peak, 0))
    tuned = with_lora(model, recipe.finetune).model
    length = recipe.finetune.sequence_length
    names = [n for n, p in tuned.named_parameters() if is_new_parameter(n) or "lora_" in n]
    kept, ends = Kept(tuned), [0]
    for layer in tuned.get_decoder().layers:
        layer.register_forward_hook(lambda *_: ends.append(kept.now))
    with training(tuned, names), kept.counting():
        output = forward(tuned, micro_batch_size, length)
    logits = LOGITS * min(SLICE_NUMBERS, micro_batch_size * length * tuned.config.vocab_size)
    options.append(_option("finetune", tuned, names, kept.peak, logits))
    layers = [after - before for before, after in itertools.pairwise(ends)]
    recomputed = max(layers) + len(layers) * output.nbytes
    options.append(_option("finetune, checkpointed", tuned, names, recomputed, logits))
    return options


def _option(name: str, model: Any, learns: list[str], activations: int, logits: int) -> TrainingMemory:
    parameters = dict(model.named_parameters())
    learning = LEARNING * sum(parameters[key].numel() for key in learns)
    weights = sum(parameter.nbytes for key, parameter in parameters.items() if key not in set(learns))
    return TrainingMemory(name, weights, learning, activations, logits)


def forward(model: Any, batch: int, length: int) -> Tensor:
    """The decoder's last hidden states of `batch` sequences; with masks made here, for nothing may look at a number."""
    device = model.get_input_embeddings().weight.device
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril()
    masks: dict[str, Any] = dict.fromkeys(model.config.layer_types + model.config.own_layer_types, mask)
    masks[TOKEN_MASK] = None  # training has no padding
    tokens = torch.zeros(batch, length, dtype=torch.long, device=device)
    hidden: Tensor = model.get_decoder()(tokens, attention_mask=masks, use_cache=False)[0]
    return hidden


class _FlashAttention(torch.autograd.Function):
    """Keeps what a fused softmax attention keeps; the plain one, which the meta device would take, keeps all scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, H, T, D] as is."""
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:3], dtype=torch.float32))
        return output


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    output: Tensor = _FlashAttention.apply(query, key, value)
    return output.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)


class Kept:
    """Counts the bytes that autograd keeps of activations: `now`, and the most it was."""

    def __init__(self, model: Any) -> None:
        self.now = self.peak = 0
        self._weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._holders: Counter[int] = Counter()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Inside, what autograd keeps is counted; a storage once, however often it is kept."""
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Saved(tensor, self), lambda saved: saved.tensor):
            yield

    def take(self, tensor: Tensor, holders: int) -> None:
        """One holder more (1) or less (-1) of a tensor's storage."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._weights:
            return
        held = self._holders[storage._cdata]
        self._holders[storage._cdata] += holders
        if held == 0 or held + holders == 0:
            self.now += holders * storage.nbytes()
            self.peak = max(self.peak, self.now)


class _Saved:
    """A tensor that a graph keeps; detached, for an output that its own node kept would never go."""

    def __init__(self, tensor: Tensor, kept: Kept) -> None:
        self.tensor, self.kept = tensor.detach(), kept
        kept.take(tensor, 1)

    def __del__(self) -> None:
        self.kept.take(self.tensor, -1)
