"""Overwriting one state with another."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lizardzoo import LizardzooError
from lizardzoo.kernels.state import map_state, overwrite, overwriting, state_tensors, writable


class Inner(NamedTuple):
    a: Tensor
    b: Tensor


class Outer(NamedTuple):
    left: Inner
    right: Inner


def nested() -> Outer:
    """One tensor held twice."""
    shared = torch.tensor([1.0, 2.0, 3.0])
    return Outer(Inner(shared, torch.tensor([4.0, 5.0])), Inner(shared, torch.tensor([6.0])))


def test_a_tensor_held_twice_stays_one() -> None:
    state = map_state(lambda x: x + 1, nested())
    assert state.left.a is state.right.a and state.left.a.tolist() == [2, 3, 4]
    copy = writable("op", state, False)
    assert copy.left.a is copy.right.a and copy.left.a is not state.left.a
    assert writable("op", state, True) is state


def test_overwrite_copies_into_the_tensors_that_are_there() -> None:
    state, new = nested(), map_state(lambda x: x * 10, nested())
    before = list(state_tensors(state))
    assert overwrite(state, new) is state
    assert all(a is b for a, b in zip(before, state_tensors(state), strict=True))
    assert [x.tolist() for x in state_tensors(state)] == [x.tolist() for x in state_tensors(new)]


def test_a_new_state_may_be_made_of_the_old_one() -> None:
    """Handed on to another place, or moved within one."""
    state = Inner(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    overwrite(state, Inner(state.b, state.a))
    assert state.a.tolist() == [3, 4] and state.b.tolist() == [1, 2]
    row = torch.tensor([1.0, 2.0, 3.0, 4.0])
    overwrite(Inner(row[1:], state.b), Inner(row[:3], state.b))
    assert row.tolist() == [1, 1, 2, 3]


def test_a_state_in_pieces_cannot_be_overwritten_by_a_kernel() -> None:
    state = Inner(torch.zeros(4, 4)[:, :2], torch.zeros(1))
    with pytest.raises(LizardzooError, match="in_place=True needs contiguous tensors"):
        writable("op", state, True)


def test_autograd_hears_of_a_state_that_an_eager_step_overwrites() -> None:
    """Or a gradient that needs what stood there would be wrong, and nobody would know."""
    state, x = (torch.zeros(2), (torch.zeros(3),)), torch.ones(2, requires_grad=True)
    y = (x * state[0]).sum()
    assert overwriting(None, lambda number: number + 1, state, 1) == 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
