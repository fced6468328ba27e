"""Which implementation of an op runs, and the checks that every entry shares."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from lizardzoo.errors import LizardzooError


class Impl(str, Enum):
    """Implementation of a kernel: a run-time choice, never saved."""

    AUTO = "auto"
    TRITON = "triton"
    REFERENCE = "reference"


def resolve(op: str, impl: Impl | str, available: tuple[Impl, ...], device: torch.device) -> Impl:
    """AUTO looks at the device only: the op's Triton kernel on CUDA where it has one, the reference elsewhere."""
    try:
        impl = Impl(impl)
    except ValueError:
        names = ", ".join(repr(choice.value) for choice in Impl)
        raise LizardzooError(f"{op}: unknown impl {impl!r}; choose one of {names}") from None
    if impl is Impl.AUTO:
        return Impl.TRITON if device.type == "cuda" and Impl.TRITON in available else Impl.REFERENCE
    if impl not in available:
        raise LizardzooError(f"{op}: there is no {impl.value} implementation; pass impl='reference'")
    if impl is Impl.TRITON and device.type != "cuda":
        raise LizardzooError(f"{op}: triton needs CUDA tensors, got {device.type}; pass impl='reference'")
    return impl


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
