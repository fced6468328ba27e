"""What training takes of a device's memory, known before any weight is loaded.

Weights and optimizer are a matter of counting. The rest is counted too: a step on the meta device makes and frees the
very tensors that it would on a device, without computing any. It runs the reference kernels; the Triton kernels make
less. `benchmarks/memory.py` holds the result against real steps.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lizardzoo.adapters.base import is_new_parameter
from lizardzoo.adapters.masks import TOKEN_MASK
from lizardzoo.distill.finetune import SLICE_NUMBERS, LogitLosses
from lizardzoo.distill.lora import with_lora
from lizardzoo.distill.recipe import Recipe
from lizardzoo.distill.trainer import activation_checkpointing, training
from lizardzoo.distill.transfer import TeacherForcing

ATTENTION = "lizardzoo_memory"
"""Of kept softmax layers, for transformers."""
LEARNING = 16
"""Bytes of a number that trains, fp32: itself, its gradient, and AdamW's two moments."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on a device, by what they are for."""

    option: str
    """The stage, and what saves memory in it."""
    weights: int
    """Frozen, in the model's dtype; sharded, each of N processes has an N-th of these."""
    learning: int
    """Parameters that train, their gradients and the optimizer."""
    activations: int
    """Everything else at the fullest moment of a micro batch: what the backward pass needs, logits, temporaries."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.learning + self.activations


def training_memory(model: Any, recipe: Recipe, micro_batch_size: int = 1) -> list[TrainingMemory]:
    """Each stage's, and with gradient checkpointing. `model`: on the meta device; it is left as it is."""
    model = copy.deepcopy(model)
    model.config._attn_implementation = ATTENTION
    options = []
    names = [name for name, _ in model.named_parameters() if is_new_parameter(name)]
    if names:
        with training(model, names), TeacherForcing(model), LiveTensors(model.parameters()) as live:
            forward(model, micro_batch_size, recipe.transfer.sequence_length)
        options.append(_option("transfer", model, names, live.peak))
    tuned = with_lora(model, recipe.finetune).model
    names = [n for n, p in tuned.named_parameters() if is_new_parameter(n) or "lora_" in n]
    for option, checkpointed in (("finetune", False), ("finetune, checkpointed", True)):
        with (
            training(tuned.train(), names),
            activation_checkpointing(tuned, checkpointed),
            LiveTensors(tuned.parameters()) as live,
        ):
            hidden = forward(tuned, micro_batch_size, recipe.finetune.sequence_length)
            logit_loss(tuned, hidden, with_teacher=recipe.finetune.kl_weight > 0).backward()
        options.append(_option(option, tuned, names, live.peak))
    return options


def _option(name: str, model: Any, learns: list[str], activations: int) -> TrainingMemory:
    parameters = dict(model.named_parameters())
    learning = LEARNING * sum(parameters[key].numel() for key in learns)
    weights = sum(parameter.nbytes for key, parameter in parameters.items() if key not in set(learns))
    return TrainingMemory(name, weights, learning, activations)


def forward(model: Any, batch: int, length: int) -> Tensor:
    """The decoder's last hidden states of `batch` sequences; with masks made here, for nothing may look at a number."""
    device = model.get_input_embeddings().weight.device
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril()
    masks: dict[str, Any] = dict.fromkeys(model.config.layer_types + model.config.own_layer_types, mask)
    masks[TOKEN_MASK] = None  # training has no padding
    tokens = torch.zeros(batch, length, dtype=torch.long, device=device)
    hidden: Tensor = model.get_decoder()(tokens, attention_mask=masks, use_cache=False)[0]
    return hidden


def logit_loss(model: Any, hidden: Tensor, *, with_teacher: bool) -> Tensor:
    """Stage 2's loss of hidden states [B, T, hidden] on the meta device, slice by slice, as it is computed."""
    hidden, head = hidden.flatten(0, 1), model.get_output_embeddings()
    labels = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
    teacher = (torch.empty_like(hidden), head) if with_teacher else None
    weights = torch.ones(2, device=hidden.device)
    size = max(1, SLICE_NUMBERS // head.weight.shape[0])
    loss: Tensor = LogitLosses.apply(hidden, head, labels, teacher, weights, size)[0]
    return loss


class _FlashAttention(torch.autograd.Function):
    """Keeps what a fused softmax attention keeps; the plain one, which the meta device would take, keeps all scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, H, T, D] as is."""
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:3], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        """A gradient of each size."""
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors[:3])


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    output: Tensor = _FlashAttention.apply(query, key, value)
    return output.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)


class LiveTensors(TorchDispatchMode):
    """Inside, counts the bytes of all tensors that are made and not yet freed: `now`, and the most it was.

    A storage counts once, whatever views there are of it. On any device: on a CPU this is what
    `torch.cuda.max_memory_allocated` is on CUDA, up to what single operators take and give back by themselves.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        """`known`: tensors that were there before, which do not count."""
        super().__init__()
        self.now = self.peak = 0
        self._storages: dict[int, weakref.ref[Any]] = {}
        for tensor in known:
            self._take(tensor, counts=False)

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operator's result, whose tensors are counted."""
        result = operator(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._take(value)
        return result

    def _take(self, tensor: Tensor, counts: bool = True) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if counts else 0
        if key in self._storages:
            return

        def freed(_: Any) -> None:
            del self._storages[key]
            self.now -= size

        self._storages[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)
