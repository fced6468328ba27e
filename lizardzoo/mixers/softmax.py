"""Softmax kept: the adapter leaves the layer's own attention as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lizardzoo.config import MixerSpec, register_mixer


@register_mixer("softmax")
@dataclass(frozen=True)
class Softmax(MixerSpec):
    """Keep this layer's softmax attention, bit for bit."""

    keeps_softmax: ClassVar[bool] = True
