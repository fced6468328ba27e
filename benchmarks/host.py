"""What a call costs the host, without a device: `python benchmarks/host.py`.

Python prepares, allocates and launches; on a short sequence the device waits for it. Here Triton compiles the kernels
for Hopper and takes every step of a launch but the last: its launcher is replaced by nothing (`Driver`). Tensors are
small and lie on the CPU. So the figures hold our own Python, Triton's, autograd, and torch's dispatch; they do NOT hold
the driver's part of a launch (Triton's own C, cuLaunchKernel) nor the CUDA allocator, which takes longer than the
CPU's: the numbers of launches, of allocations and of torch's own operations stand beside the times. A few of torch's
operations compute here, on few numbers.

Compare commits on one idle machine only; `profile_layer.py` says what a device's own host needs.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
from contenders import MIXERS, Function, Inputs, Shape, build_mixer, draw, ours
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from lizardzoo.mixers import MixerInputs

SHAPE = Shape(4, 2, 64, 64)
TOKENS = 320  # more than one chunk of every kernel
REPEATS = 300


class Driver:
    """A device as far as Triton asks before the last step of a launch, which counts and does nothing.

    Args:
        capability: 90 is Hopper.
    """

    launches = 0

    def __init__(self, capability: int = 90):
        self.capability = capability

    class launcher_cls:
        """Stands for the launcher that Triton makes of a compiled kernel."""

        def __init__(self, *_: Any):
            pass

        def __call__(self, *_: Any) -> None:
            Driver.launches += 1

    class utils:
        """What Triton asks of the device."""

        @staticmethod
        def get_device_properties(_: int) -> dict[str, int]:
            return {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}

        @staticmethod
        def load_binary(*_: Any) -> tuple[int, ...]:
            return 1, 1, 0, 0, 1024

        @staticmethod
        def unload_module(_: Any) -> None:
            pass

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> None:
        return None


class Counts(TorchDispatchMode):
    """Operations of torch, by whether they allocate only; views are neither."""

    def __init__(self) -> None:
        super().__init__()
        self.allocations = self.others = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        allocates = "empty" in func.overloadpacket.__name__
        self.allocations += allocates
        self.others += not (allocates or func.is_view or func.overloadpacket is torch.ops.aten.detach)
        return func(*args, **(kwargs or {}))


def pretend(device: Driver | None = None) -> None:
    """Make Triton and torch believe in the device. Kernels are imported before CPU tensors are let in."""
    import lizardzoo.kernels.heavy.step
    import lizardzoo.kernels.hybrid.ops
    import lizardzoo.kernels.rotary.ops
    import lizardzoo.kernels.token_gates.ops  # noqa: F401

    driver.set_active(device or Driver())
    torch.cuda.current_device = lambda: 0
    torch._C._cuda_getCurrentRawStream = lambda _: 0
    os.environ["TRITON_INTERPRET"] = "1"  # what lets CPU tensors in; the kernels have been made without it


def median(run: Callable[[], Any]) -> float:
    """Microseconds, after a warm-up."""
    for _ in range(20):
        run()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def counts(run: Callable[[], Any]) -> str:
    """Launches, allocations and torch's own operations of a call; a forward and backward stay on one thread here."""
    before = Driver.launches
    with Counts() as found:
        run()
    return f"{Driver.launches - before:8d} {found.allocations:8d} {found.others:8d}"


def calls(function: Function, inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """A forward, and a forward + backward."""
    learns, gradient = list(function.learns(inputs).values()), torch.randn_like(function.run(inputs))
    return {
        "forward": torch.no_grad()(lambda: function.run(inputs)),
        "forward + backward": lambda: torch.autograd.grad(function.run(inputs), learns, gradient),
    }


def mixer_calls(kind: str) -> dict[str, Callable[[], Any]]:
    """A mixer's prompt of which a state is left, one that the window holds too, and a token behind a state."""
    mixer = build_mixer(kind, SHAPE, SHAPE.heads * SHAPE.head_dim, "cpu", "triton")
    i = draw(SHAPE, 1, TOKENS, "cpu").detached()
    whole = MixerInputs(i.q, i.k, i.v, i.x, i.cos, i.sin)
    short, token, state = whole.tokens(0, 60), whole.tokens(0, 1), mixer.init_state(1, torch.bfloat16, "cpu")
    return {
        "a prompt, leaving a state": torch.no_grad()(lambda: mixer(whole, need_state=True)),
        "a short one": torch.no_grad()(lambda: mixer(short, need_state=True)),
        "a short one without": torch.no_grad()(lambda: mixer(short)),
        "a step": lambda: mixer.step_(token, state),
    }


def main() -> None:
    """Print a table of all our ops."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("host.py times compiled kernels: run it without TRITON_INTERPRET=1")
    found = ours("triton")
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--contender", choices=found, nargs="+", default=[name for name in found if name != "sdpa"])
    chosen = parser.parse_args().contender
    torch.manual_seed(0)
    torch.set_num_threads(1)
    pretend()
    print(f"torch {torch.__version__}, triton {triton.__version__}, {platform.processor() or platform.machine()}")
    print(f"{'':52}{'us':>8} {'launches':>8} {'empty':>8} {'other':>8}")
    inputs = draw(SHAPE, 1, TOKENS, "cpu")
    runs = {f"{name}: {kind}": run for name in chosen for kind, run in calls(found[name].make(inputs), inputs).items()}
    for kind in MIXERS:
        if (name := f"lizardzoo {kind} mixer") in chosen:
            runs |= {f"{name}: {what}": run for what, run in mixer_calls(kind).items()}
    for name, run in runs.items():
        print(f"{name:52}{median(run):8.1f} {counts(run)}", flush=True)
    lengths = iter(range(TOKENS + 1, TOKENS + 100))
    hybrid = found["lizardzoo hybrid"]

    def another_length() -> None:
        i = draw(SHAPE, 1, next(lengths), "cpu")
        start = time.perf_counter()
        calls(hybrid.make(i), i)["forward + backward"]()
        times.append(time.perf_counter() - start)

    times: list[float] = []
    for _ in range(20):
        another_length()
    print(f"{'lizardzoo hybrid: a length not seen before':52}{1e6 * statistics.median(times):8.1f}")


if __name__ == "__main__":
    main()
