"""Sliding-window softmax attention with kept first tokens and meta memory (Lizard, section 3.2).

y_i = sum_{t in S_i} e^{s_it} v_t / (sum_{t in S_i} e^{s_it} + sum_j e^{sink_j}),  s_it = scale q_i . k_t,
S_i = the last `window` real tokens of i's document (i included) and its first `keep` ones. q and k come rotated.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lizardzoo.errors import LizardzooError
from lizardzoo.kernels.dispatch import Impl, check_qkv, check_token_flags, resolve
from lizardzoo.kernels.window import reference

OP = "window_attention"


class WindowState(NamedTuple):
    """What later queries may still see: the last `window` tokens, oldest first, and the first `keep` ones.

    k, v [B, window, Hkv, D]; valid [B, window] bool (False: no such token yet, or one of another document);
    kept_k, kept_v [B, keep, Hkv, D]; length [B]: real tokens of the current document so far.
    """

    k: Tensor
    v: Tensor
    valid: Tensor
    kept_k: Tensor
    kept_v: Tensor
    length: Tensor


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    keep: int = 0,
    sinks: Tensor | None = None,
    scale: float | None = None,
    mask: Tensor | None = None,
    starts: Tensor | None = None,
    state: WindowState | None = None,
    return_state: bool = True,
    impl: Impl | str = Impl.AUTO,
) -> tuple[Tensor, Tensor, WindowState | None]:
    """Attend over a window.

    Args:
        q, k, v: [B, T, H, D], [B, T, Hkv, D], [B, T, Hkv, Dv].
        window: keys a query sees, itself included.
        keep: first tokens of a document that stay visible for ever.
        sinks: [m] or [H, m] logits that enter the denominator only.
        scale: of the scores; D ** -0.5 unless given.
        mask, starts: [B, T] bool; see `lizardzoo.kernels`.
        state: from an earlier call, to go on behind it.
        return_state: False saves the work when nothing follows.

    Returns:
        y [B, T, H, Dv] in q's dtype, log_mass [B, T, H], and the state (None unless wanted).

    Raises:
        LizardzooError: shapes, dtypes or sizes that do not fit.
    """
    _check(q, k, v, window, keep, sinks, state)
    check_token_flags(OP, q, mask=mask, starts=starts)
    kernels = _kernels(impl, q, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    y, log_mass, new = kernels.chunked(q, k, v, window, keep, sinks, scale, mask, starts, state, return_state)
    return y, log_mass, WindowState(*new) if new is not None else None


def window_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: WindowState,
    *,
    keep: int = 0,
    sinks: Tensor | None = None,
    scale: float | None = None,
    mask: Tensor | None = None,
    impl: Impl | str = Impl.AUTO,
) -> tuple[Tensor, Tensor, WindowState]:
    """`window_attention` of one token (T = 1) behind a state, whose ring gives the window; same returns."""
    _check(q, k, v, state.k.shape[1], keep, sinks, state)
    check_token_flags(OP, q, mask=mask)
    if q.shape[1] != 1:
        raise LizardzooError(f"{OP}: a step takes one token, got {q.shape[1]}; call window_attention")
    kernels = _kernels(impl, q, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    y, log_mass, new = kernels.step(q, k, v, keep, sinks, scale, mask, state)
    return y, log_mass, WindowState(*new)


def init_state(
    batch: int,
    kv_heads: int,
    head_dim: int,
    window: int,
    keep: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> WindowState:
    """The state before the first token."""

    def zeros(size: int) -> Tensor:
        return torch.zeros(batch, size, kv_heads, head_dim, dtype=dtype, device=device)

    valid = torch.zeros(batch, window, dtype=torch.bool, device=device)
    length = torch.zeros(batch, dtype=torch.long, device=device)
    return WindowState(zeros(window), zeros(window), valid, zeros(keep), zeros(keep), length)


def _kernels(impl: Impl | str, q: Tensor, v: Tensor) -> Any:
    """The module that computes."""
    if impl != Impl.TRITON:
        resolve(OP, impl, (Impl.REFERENCE,), q.device)
        return reference
    try:
        from lizardzoo.kernels.window import ops
    except ImportError:
        raise LizardzooError(
            f"{OP}: there is no triton implementation where triton is not installed; pass impl='reference'"
        ) from None
    ops.check(OP, q, v)
    return ops


def _check(
    q: Tensor, k: Tensor, v: Tensor, window: int, keep: int, sinks: Tensor | None, state: WindowState | None
) -> None:
    check_qkv(OP, q, k, v)
    if window < 1 or keep < 0:
        raise LizardzooError(f"{OP}: window must be at least 1 and keep at least 0, got {window} and {keep}")
    if sinks is not None and (sinks.ndim not in (1, 2) or (sinks.ndim == 2 and sinks.shape[0] != q.shape[2])):
        raise LizardzooError(f"{OP}: sinks are [m] or [{q.shape[2]}, m], got {list(sinks.shape)}")
    if state is not None and (state.k.shape[1] != window or state.kept_k.shape[1] != keep):
        raise LizardzooError(
            f"{OP}: the state was made with window={state.k.shape[1]}, keep={state.kept_k.shape[1]}, "
            f"got window={window}, keep={keep}; start from a new state"
        )
