"""Kernels: pure functions on tensors. Each op has one entry that validates and dispatches to its implementations.

Every branch returns `(y, log_mass)`: `y` [B, T, H, D] is its normalized output (a weighted mean of values) in q's
dtype, `log_mass` [B, T, H] the log of its denominator. A query with nothing to see has y = 0, log_mass = -inf and zero
gradients. Gradients flow through both. How branches are merged is one line elsewhere (`lizardzoo.mixers.merge`).

Conventions, obeyed by every kernel:

- layout [B, T, H, D]; key-side tensors have Hkv heads with H % Hkv == 0 and are never repeated for queries that share
  them: query head h reads key head h // (H // Hkv).
- `log_decay` is a natural logarithm, <= 0; `log_input` the natural logarithm of a key's weight.
- `window` w counts the current token: query i sees keys i-w+1 .. i.
- `keep` n: the first n real tokens of a document stay in the softmax set for ever, beside the window. Not to be
  confused with `sinks`: learned logits (the paper's meta memory) that enter the denominator only.
- `lag` L: the linear branch sees keys t <= i - L (0 = all; L = w = exactly what the window does not see); `skip` n: it
  never sees the first n real tokens of a document (those that a window keeps).
- `mask` [B, T], True = real token. A padded token takes no place: it is in no window, adds nothing to a numerator or a
  denominator, does not decay the state, and its own output is y = 0, log_mass = -inf. Distances (window, lag, keep)
  count real tokens, so a row padded anywhere equals its unpadded row.
- `starts` [B, T], True where a packed document begins: it sees nothing of what came before.
- state goes in and comes out, nothing is changed in place (unless a step is told to: `in_place`); its size does not
  depend on the length.
- the last n tokens of a document are held in a ring [B, n, ...]: the token of rank r (its number among the real tokens
  of its document) stands in slot r % n, so that a step writes one slot. `length` says which ranks those are: slot s
  holds rank length-1 - (length-1-s) % n, and nothing while that is below 0 (s >= length).
- accumulation and state are fp32 (float64 for float64 inputs); keys and values wait in their own dtype.
- `impl` is AUTO (looks at the device only), TRITON or REFERENCE; what is unsupported raises.
"""

from lizardzoo.kernels.dispatch import Impl
from lizardzoo.kernels.features import FeatureMap
from lizardzoo.kernels.gated_linear import (
    GatedLinearState,
    gated_linear_attention,
    gated_linear_attention_step,
)
from lizardzoo.kernels.heavy import (
    HeavyState,
    heavy_attention,
    heavy_attention_step,
    window_and_heavy_attention,
    window_and_heavy_step,
)
from lizardzoo.kernels.hybrid import HybridState, hybrid_attention, hybrid_attention_step
from lizardzoo.kernels.rotary import rotate
from lizardzoo.kernels.token_gates import token_gates
from lizardzoo.kernels.window import WindowState, window_attention, window_attention_step

__all__ = [
    "FeatureMap",
    "GatedLinearState",
    "HeavyState",
    "HybridState",
    "Impl",
    "WindowState",
    "gated_linear_attention",
    "gated_linear_attention_step",
    "heavy_attention",
    "heavy_attention_step",
    "hybrid_attention",
    "hybrid_attention_step",
    "rotate",
    "token_gates",
    "window_and_heavy_attention",
    "window_and_heavy_step",
    "window_attention",
    "window_attention_step",
]
