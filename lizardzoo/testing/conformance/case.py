"""What a law of the conformance suite is about, one teacher and one list of layers, and what all laws share."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from lizardzoo.adapters.masks import CACHE_KEYWORD
from lizardzoo.config import MixerSpec
from lizardzoo.errors import LizardzooError
from lizardzoo.linearize import linearize

EXACT = 1e-5
"""Largest difference, relative to the largest logit in fp32, that is rounding: far below what any mistake gives."""
TINY: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.15,  # attention scores of about 1; with 0.02 every head would be uniform
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

ModelLaw = Callable[[st.DataObject, "Case"], None]
MODEL_LAWS: dict[str, ModelLaw] = {}
"""The laws of a linearized model by name."""


def model_law(check: ModelLaw) -> ModelLaw:
    """Register a law under its function's name."""
    MODEL_LAWS[check.__name__] = check
    return check


def tiny_teacher(model_type: str = "llama", **changes: Any) -> Any:
    """A random fp32 model of an architecture, in eval mode: 3 layers, hidden 48, 4 query and 2 key heads.

    Always the same weights; biases and norms are random too, where they start constant.

    Args:
        model_type: of any architecture that transformers knows.
        **changes: for its config.
    """
    config = AutoConfig.for_model(model_type, **TINY | changes)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
            if name.endswith("_norm.weight"):
                parameter.uniform_(0.5, 1.5)
    return model


class Case:
    """A small fp32 teacher and one spec per layer. Laws leave both models as they are; `copy` gives one to change."""

    def __init__(self, teacher: Any, layers: Sequence[MixerSpec]) -> None:
        if teacher.dtype != torch.float32 or teacher.training:
            raise LizardzooError(
                f"the conformance laws compare in float32 and without dropout, got a teacher in {teacher.dtype}"
                f"{', in train mode' if teacher.training else ''}; load it with dtype=torch.float32 and call eval()"
            )
        self.teacher = teacher
        self.layers = list(layers)

    def __repr__(self) -> str:  # what hypothesis shows of a case that breaks a law
        return f"Case({self.teacher.config.model_type}, {self.layers})"

    @functools.cached_property
    def student(self) -> Any:
        """The linearized teacher; its new parameters are random: no gate is constant and no map the identity."""
        model = linearize(self.teacher, self.layers)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for mixer in model.mixers().values():
                for parameter in mixer.parameters():
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        return model

    def copy(self) -> Any:
        """A student of its own, for a law that changes it."""
        return copy.deepcopy(self.student)

    def tokens(self, batch: int, length: int, seed: int = 1) -> Tensor:
        """Random token ids [B, T], special ones left out."""
        config = self.teacher.config
        special: set[int] = set()
        for value in (config.pad_token_id, config.bos_token_id, config.eos_token_id):
            special |= set(value) if isinstance(value, list) else {value}
        plain = torch.tensor([index for index in range(config.vocab_size) if index not in special])
        return plain[torch.randint(len(plain), (batch, length), generator=torch.Generator().manual_seed(seed))]

    @property
    def slides(self) -> bool:
        """Whether a kept softmax layer has transformers' sliding window, which counts padded tokens."""
        own = self.student.config.own_layer_types
        return any(s.keeps_softmax and kind == "sliding_attention" for s, kind in zip(self.layers, own, strict=True))


def positions(mask: Tensor) -> Tensor:
    """Position ids [B, T] as `generate` makes them from a padding mask."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def past(cache: Any) -> dict[str, Any]:
    """The keyword by which the installed transformers goes on from a cache."""
    return {CACHE_KEYWORD: cache}


def new_cache(model: Any) -> DynamicCache:
    """An empty cache for a model."""
    return DynamicCache(config=model.config)


@torch.no_grad()
def logits(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """Logits [B, T, V]."""
    return model(ids, **options).logits


def logits_in_pieces(model: Any, ids: Tensor, edges: Sequence[int], mask: Tensor, cache: Any) -> Tensor:
    """Logits of consecutive pieces ids[:, edges[i] : edges[i + 1]], each behind the cache that the last one left."""
    pieces = [
        logits(
            model,
            ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions(mask)[:, start:end],
            **past(cache),
        )
        for start, end in itertools.pairwise(edges)
    ]
    return torch.cat(pieces, 1)


def greedy(model: Any, ids: Tensor | None, count: int = 8, **options: Any) -> Tensor:
    """`generate` exactly `count` tokens, the likeliest ones; all of `ids` is real unless a mask says otherwise."""
    if ids is not None:  # without a mask, generate would take a pad token that was generated before for padding
        options.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, **options)


def assert_close(actual: Tensor, expected: Tensor, what: str, bound: float = EXACT) -> None:
    """Finite, and equal up to `bound` times the largest entry."""
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    worst = distance(actual, expected)
    assert worst <= bound, f"{what}: differs by {worst:.2e} of the largest entry"


def distance(actual: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest entry."""
    return ((actual - expected).abs().max() / expected.abs().max()).item() if expected.numel() else 0.0


def assert_same_tokens(actual: Tensor, expected: Tensor, what: str) -> None:
    """The same token ids."""
    assert torch.equal(actual, expected), f"{what}: other tokens, {actual.tolist()} instead of {expected.tolist()}"


@contextmanager
def refused(words: str) -> Iterator[None]:
    """Inside, one LizardzooError is raised, in one line that holds these words."""
    message = "nothing was refused"
    try:
        yield
    except LizardzooError as error:
        message = str(error)
    assert words in message and "\n" not in message, f"expected an error with {words!r}, got: {message}"
