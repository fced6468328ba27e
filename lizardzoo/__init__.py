"""lizardzoo: a modular zoo of token mixers that linearizes pretrained language models.

The verbs `linearize`, `distill` and `diagnose` have the names of the modules they come from; what else those modules
hold is imported as in `from lizardzoo.distill import load_data`.
"""

from lizardzoo import evaluate
from lizardzoo.adapters import softmax_mode
from lizardzoo.config import MixerSpec, register_mixer, register_preset
from lizardzoo.diagnose import diagnose
from lizardzoo.distill import distill
from lizardzoo.errors import LizardzooError
from lizardzoo.linearize import linearize
from lizardzoo.loading import from_pretrained
from lizardzoo.mixers import GatedLinear, Heavy, Hybrid, Softmax, Window
from lizardzoo.selection import select_layers, select_windows
from lizardzoo.streaming import linearize_checkpoint

__version__ = "0.1.0"
__all__ = [
    "GatedLinear",
    "Heavy",
    "Hybrid",
    "LizardzooError",
    "MixerSpec",
    "Softmax",
    "Window",
    "diagnose",
    "distill",
    "evaluate",
    "from_pretrained",
    "linearize",
    "linearize_checkpoint",
    "register_mixer",
    "register_preset",
    "select_layers",
    "select_windows",
    "softmax_mode",
]
