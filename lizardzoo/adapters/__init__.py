"""Adapters: the Hugging Face architectures that can be linearized. Importing this package registers them."""

from lizardzoo.adapters import llama
from lizardzoo.adapters.base import ADAPTERS, Adapter, is_new_parameter, softmax_mode

__all__ = ["ADAPTERS", "Adapter", "is_new_parameter", "llama", "softmax_mode"]
