"""The masks of one call: the per-token flags that mixers take, and the attention masks of kept softmax layers."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from lizardzoo.errors import LizardzooError

CACHE_KEYWORD = "cache" if "cache" in signature(create_causal_mask).parameters else "past_key_values"
"""What forwards, mask functions and outputs call the cache: transformers 5.24 renamed it, everywhere at once."""
TOKEN_MASK = "token_mask"
"""Beside the layer types, a key of the masks that are made before a compiled forward."""


def cache_of(kwargs: dict[str, Any]) -> Cache | None:
    """The cache among a forward's keywords; its old name too, which transformers goes on to take from users."""
    return kwargs.get(CACHE_KEYWORD, kwargs.get("past_key_values"))


def refuse_static(cache: Cache | None) -> None:
    """Of flex_attention, whose mask of transformers reads a static cache's length when it has moved on already."""
    if cache is not None and cache.is_compileable:
        raise LizardzooError(
            "flex_attention cannot go on from a static cache: by transformers' mask tokens would see past themselves; "
            "take a dynamic cache, or set_attn_implementation('sdpa')"
        )


def softmax_masks(
    config: Any, inputs_embeds: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Cache | None
) -> dict[str, Any]:
    """One attention mask for each kind of softmax layer that the teacher has, by its name among `layer_types`."""
    given = {
        "config": config,
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        CACHE_KEYWORD: cache,
        "position_ids": position_ids,
    }
    make = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
    return {kind: make[kind](**given) for kind in dict.fromkeys(config.own_layer_types)}


def token_mask(attention_mask: Tensor | None, tokens: Tensor, cache: Cache | None) -> Tensor | None:
    """[B, T] bool of this call's tokens; None when all are real."""
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        raise LizardzooError(
            f"a linearized model takes a padding mask [batch, length], got shape {list(attention_mask.shape)}; "
            f"arbitrary attention patterns need softmax"
        )
    batch, count = tokens.shape[:2]
    seen = cache.get_seq_length() if cache is not None else 0
    if torch.compiler.is_compiling():  # no number may be asked for
        places = torch.arange(count, device=tokens.device) + seen
        return attention_mask.to(torch.bool).index_select(1, places)
    lengths = [int(seen) + count]
    if cache is not None and cache.is_compileable:
        lengths.append(cache.get_max_length())
    if attention_mask.shape[0] != batch or attention_mask.shape[1] not in lengths:
        raise LizardzooError(
            f"attention_mask is [{attention_mask.shape[0]}, {attention_mask.shape[1]}], expected "
            f"[{batch}, {int(seen) + count}]: {int(seen)} tokens in the cache and {count} new ones"
        )
    mask = attention_mask[:, int(seen) : int(seen) + count].to(torch.bool)
    return None if bool(mask.all()) else mask


def document_starts(position_ids: Tensor | None, batch: int, count: int) -> Tensor | None:
    """[B, T] bool: where positions restart, as transformers reads packed sequences; None when they do not."""
    if position_ids is None or position_ids.shape[-1] < 2:
        return None
    starts = torch.zeros(position_ids.shape, dtype=torch.bool, device=position_ids.device)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return starts.expand(batch, count) if torch.compiler.is_compiling() or bool(starts.any()) else None
