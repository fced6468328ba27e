"""Low-rank updates: how LoRA changed a matrix, kept as its two factors, and the one arithmetic that merges them.

A merge is rounded, and a product of matrices is rounded otherwise on another machine. Here it is a sum in float64, rank
after rank, element by element: each of its steps is IEEE's, so the same factors give the same matrix everywhere, bit
for bit, and a few kilobytes can stand for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lizardzoo.errors import LizardzooError

LOW_RANK = "low_rank.safetensors"
"""Beside the weights of a model that was finetuned here: the factors, for a difference. `push` leaves it out."""
A, B = ".lora_A", ".lora_B"
FACTOR = re.compile(rf"(.+)({re.escape(A)}|{re.escape(B)})")
DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}
DTYPE = "merged_in"
"""The entry of a file's metadata that holds each matrix's dtype."""
BLOCK = 1 << 18
"""Numbers of a matrix that are merged at once: 2 MiB in float64, which stay in a CPU's cache."""


class LowRank(NamedTuple):
    """What is added to a matrix [out, in]: b @ a.

    a [rank, in], b [out, rank] (LoRA's scale is in it): fp32. dtype: of the matrix that it was merged into.
    """

    a: Tensor
    b: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def is_smaller(self) -> bool:
        """Whether the factors are fewer numbers than the matrix."""
        return self.a.numel() + self.b.numel() < self.shape[0] * self.shape[1]

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """`weight` [out, in] with the update, in `dtype`, on its device; the same on every device."""
        a, b = (factor.to(weight.device, torch.float64) for factor in (self.a, self.b))
        result = torch.empty_like(weight, dtype=self.dtype)
        rows = max(1, BLOCK // weight.shape[1])
        for start in range(0, len(weight), rows):
            part = slice(start, start + rows)
            total = weight[part].to(self.dtype).double()
            for rank in range(len(a)):
                total += b[part, rank, None] * a[rank]  # rounded after each: addcmul would round once, where it can
            result[part] = total.to(self.dtype)
        return result


def pack(updates: Mapping[str, LowRank]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and its metadata: the dtype of each matrix.

    That is one entry, in place of the usual "format": safetensors writes several in any order, and the same model shall
    give the same file.
    """
    tensors: dict[str, Tensor] = {}
    for name, update in updates.items():
        tensors |= {name + A: update.a.contiguous(), name + B: update.b.contiguous()}
    dtypes = {name: str(update.dtype).removeprefix("torch.") for name, update in updates.items()}
    return tensors, {DTYPE: json.dumps(dtypes, sort_keys=True)} if dtypes else {"format": "pt"}


def low_rank_shapes(shapes: Mapping[str, tuple[int, ...]], source: object) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's tensors, pairs of factors as the one matrix that they stand for.

    Raises:
        LizardzooError: a factor alone, or two that do not belong together.
    """
    found = {name: shape for name, shape in shapes.items() if not FACTOR.fullmatch(name)}
    for name in dict.fromkeys(match[1] for each in shapes if (match := FACTOR.fullmatch(each))):
        a, b = shapes.get(name + A, ()), shapes.get(name + B, ())
        if name in found or len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise LizardzooError(
                f"{source} does not hold {name} once, whole or as two factors [rank, in] and [out, rank], but factors "
                f"of the shapes {list(a)} and {list(b)}{' and the whole' if name in found else ''}; save it again"
            )
        found[name] = (b[0], a[1])
    return found


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, LowRank]]:
    """What a safetensors file holds: plain tensors, and low-rank updates.

    Raises:
        LizardzooError: the file is damaged, or factors do not belong together.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise LizardzooError(f"{path} is damaged or cut short ({error}); download or save it again") from error
    try:
        dtypes = dict(json.loads(metadata.get(DTYPE, "{}")))
    except (ValueError, TypeError, RecursionError) as error:
        raise LizardzooError(
            f"{path.name}: its metadata {DTYPE!r} is no JSON object ({error}); save it again"
        ) from error
    shapes = low_rank_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, path.name)
    updates = {}
    for name in shapes.keys() - tensors.keys():
        a, b, dtype = tensors.pop(name + A), tensors.pop(name + B), DTYPES.get(str(dtypes.get(name)))
        if dtype is None or {a.dtype, b.dtype} != {torch.float32}:
            raise LizardzooError(
                f"{path.name} has {name} as factors in {a.dtype} and {b.dtype}, merged in {dtypes.get(name)!r}; "
                f"float32, and one of {', '.join(DTYPES)}, was expected: save it again"
            )
        updates[name] = LowRank(a, b, dtype)
    return tensors, updates


def write_updates(folder: str | Path, updates: Mapping[str, LowRank]) -> None:
    """Put a model's updates beside its weights; an older model's go."""
    path = Path(folder) / LOW_RANK
    path.unlink(missing_ok=True)
    if updates:
        tensors, metadata = pack(updates)
        save_file(tensors, path, metadata=metadata)
