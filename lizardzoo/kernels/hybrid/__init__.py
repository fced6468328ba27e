"""Hybrid attention: a window for what is near, gated linear attention for what is far, one denominator (LoLCATs)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lizardzoo.errors import LizardzooError
from lizardzoo.kernels.dispatch import Impl, check_token_flags, implementation
from lizardzoo.kernels.features import FeatureMap
from lizardzoo.kernels.gated_linear import check_arguments as check_linear
from lizardzoo.kernels.hybrid import reference
from lizardzoo.kernels.hybrid.state import HybridState, share
from lizardzoo.kernels.rotary import check_rotary
from lizardzoo.kernels.state import check_in_place
from lizardzoo.kernels.window import Turn, check_turn
from lizardzoo.kernels.window import check_arguments as check_window

__all__ = ["HybridState", "hybrid_attention", "hybrid_attention_step", "share"]

OP = "hybrid_attention"


def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    rotated: tuple[Tensor, Tensor],
    log_input: Tensor | None = None,
    log_scale: Tensor | None = None,
    feature_map: FeatureMap | None = None,
    window: int,
    keep: int = 0,
    lag: int,
    skip: int = 0,
    sinks: Tensor | None = None,
    scale: float | None = None,
    mask: Tensor | None = None,
    starts: Tensor | None = None,
    state: HybridState | None = None,
    return_state: bool = True,
    impl: Impl | str = Impl.AUTO,
) -> tuple[Tensor, Tensor, HybridState | None]:
    """Attend to what is near and to what is far (LoLCATs, arXiv:2410.10254, with Lizard's gates).

        y_i = (sum_{S_i} e^{s_it} v_t + e^{c_i} sum_{F_i} w_it v_t) / (sum_{S_i} e^{s_it} + e^{c_i} sum_{F_i} w_it)

    with S and s of `window_attention` (sinks are in its sum), F and w of `gated_linear_attention`, and c = log_scale:
    what these two and `lizardzoo.kernels.merge.joint` compute.

    Args:
        q, k, v: [B, T, H, D], [B, T, Hkv, D], [B, T, Hkv, Dv], as the linear branch takes them.
        rotated: q and k as the window takes them; the same tensors where both branches take the same.
        log_decay, log_input, feature_map, lag, skip: of the linear branch; see `gated_linear_attention`. lag = window
            and skip = keep make the branches disjoint, 0 and 0 let the linear one see everything.
        log_scale: [B, T, H], added to the linear branch's log_mass; None = 0.
        window, keep, sinks, scale: of the window; see `window_attention`.
        mask, starts: [B, T] bool; see `lizardzoo.kernels`.
        state: from an earlier call, to go on behind it.
        return_state: False saves the work when nothing follows.
        impl: which implementation computes; see `lizardzoo.kernels`.

    Returns:
        y [B, T, H, Dv] in q's dtype, log_mass [B, T, H] (the log of the one denominator), and the state (None unless
        wanted).

    Raises:
        LizardzooError: shapes, dtypes or sizes that do not fit, or that the implementation does not take.
    """
    _check(q, k, v, log_decay, rotated, log_input, log_scale, feature_map, window, keep, lag, skip, sinks, state)
    check_token_flags(OP, q, mask=mask, starts=starts)
    kernels = implementation(OP, impl, q.device, reference, _triton)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return kernels.chunked(
        q, k, v, log_decay, rotated, log_input, log_scale, feature_map, window, keep, lag, skip, sinks, scale, mask,
        starts, state, return_state,
    )  # fmt: skip


def hybrid_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: HybridState,
    *,
    rotated: tuple[Tensor, Tensor] | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    log_input: Tensor | None = None,
    log_scale: Tensor | None = None,
    feature_map: FeatureMap | None = None,
    keep: int = 0,
    skip: int = 0,
    sinks: Tensor | None = None,
    scale: float | None = None,
    mask: Tensor | None = None,
    turn: Turn | None = None,
    in_place: bool = False,
    impl: Impl | str = Impl.AUTO,
) -> tuple[Tensor, Tensor, HybridState]:
    """`hybrid_attention` of one token behind a state.

    Args:
        q, k, v, log_decay, rotated, log_input, log_scale, feature_map: as for `hybrid_attention`, with T = 1.
        state: what the call before returned, or the start state; it gives window and lag.
        rope: cos and sin [B or 1, 1, D], in place of `rotated`: the window takes q and k as
            `lizardzoo.kernels.rotate` gives them. Triton rotates in the same kernel.
        keep, skip, sinks, scale, mask, impl: likewise.
        turn: of the kept keys; as for `window_attention_step`.
        in_place: the tensors of the given state are overwritten, and it is the one returned; without gradients only.

    Returns:
        y [B, 1, H, Dv] in q's dtype, log_mass [B, 1, H], and the state behind the token.

    Raises:
        LizardzooError: as `hybrid_attention`; more than one token; in_place where gradients are on.
    """
    window, lag = state.window.k.shape[1], state.linear.k.shape[1]
    if (rotated is None) == (rope is None):
        raise LizardzooError(f"{OP}: a step takes either rotated or rope, got {'neither' if rope is None else 'both'}")
    near = (q, k) if rotated is None else rotated
    _check(q, k, v, log_decay, near, log_input, log_scale, feature_map, window, keep, lag, skip, sinks, state)
    check_token_flags(OP, q, mask=mask)
    if rope is not None:
        check_rotary(OP, q, k, *rope)
    check_turn(OP, k, turn)
    check_in_place(OP, in_place)
    if q.shape[1] != 1:
        raise LizardzooError(f"{OP}: a step takes one token, got {q.shape[1]}; call hybrid_attention")
    kernels = implementation(OP, impl, q.device, reference, _triton)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return kernels.step(
        q, k, v, log_decay, rotated, rope, log_input, log_scale, feature_map, keep, skip, sinks, scale, mask, turn,
        state, in_place,
    )  # fmt: skip


def _triton() -> Any:
    from lizardzoo.kernels.hybrid import ops

    return ops


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    rotated: tuple[Tensor, Tensor],
    log_input: Tensor | None,
    log_scale: Tensor | None,
    feature_map: FeatureMap | None,
    window: int,
    keep: int,
    lag: int,
    skip: int,
    sinks: Tensor | None,
    state: HybridState | None,
) -> None:
    check_linear(OP, q, k, v, log_decay, log_input, feature_map, lag, skip, state and state.linear)
    check_window(OP, *rotated, v, window, keep, sinks, state and state.window)
    if log_scale is not None and log_scale.shape != q.shape[:3]:
        raise LizardzooError(f"{OP}: log_scale is {list(q.shape[:3])}, got {list(log_scale.shape)}")
