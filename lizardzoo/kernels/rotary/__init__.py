"""Rotary position embedding, in the rotate-half convention of Llama, Mistral and Qwen (RoFormer, arXiv:2104.09864).

With the two halves x1, x2 of a head: y1 = x1 cos1 - x2 sin1, y2 = x2 cos2 + x1 sin2.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lizardzoo.errors import LizardzooError
from lizardzoo.kernels.dispatch import Impl, implementation
from lizardzoo.kernels.rotary import reference

__all__ = ["rotate"]

OP = "rotate"


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, impl: Impl | str = Impl.AUTO) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys to their positions (RoFormer, arXiv:2104.09864, in the rotate-half convention).

    Args:
        q, k: [B, T, H, D], [B, T, Hkv, D], D even.
        cos, sin: [B or 1, T, D], of any floating-point dtype; no gradient flows to them.
        impl: which implementation computes; see `lizardzoo.kernels`.

    Returns:
        q and k rotated, in their own dtype. Triton computes in fp32 and rounds once; the reference computes in the
        dtypes given, as transformers does, so that it equals a teacher bit for bit.

    Raises:
        LizardzooError: shapes or dtypes that do not fit.
    """
    check_rotary(OP, q, k, cos, sin)
    return implementation(OP, impl, q.device, reference, _triton).rotate(q, k, cos.detach(), sin.detach())


def _triton() -> Any:
    from lizardzoo.kernels.rotary import ops

    return ops


def check_rotary(op: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """q [B, T, H, D], k [B, T, Hkv, D] with an even D, cos and sin [B or 1, T, D]."""
    if q.ndim != 4 or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or q.shape[3] % 2:
        raise LizardzooError(
            f"{op}: shapes q {list(q.shape)}, k {list(k.shape)} do not fit; expected q [B, T, H, D] and "
            f"k [B, T, Hkv, D] with an even D"
        )
    batch, count, _, dim = q.shape
    for name, table in (("cos", cos), ("sin", sin)):
        if table.ndim != 3 or table.shape[0] not in (1, batch) or table.shape[1:] != (count, dim):
            raise LizardzooError(f"{op}: {name} is [1 or {batch}, {count}, {dim}], got {list(table.shape)}")
    if q.dtype != k.dtype or not all(x.dtype.is_floating_point for x in (q, cos, sin)):
        raise LizardzooError(
            f"{op}: q, k, cos, sin have dtypes {q.dtype}, {k.dtype}, {cos.dtype}, {sin.dtype}; expected "
            f"floating-point numbers, and one dtype for q and k"
        )
