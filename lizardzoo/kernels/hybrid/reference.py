"""Hybrid attention as the composition of its branches' references."""

from __future__ import annotations

from functools import partial

from lizardzoo.kernels.gated_linear import reference as linear_reference
from lizardzoo.kernels.hybrid import composed
from lizardzoo.kernels.rotary import reference as rotary_reference
from lizardzoo.kernels.window import reference as window_reference

chunked = partial(composed.chunked, window_reference, linear_reference)
step = partial(composed.step, window_reference, linear_reference, rotary_reference)
