"""Which implementation of an op runs, and the checks that every entry shares."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from lizardzoo.errors import LizardzooError


class Impl(str, Enum):
    """Implementation of a kernel: a run-time choice, never saved. The strings are taken for them everywhere.

    Attributes:
        AUTO: Triton on CUDA, the reference elsewhere. By the kind of device only: what Triton does not take, a device
            of a compute capability below 8.0 too, raises.
        TRITON: on CUDA; under TRITON_INTERPRET=1 also on a CPU.
        REFERENCE: plain PyTorch, on any device.
    """

    AUTO = "auto"
    TRITON = "triton"
    REFERENCE = "reference"


TRITON_SIZES = {
    "window_attention": (256, False),
    "gated_linear_attention": (256, True),
    "hybrid_attention": (256, True),
    "token_gates": (128, False),
    "heavy_attention": (256, False),
    "window_and_heavy_attention": (256, False),
}
"""Largest head_dim and feature_dim (or heads of a gate) of an op's Triton kernels, and whether they are `even_sizes`;
others take any."""


def even_sizes(sizes: Sequence[int]) -> bool:
    """Powers of two and multiples of 16."""
    return all(size % 16 == 0 or size & (size - 1) == 0 for size in sizes)


def auto_on_cuda(op: str, sizes: Sequence[int]) -> str:
    """What AUTO comes to on a CUDA device for an op with these head and feature dims (or heads of a gate), in words."""
    largest, even = TRITON_SIZES.get(op, (max(sizes), False))
    if max(sizes) <= largest and (not even or even_sizes(sizes)):
        return "triton"
    kind = "powers of two and multiples of 16" if even else "sizes"
    return f"refused: triton takes {kind} up to {largest}, not {', '.join(map(str, sizes))}; mixer.impl = 'reference'"


def implementation(op: str, impl: Impl | str, device: torch.device, reference: Any, triton: Callable[[], Any]) -> Any:
    """The module that computes: `reference`, or what `triton` imports.

    AUTO looks at the device only: Triton on CUDA, the reference elsewhere. Triton's interpreter (TRITON_INTERPRET=1)
    takes CPU tensors where it is asked for.
    """
    try:
        impl = Impl(impl)
    except ValueError:
        names = ", ".join(repr(choice.value) for choice in Impl)
        raise LizardzooError(f"{op}: unknown impl {impl!r}; choose one of {names}") from None
    if impl is Impl.REFERENCE or (impl is Impl.AUTO and device.type != "cuda"):
        return reference
    if device.type != "cuda" and not (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        raise LizardzooError(f"{op}: triton needs CUDA tensors, got {device.type}; pass impl='reference'")
    try:
        return triton()
    except ImportError as error:
        raise LizardzooError(f"{op}: triton is not installed; pip install triton, or pass impl='reference'") from error


def check_qkv(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """q [B, T, H, Dk], k [B, T, Hkv, Dk], v [B, T, Hkv, Dv] with H % Hkv == 0, floating point, T >= 1."""
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise LizardzooError(f"{op}: q, k, v are [B, T, H, D], got {[list(x.shape) for x in (q, k, v)]}")
    fits = k.shape[:3] == v.shape[:3] and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]
    if not fits or q.shape[2] % k.shape[2] or q.shape[1] == 0:
        raise LizardzooError(
            f"{op}: shapes q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} do not fit; expected "
            f"q [B, T, H, D], k and v [B, T, Hkv, D] with T >= 1 and H a multiple of Hkv"
        )
    if not (q.dtype == k.dtype == v.dtype and q.dtype.is_floating_point):
        raise LizardzooError(
            f"{op}: q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; cast them to one floating-point dtype"
        )


def check_token_flags(op: str, q: Tensor, **flags: Tensor | None) -> None:
    """mask, starts: [B, T] bool."""
    for name, flag in flags.items():
        if flag is not None and (flag.dtype != torch.bool or flag.shape != q.shape[:2]):
            raise LizardzooError(
                f"{op}: {name} is a bool tensor of shape {list(q.shape[:2])}, got {flag.dtype} {list(flag.shape)}"
            )


def compute_dtype(x: Tensor) -> torch.dtype:
    """fp32, or float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
