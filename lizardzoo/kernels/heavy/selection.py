"""Which tokens are held when: the best `heavy` of a stream so far, without a loop over its tokens.

One token joins the stream at a time. It is held as long as fewer than `heavy` of those that have joined beat it: by a
higher key, or by the same one and having joined later. Once beaten so often it never comes back, so each token's time
is one stretch, and what is held at the start of a chunk is all that a chunk has to know of the past.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NEG_INF = float("-inf")


class Selection(NamedTuple):
    """Of a stream of N chunks of C tokens; places count the `heavy` of the past first, then the stream.

    Attributes:
        held: [..., N, heavy], places of the tokens held when each chunk begins, best first.
        until: [..., N, heavy + C] int32, of those that were held and of the chunk's own: which of the chunk's tokens is
            the first to join that leaves no room for it; C: none does. See `visible`.
        last: [..., heavy], places of the tokens held behind the stream.
        any_last: [..., heavy] bool, whether there is a token at all.
    """

    held: Tensor
    until: Tensor
    last: Tensor
    any_last: Tensor


def visible(until: Tensor, heavy: int) -> Tensor:
    """[..., N, C, heavy + C] bool: which candidates are held when the chunk's t-th token has joined."""
    chunk = until.shape[-1] - heavy
    time = torch.arange(chunk, device=until.device)
    since = F.pad(time, (heavy, 0))  # what was held is there from the chunk's beginning
    return (time[:, None] >= since) & (time[:, None] < until[..., None, :])


def select(keys: Tensor, heavy: int, chunk: int) -> Selection:
    """Who is held.

    Args:
        keys: [..., heavy + N * chunk], those of the past (best first; equal ones latest first), then the stream in the
            order in which it joins; -inf: no token.
        heavy: how many are held at most.
        chunk: C.
    """
    places = torch.arange(keys.shape[-1], device=keys.device).expand(keys.shape)
    past, stream = keys[..., :heavy], keys[..., heavy:].unflatten(-1, (-1, chunk))
    best, where = _best(stream.flip(-1), places[..., heavy:].unflatten(-1, (-1, chunk)).flip(-1), heavy)
    best = torch.cat([past[..., None, :], best], -2)  # of the past, and of each chunk
    where = torch.cat([places[..., None, :heavy], where], -2)
    reach = 1
    while reach < best.shape[-2]:  # doubles how many chunks back an entry has seen
        both = [torch.cat([x[..., reach:, :], x[..., :-reach, :]], -1) for x in (best, where)]  # later ones first
        merged = _best(both[0], both[1], heavy)
        best, where = (torch.cat([x[..., :reach, :], new], -2) for x, new in zip((best, where), merged))
        reach *= 2
    held = best[..., :-1, :]
    return Selection(where[..., :-1, :], _until(held, stream), where[..., -1, :], best[..., -1, :] > NEG_INF)


def _best(keys: Tensor, places: Tensor, heavy: int) -> tuple[Tensor, Tensor]:
    """The best `heavy` of those given latest first; filled up with nothing."""
    keys, order = keys.sort(dim=-1, descending=True, stable=True)
    keys, places = keys[..., :heavy], places.gather(-1, order)[..., :heavy]
    fill = heavy - keys.shape[-1]
    return F.pad(keys, (0, fill), value=NEG_INF), F.pad(places, (0, fill))


def _until(held: Tensor, stream: Tensor) -> Tensor:
    """See `Selection.until`; held [..., N, heavy] sorted, stream [..., N, C], both keys."""
    heavy, chunk = held.shape[-1], stream.shape[-1]
    time = torch.arange(chunk, device=stream.device)
    new, real = stream[..., :, None], (stream > NEG_INF)[..., :, None]
    beats_held = (new >= held[..., None, :]) & real
    later = time[:, None] > time
    beats_new = torch.where(later, new >= stream[..., None, :], new > stream[..., None, :]) & real
    beaten = torch.cat([beats_held, beats_new], -1).to(torch.int32).cumsum(-2, dtype=torch.int32)  # by the stream
    before = torch.arange(heavy, device=held.device, dtype=torch.int32).expand(held.shape)
    joined = (held[..., None, :] > new).sum(-1, dtype=torch.int32)
    beaten = beaten + torch.cat([before, joined], -1)[..., None, :]
    there = torch.cat([held, stream], -1) > NEG_INF
    return torch.where(there, (beaten < heavy).sum(-2, dtype=torch.int32), 0)
