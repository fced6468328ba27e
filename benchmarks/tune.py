"""Choose the entries of a kernel's table of tile sizes by trying them: `python benchmarks/tune.py window --shape 1b`.

A candidate that does not compile, needs more than the device has, or changes the result is left out. Prints the others
by their time, the table's own entry among them: an entry is worth a change where it wins by more than the spread
between two timings of that entry, which stand first and last.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from contenders import SHAPES, Inputs, Maker, draw, gated_linear, heavy, hybrid, window
from measure import relative_error, timed
from torch import Tensor

from lizardzoo.kernels.launching import forget, shared_memory, table_key

Entry: TypeAlias = Any
TOLERANCE = 5e-3
"""Relative difference to the default's result: another order of rounding in bf16."""


class Trial(NamedTuple):
    """One candidate: its milliseconds, or why it has none."""

    entry: Entry
    ms: float | None
    reason: str = ""


class Target(NamedTuple):
    """A kernel's table, what runs it, which part of that is timed, and the entries to try."""

    table: MutableMapping[Any, Any]
    maker: Maker
    part: Literal["forward", "backward", "both"]
    candidates: Iterable[Entry]


def targets(op: str) -> dict[str, Target]:
    """By kernel. The hybrid runs the kernels of its branches, in forms of their own: its tables are theirs."""
    from lizardzoo.kernels.gated_linear import tables as linear
    from lizardzoo.kernels.heavy import ops as heavy_ops
    from lizardzoo.kernels.window import ops as window_ops

    makers: dict[str, Maker] = {
        "window": lambda i: window(i, "triton"),
        "heavy": lambda i: heavy(i, "triton"),  # with the window, whose tables stay
        "gated-linear": lambda i: gated_linear(i, "triton"),
        "hybrid": lambda i: hybrid(i, "triton"),
    }
    found: dict[str, Target] = {}
    maker = makers[op]
    tiles = list(itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3)))  # query rows, keys, warps, stages
    tables = {"window": window_ops.TILES, "heavy": heavy_ops.TILES, "hybrid": window_ops.TILES}.get(op, {})
    for kernel, table in tables.items():
        part: Any = "forward" if kernel in ("forward", "drawn") else "backward"
        found[f"window {kernel}" if op == "hybrid" else kernel] = Target(table, maker, part, tiles)
    if op in ("gated-linear", "hybrid"):
        options = list(itertools.product((4, 8), (1, 2, 3), (None, 128, 168, 255)))  # warps, stages, registers at most
        for kernel, launches in linear.LAUNCHES.items():
            part = "forward" if kernel in ("chunk_states", "outputs") else "backward"
            found[kernel] = Target(launches, maker, part, options)
        found["chunks"] = Target(linear.CHUNKS, maker, "both", (16, 32, 64, 128))  # which all of these kernels share
        scans = itertools.product((128, 256, 512, 1024), (2, 4, 8))  # numbers of a program, steps read ahead
        found["scan"] = Target(linear.SCANS, maker, "both", list(scans))
    return found


def tune(
    table: MutableMapping[Any, Any], key: Any, candidates: Iterable[Entry], run: Callable[[], Sequence[Tensor]]
) -> list[Trial]:
    """Every candidate for `table[key]`, the fastest first; `run` gives the tensors that must not change."""
    default = table[key]
    expected = [result.clone() for result in run()]
    trials = []
    try:
        for entry in (default, *(c for c in candidates if c != default), default):
            table[key] = entry
            forget()
            trials.append(_try(entry, expected, run))
            print(*trials[-1], flush=True)
    finally:
        table[key] = default
        forget()
    return sorted(trials, key=lambda trial: (trial.ms is None, trial.ms))


def _try(entry: Entry, expected: Sequence[Tensor], run: Callable[[], Sequence[Tensor]]) -> Trial:
    try:
        differences = [relative_error(a, b) for a, b in zip(run(), expected, strict=True)]
        if not max(differences) <= TOLERANCE:
            return Trial(entry, None, f"differs by {max(differences):.1e}")
        return Trial(entry, timed(run))
    except Exception as error:  # noqa: BLE001  a compiler raises what it likes
        return Trial(entry, None, f"{type(error).__name__}: {str(error).partition(chr(10))[0][:100]}")


def runner(target: Target, inputs: Inputs) -> Callable[[], Sequence[Tensor]]:
    """The forward alone, the backward alone behind a forward that was made once, or both."""
    function = target.maker(inputs)
    if target.part == "forward":
        return torch.no_grad()(lambda: [function.run(inputs)])
    y = function.run(inputs)
    dy, learns = torch.randn_like(y), list(function.learns(inputs).values())
    if target.part == "both":
        return lambda: torch.autograd.grad(function.run(inputs), learns, dy)
    return lambda: torch.autograd.grad(y, learns, dy, retain_graph=True)


def main() -> None:
    """Tune the tables of an op at a shape."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("op", choices=("window", "heavy", "gated-linear", "hybrid"))
    parser.add_argument("--kernel", action="append", help="default: all of the op")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    arguments = parser.parse_args()
    found = targets(arguments.op)
    unknown = [kernel for kernel in arguments.kernel or () if kernel not in found]
    if unknown:
        parser.error(f"{arguments.op} has no kernel {unknown[0]!r}; choose of {', '.join(found)}")
    if not torch.cuda.is_available():
        raise SystemExit("tune times kernels on a CUDA device, and torch finds none here")
    shape, dtype = SHAPES[arguments.shape], getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    inputs = draw(shape, arguments.batch, arguments.tokens, "cuda", dtype)
    sizes = inputs.q.element_size(), max(64, shape.head_dim, shape.feature_dim)
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    for kernel, target in found.items():
        if arguments.kernel and kernel not in arguments.kernel:
            continue
        if kernel == "scan":  # by rows of states
            from lizardzoo.kernels.gated_linear.tables import scan_key

            key: Any = scan_key(arguments.batch * shape.kv_heads)
        else:
            key = table_key(target.table, *sizes, shared_memory(inputs.q.device))
        print(f"{arguments.op}, {kernel} {key}, {torch.cuda.get_device_name()} ({capability})")
        trials = tune(target.table, key, target.candidates, runner(target, inputs))
        default = target.table[key]
        spread = " and ".join(f"{t.ms:.4f}" for t in trials if t.entry == default and t.ms is not None)
        for trial in trials[:10]:
            print(f"  {trial.entry}  {trial.ms:.4f} ms" if trial.ms is not None else f"  {trial.entry}  {trial.reason}")
        print(f"  -> {trials[0].entry}; the table has {default}, at {spread}")


if __name__ == "__main__":
    main()
