"""Rows of a batch as the reference kernels want them: real tokens first, each with its document and its rank in it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """x [B, T, ...] at index [B, S] along the tokens: [B, S, ...]."""
    shape = index.shape + (1,) * (x.ndim - 2)
    return x.gather(1, index.view(shape).expand(*index.shape, *x.shape[2:]))


class Rows(NamedTuple):
    """Where the tokens of a [B, T] batch stand once every row's real tokens are moved to its front.

    A slot is a place after that move. `valid`, `document` and `rank` are [B, T] by slot: whether a real token stands
    there, which document it belongs to (0 = the one the incoming state is in, then 1, 2, ... for those that start here)
    and how many real tokens of that document come before it. `lengths` [B] counts the real tokens of a row.
    """

    valid: Tensor
    document: Tensor
    rank: Tensor
    lengths: Tensor
    order: Tensor | None
    inverse: Tensor | None

    def pack(self, x: Tensor) -> Tensor:
        """Move real tokens to the front and zero the rest, so that a NaN in a padded place stays there."""
        if self.order is None or self.inverse is None:
            return x
        flags = self.valid.view(self.valid.shape + (1,) * (x.ndim - 2))
        return torch.where(flags, take_tokens(x, self.order), torch.zeros((), dtype=x.dtype, device=x.device))

    def unpack(self, x: Tensor) -> Tensor:
        """The inverse move of an output."""
        return x if self.inverse is None else take_tokens(x, self.inverse)

    def next_length(self, length: Tensor) -> Tensor:
        """Real tokens seen so far of the document that each row ends in; [B]."""
        last = (self.lengths - 1).clamp(min=0)[:, None]
        return torch.where(self.lengths > 0, self.rank.gather(1, last)[:, 0] + 1, length)

    def last_document(self) -> Tensor:
        """The document each row ends in; [B, 1]. Slots behind the real tokens continue the last document."""
        return self.document[:, -1:]


def arrange(tokens: Tensor, mask: Tensor | None, starts: Tensor | None, length: Tensor | None) -> Rows:
    """Rows of `tokens` [B, T, ...]; `length` [B] is how many real tokens the incoming state has seen."""
    batch, count = tokens.shape[:2]
    slots = torch.arange(count, device=tokens.device).expand(batch, count)
    order = inverse = None
    lengths = torch.full((batch,), count, device=tokens.device)
    if mask is not None:
        order = (~mask).long().argsort(dim=1, stable=True)
        inverse = order.argsort(dim=1)
        lengths = mask.sum(1)
        starts = None if starts is None else take_tokens(starts & mask, order)
    before = torch.zeros_like(lengths) if length is None else length
    if starts is None:
        document, rank = torch.zeros_like(slots), slots + before[:, None]
    else:
        document = starts.long().cumsum(1)
        first = torch.where(starts, slots, 0).cummax(1).values
        rank = torch.where(document > 0, slots - first, slots + before[:, None])
    return Rows(slots < lengths[:, None], document, rank, lengths, order, inverse)


def last_document(rows: Rows | None, count: int, length: Tensor) -> tuple[Tensor, Tensor]:
    """Of the document that each row ends in: the slot at which it began (below 0: in the incoming state), its length.

    length [B]: what the incoming state has seen; rows None: all `count` tokens are real and go on with its document.
    """
    if rows is None:
        return -length, length + count
    after = rows.next_length(length)
    return rows.lengths - after, after


def unroll(ring: Tensor, length: Tensor) -> Tensor:
    """A ring's tokens, oldest first: place j of `size` holds rank length - size + j, or anything if that is below 0.

    ring [B, size, ...] behind `length` [B] tokens of the document.
    """
    size = ring.shape[1]
    return take_tokens(ring, (length[:, None] + torch.arange(size, device=ring.device)) % max(size, 1))


def ring_ranks(length: Tensor, size: int) -> Tensor:
    """The rank that each slot of a ring holds behind `length` [B] tokens; below 0: none yet. [B, size]."""
    last = length[:, None] - 1
    return last - (last - torch.arange(size, device=length.device)) % max(size, 1)


def is_whole(rows: Rows | None, state: object | None) -> bool:
    """Whether a call's tokens are a document from its beginning, all of them real.

    What a state holds of them is then known beforehand, and taken in a third of the operations (`ring_of`, `first_of`).
    Not while torch.compile traces: for it the other way is one function of any length.
    """
    return rows is None and state is None and not torch.compiler.is_compiling()


def first_of(tokens: Tensor, size: int) -> Tensor:
    """The first `size` of tokens [B, T, ...], each at its rank; zeros where there are none."""
    missing = size - tokens.shape[1]
    if missing > 0:
        return F.pad(tokens, (0, 0) * (tokens.ndim - 2) + (0, missing)).contiguous()
    return tokens[:, :size].clone(memory_format=torch.contiguous_format)


def ring_of(tokens: Tensor, size: int) -> Tensor:
    """A ring of the last `size` of tokens [B, T, ...], which are all of a document; zeros in slots that hold none."""
    count = tokens.shape[1]
    if count <= size:
        return first_of(tokens, size)
    return tokens[:, count - size :].roll(count % max(size, 1), 1).contiguous()


def hold(past: Tensor | None, new: Tensor, first: Tensor, ranks: Tensor) -> Tensor:
    """What a state holds behind `new` [B, T, ...] (packed): the tokens of the given ranks of the last document.

    ranks [B, size]; first [B]: the slot of `new` at which that document began. Below 0 it began in the incoming state,
    whose tokens past [B, size, ...] (None: zeros) stay in their places. A rank that is not there yet may hold anything.
    """
    slot = first[:, None] + ranks
    taken = take_tokens(new, slot.clamp(0, new.shape[1] - 1))
    before = torch.zeros((), dtype=new.dtype, device=new.device) if past is None else past
    return torch.where((slot >= 0).view(slot.shape + (1,) * (new.ndim - 2)), taken, before)
