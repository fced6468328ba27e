"""Bounds on what a config.json may ask for, checked before anything is allocated or imported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import StrictDataclassError

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
CODE = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation")
"""Fields by which a config could have transformers fetch code from the Hub ("someone/kernel")."""


def check_config(config: Any) -> None:
    """Refuse sizes that no model has, and names of code to fetch; `config` may be half initialized."""
    for name, limit in LIMITS.items():
        value = getattr(config, name, None)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and not (whole and 1 <= value <= limit):
            raise LizardzooError(f"config.json: {name}={value!r} must be a whole number from 1 to {limit}; correct it")
    count = getattr(config, "num_hidden_layers", None)
    if isinstance(config.layers, list) and len(config.layers) != count:
        raise LizardzooError(
            f"config.json: layers has {len(config.layers)} entries but the model has {count} layers; "
            f"give one spec per layer, or a single spec for all of them"
        )


@contextmanager
def clear_errors(fields: dict[str, Any]) -> Iterator[None]:
    """Around the making of a config from `fields`: whatever is wrong with them becomes one sentence."""
    check_extras(fields)
    try:
        yield
    except LizardzooError:
        raise
    except (
        StrictDataclassError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise LizardzooError(
            f"this config.json describes no model: {' '.join(lines[:3]) or type(error).__name__}; correct it"
        ) from error


def check_extras(fields: dict[str, Any]) -> None:
    """Refuse what a config names beyond its family's fields and would run or reach out of its folder."""
    for name in CODE:
        if "/" in str(fields.get(name) or ""):
            raise LizardzooError(
                f"config.json: {name}={fields[name]!r} names code on the Hub; remove it, and pass "
                f"attn_implementation= yourself if you trust it"
            )
    weights = fields.get("transformers_weights")
    if weights is not None:
        raise LizardzooError(
            f"config.json: transformers_weights={weights!r} is not supported; the weights lie in model.safetensors "
            f"or its shards: remove the field"
        )
