"""Specs with a name: the papers' readings with their own choices, each mixer with its defaults under its own name, and
`recommended`, the one that was measured to be closest to its teacher at equal state (docs/results.md)."""

from __future__ import annotations

from dataclasses import replace

from lizardzoo.config import register_preset
from lizardzoo.mixers.gated_linear import GatedLinear
from lizardzoo.mixers.heavy import Heavy
from lizardzoo.mixers.hybrid import Hybrid
from lizardzoo.mixers.softmax import Softmax
from lizardzoo.mixers.window import Window

# Lizard as written (arXiv:2507.09025, sections 3.1-3.2): one map per layer, one scalar gate per token that starts at
# 0.5, a window of 128 with 4 meta-memory logits, no RoPE anywhere, both branches over the same tokens, summed.
LIZARD = Hybrid(
    window=128, keep=0, sinks=4, window_rope=False, maps="layer", gate="token", gate_init=0.5, input_gate=False,
    disjoint=False, merge="sum", alpha="layer", log_scale=None,
)  # fmt: skip
register_preset("lizard", LIZARD)
# The one change with which an independent reproduction recovered most of the teacher.
register_preset("lizard-rope", replace(LIZARD, window_rope=True))
# LoLCATs (arXiv:2410.10254): ungated, maps per head after RoPE, the linear branch outside the window, one denominator.
register_preset(
    "lolcats",
    Hybrid(
        window=64, keep=0, sinks=0, window_rope=True, feature_rope=True, maps="head", gate=None, input_gate=False,
        disjoint=True, merge="joint", alpha=None, log_scale="head",
    ),
)  # fmt: skip
register_preset("hybrid", Hybrid())
register_preset("gated-linear", GatedLinear())
register_preset("window", Window())
register_preset("heavy", Heavy())
register_preset("softmax", Softmax())
register_preset("recommended", Heavy())
