"""What can be done with any state: a (nested) NamedTuple of tensors, one of which may be held in several places."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from lizardzoo.errors import LizardzooError

State = TypeVar("State")


def state_tensors(state: Any) -> Iterator[Tensor]:
    """All tensors of a state."""
    if isinstance(state, Tensor):
        yield state
    elif state is not None:
        for part in state:
            yield from state_tensors(part)


def overwriting(operator: Any, function: Callable[..., Any], state: Any, *arguments: Any) -> Any:
    """A step that overwrites `state`: an operator for torch.compile, otherwise the function that it is made of.

    For an operator of so many tensors torch's dispatcher takes longer than all the rest of a step does (benchmarks/
    NOTES.md). What it does beside calling is done here: autograd hears that the state has changed.
    """
    if torch.compiler.is_compiling():
        return operator(*arguments)
    found = function(*arguments)
    torch.autograd.graph.increment_version(list(state_tensors(state)))
    return found


def map_state(fn: Callable[[Tensor], Tensor], state: Any, done: dict[int, Tensor] | None = None) -> Any:
    """`fn` of every tensor of a state; a tensor held twice stays one."""
    done = {} if done is None else done
    if state is None:
        return None
    if isinstance(state, Tensor):
        if id(state) not in done:
            done[id(state)] = fn(state)
        return done[id(state)]
    return type(state)(*(map_state(fn, part, done) for part in state))


@torch.no_grad()
def overwrite(state: State, new: State) -> State:
    """Copy the tensors of `new` into those of `state`, and return `state`; a new one may be a view of an old one."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for a, b in zip(state_tensors(state), state_tensors(new), strict=True):
        if a is not b and not any(a is seen for seen, _ in pairs):
            pairs.append((a, b))
    for a, b in [(a, b.clone() if _shares_memory(b, pairs) else b) for a, b in pairs]:
        a.copy_(b)
    return state


def _shares_memory(x: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> bool:
    """Whether x may lie in a tensor that is overwritten."""
    if torch.compiler.is_compiling():  # nothing has an address yet; the compiler drops the copies it does not need
        return True
    return any(x.untyped_storage().data_ptr() == a.untyped_storage().data_ptr() for a, _ in pairs)


def writable(op: str, state: State, in_place: bool) -> State:
    """The state that a kernel overwrites: the given one, or a copy of it."""
    if not in_place:
        return map_state(lambda x: x.clone(memory_format=torch.contiguous_format), state)
    if not all(x.is_contiguous() for x in state_tensors(state)):
        raise LizardzooError(f"{op}: in_place=True needs contiguous tensors in the state; pass in_place=False")
    return state


def check_in_place(op: str, in_place: bool) -> None:
    """A step in place has no gradients: the next step overwrites what they would need."""
    if in_place and torch.is_grad_enabled():
        raise LizardzooError(f"{op}: in_place=True gives no gradients; call it under torch.no_grad()")
