"""Gated linear attention with its own denominator and, optionally, a lag (Lizard, section 3.1)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lizardzoo.errors import LizardzooError
from lizardzoo.kernels.dispatch import Impl, check_qkv, check_token_flags, implementation
from lizardzoo.kernels.features import FeatureMap
from lizardzoo.kernels.gated_linear import reference
from lizardzoo.kernels.gated_linear.state import GatedLinearState, init_state
from lizardzoo.kernels.state import check_in_place

__all__ = ["GatedLinearState", "check_arguments", "gated_linear_attention", "gated_linear_attention_step", "init_state"]

OP = "gated_linear_attention"


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
    """Attend linearly (Lizard, arXiv:2507.09025, section 3.1, parallel form).

        y_i = sum_t w_it v_t / sum_t w_it,  w_it = phi_q(q_i) . phi_k(k_t) exp(L_i - L_t + a_t)

    with L = cumsum log_decay and a = log_input, over the real tokens t <= i - lag of i's document that are not among
    its first `skip` ones. As a recurrence over the token j = i - lag that enters at step i:

        S_i = exp(log_decay_i) S_{i-1} + exp(a_j + L_i - L_j) phi_k(k_j) v_j^T

    Args:
        q, k, v: [B, T, H, D], [B, T, Hkv, D], [B, T, Hkv, Dv].
        log_decay: [B, T, 1, Hkv or H], natural log, <= 0; None = no decay.
        log_input: [B, T, 1, Hkv or H], natural log of the key's weight; None = 0.
        feature_map: phi for queries and keys; None = q and k already are log-features.
        lag, skip: which keys a query sees; see `lizardzoo.kernels`.
        mask, starts: [B, T] bool; see `lizardzoo.kernels`.
        state: from an earlier call, to go on behind it.
        return_state: False saves the work when nothing follows.
        impl: which implementation computes; see `lizardzoo.kernels`.

    Returns:
        y [B, T, H, Dv] in q's dtype, log_mass [B, T, H], and the state (None unless wanted).

    Raises:
        LizardzooError: shapes, dtypes or sizes that do not fit, or that the implementation does not take.
    """
    check_arguments(OP, q, k, v, log_decay, log_input, feature_map, lag, skip, state)
    check_token_flags(OP, q, mask=mask, starts=starts)
    kernels = implementation(OP, impl, q.device, reference, _triton)
    return kernels.chunked(q, k, v, log_decay, log_input, feature_map, lag, skip, mask, starts, state, return_state)


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
    in_place: bool = False,
    impl: Impl | str = Impl.AUTO,
) -> tuple[Tensor, Tensor, GatedLinearState]:
    """`gated_linear_attention` of one token behind a state.

    Args:
        q, k, v, log_decay, log_input, feature_map, skip, mask, impl: as for `gated_linear_attention`, with T = 1.
        state: what the call before returned, or the start state; its waiting tokens give the lag.
        in_place: the tensors of the given state are overwritten, and it is the one returned; without gradients only.

    Returns:
        y [B, 1, H, Dv] in q's dtype, log_mass [B, 1, H], and the state behind the token.

    Raises:
        LizardzooError: as `gated_linear_attention`; more than one token; in_place where gradients are on.
    """
    check_arguments(OP, q, k, v, log_decay, log_input, feature_map, state.k.shape[1], skip, state)
    check_token_flags(OP, q, mask=mask)
    if q.shape[1] != 1:
        raise LizardzooError(f"{OP}: a step takes one token, got {q.shape[1]}; call gated_linear_attention")
    check_in_place(OP, in_place)
    kernels = implementation(OP, impl, q.device, reference, _triton)
    return kernels.step(q, k, v, log_decay, log_input, feature_map, skip, mask, state, in_place)


def _triton() -> Any:
    from lizardzoo.kernels.gated_linear import ops

    return ops


def check_arguments(
    op: str,
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
    """What `gated_linear_attention` raises at; `op` is named."""
    check_qkv(op, q, k, v)
    heads, kv_heads = q.shape[2], k.shape[2]
    for name, gate in (("log_decay", log_decay), ("log_input", log_input)):
        fits = gate is None or (
            gate.ndim == 3 and gate.shape[:2] == q.shape[:2] and gate.shape[2] in (1, kv_heads, heads)
        )
        if gate is not None and not fits:
            raise LizardzooError(
                f"{op}: {name} is [{q.shape[0]}, {q.shape[1]}, 1, {kv_heads} or {heads}], got {list(gate.shape)}"
            )
    if feature_map is not None:
        for name, weight, count in (("query", feature_map.query, heads), ("key", feature_map.key, kv_heads)):
            if weight.ndim != 3 or weight.shape[0] not in (1, count) or weight.shape[1] != q.shape[3]:
                raise LizardzooError(
                    f"{op}: the {name} feature map is [1 or {count}, {q.shape[3]}, F], got {list(weight.shape)}"
                )
        if feature_map.activation not in ("softmax", "exp"):
            raise LizardzooError(f"{op}: activation is 'softmax' or 'exp', got {feature_map.activation!r}")
    if lag < 0 or skip < 0:
        raise LizardzooError(f"{op}: lag and skip must be at least 0, got {lag} and {skip}")
    if state is not None and state.k.shape[1] != lag:
        raise LizardzooError(
            f"{op}: the state was made with lag={state.k.shape[1]}, got lag={lag}; start from a new state"
        )
