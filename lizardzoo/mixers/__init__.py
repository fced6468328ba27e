"""Mixers: what can stand in for a layer's softmax attention. Importing this package registers the built-in ones."""

from lizardzoo.mixers import presets
from lizardzoo.mixers.base import AttentionShape, Mixer, MixerInputs
from lizardzoo.mixers.gated_linear import GatedLinear
from lizardzoo.mixers.heavy import Heavy
from lizardzoo.mixers.hybrid import Hybrid
from lizardzoo.mixers.softmax import Softmax
from lizardzoo.mixers.window import Window

__all__ = ["AttentionShape", "GatedLinear", "Heavy", "Hybrid", "Mixer", "MixerInputs", "Softmax", "Window", "presets"]
