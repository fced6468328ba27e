"""Where a layer's time goes: `python benchmarks/profile_layer.py --shape 1b --batch 8 --tokens 2048`.

Prints the device's microseconds by kernel for one forward + backward, how long the CPU takes to launch it (where that
is longer, the device waits), and how long the bytes alone take that any implementation has to read and write.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from contenders import SHAPES, draw, ours
from measure import machine, timed
from torch import Tensor

RUNS = 10


def main() -> None:
    """Profile one of our contenders at a shape."""
    contenders = ours("auto")
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--contender", choices=contenders, default="lizardzoo hybrid")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--impl", default="auto", help="of lizardzoo's kernels: auto, triton or reference")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("profile_layer reads a CUDA device, and torch finds none here")
    torch.manual_seed(0)
    inputs = draw(SHAPES[arguments.shape], arguments.batch, arguments.tokens, "cuda")
    function = ours(arguments.impl)[arguments.contender].make(inputs)
    learns, gradient = list(function.learns(inputs).values()), torch.randn_like(function.run(inputs))

    def both() -> None:
        torch.autograd.grad(function.run(inputs), learns, gradient)

    milliseconds = timed(both)
    print(f"{arguments.contender}, {arguments.shape}, {arguments.batch} x {arguments.tokens}: {milliseconds:.3f} ms")
    print(f"launched by the CPU in {launch_time(both) * 1e3:.3f} ms")
    forward, backward = bytes_floor(learns, gradient)
    rate = machine()["copy TB/s"] * 1e6  # bytes a microsecond
    alone = f"{forward / rate:.0f} us forward, {(forward + backward) / rate:.0f} us both ways"
    print(f"the bytes alone, at {rate / 1e6:.2f} TB/s: {alone}")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(RUNS):
            both()
        torch.cuda.synchronize()
    print_kernels(profile.key_averages())


def bytes_floor(learns: Sequence[Tensor], y: Tensor) -> tuple[int, int]:
    """Bytes of a forward (inputs read, output written) and of a backward (both and dy read, gradients written)."""
    inputs = sum(x.nbytes for x in learns)
    return inputs + y.nbytes, 2 * inputs + 2 * y.nbytes


def launch_time(run: Callable[[], Any]) -> float:
    """Median seconds until `run` returns on an idle device, without waiting for it."""
    times = []
    for _ in range(RUNS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times)


def print_kernels(averages: Any) -> None:
    """Calls and microseconds of each kernel in one run, the longest first."""
    rows = [(row.key, row.count / RUNS, row.self_device_time_total / RUNS) for row in averages]
    rows = sorted((row for row in rows if row[2] > 0), key=lambda row: -row[2])
    total = sum(row[2] for row in rows)
    print(f"{'us':>9} {'%':>5} {'calls':>6}  kernel")
    for name, calls, microseconds in rows:
        print(f"{microseconds:9.1f} {100 * microseconds / total:5.1f} {calls:6g}  {name[:100]}")
    print(f"{total:9.1f} {100:5.1f}         all")


if __name__ == "__main__":
    main()
