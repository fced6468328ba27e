# mypy: ignore-errors
"""The one place that knows how Triton calls a kernel it has compiled."""

from __future__ import annotations

import re

import triton
from triton import knobs

CHECKED = (3, 6), (3, 9)
"""Versions, first and last, whose `CompiledKernel.run` was read: it takes what `direct` gives it."""
DIRECT = CHECKED[0] <= tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2]) <= CHECKED[1]


def watched():
    """Whether somebody, Proton for one, wants to hear of launches."""
    return bool(knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls)


def public(compiled, grid):
    """Call with stream and arguments: Triton's own way. It tells hooks of the launch, whether there are any or not."""

    def call(stream, *arguments):
        compiled[grid](*arguments, stream=stream)

    return call


def direct(compiled, grid):
    """The same without hooks, in less time. Not an interface that Triton promises, so only in `CHECKED` versions."""
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata

    def call(stream, *arguments):
        run(*grid, stream, function, metadata, None, None, None, *arguments)

    return call


def callers(compiled, grid):
    """How to call a compiled kernel as fast as this Triton allows, and how to do it under `watched`."""
    slow = public(compiled, grid)
    return (direct(compiled, grid) if DIRECT else slow), slow
