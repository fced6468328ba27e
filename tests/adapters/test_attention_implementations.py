"""Kept softmax layers and teachers by flash_attention_2 and flex_attention: the same answers as by sdpa, or an error.

flash-attn needs a GPU, so its two functions stand here in plain PyTorch, and refuse what the real ones do not take;
flex_attention runs without its compiler. transformers' own code around them (unpadding, packed documents, windows,
block masks) runs as it is.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, masking_utils
from transformers import modeling_flash_attention_utils as flash
from transformers.integrations import flex_attention as flex

import lizardzoo as lz
from lizardzoo.adapters import softmax_mode
from lizardzoo.distill.transfer import TeacherForcing
from lizardzoo.errors import LizardzooError
from lizardzoo.testing.conformance.case import greedy, logits, logits_in_pieces, new_cache, positions
from tests.adapters.families import FAMILIES, teacher
from tests.adapters.students import LAYERS, distance, student, tokens

FLASH, FLEX = "flash_attention_2", "flex_attention"
EXACT = 1e-5
SLIDING = ["mistral, sliding", "qwen2, sliding above, tied"]
uncompiled = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")


def attend(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, window_size: tuple[int, int]) -> Tensor:
    """[T, H, D] of one sequence; queries are the last of the keys, as in flash-attn from 2.1 on."""
    place = torch.arange(len(q))[:, None] + len(k) - len(q)
    keys, (left, right) = torch.arange(len(k)), window_size
    seen = (keys <= place) | (not causal)
    seen &= (keys >= place - left) | (left < 0)
    seen &= (keys <= place + right) | (right < 0)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * softmax_scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


class Calls(list[str]):
    """The two functions, and the names of those that were called."""

    def flash_attn_func(
        self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
        causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
        deterministic: bool = False,
    ) -> Tensor:  # fmt: skip
        """q [B, Tq, H, D], k, v [B, Tk, Hkv, D]."""
        assert dropout_p == 0.0 and softmax_scale is not None
        self.append("whole")
        return torch.stack([attend(*row, softmax_scale, causal, window_size) for row in zip(q, k, v)])

    def flash_attn_varlen_func(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, deterministic: bool = False,
    ) -> Tensor:  # fmt: skip
        """q [tokens, H, D], k, v [tokens, Hkv, D], sequences one behind the other."""
        assert dropout_p == 0.0 and softmax_scale is not None
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert cu_seqlens_q[-1] == len(q) and cu_seqlens_k[-1] == len(k)
        lengths = [torch.diff(x) for x in (cu_seqlens_q, cu_seqlens_k)]
        assert max_seqlen_q >= max(lengths[0]) and max_seqlen_k >= max(lengths[1])
        self.append("packed")
        rows = zip(q.split(lengths[0].tolist()), k.split(lengths[1].tolist()), v.split(lengths[1].tolist()))
        return torch.cat([attend(*row, softmax_scale, causal, window_size) for row in rows])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """flash-attn as far as transformers can tell."""
    calls = Calls()
    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    for name in ("flash_attn_func", "flash_attn_varlen_func"):
        setattr(package, name, getattr(calls, name))
    package.flash_attn_with_kvcache = None  # type: ignore[attr-defined]
    padding.pad_input, padding.unpad_input = flash._pad_input, flash._unpad_input  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(flash, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    check = {**flash.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2], "general_availability_check": lambda: True}
    monkeypatch.setitem(flash.FLASH_ATTENTION_COMPATIBILITY_MATRIX, 2, check)
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda *_, **__: True)
    return calls


@pytest.fixture
def uncompiled_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """flex_attention as a plain function: what its compiler makes for a CPU does not always compile."""
    make = masking_utils.create_block_mask
    monkeypatch.setattr(flex.WrappedFlexAttention, "__init__", lambda *_: None)
    monkeypatch.setattr(flex.WrappedFlexAttention, "__call__", lambda *_: flex.flex_attention)
    monkeypatch.setattr(masking_utils, "create_block_mask", lambda *a, **k: make(*a, **(k | {"_compile": False})))


def pair(name: str, implementation: str, layers: str = "mixed") -> tuple[Any, Any]:
    """A student by sdpa, and the same by another implementation."""
    plain, other = (student(teacher(name), LAYERS[layers]) for _ in range(2))
    other.set_attn_implementation(implementation)
    return plain, other


@pytest.mark.parametrize("name", [*FAMILIES, *SLIDING])
def test_softmax_is_the_teacher_bit_for_bit_by_flash_attention(name: str, calls: Calls) -> None:
    original, ids = copy.deepcopy(teacher(name)), tokens(2, 20)
    original.set_attn_implementation(FLASH)
    kept, mixed = lz.linearize(original, "softmax"), student(original, LAYERS["hybrid"])
    assert kept.config._attn_implementation == mixed.config._attn_implementation == FLASH
    expected = logits(original, ids, use_cache=False)
    assert torch.equal(logits(kept, ids, use_cache=False), expected)
    with softmax_mode(mixed):
        assert torch.equal(logits(mixed, ids, use_cache=False), expected)
    with TeacherForcing(mixed):
        assert torch.equal(logits(mixed, ids, use_cache=False), expected)
    assert len(calls) == 4 * original.config.num_hidden_layers
    assert distance(logits(teacher(name), ids, use_cache=False), expected) <= EXACT


@uncompiled
@pytest.mark.usefixtures("calls", "uncompiled_flex")
@pytest.mark.parametrize(
    ("implementation", "name"),
    [*((FLASH, name) for name in [*FAMILIES, *SLIDING]), (FLEX, "llama"), (FLEX, SLIDING[1])],  # flex takes seconds
)
def test_kept_softmax_gives_the_same_by_any_implementation(implementation: str, name: str) -> None:
    """Whole, padded on either side, in pieces behind a cache, and packed."""
    for layers in ("mixed", "mixed windows"):
        (plain, other), ids = pair(name, implementation, layers), tokens(2, 20)
        assert distance(logits(other, ids, use_cache=False), logits(plain, ids, use_cache=False)) <= EXACT
        for padded in (slice(0, 7), slice(13, 20)):
            mask = torch.ones_like(ids)
            mask[0, padded] = 0
            given = {"attention_mask": mask, "position_ids": positions(mask)}
            real, expected = mask.bool(), logits(plain, ids, **given)
            assert distance(logits(other, ids, **given)[real], expected[real]) <= EXACT
            if padded.start == 0:
                cached = logits_in_pieces(other, ids, [0, 9, 10, 15, 20], mask, new_cache(other))
                assert distance(cached[real], expected[real]) <= EXACT
        restart = torch.cat([torch.arange(8), torch.arange(12)])[None]
        packed = logits(other, ids[:1], position_ids=restart)
        apart = [logits(plain, part) for part in ids[:1].split([8, 12], 1)]
        assert distance(packed, torch.cat(apart, 1)) <= EXACT


@pytest.mark.parametrize("name", FAMILIES)
def test_generating_by_flash_attention_gives_the_same_tokens(name: str, calls: Calls) -> None:
    """With a dynamic and a static cache, by beams; padded and not."""
    (plain, other), ids = pair(name, FLASH), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    for given in (mask, torch.ones_like(ids)):
        for options in ({}, {"cache_implementation": "static"}, {"num_beams": 3}):
            expected = greedy(plain, ids, 6, attention_mask=given, **options)
            assert torch.equal(greedy(other, ids, 6, attention_mask=given, **options), expected), options
    assert {"whole", "packed"} == set(calls)


@uncompiled
@pytest.mark.usefixtures("uncompiled_flex")
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_generating_by_flex_attention_gives_the_same_tokens_or_is_refused(name: str) -> None:
    """Its mask is looked at when a static cache has counted the new tokens already: they would see past themselves."""
    (plain, other), ids = pair(name, FLEX), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    for options in ({}, {"num_beams": 3}):
        expected = greedy(plain, ids, 6, attention_mask=mask, **options)
        assert torch.equal(greedy(other, ids, 6, attention_mask=mask, **options), expected), options
    with pytest.raises(LizardzooError, match="flex_attention cannot go on from a static cache"):
        greedy(other, ids, 6, attention_mask=mask, cache_implementation="static")
    mixing, expected = (student(teacher(name), LAYERS["hybrid"]) for _ in range(2))  # nobody looks at a mask here
    mixing.set_attn_implementation(FLEX)
    options = {"attention_mask": mask, "cache_implementation": "static"}
    assert torch.equal(greedy(mixing, ids, 6, **options), greedy(expected, ids, 6, **options))


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed here")
def test_where_flash_attention_is_not_installed_it_is_refused_and_nothing_changes(tmp_path: Any) -> None:
    model, ids = student(teacher("llama"), LAYERS["mixed"]), tokens(2, 9)
    expected = logits(model, ids)
    with pytest.raises(ImportError, match="FlashAttention2"):
        model.set_attn_implementation(FLASH)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model, ids), expected)
    model.save_pretrained(tmp_path)
    with pytest.raises(LizardzooError, match=r"'flash_attention_2' cannot be used here.*'sdpa'"):
        lz.from_pretrained(tmp_path, attn_implementation=FLASH)
