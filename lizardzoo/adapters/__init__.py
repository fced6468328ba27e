"""Adapters: the Hugging Face architectures that can be linearized. Importing this package registers them."""

from lizardzoo.adapters import llama, mistral, qwen2, qwen3
from lizardzoo.adapters.attention import softmax_mode
from lizardzoo.adapters.base import ADAPTERS, is_new_parameter, register_adapter

__all__ = [
    "ADAPTERS",
    "is_new_parameter",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "register_adapter",
    "softmax_mode",
]
