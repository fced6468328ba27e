"""Texts longer than the teacher was trained for: the kept first tokens are never farther than it ever looked.

A window looks back a fixed distance, but the first tokens that it keeps move away for ever, and RoPE turns their
scores to angles that the teacher never met: SmolLM2, trained to 8,192 positions, loses a novel's thread from 12,000 on
(docs/concepts/past.md). So beyond the teacher's positions the kept keys are turned after the queries: from rank R on,
at every multiple of S, by another S, which leaves them R - S to R - 1 tokens behind (StreamingLLM, arXiv:2309.17453,
counts positions in the cache instead, to the same end). Nothing changes up to rank R. The steps stand at fixed ranks,
so that a text cut anywhere gives what the whole one gives; what a state holds is never turned itself. A step's kernels
turn what they read (`turn` of `window_attention_step`); for several tokens it is done around the mixer, here.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lizardzoo.kernels.rows import arrange, take_tokens
from lizardzoo.kernels.window import as_held, turned
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
        return mixer(_without_turns(inputs), state, need_state)
    if state is not None and _turns_itself(mixer, inputs):
        return mixer(inputs, state, need_state)
    bounds = [0, *inputs.turns.cuts, inputs.q.shape[1]]
    outputs = []
    for start, stop in pairwise(bounds):
        part = inputs.tokens(start, stop)
        y, new = mixer(_without_turns(part), _near(mixer, part, state), need_state or stop < bounds[-1])
        outputs.append(y)
        state = new if state is None or new is None else _as_before(mixer, new, state, part.starts)
    return torch.cat(outputs, 1), state


@torch.no_grad()
def step_(mixer: Mixer, inputs: MixerInputs, state: Any) -> Tensor:
    """`mixer.step_(inputs, state)` for a text of any length; what is held of the kept keys is not turned."""
    if inputs.turns is None or not keeps(mixer):
        return mixer.step_(_without_turns(inputs), state)
    if _turns_itself(mixer, inputs):
        return mixer.step_(inputs, state)
    near, window = _near(mixer, inputs, state), mixer.window_state(state)
    held = window and window._replace(length=window.length.clone())  # the step overwrites it
    y = mixer.step_(_without_turns(inputs), near)
    after = mixer.window_state(near)
    if held is not None and after is not None:
        held.kept_k.copy_(as_held(after, held, inputs.starts).kept_k)  # one of the first tokens may have come in
    return y


def _turns_itself(mixer: Mixer, inputs: MixerInputs) -> bool:
    """Whether this is a step whose kernels turn the kept keys."""
    return mixer.turns_steps and inputs.q.shape[1] == 1 and inputs.starts is None


def _without_turns(inputs: MixerInputs) -> MixerInputs:
    return inputs._replace(turns=None)


def _near(mixer: Mixer, inputs: MixerInputs, state: Any | None) -> Any:
    """The state with the kept keys turned as the first token needs it."""
    window, far = mixer.window_state(state), inputs.turns
    if window is None or far is None:
        return state
    return mixer.with_window(state, turned(window, (far.cos[:, :1], far.sin[:, :1]), mixer.impl))


def _as_before(mixer: Mixer, new: Any, state: Any, starts: Tensor | None) -> Any:
    """The new state with the kept keys unturned, except those that came in."""
    before, after = mixer.window_state(state), mixer.window_state(new)
    if before is None or after is None:
        return new
    return mixer.with_window(new, as_held(after, before, starts))
