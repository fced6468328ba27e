"""Sliding-window softmax attention with kept first tokens and meta memory (Lizard, section 3.2)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lizardzoo.errors import LizardzooError
from lizardzoo.kernels.dispatch import Impl, check_qkv, check_token_flags, implementation
from lizardzoo.kernels.rotary import check_rotary
from lizardzoo.kernels.state import check_in_place
from lizardzoo.kernels.window import reference
from lizardzoo.kernels.window.state import WindowState, init_state
from lizardzoo.kernels.window.turning import Turn, as_held, turned

__all__ = [
    "Turn",
    "WindowState",
    "as_held",
    "check_arguments",
    "check_turn",
    "init_state",
    "turned",
    "window_attention",
    "window_attention_step",
]

OP = "window_attention"


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
    """Attend over a window (Lizard, arXiv:2507.09025, section 3.2).

        y_i = sum_{t in S_i} e^{s_it} v_t / (sum_{t in S_i} e^{s_it} + sum_j e^{sink_j}),  s_it = scale q_i . k_t

    S_i: the last `window` real tokens of i's document, i included, and its first `keep` ones. q and k come rotated.

    Args:
        q, k, v: [B, T, H, D], [B, T, Hkv, D], [B, T, Hkv, Dv].
        window: keys a query sees, itself included.
        keep: first tokens of a document that stay visible for ever.
        sinks: [m] or [H, m] logits that enter the denominator only.
        scale: of the scores; D ** -0.5 unless given.
        mask, starts: [B, T] bool; see `lizardzoo.kernels`.
        state: from an earlier call, to go on behind it.
        return_state: False saves the work when nothing follows.
        impl: which implementation computes; see `lizardzoo.kernels`.

    Returns:
        y [B, T, H, Dv] in q's dtype, log_mass [B, T, H], and the state (None unless wanted).

    Raises:
        LizardzooError: shapes, dtypes or sizes that do not fit, or that the implementation does not take.
    """
    check_arguments(OP, q, k, v, window, keep, sinks, state)
    check_token_flags(OP, q, mask=mask, starts=starts)
    kernels = _kernels(impl, q, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return kernels.chunked(q, k, v, window, keep, sinks, scale, mask, starts, state, return_state)


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
    turn: Turn | None = None,
    in_place: bool = False,
    impl: Impl | str = Impl.AUTO,
) -> tuple[Tensor, Tensor, WindowState]:
    """`window_attention` of one token behind a state.

    Args:
        q, k, v, keep, sinks, scale, mask, impl: as for `window_attention`, with T = 1.
        state: what the call before returned, or the start state; its ring gives the window.
        turn: cos and sin [B or 1, 1, D]: the kept keys are read rotated by these, in their own dtype, and stay held as
            they are. Triton does it in the same kernel, in fp32 and rounded once; the reference as its
            `lizardzoo.kernels.rotate` does, in the dtypes given, so that with fp32 tables they differ by a last bit.
        in_place: the tensors of the given state are overwritten, and it is the one returned; without gradients only.

    Returns:
        y [B, 1, H, Dv] in q's dtype, log_mass [B, 1, H], and the state behind the token.

    Raises:
        LizardzooError: as `window_attention`; more than one token; in_place where gradients are on.
    """
    check_arguments(OP, q, k, v, state.k.shape[1], keep, sinks, state)
    check_token_flags(OP, q, mask=mask)
    if q.shape[1] != 1:
        raise LizardzooError(f"{OP}: a step takes one token, got {q.shape[1]}; call window_attention")
    check_turn(OP, k, turn)
    check_in_place(OP, in_place)
    kernels = _kernels(impl, q, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return kernels.step(q, k, v, keep, sinks, scale, mask, turn, state, in_place)


def _kernels(impl: Impl | str, q: Tensor, v: Tensor) -> Any:
    """The module that computes."""
    kernels = implementation(OP, impl, q.device, reference, _triton)
    if kernels is not reference:
        kernels.check(OP, q, v)
    return kernels


def _triton() -> Any:
    from lizardzoo.kernels.window import ops

    return ops


def check_arguments(
    op: str, q: Tensor, k: Tensor, v: Tensor, window: int, keep: int, sinks: Tensor | None, state: WindowState | None
) -> None:
    """What `window_attention` raises at; `op` is named."""
    check_qkv(op, q, k, v)
    if window < 1 or keep < 0:
        raise LizardzooError(f"{op}: window must be at least 1 and keep at least 0, got {window} and {keep}")
    if sinks is not None and (sinks.ndim not in (1, 2) or (sinks.ndim == 2 and sinks.shape[0] != q.shape[2])):
        raise LizardzooError(f"{op}: sinks are [m] or [{q.shape[2]}, m], got {list(sinks.shape)}")
    if state is not None and (state.k.shape[1] != window or state.kept_k.shape[1] != keep):
        raise LizardzooError(
            f"{op}: the state was made with window={state.k.shape[1]}, keep={state.kept_k.shape[1]}, "
            f"got window={window}, keep={keep}; start from a new state"
        )


def check_turn(op: str, k: Tensor, turn: Turn | None) -> None:
    """What a step raises at: a turn of the kept keys that does not fit its token's key k [B, 1, Hkv, D]."""
    if turn is not None:
        check_rotary(f"{op}, turn", k, k, *turn)
