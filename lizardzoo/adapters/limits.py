"""Bounds on what a config.json may ask for, checked before anything is allocated, imported or fetched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers.activations import ACT2FN

from lizardzoo.errors import LizardzooError

LIMITS = {
    "num_hidden_layers": 1 << 10,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 12,
    "vocab_size": 1 << 23,
    "max_position_embeddings": 1 << 40,
    "sliding_window": 1 << 40,
}
"""The largest value of each; all are whole numbers above 0. Ten times what the largest known models have."""
LAYER_LIMITS = {"window": 1 << 17, "keep": 1 << 17, "sinks": 1 << 12, "feature_dim": 1 << 12}
"""The same for a layer's spec; tokens may also be as many as the model has positions."""
TOKENS = ("window", "keep")
LABELS = 1 << 16
FLAGS = ("output_attentions", "output_hidden_states", "use_cache")
ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation")
"""Fields by which a config could have transformers fetch code from the Hub ("someone/kernel")."""
UNFIT = (
    StrictDataclassError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError,
    RuntimeError,
)  # fmt: skip
"""What transformers and torch raise for a config that describes no model."""


def check_sizes(config: Any) -> None:
    """Refuse sizes that no model has."""
    for name, limit in LIMITS.items():
        value = getattr(config, name, None)
        if value is not None and not _is_size(value, limit):
            raise LizardzooError(f"config.json: {name}={value!r} must be a whole number from 1 to {limit}; correct it")
    if getattr(config, "hidden_act", "silu") not in ACT2FN:
        raise LizardzooError(f"config.json: hidden_act={config.hidden_act!r} is no activation of transformers")


def check_config(config: Any) -> None:
    """Refuse a linearized config that no model has, and what would fail only later; it may be half initialized."""
    check_sizes(config)
    count = getattr(config, "num_hidden_layers", None)
    if isinstance(config.layers, list):
        if len(config.layers) != count:
            raise LizardzooError(
                f"config.json: layers has {len(config.layers)} entries but the model has {count} layers; "
                f"give one spec per layer, or a single spec for all of them"
            )
        check_layers(config.layers, getattr(config, "max_position_embeddings", None))
    types = config.teacher_layer_types
    if types is not None and (
        len(types) != count or any(each not in ("full_attention", "sliding_attention") for each in types)
    ):
        raise LizardzooError(
            f"config.json: teacher_layer_types={types!r} must be one of full_attention and sliding_attention for each "
            f"of {count} layers; correct it"
        )


def check_layers(layers: Sequence[Any], positions: int | None) -> None:
    """Refuse sizes that no layer has; `positions` is the model's max_position_embeddings."""
    for index, layer in enumerate(layers):
        fields = layer if isinstance(layer, Mapping) else vars(layer) if hasattr(layer, "__dict__") else {}
        for name, limit in LAYER_LIMITS.items():
            value = fields.get(name)
            if isinstance(value, int) and value > (max(limit, positions or 0) if name in TOKENS else limit):
                raise LizardzooError(f"layer {index}: {name}={value} is more than {limit}, the most there can be")


@contextmanager
def clear_errors() -> Iterator[None]:
    """Around the making of a config from a config.json: whatever is wrong with it becomes one sentence."""
    try:
        yield
    except LizardzooError:
        raise
    except UNFIT as error:
        raise LizardzooError(f"this config.json describes no model: {first_lines(error)}; correct it") from error


def first_lines(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:400] or type(error).__name__


def check_fields(fields: dict[str, Any]) -> None:
    """Refuse what a config.json holds beyond its family's fields and would run, or reach out of its folder."""
    for name in ATTENTION:
        value = fields.get(name)
        if value is not None and (not isinstance(value, str) or "/" in value):
            raise LizardzooError(
                f"config.json: {name}={value!r} is not the name of an attention of transformers, but may be of code on "
                f"the Hub; remove it, and pass attn_implementation= yourself if you trust it"
            )
    if (weights := fields.get("transformers_weights")) is not None:
        raise LizardzooError(
            f"config.json: transformers_weights={weights!r} is not supported; the weights lie in model.safetensors "
            f"or its shards: remove the field"
        )
    labels = fields.get("num_labels")
    if labels is not None and not _is_size(labels, LABELS):  # transformers writes a list of so many names
        raise LizardzooError(f"config.json: num_labels={labels!r} must be a whole number from 1 to {LABELS}; remove it")
    for name in FLAGS:
        if not isinstance(fields.get(name, False), (bool, type(None))):
            raise LizardzooError(f"config.json: {name}={fields[name]!r} must be true or false; correct it")
    if fields.get("return_dict", True) is not True:
        raise LizardzooError("config.json: return_dict is not true, which is a matter of a call; remove it")
    if fields.get("is_encoder_decoder"):
        raise LizardzooError("config.json: is_encoder_decoder is set, but a linearized model is a decoder; remove it")
    for name in ("dtype", "torch_dtype"):
        value = fields.get(name)
        found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
        if value is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
            raise LizardzooError(f"config.json: {name}={value!r} is no dtype of weights, such as bfloat16; correct it")
    quantization = fields.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if quantization is not None and not method and not hasattr(quantization, "quant_method"):
        raise LizardzooError(f"config.json: quantization_config={quantization!r} names no quant_method; remove it")
    _check_rope(fields)


def _check_rope(fields: dict[str, Any]) -> None:
    """The lists of longrope have one factor for each pair of dimensions; transformers only warns."""
    for key in ("rope_parameters", "rope_scaling"):
        rope = fields.get(key)
        if not isinstance(rope, dict):
            continue
        head_dim = fields.get("head_dim")
        hidden, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
        if head_dim is None and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
            head_dim = hidden // heads
        for name in ("short_factor", "long_factor"):
            factors = rope.get(name)
            if isinstance(factors, list) and isinstance(head_dim, int) and len(factors) != head_dim // 2:
                raise LizardzooError(
                    f"config.json: {key} has {len(factors)} entries in {name}, and heads of {head_dim} dimensions need "
                    f"{head_dim // 2}; correct it"
                )
        if rope.get("partial_rotary_factor", 1) != 1:
            raise LizardzooError(
                f"config.json: {key} has partial_rotary_factor={rope['partial_rotary_factor']!r}, which these families "
                f"do not know; remove it"
            )


def _is_size(value: Any, limit: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= limit
