"""One tiny random teacher for every family, and for the variants its checkpoints come in."""

from __future__ import annotations

import functools
from typing import Any

from lizardzoo.testing import tiny_teacher

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
SLIDING_ABOVE = {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}

FAMILIES: dict[str, dict[str, Any]] = {  # head_dim 16 is not hidden / heads: code that takes it for that breaks
    "llama": {"model_type": "llama", "head_dim": 16},
    "mistral": {"model_type": "mistral", "head_dim": 16, "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama 2, a key head for each": {"model_type": "llama", "num_key_value_heads": 4},
    "llama, one key head": {"model_type": "llama", "num_key_value_heads": 1, "head_dim": 16},
    "llama, biases, tied": {"model_type": "llama", "attention_bias": True, "tie_word_embeddings": True},
    "llama 3 rope": {"model_type": "llama", "rope_parameters": LLAMA3_ROPE, "max_position_embeddings": 256},
    "llama, yarn": {"model_type": "llama", "rope_parameters": YARN, "max_position_embeddings": 256},
    "llama, linear rope": {"model_type": "llama", "rope_parameters": LINEAR},
    "mistral, sliding": {"model_type": "mistral", "sliding_window": 12},
    "mistral, sliding far, tied": {"model_type": "mistral", "sliding_window": 40, "tie_word_embeddings": True},
    "qwen2, yarn": {"model_type": "qwen2", "rope_parameters": YARN, "max_position_embeddings": 256},
    "qwen2, sliding above, tied": {"model_type": "qwen2", "tie_word_embeddings": True, **SLIDING_ABOVE},
    "qwen3 with heads of 128, tied": {"model_type": "qwen3", "head_dim": 128, "tie_word_embeddings": True},
    "qwen3, sliding above": {"model_type": "qwen3", "head_dim": 32, **SLIDING_ABOVE},
}


@functools.cache
def teacher(name: str) -> Any:
    """The same one for all tests: read it, never write into it."""
    return tiny_teacher(**(FAMILIES | VARIANTS)[name])
