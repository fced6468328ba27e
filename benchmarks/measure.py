"""Verify against float64, then time: what every figure of these benchmarks goes through."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from contenders import Contender, Function, Inputs
from torch import Tensor

TOLERANCE = 2e-2
"""Relative error that bf16 may have; where plain PyTorch in bf16 itself has more than half of it, twice that."""
REPEATS = 20


class Verdict(NamedTuple):
    """Relative errors against float64, of the output and by name of the gradients, and what red there is."""

    output: float
    gradients: dict[str, float]
    red: list[str]
    first_s: float
    """Seconds of the first forward and backward: compiling and autotuning."""


def relative_error(actual: Tensor, exact: Tensor, scale: float = 0.0) -> float:
    """NaN where a number is not finite; `scale` is a floor for the norm that it is relative to."""
    exact = exact.double()
    norm = max(exact.norm().item(), scale, 1e-300)
    return ((actual.double() - exact).norm() / norm).item()


def results(function: Function, inputs: Inputs, backward: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and the gradients of a fixed random function of it."""
    y = function.run(inputs)
    if not backward:
        return y.detach(), {}
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=generator).to(y)
    learns = function.learns(inputs)
    return y.detach(), dict(zip(learns, torch.autograd.grad(y, list(learns.values()), dy)))


def verify(contender: Contender, inputs: Inputs, backward: bool = True) -> Verdict:
    """Output and gradients in bf16 against the formula in float64 on the same numbers."""
    start = time.perf_counter()
    y, gradients = results(contender.make(inputs), inputs, backward)
    if y.is_cuda:
        torch.cuda.synchronize()
    first = time.perf_counter() - start
    wide = inputs.leaves(dtype=torch.float64)
    exact_y, exact = results(contender.formula(wide), wide, backward)
    plain_y, plain = results(contender.formula(inputs), inputs, backward)
    # A gradient may cancel to nearly nothing: it is then compared with the size of the others.
    scale = 1e-3 * max((gradient.norm().item() for gradient in exact.values()), default=0.0)
    errors = {name: relative_error(gradients[name], exact[name], scale) for name in gradients}
    allowed = {name: max(TOLERANCE, 2 * relative_error(plain[name], exact[name], scale)) for name in gradients}
    error = relative_error(y, exact_y)
    red = [] if error <= max(TOLERANCE, 2 * relative_error(plain_y, exact_y)) else ["output"]
    if not contender.note:
        red += [name for name in errors if not errors[name] <= allowed[name]]
    return Verdict(error, errors, red, first)


def timed(run: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Median milliseconds on the device (on the CPU where there is none), after a warm-up; short runs more often."""

    def clock() -> float:
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)

    def events(count: int) -> list[float]:
        if not torch.cuda.is_available():
            return [clock() for _ in range(count)]
        pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(count)]
        for start, end in pairs:
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    warm = events(3)[-1]
    return statistics.median(events(max(repeats, min(100, int(300 / max(warm, 1e-3))))))


def captured(run: Callable[[], Any], warm_up: int = 1) -> torch.cuda.CUDAGraph:
    """`run` as a CUDA graph; replayed, it shows the device alone, however slow the CPU launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def times(name: str, run: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds as PyTorch runs it, and of the device alone where it can be captured."""
    found = {f"{name} ms": timed(run)}
    if not torch.cuda.is_available():
        return found
    try:
        found[f"{name} graph ms"] = timed(captured(run).replay)
    except RuntimeError as error:
        print(f"{name}: no CUDA graph of it: {str(error).partition(chr(10))[0]}")
    return found


def measure(contender: Contender, inputs: Inputs, backward: bool = True) -> dict[str, float]:
    """Milliseconds of a forward without gradients and of forward + backward, and what the latter adds to memory.

    Each as PyTorch runs it, with the CPU's time to launch where that is longer, and replayed from a CUDA graph.
    """
    function = contender.make(inputs)
    learns = list(function.learns(inputs).values())
    start = time.perf_counter()
    with torch.no_grad():
        gradient = torch.randn_like(function.run(inputs))
        torch.cuda.synchronize()
        first = time.perf_counter() - start
        figures = times("forward", lambda: function.run(inputs))

    def both() -> None:
        torch.autograd.grad(function.run(inputs), learns, gradient)

    if backward:
        start = time.perf_counter()
        both()
        torch.cuda.synchronize()
        first += time.perf_counter() - start
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        both()
        torch.cuda.synchronize()
        figures["peak MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        figures |= times("forward + backward", both)
    return figures | {"first call s": first}


def attempt(run: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What it gives, or why it gives nothing: a contender that fails must not take the others' figures with it."""
    try:
        return run(*arguments)
    except torch.OutOfMemoryError:
        reason = "out of memory"
    except Exception as error:  # noqa: BLE001  compilers raise what they like
        reason = (str(error) or type(error).__name__).partition("\n")[0]
        if not isinstance(error, ImportError):
            traceback.print_exc()
    finally:
        torch.cuda.empty_cache()
    print(f"{arguments[0] if isinstance(arguments[0], str) else run.__name__}: {reason}")
    return {"right": False, "missing": reason}


def machine() -> dict[str, Any]:
    """What the figures belong to: device, versions, and the device's two measured ceilings."""
    packages = {"transformers": "transformers", "triton": "triton", "fla": "fla-core"}
    versions = {name: version for name, package in packages.items() if (version := _version(package))}
    if not torch.cuda.is_available():
        return {"device": platform.processor() or platform.machine(), "torch": torch.__version__, **versions}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "memory GiB": round(properties.total_memory / 2**30, 1),
        "torch": torch.__version__,
        **versions,
        "copy TB/s": round(_copy_rate() / 1e12, 2),
        "bf16 TFLOP/s": round(_product_rate() / 1e12),
    }


def _copy_rate() -> float:
    """Bytes read and written per second by a copy of 2 GiB."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed(lambda: target.copy_(source)) * 1e3


def _product_rate() -> float:
    """Operations per second of a matrix product in bf16."""
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return 2 * 8192**3 / timed(lambda: matrix @ matrix) * 1e3


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
