"""Rings: what a state holds of a document's tokens, wherever a call ended."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lizardzoo.kernels.rows import arrange, first_of, hold, last_document, ring_of, ring_ranks, unroll
from lizardzoo.testing import token_flags


@given(st.integers(0, 6), st.lists(st.integers(0, 20), min_size=1, max_size=3))
def test_a_ring_holds_the_last_tokens_and_unrolls_to_them(size: int, lengths: list[int]) -> None:
    length = torch.tensor(lengths)
    ranks = ring_ranks(length, size)
    for row, count in enumerate(lengths):
        last = list(range(max(count - size, 0), count))
        assert sorted(r for r in ranks[row].tolist() if r >= 0) == last
        assert all(ranks[row, r % size] == r for r in last)
        assert all((r >= 0) == (slot < count) for slot, r in enumerate(ranks[row].tolist()))
    assert torch.equal(unroll(ranks, length), torch.arange(-size, 0) + length[:, None])


@given(st.integers(1, 6), st.integers(1, 2), st.lists(st.integers(1, 7), min_size=1, max_size=5), st.data())
def test_a_ring_grown_in_pieces_is_the_ring_of_the_whole(
    size: int, batch: int, pieces: list[int], data: st.DataObject
) -> None:
    """Under any padding and packing; tokens are their own places in the row."""
    total = sum(pieces)
    flags = data.draw(token_flags(batch, total))
    tokens = torch.arange(total).expand(batch, -1)
    ring, length, start = None, torch.zeros(batch, dtype=torch.long), 0
    for count in pieces:
        mask, starts = (None if flag is None else flag[:, start : start + count] for flag in flags)
        rows = arrange(tokens[:, start : start + count], mask, starts, length)
        first, length = last_document(rows, count, length)
        ring = hold(ring, rows.pack(tokens[:, start : start + count]), first, ring_ranks(length, size))
        start += count
    assert ring is not None
    for row in range(batch):
        document: list[int] = []
        for t in range(total):
            if flags.mask is None or flags.mask[row, t]:
                document = [t] if flags.starts is not None and flags.starts[row, t] else [*document, t]
        assert length[row] == len(document)
        last = document[-size:]
        assert unroll(ring, length)[row].tolist()[size - len(last) :] == last


@given(st.integers(0, 6), st.integers(1, 20), st.booleans())
def test_of_a_whole_document_ring_and_first_tokens_are_taken_at_once(size: int, count: int, turned: bool) -> None:
    """As `hold` gives them where nothing came before; in memory of their own, whatever the tokens' strides."""
    tokens = torch.rand(2, 3, count, 4).transpose(1, 2) if turned else torch.rand(2, count, 3, 4)
    length, first = torch.full((2,), count), torch.zeros(2, dtype=torch.long)
    ring, kept = ring_of(tokens, size), first_of(tokens, size)
    assert torch.equal(ring, hold(None, tokens, first, ring_ranks(length, size)))
    there = torch.arange(size) < count
    assert torch.equal(kept[:, there], hold(None, tokens, first, torch.arange(size).expand(2, -1))[:, there])
    assert (kept[:, ~there] == 0).all()
    for held in (ring, kept):
        assert held.is_contiguous()
        assert held.numel() == 0 or held.untyped_storage().data_ptr() != tokens.untyped_storage().data_ptr()
