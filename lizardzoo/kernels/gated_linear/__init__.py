"""Gated linear attention with its own denominator and, optionally, a lag (Lizard, section 3.1).

y_i = sum_t w_it v_t / sum_t w_it,  w_it = phi_q(q_i) . phi_k(k_t) exp(L_i - L_t + a_t),
with L = cumsum log_decay and a = log_input, over the real tokens t <= i - lag of i's document that are not among its
first `skip` ones. As a recurrence over the token j = i - lag that enters at step i:
S_i = exp(log_decay_i) S_{i-1} + exp(a_j + L_i - L_j) phi_k(k_j) v_j^T.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lizardzoo.errors import LizardzooError
from lizardzoo.kernels.dispatch import Impl, check_qkv, check_token_flags, resolve
from lizardzoo.kernels.features import FeatureMap
from lizardzoo.kernels.gated_linear import reference

OP = "gated_linear_attention"
PROVEN_ON_GPU = False
"""Whether the Triton kernels have passed tests/gpu on a device. They equal the reference in Triton's interpreter, but
an earlier version raced on an H100; a wrong gradient is worse than none: CUDA tensors are refused until they pass."""


class GatedLinearState(NamedTuple):
    """The memory, and the last `lag` tokens that wait to enter it.

    The memory is held as kv [B, Hs, F, D] and norm [B, Hs, F], both times exp(scale) with scale [B, Hs, F] (fp32; -inf:
    nothing yet). Hs = Hkv, or H where a gate is per query head. Waiting, oldest first: k, v [B, lag, Hkv, D],
    log_decay, log_input [B, lag, Hg] or [B, lag, 0] without, valid [B, lag]. length [B]: real tokens of the current
    document so far.
    """

    kv: Tensor
    norm: Tensor
    scale: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    log_input: Tensor
    valid: Tensor
    length: Tensor


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    log_input: Tensor | None = None,
    feature_map: FeatureMap | None = None,
    lag: int = 0,
    skip: int = 0,
    mask: Tensor | None = None,
    starts: Tensor | None = None,
    state: GatedLinearState | None = None,
    return_state: bool = True,
    impl: Impl | str = Impl.AUTO,
) -> tuple[Tensor, Tensor, GatedLinearState | None]:
    """Attend linearly.

    Args:
        q, k, v: [B, T, H, D], [B, T, Hkv, D], [B, T, Hkv, Dv].
        log_decay: [B, T, 1, Hkv or H], natural log, <= 0; None = no decay.
        log_input: [B, T, 1, Hkv or H], natural log of the key's weight; None = 0.
        feature_map: phi for queries and keys; None = q and k already are log-features.
        lag, skip: which keys a query sees; see `lizardzoo.kernels`.
        mask, starts: [B, T] bool; see `lizardzoo.kernels`.
        state: from an earlier call, to go on behind it.
        return_state: False saves the work when nothing follows.

    Returns:
        y [B, T, H, Dv] in q's dtype, log_mass [B, T, H], and the state (None unless wanted).

    Raises:
        LizardzooError: shapes, dtypes or sizes that do not fit.
    """
    _check(q, k, v, log_decay, log_input, feature_map, lag, skip, state)
    check_token_flags(OP, q, mask=mask, starts=starts)
    y, log_mass, new = _implementation(impl, q.device).chunked(
        q, k, v, log_decay, log_input, feature_map, lag, skip, mask, starts, state, return_state
    )
    return y, log_mass, GatedLinearState(*new) if new is not None else None


def gated_linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: GatedLinearState,
    *,
    log_input: Tensor | None = None,
    feature_map: FeatureMap | None = None,
    skip: int = 0,
    mask: Tensor | None = None,
    impl: Impl | str = Impl.AUTO,
) -> tuple[Tensor, Tensor, GatedLinearState]:
    """`gated_linear_attention` of one token (T = 1) behind a state, whose waiting tokens give the lag; same returns."""
    _check(q, k, v, log_decay, log_input, feature_map, state.k.shape[1], skip, state)
    check_token_flags(OP, q, mask=mask)
    if q.shape[1] != 1:
        raise LizardzooError(f"{OP}: a step takes one token, got {q.shape[1]}; call gated_linear_attention")
    y, log_mass, new = _implementation(impl, q.device).step(
        q, k, v, log_decay, log_input, feature_map, skip, mask, state
    )
    return y, log_mass, GatedLinearState(*new)


def init_state(
    batch: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    features: int,
    lag: int,
    decay_heads: int,
    input_heads: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> GatedLinearState:
    """The state before the first token; decay_heads, input_heads: last axis of the gates, 0 without."""
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    state_heads = reference.state_heads(heads, kv_heads, decay_heads, input_heads)

    def zeros(*shape: int, dtype: torch.dtype = accumulate) -> Tensor:
        return torch.zeros(batch, *shape, dtype=dtype, device=device)

    return GatedLinearState(
        kv=zeros(state_heads, features, head_dim),
        norm=zeros(state_heads, features),
        scale=torch.full((batch, state_heads, features), float("-inf"), dtype=accumulate, device=device),
        k=zeros(lag, kv_heads, head_dim, dtype=dtype),
        v=zeros(lag, kv_heads, head_dim, dtype=dtype),
        log_decay=zeros(lag, decay_heads),
        log_input=zeros(lag, input_heads),
        valid=zeros(lag, dtype=torch.bool),
        length=zeros(dtype=torch.long),
    )


def _implementation(impl: Impl | str, device: torch.device) -> Any:
    """The module that holds `chunked` and `step`. Triton's interpreter (TRITON_INTERPRET=1) takes CPU tensors too."""
    if impl == Impl.TRITON and device.type == "cuda" and not PROVEN_ON_GPU:
        raise LizardzooError(f"{OP}: its Triton kernels have not passed their GPU tests yet; pass impl='reference'")
    interpreted = impl == Impl.TRITON and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    available = (Impl.REFERENCE,) if impl == Impl.AUTO else (Impl.REFERENCE, Impl.TRITON)
    if not interpreted and resolve(OP, impl, available, device) is Impl.REFERENCE:
        return reference
    try:
        from lizardzoo.kernels.gated_linear import ops
    except ImportError as error:
        raise LizardzooError(f"{OP}: triton is not installed; pip install triton, or pass impl='reference'") from error
    return ops


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    log_input: Tensor | None,
    feature_map: FeatureMap | None,
    lag: int,
    skip: int,
    state: GatedLinearState | None,
) -> None:
    check_qkv(OP, q, k, v)
    heads, kv_heads = q.shape[2], k.shape[2]
    for name, gate in (("log_decay", log_decay), ("log_input", log_input)):
        fits = gate is None or (
            gate.ndim == 3 and gate.shape[:2] == q.shape[:2] and gate.shape[2] in (1, kv_heads, heads)
        )
        if gate is not None and not fits:
            raise LizardzooError(
                f"{OP}: {name} is [{q.shape[0]}, {q.shape[1]}, 1, {kv_heads} or {heads}], got {list(gate.shape)}"
            )
    if feature_map is not None:
        for name, weight, count in (("query", feature_map.query, heads), ("key", feature_map.key, kv_heads)):
            if weight.ndim != 3 or weight.shape[0] not in (1, count) or weight.shape[1] != q.shape[3]:
                raise LizardzooError(
                    f"{OP}: the {name} feature map is [1 or {count}, {q.shape[3]}, F], got {list(weight.shape)}"
                )
        if feature_map.activation not in ("softmax", "exp"):
            raise LizardzooError(f"{OP}: activation is 'softmax' or 'exp', got {feature_map.activation!r}")
    if lag < 0 or skip < 0:
        raise LizardzooError(f"{OP}: lag and skip must be at least 0, got {lag} and {skip}")
    if state is not None and state.k.shape[1] != lag:
        raise LizardzooError(
            f"{OP}: the state was made with lag={state.k.shape[1]}, got lag={lag}; start from a new state"
        )
