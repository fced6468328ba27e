"""lizardzoo: a modular zoo of token mixers that linearizes pretrained language models."""

from lizardzoo.adapters import softmax_mode
from lizardzoo.config import MixerSpec, register_mixer, register_preset
from lizardzoo.errors import LizardzooError
from lizardzoo.linearize import from_pretrained, linearize
from lizardzoo.mixers import GatedLinear, Hybrid, Softmax, Window

__version__ = "0.1.0"
__all__ = [
    "GatedLinear",
    "Hybrid",
    "LizardzooError",
    "MixerSpec",
    "Softmax",
    "Window",
    "from_pretrained",
    "linearize",
    "register_mixer",
    "register_preset",
    "softmax_mode",
]
