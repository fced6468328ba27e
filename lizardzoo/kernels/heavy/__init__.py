"""Attention to a few tokens of the far past: those that drew most attention while they were in the window.

After H2O (Heavy-Hitter Oracle, arXiv:2306.14048), which ranks by the sum of a token's attention weights for as long as
it is held. Here a token's rank is settled when it leaves the window, so that a whole sequence is computed at once, and
weights are squared: one query that needs a token tells more than many that touch it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lizardzoo.errors import LizardzooError
from lizardzoo.kernels.dispatch import Impl, check_qkv, check_token_flags, implementation
from lizardzoo.kernels.heavy import reference
from lizardzoo.kernels.heavy.state import HeavyState, init_state
from lizardzoo.kernels.state import check_in_place
from lizardzoo.kernels.window import Turn, WindowState, check_arguments, check_turn

__all__ = [
    "HeavyState",
    "heavy_attention",
    "heavy_attention_step",
    "init_state",
    "window_and_heavy_attention",
    "window_and_heavy_step",
]

OP = "heavy_attention"
BOTH = "window_and_heavy_attention"


def heavy_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_mass: Tensor,
    *,
    window: int,
    heavy: int,
    keep: int = 0,
    half_life: float | None = None,
    scale: float | None = None,
    mask: Tensor | None = None,
    starts: Tensor | None = None,
    past: WindowState | None = None,
    state: HeavyState | None = None,
    return_state: bool = True,
    impl: Impl | str = Impl.AUTO,
) -> tuple[Tensor, Tensor, HeavyState | None]:
    """Attend to the `heavy` tokens that drew most attention, of those that `window_attention` sees no more.

        y_i = sum_{t in E_i} e^{s_it} v_t / sum_{t in E_i} e^{s_it},  s_it = scale q_i . k_t
        E_i = the `heavy` tokens of highest score_t 2^{t / half_life} among t <= i - window of i's document, less its
              first `keep` ones
        score_t = sum_{i = t + max(1, window // 8)}^{t + window - 1} sum_h e^{2 (s_it - log_mass_ih)}

    h: the query heads that share t's key head, each of which chooses for itself. Of equal scores the later one counts
    more. No gradient flows into the choice.

    Args:
        q, k, v: [B, T, H, D], [B, T, Hkv, D], [B, T, Hkv, Dv], rotated as for `window_attention`.
        log_mass: [B, T, H], what `window_attention` returns for the same queries.
        window: the window's size.
        heavy: tokens held for each key head, at least 1.
        keep: first tokens of a document, which the window holds for ever.
        half_life: in tokens, at least 1; scores of tokens that have left the window halve in that time. None: never.
        scale: of the scores; D ** -0.5 unless given.
        mask, starts: [B, T] bool; see `lizardzoo.kernels`.
        past: the window's state BEFORE these tokens; given if and only if `state` is.
        state: from an earlier call, to go on behind it.
        return_state: False saves the work when nothing follows.
        impl: which implementation computes; see `lizardzoo.kernels`.

    Returns:
        y [B, T, H, Dv] in q's dtype, log_mass [B, T, H] of what is held, and the state (None unless wanted).

    Raises:
        LizardzooError: shapes, dtypes or sizes that do not fit, or that the implementation does not take.
    """
    _check(OP, q, k, v, log_mass, window, heavy, keep, past, state)
    check_token_flags(OP, q, mask=mask, starts=starts)
    kernels = _kernels(OP, impl, q, v, _triton)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return kernels.chunked(
        q, k, v, log_mass, window, keep, heavy, _fade(OP, half_life), scale, mask, starts, past, state, return_state
    )


def heavy_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_mass: Tensor,
    past: WindowState,
    state: HeavyState,
    *,
    keep: int = 0,
    half_life: float | None = None,
    scale: float | None = None,
    mask: Tensor | None = None,
    in_place: bool = False,
    impl: Impl | str = Impl.AUTO,
) -> tuple[Tensor, Tensor, HeavyState]:
    """`heavy_attention` of one token behind a state.

    Args:
        q, k, v, log_mass, keep, half_life, scale, mask, impl: as for `heavy_attention`, with T = 1.
        past: the window's state BEFORE this token.
        state: what the call before returned, or the start state.
        in_place: the tensors of `state` are overwritten, and it is the one returned; without gradients only.

    Returns:
        y [B, 1, H, Dv] in q's dtype, log_mass [B, 1, H], and the state behind the token.

    Raises:
        LizardzooError: as `heavy_attention`; more than one token; in_place where gradients are on.
    """
    _check(OP, q, k, v, log_mass, past.k.shape[1], state.k.shape[1], keep, past, state)
    check_token_flags(OP, q, mask=mask)
    _check_step(OP, q, in_place)
    kernels = _kernels(OP, impl, q, v, _triton_step)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return kernels.step(q, k, v, log_mass, keep, _fade(OP, half_life), scale, mask, past, state, in_place)


def window_and_heavy_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    heavy: int,
    keep: int = 0,
    half_life: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    mask: Tensor | None = None,
    starts: Tensor | None = None,
    past: WindowState | None = None,
    state: HeavyState | None = None,
    return_state: bool = True,
    impl: Impl | str = Impl.AUTO,
) -> tuple[Tensor, Tensor, WindowState | None, HeavyState | None]:
    """Attend to a window and to the tokens that drew most attention in it, under one denominator (after H2O).

        y_i = sum_{S_i, E_i} e^{s_it} v_t / (sum_{S_i, E_i} e^{s_it} + sum_j e^{sink_j})

    with S and s of `window_attention` and E of `heavy_attention` by that window's log_mass: what these two and
    `lizardzoo.kernels.merge.joint` compute. Triton computes nothing between its kernels.

    Args:
        q, k, v, window, keep, sinks, scale: as for `window_attention`.
        heavy, half_life, mask, starts, past, state: as for `heavy_attention`.
        return_state: False saves the work when nothing follows.
        impl: which implementation computes; see `lizardzoo.kernels`.

    Returns:
        y [B, T, H, Dv] in q's dtype, log_mass [B, T, H] (the log of the one denominator), and both states (None unless
        wanted).

    Raises:
        LizardzooError: shapes, dtypes or sizes that do not fit, or that the implementation does not take.
    """
    check_arguments(BOTH, q, k, v, window, keep, sinks, past)
    _check(BOTH, q, k, v, None, window, heavy, keep, past, state)
    check_token_flags(BOTH, q, mask=mask, starts=starts)
    kernels = _kernels(BOTH, impl, q, v, _triton_fused)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return kernels.joint_chunked(
        q, k, v, window, keep, heavy, _fade(BOTH, half_life), sinks, scale, mask, starts, past, state, return_state
    )


def window_and_heavy_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: WindowState,
    state: HeavyState,
    *,
    keep: int = 0,
    half_life: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    mask: Tensor | None = None,
    turn: Turn | None = None,
    in_place: bool = False,
    impl: Impl | str = Impl.AUTO,
) -> tuple[Tensor, Tensor, WindowState, HeavyState]:
    """`window_and_heavy_attention` of one token behind both states: a decode step, in Triton one kernel.

    Args:
        q, k, v, past, state, keep, half_life, scale, mask, impl: as for `heavy_attention_step`.
        sinks: as for `window_attention`.
        turn: of the kept keys; as for `window_attention_step`.
        in_place: the tensors of `past` and `state` are overwritten, and they are returned; without gradients only.

    Returns:
        y [B, 1, H, Dv] in q's dtype, log_mass [B, 1, H], and both states behind the token.

    Raises:
        LizardzooError: as `heavy_attention_step`.
    """
    window = past.k.shape[1]
    check_arguments(BOTH, q, k, v, window, keep, sinks, past)
    _check(BOTH, q, k, v, None, window, state.k.shape[1], keep, past, state)
    check_token_flags(BOTH, q, mask=mask)
    _check_step(BOTH, q, in_place)
    check_turn(BOTH, k, turn)
    kernels = _kernels(BOTH, impl, q, v, _triton_step)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return kernels.joint_step(q, k, v, keep, _fade(BOTH, half_life), sinks, scale, mask, turn, past, state, in_place)


def _kernels(op: str, impl: Impl | str, q: Tensor, v: Tensor, triton: Callable[[], Any]) -> Any:
    """The module that computes."""
    kernels = implementation(op, impl, q.device, reference, triton)
    if kernels is not reference:
        kernels.check(op, q, v)
    return kernels


def _triton() -> Any:
    from lizardzoo.kernels.heavy import ops

    return ops


def _triton_fused() -> Any:
    from lizardzoo.kernels.heavy import fused

    return fused


def _triton_step() -> Any:
    from lizardzoo.kernels.heavy import step

    return step


def _fade(op: str, half_life: float | None) -> float:
    """Halvings a token."""
    if half_life is not None and not half_life >= 1:
        raise LizardzooError(f"{op}: half_life must be at least 1 token, or None, got {half_life}")
    return 0.0 if half_life is None else 1.0 / half_life


def _check_step(op: str, q: Tensor, in_place: bool) -> None:
    if q.shape[1] != 1:
        raise LizardzooError(f"{op}: a step takes one token, got {q.shape[1]}; call {op}")
    check_in_place(op, in_place)


def _check(
    op: str, q: Tensor, k: Tensor, v: Tensor, log_mass: Tensor | None, window: int, heavy: int, keep: int,
    past: WindowState | None, state: HeavyState | None,
) -> None:  # fmt: skip
    check_qkv(op, q, k, v)
    if window < 1 or heavy < 1 or keep < 0:
        raise LizardzooError(
            f"{op}: window and heavy must be at least 1 and keep at least 0, got {window}, {heavy} and {keep}"
        )
    if log_mass is not None and log_mass.shape != q.shape[:3]:
        raise LizardzooError(
            f"{op}: log_mass is what window_attention returns, of shape {list(q.shape[:3])}, got {list(log_mass.shape)}"
        )
    if (past is None) != (state is None):
        given, missing = ("past", "state") if state is None else ("state", "past")
        raise LizardzooError(f"{op}: {given} is given without {missing}; give both, or none at a text's beginning")
    if past is not None and state is not None:
        made = past.k.shape[1], state.drawn.shape[1], state.k.shape[1], past.kept_k.shape[1]
        if made != (window, window, heavy, keep):
            raise LizardzooError(
                f"{op}: the states were made with window={made[0]} and {made[1]}, heavy={made[2]}, keep={made[3]}, "
                f"got window={window}, heavy={heavy}, keep={keep}; start from new ones"
            )
