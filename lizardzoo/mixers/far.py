"""Texts longer than the teacher was trained for: the kept first tokens are never farther than it ever looked.

A window looks back a fixed distance, but the first tokens that it keeps move away for ever, and RoPE turns their
scores to angles that the teacher never met: SmolLM2, trained to 8,192 positions, loses a novel's thread from 12,000 on
(docs/concepts/past.md). So beyond the teacher's positions the kept keys are turned after the queries: from rank R on,
at every multiple of S, by another S, which leaves them R - S to R - 1 tokens behind (StreamingLLM, arXiv:2309.17453,
counts positions in the cache instead, to the same end). Nothing changes up to rank R. The steps stand at fixed ranks,
so that a text cut anywhere gives what the whole one gives; what a state holds is never turned itself.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lizardzoo.kernels import rotate
from lizardzoo.kernels.rows import arrange, take_tokens
from lizardzoo.mixers.base import Mixer, MixerInputs, Turns

STEPS = 8
"""At least so many of the distances S lie within the teacher's positions."""


def grid(positions: int) -> tuple[int, int]:
    """R and S for a teacher of so many positions: S a power of two, R the multiple of it below or at them."""
    step = 1 << max(0, (positions // STEPS).bit_length() - 1)
    return positions // step * step, step


def keeps(mixer: Mixer | None) -> bool:
    """Whether it keeps first tokens whose keys are rotated."""
    return mixer is not None and getattr(mixer.spec, "keep", 0) > 0 and getattr(mixer.spec, "window_rope", False)


def turns(
    positions: int, frequencies: Tensor, length: Tensor, count: int, mask: Tensor | None, starts: Tensor | None
) -> Turns:
    """What `count` tokens behind `length` [B] real ones of their documents need.

    Args:
        positions: those that the teacher was trained for.
        frequencies: [D / 2] of its RoPE, in radians a token.
        length: [B] int64.
        count: tokens T.
        mask, starts: [B, T] bool or None, as for a mixer.
    """
    reach, step = grid(positions)
    rows = arrange(length[:, None].expand(-1, count), mask, starts, length)
    ranks = rows.unpack(rows.rank)
    if mask is not None:  # a padded token goes with the last real one
        places = torch.arange(count, device=length.device)
        last = torch.where(mask, places, -1).cummax(1).values
        ranks = torch.where(last < 0, length[:, None], take_tokens(ranks, last.clamp(min=0)))
    moved = ((ranks // step + 1) * step - reach).clamp(min=0)
    angles = moved[..., None].float() * frequencies.float()
    angles = torch.cat([angles, angles], -1)
    cuts: tuple[int, ...] = ()
    # Where no number may be asked for, or there is none (a dry run), a piece is turned as a whole.
    if count > 1 and not torch.compiler.is_compiling() and not length.is_meta:
        changes = (moved[:, 1:] != moved[:, :-1]).any(0)
        cuts = tuple(int(place) + 1 for place in changes.nonzero()[:, 0])
    return Turns(angles.cos(), angles.sin(), cuts)


def run(mixer: Mixer, inputs: MixerInputs, state: Any | None, need_state: bool) -> tuple[Tensor, Any | None]:
    """`mixer(inputs, state, need_state)` for a text of any length, piece by piece where the turn changes."""
    if inputs.turns is None or not keeps(mixer):
        return mixer(inputs, state, need_state)
    bounds = [0, *inputs.turns.cuts, inputs.q.shape[1]]
    outputs = []
    for start, stop in pairwise(bounds):
        part = inputs.tokens(start, stop)
        turned, full = near(mixer, part, state)
        y, new = mixer(part, turned, need_state or stop < bounds[-1])
        outputs.append(y)
        state = new if state is None or new is None else _as_before(mixer, new, state, full, part.starts)
    return torch.cat(outputs, 1), state


@torch.no_grad()
def step_(mixer: Mixer, inputs: MixerInputs, state: Any) -> Tensor:
    """`mixer.step_(inputs, state)` for a text of any length; the held keys are turned aside and stay as they are."""
    if inputs.turns is None or not keeps(mixer):
        return mixer.step_(inputs, state)
    turned, full = near(mixer, inputs, state)
    y = mixer.step_(inputs, turned)
    window, after = mixer.window_state(state), mixer.window_state(turned)
    if turned is not state and window is not None and after is not None:
        window.kept_k.copy_(torch.where(full, window.kept_k, after.kept_k))  # one of the first tokens may have come in
    return y


def near(mixer: Mixer, inputs: MixerInputs, state: Any | None) -> tuple[Any, Tensor]:
    """The state with the kept keys turned as the first token needs it, and which rows [B, 1, 1, 1] have all of them."""
    window, far = mixer.window_state(state), inputs.turns
    if window is None or far is None:
        return state, inputs.q.new_ones((), dtype=torch.bool)
    keep = window.kept_k.shape[1]
    cos, sin = (x[:, :1].expand(-1, keep, -1) for x in (far.cos, far.sin))
    kept, _ = rotate(window.kept_k, window.kept_k, cos, sin, mixer.impl)
    return mixer.with_window(state, window._replace(kept_k=kept)), (window.length >= keep)[:, None, None, None]


def _as_before(mixer: Mixer, new: Any, state: Any, full: Tensor, starts: Tensor | None) -> Any:
    """The new state with the kept keys unturned, except those that came in."""
    before, after = mixer.window_state(state), mixer.window_state(new)
    if before is None or after is None:
        return new
    if starts is not None:
        full = full & ~starts.any(1)[:, None, None, None]
    return mixer.with_window(new, after._replace(kept_k=torch.where(full, before.kept_k, after.kept_k)))
