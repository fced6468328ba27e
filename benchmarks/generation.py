"""Reading and generating with a whole model: the teacher behind its key-value cache, the student behind its states.

One step of each can be captured as a CUDA graph: nothing in it is allocated anew, and no number comes back to the CPU.
The student's states never move. The teacher has two caches: `FullLayer` is the best that torch's softmax can do (no
mask, no token of room, every byte read once), `StaticCache` what transformers offers its users.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from measure import captured
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer

from lizardzoo.adapters.masks import CACHE_KEYWORD

PIECE = 16384
"""Tokens of all rows together that the student reads at once: its memory is that of a piece, however long the text."""
ROOM = 512
"""Slots of a static cache behind its context; the steps that are timed fill them."""


class FullLayer(DynamicLayer):
    """The key-value cache of a layer that is full up to the last slot, which is the next token's: [B, Hkv, N, D].

    Every step writes the same slot, so that it can be repeated: always token N - 1 behind N - 1 others.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the last slot."""
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """All but the last."""
        return self.keys.shape[-2] - 1


class Decoder:
    """One greedy step of a model behind a cache: reads `token` [B, 1], writes the next one there, leaves `logits`."""

    def __init__(self, model: Any, cache: Cache, token: Tensor) -> None:
        self.model, self.cache, self.token = model, cache, token.clone()
        self.logits = torch.empty(0)

    @torch.no_grad()
    def step(self) -> None:
        """Without a mask: all tokens are real."""
        self.logits = self.model(self.token, logits_to_keep=1, **{CACHE_KEYWORD: self.cache}).logits[:, -1]
        self.token.copy_(self.logits.argmax(-1, keepdim=True))


@torch.no_grad()
def read(model: Any, ids: Tensor, cache: Cache, piece: int | None = None) -> Tensor:
    """Read ids [B, T] into a cache, `piece` tokens of a row at a time (None: all at once); the last logits [B, V]."""
    for part in ids.split(piece or ids.shape[1], 1):
        logits = model(part, logits_to_keep=1, **{CACHE_KEYWORD: cache}).logits[:, -1]
    return logits


def read_by_student(student: Any, ids: Tensor) -> tuple[Cache, Tensor]:
    """In pieces into states that stay where they are."""
    cache = StaticCache(config=student.config, max_cache_len=ids.shape[1] + ROOM)
    return cache, read(student, ids, cache, max(1, PIECE // len(ids)))


def read_by_teacher(teacher: Any, ids: Tensor) -> tuple[Cache, Tensor]:
    """At once, by torch's flash attention where it has it."""
    cache = DynamicCache(config=teacher.config)
    return cache, read(teacher, ids, cache)


def full_cache(teacher: Any, ids: Tensor) -> Cache:
    """The teacher's cache behind all of ids but the last token."""
    cache, _ = read_by_teacher(teacher, ids)
    for layer in cache.layers:
        layer.keys[:, :, -1] = layer.values[:, :, -1] = 0
    return Cache(layers=[FullLayer(layer.keys, layer.values) for layer in cache.layers])


def static_cache(teacher: Any, ids: Tensor) -> Cache:
    """The same as transformers' static cache, with room behind."""
    cache = StaticCache(config=teacher.config, max_cache_len=ids.shape[1] + ROOM)
    read(teacher, ids[:, :-1], cache)
    return cache


def state_cache(student: Any, ids: Tensor) -> Cache:
    """The student's states behind all of ids but the last token."""
    return read_by_student(student, ids[:, :-1])[0]


def drawn_full_cache(teacher: Any, ids: Tensor) -> Cache:
    """`full_cache` of the size for ids with random numbers: how long a step takes does not depend on them."""
    shape = (len(ids), *kv_shape(teacher, ids.shape[1]))
    drawn = ([torch.randn(shape, dtype=teacher.dtype, device=ids.device) for _ in "kv"] for _ in _layers(teacher))
    return Cache(layers=[FullLayer(keys, values) for keys, values in drawn])


def drawn_static_cache(teacher: Any, ids: Tensor) -> Cache:
    """`static_cache` with random numbers."""
    cache = StaticCache(config=teacher.config, max_cache_len=ids.shape[1] + ROOM)
    token = torch.empty(len(ids), *kv_shape(teacher, 1), dtype=teacher.dtype, device=ids.device)
    for layer in cache.layers:
        layer.lazy_initialization(token, token)
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(ids.shape[1] - 1)
    return cache


def kv_shape(model: Any, length: int) -> tuple[int, int, int]:
    """Of a row's keys, or values, in a layer."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_key_value_heads, length, head_dim


def _layers(model: Any) -> range:
    return range(model.config.num_hidden_layers)


def replayed(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` as a CUDA graph, on a CUDA device; it must have run before, elsewhere."""
    return captured(run, warm_up=0).replay if torch.cuda.is_available() else run


def generate(student: Any, prompt: Tensor, count: int, mark: int) -> tuple[list[dict[str, Any]], Tensor, Tensor]:
    """`count` tokens behind a prompt [1, T], every one by the same captured step.

    At every `mark` tokens: milliseconds a token since the last mark, and MiB on the device, then and at most since.
    Returns the marks, the tokens [1, count], and the logits that gave the last of them.
    """

    def begin() -> tuple[Decoder, Tensor, Callable[[], None]]:
        decoder = Decoder(student, state_cache(student, prompt), prompt[:, -1:])
        text = torch.zeros(1, count, dtype=prompt.dtype, device=prompt.device)
        place = torch.zeros(1, dtype=torch.long, device=prompt.device)

        def step() -> None:
            decoder.step()
            text.index_copy_(1, place, decoder.token)
            place.add_(1)

        return decoder, text, step

    if torch.cuda.is_available():  # what is compiled or loaded at the first step must not be while it is captured
        begin()[2]()
    decoder, text, step = begin()
    run, marks = replayed(step), []
    for start in range(0, count, mark):
        tokens = min(mark, count - start)
        seconds, memory = watched(run, tokens)
        marks.append({"tokens": prompt.shape[1] + start + tokens, "ms": 1e3 * seconds / tokens, **memory})
    return marks, text, decoder.logits


def watched(run: Callable[[], Any], times: int = 1) -> tuple[float, dict[str, float]]:
    """Seconds of so many runs, and the memory behind and during them (on a CUDA device)."""
    on_device = torch.cuda.is_available()
    if on_device:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(times):
        run()
    if not on_device:
        return time.perf_counter() - start, {}
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, {
        "MiB": torch.cuda.memory_allocated() / 2**20,
        "peak MiB": torch.cuda.max_memory_allocated() / 2**20,
    }
