"""What the kernels' tests share: comparing outputs and gradients with an oracle's, and scripts that compile."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

TRITON = importlib.util.find_spec("triton") is not None  # before a test puts another in its place


def error(actual: Tensor, expected: Tensor, scale: float = 0.0) -> float:
    """Relative error; entries of -inf must agree. `scale` is a floor for the norm it is relative to."""
    infinite = torch.isinf(expected)
    assert torch.equal(torch.isinf(actual), infinite), "one is -inf where the other is not"
    difference = (actual - expected).masked_fill(infinite, 0.0)
    norm = max(expected.masked_fill(infinite, 0.0).norm().item(), scale, 1e-300)
    return difference.norm().item() / norm


def gradients(y: Tensor, log_mass: Tensor, inputs: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Gradients of a random function of both outputs; -inf entries of log_mass take no part."""
    generator = torch.Generator().manual_seed(seed)
    loss = (y * torch.randn(y.shape, generator=generator).to(y)).sum()
    finite = torch.isfinite(log_mass)
    loss = loss + (log_mass.masked_fill(~finite, 0.0) * torch.randn(log_mass.shape, generator=generator).to(y)).sum()
    if not loss.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    found = torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


def assert_same(
    actual: tuple[Tensor, Tensor],
    expected: tuple[Tensor, Tensor],
    inputs: Sequence[Tensor],
    tolerance: float,
    seed: int = 0,
) -> None:
    """Outputs and all gradients agree; a gradient's error is relative to the largest (saturated ones cancel to 0)."""
    for a, b in zip(actual, expected, strict=True):
        assert error(a, b) <= tolerance
    ours, theirs = gradients(*actual, inputs, seed), gradients(*expected, inputs, seed)
    scale = max(g.norm().item() for g in theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.isfinite(a).all()
        assert error(a, b, scale) <= tolerance


def assert_same_tokens(actual: Any, expected: Any) -> None:
    """Two states hold the same tokens, bit for bit; a slot that holds none may hold anything."""
    assert torch.equal(actual.length, expected.length)
    for name in {"k", "v", "kept_k", "kept_v", "log_decay", "log_input"} & set(expected._fields):
        a, b = getattr(actual, name), getattr(expected, name)
        there = torch.arange(b.shape[1], device=b.device) < expected.length[:, None]
        empty = ~there.view(there.shape + (1,) * (b.ndim - 2))
        assert torch.equal(a.masked_fill(empty, 0.0), b.masked_fill(empty, 0.0)), name


def saved_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for the backward of `run`."""
    storages: dict[int, int] = {}
    held = []

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        held.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run()
    return sum(storages.values())


def poison(patch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel forgets to write shows as NaN."""
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(x: Tensor) -> Tensor:
        if x.dtype == torch.uint8:  # bytes that hold numbers: all bits are a NaN of any dtype
            return x.fill_(255)
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(1)

    patch.setattr(torch, "empty", lambda *a, **k: poisoned(empty(*a, **k)))
    patch.setattr(torch, "empty_like", lambda *a, **k: poisoned(empty_like(*a, **k)))


def run_compiling(code: str) -> None:
    """Run a script in a process of its own where Triton compiles and does not interpret; it finds the benchmarks."""
    if not TRITON:
        pytest.skip("triton is not installed")
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "benchmarks"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
