"""Verify, then time: one layer's attention, ours beside PyTorch's, forward, forward + backward and peak memory.

    python benchmarks/bench_attention.py [--shape 1b] [--out FOLDER]

On a CUDA device (it refuses to time anything else). Each contender is first checked against float64 on a small input; a
red check is printed and that contender is not timed. Figures are medians of device-event timings over fresh random bf16
inputs, in one run, so that ratios count. Contenders: causal softmax (sdpa), a compiled windowed flex_attention, and
lizardzoo's window, gated linear branch and recommended hybrid (projections and RoPE tables excluded for all).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lizardzoo.kernels import FeatureMap, gated_linear_attention, window_attention
from lizardzoo.mixers import AttentionShape, Hybrid, MixerInputs

WINDOW, KEEP = 128, 4
SHAPES = {"1b": (32, 8, 64), "8b": (32, 8, 128), "smollm2": (9, 3, 64)}
"""Query heads, key heads, head_dim."""
LENGTHS = ((8, 2048), (1, 8192), (1, 32768))
"""Batch and tokens."""
console = Console()


class Inputs(NamedTuple):
    """bf16 q, k, v [B, T, heads, D] (rotated, for all), the layer's input x, and the gates' values."""

    q: Tensor
    k: Tensor
    v: Tensor
    x: Tensor
    log_decay: Tensor
    log_input: Tensor


def draw(shape: tuple[int, int, int], batch: int, length: int, dtype: torch.dtype, device: str) -> Inputs:
    """Fresh random inputs."""
    heads, kv_heads, dim = shape

    def randn(*size: int) -> Tensor:
        return torch.randn(batch, length, *size, device=device, dtype=dtype)

    q, k, v = (randn(count, dim).requires_grad_() for count in (heads, kv_heads, kv_heads))
    log_decay = F.logsigmoid(randn(kv_heads).float() + 5).requires_grad_()
    return Inputs(q, k, v, randn(heads * dim).requires_grad_(), log_decay, randn(kv_heads).float().requires_grad_())


def contenders(shape: tuple[int, int, int], device: str, dtype: torch.dtype) -> dict[str, Callable[[Inputs], Tensor]]:
    """Name -> a function of the inputs that gives [B, T, H, D]."""
    heads, kv_heads, dim = shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    eye = torch.eye(dim, device=device, dtype=wide)
    maps = FeatureMap(
        eye.expand(heads, -1, -1).clone().requires_grad_(),
        eye.expand(kv_heads, -1, -1).clone().requires_grad_(),
        "softmax",
    )
    hybrid = Hybrid(window=WINDOW, keep=KEEP).build(AttentionShape(heads * dim, heads, kv_heads, dim, dim**-0.5))
    hybrid = hybrid.to(device=device, dtype=wide)

    def sdpa(i: Inputs) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in i[:3])
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    def mixer(i: Inputs) -> Tensor:
        zero = torch.zeros(1, i.q.shape[1], dim, device=device, dtype=dtype)
        return hybrid(MixerInputs(i.q, i.k, i.v, i.x, zero + 1, zero))[0]

    found: dict[str, Callable[[Inputs], Tensor]] = {
        "sdpa (causal softmax)": sdpa,
        "lizardzoo window": lambda i: window_attention(*i[:3], window=WINDOW, keep=KEEP, return_state=False)[0],
        "lizardzoo window (triton)": lambda i: window_attention(
            *i[:3], window=WINDOW, keep=KEEP, return_state=False, impl="triton" if device == "cuda" else "reference"
        )[0],
        "lizardzoo gated linear": lambda i: gated_linear_attention(
            *i[:3], i.log_decay, log_input=i.log_input, feature_map=maps, lag=WINDOW, skip=KEEP, return_state=False
        )[0],
        "lizardzoo hybrid": mixer,
    }
    if device == "cuda":
        found["flex window (compiled)"] = _flex()
    return found


def _flex() -> Callable[[Inputs], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    masks: dict[int, Any] = {}

    def run(i: Inputs) -> Tensor:
        length = i.q.shape[1]
        if length not in masks:
            masks[length] = create_block_mask(
                lambda b, h, q, k: (q >= k) & (q - k < WINDOW), None, None, length, length, device="cuda"
            )
        q, k, v = (x.transpose(1, 2) for x in i[:3])
        return compiled(q, k, v, block_mask=masks[length], enable_gqa=True).transpose(1, 2)

    return run


def verified(name: str, shape: tuple[int, int, int]) -> float:
    """Relative error of the bf16 result on the device against the same function in float64 on the CPU."""
    torch.manual_seed(0)
    reference = "lizardzoo window" if name.startswith("flex") else name
    exact = contenders(shape, "cpu", torch.float64)[reference]
    inputs = draw(shape, 1, 300, torch.bfloat16, "cpu")
    wide = Inputs(*(x.double() for x in inputs))
    if name.startswith("flex"):
        expected = window_attention(*wide[:3], window=WINDOW)[0]
    else:
        expected = exact(wide)
    given = Inputs(*(x.detach().cuda().requires_grad_() for x in inputs))
    actual = contenders(shape, "cuda", torch.bfloat16)[name](given)
    return ((actual.double().cpu() - expected).norm() / expected.norm()).item()


def timed(run: Callable[[], Any], repeats: int = 10) -> float:
    """Median milliseconds."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def measure(run: Callable[[Inputs], Tensor], inputs: Inputs) -> dict[str, float]:
    """Forward without gradients, forward + backward, and the extra memory of the latter in MiB."""
    with torch.no_grad():
        forward = timed(lambda: run(inputs))
    gradient = torch.randn_like(inputs.q)

    def both() -> None:
        run(inputs).backward(gradient)

    step = timed(both)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return {"forward ms": forward, "forward + backward ms": step, "peak MiB": peak}


def main() -> None:
    """Verify, time, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_attention times kernels on a CUDA device, and torch finds none here")
    results: list[dict[str, Any]] = []
    for shape_name in arguments.shape or SHAPES:
        shape = SHAPES[shape_name]
        names = [n for n in contenders(shape, "cuda", torch.bfloat16) if _is_right(n, shape)]
        for batch, length in LENGTHS:
            table = Table("contender", "forward ms", "forward + backward ms", "peak MiB")
            for name in names:
                inputs = draw(shape, batch, length, torch.bfloat16, "cuda")
                try:
                    figures = measure(contenders(shape, "cuda", torch.bfloat16)[name], inputs)
                except torch.OutOfMemoryError:
                    table.add_row(name, "out of memory")
                    continue
                results.append({"shape": shape_name, "batch": batch, "length": length, "contender": name, **figures})
                table.add_row(name, *(f"{value:.3g}" for value in figures.values()))
            table.title = (
                f"{shape_name}: {shape[0]} heads, {shape[1]} kv heads, head_dim {shape[2]}; B{batch} T{length}"
            )
            console.print(table)
    arguments.out.mkdir(parents=True, exist_ok=True)
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    (arguments.out / "attention.json").write_text(json.dumps({**machine, "results": results}, indent=2) + "\n")
    console.print(f"{machine['device']}, torch {machine['torch']}; written: {arguments.out / 'attention.json'}")


def _is_right(name: str, shape: tuple[int, int, int]) -> bool:
    error = verified(name, shape)
    right = error < 2e-2  # bf16 outputs: between 1e-3 and 1e-2
    console.print(f"{name}: relative error {error:.1e} against float64 {'' if right else '-> NOT TIMED'}")
    return right


if __name__ == "__main__":
    main()
