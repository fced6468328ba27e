"""Linearized tiny models with random new parameters, one for every registered mixer and for mixed lists."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch

import lizardzoo as lz
from lizardzoo.config import MIXERS, MixerSpec
from lizardzoo.testing.conformance.case import distance, past

__all__ = ["LAYERS", "distance", "past", "small", "student", "tokens"]


def small(name: str) -> MixerSpec:
    """A registered mixer's default spec, with a window that a short text leaves."""
    spec = MIXERS.get(name)()
    return replace(spec, window=6, keep=2) if any(f.name == "window" for f in fields(spec)) else spec


LAYERS: dict[str, Any] = {name: [small(name)] * 3 for name in MIXERS}
LAYERS["mixed"] = [lz.GatedLinear(), lz.Softmax(), lz.Hybrid(window=5, keep=1)]
LAYERS["mixed windows"] = [lz.Window(window=3, keep=0, sinks=2), lz.Hybrid(window=9, keep=2), lz.Softmax()]
LAYERS["lizard"] = [replace(lz.config.PRESETS.get("lizard"), window=7)] * 3
LAYERS["lolcats"] = [replace(lz.config.PRESETS.get("lolcats"), window=7)] * 3


def student(teacher: Any, layers: Any, seed: int = 0) -> Any:
    """A linearized copy whose gates, maps and scales are all random."""
    model = lz.linearize(teacher, layers)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for mixer in model.mixers().values():
            for parameter in mixer.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    """Random token ids of the tiny vocabulary, special ones left out."""
    return torch.randint(5, 290, (batch, length), generator=torch.Generator().manual_seed(seed))
