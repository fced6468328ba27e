"""A difference: what of a linearized model is not its base's, in one small file beside a config that names the base.

`difference.safetensors` holds every tensor that the base does not have (the mixers') or has otherwise. Projections that
`lizardzoo.distill` merged LoRA into are held as its factors (`low_rank.py`), where these give back the matrix bit for
bit; all else is held as it is.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lizardzoo.errors import LizardzooError
from lizardzoo.hub.low_rank import LowRank

DIFFERENCE = "difference"
"""The key in config.json, and the stem of the file."""
REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
LICENSE = re.compile(r"[\w.+-]+")


def on_hub(name: Any) -> bool:
    """Whether a name is a model's id on the Hub, and no folder of this machine."""
    return isinstance(name, str) and bool(REPO_ID.fullmatch(name)) and ".." not in name and not Path(name).exists()


@dataclass(frozen=True)
class Base:
    """The model that a difference is to; the hash is what has to be right, all else says where to find it.

    Attributes:
        name: a Hub id.
        revision: of it.
        sha256: of all its weights (`weights_hash`).
        built_from: where they are not the repository's but were made from it: what they are built from, as
            `lizardzoo.smollm2.BUILT_FROM`.
        license: of the base, as the Hub knows it.
    """

    name: str
    revision: str | None
    sha256: str
    built_from: str | None = None
    license: str | None = None

    def __str__(self) -> str:
        at = f"revision {self.revision or 'main'}" if self.built_from is None else f"built from {self.built_from}"
        return f"{self.name} ({at})"

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        known = {"base": self.name, "revision": self.revision, "sha256": self.sha256}
        more = {"built_from": self.built_from, "license": self.license}
        return known | {key: value for key, value in more.items() if value is not None}


FORMS = {
    "base": REPO_ID,
    "revision": re.compile(r"[\w./-]+"),
    "sha256": re.compile(r"[0-9a-f]{64}"),
    "built_from": re.compile(r"[\w.+-]+==[\w.+-]+/[\w.+-]+"),
    "license": LICENSE,
}
NEEDED = ("base", "sha256")


def difference_of(config: Any) -> Base | None:
    """The base that a config (or its dict) names; None for a whole model."""
    found = config.get(DIFFERENCE) if isinstance(config, Mapping) else getattr(config, DIFFERENCE, None)
    if found is None:
        return None
    given: dict[str, Any] = {key: found.get(key) for key in FORMS} if isinstance(found, Mapping) else {}
    fits = [
        key not in NEEDED if value is None else isinstance(value, str) and FORMS[key].fullmatch(value)
        for key, value in given.items()
    ]
    if not given or not all(fits) or ".." in given["base"]:
        raise LizardzooError(
            f"config.json: difference={found!r} is not a base: a Hub id, a revision or null, and the sha256 of its "
            f"weights; save it again with save_difference"
        )
    return Base(given["base"], given["revision"], given["sha256"], given["built_from"], given["license"])


@torch.no_grad()
def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of all names, dtypes, shapes and bytes, in the order of the names: not of how they lie in files."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def changed(
    model: Mapping[str, Tensor], base: Mapping[str, Tensor], updates: Mapping[str, LowRank]
) -> tuple[dict[str, Tensor], dict[str, LowRank]]:
    """What of `model` is not bit for bit `base` cast to its dtype.

    Whole, as contiguous copies that share nothing; and those of the `updates` that are smaller and give it bit for bit.
    """
    whole, low_rank = {}, {}
    for name, tensor in model.items():
        other, update = base.get(name), updates.get(name)
        if other is None or other.shape != tensor.shape:
            other = update = None
        if other is not None and _same(other, tensor):
            continue
        if (
            other is not None
            and update is not None
            and update.shape == other.shape
            and update.is_smaller
            and _same(update.merged(other), tensor)
        ):
            low_rank[name] = update
        else:
            whole[name] = tensor.detach().cpu().clone()
    return whole, low_rank


def _same(base: Tensor, tensor: Tensor) -> bool:
    cast = base.to(tensor)
    return torch.equal(cast.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))


def join(
    base: Mapping[str, Tensor], whole: Mapping[str, Tensor], updates: Mapping[str, LowRank], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The model's tensors: the base's, cast as the model's are, and what differs.

    Raises:
        LizardzooError: an update of what the base does not have, or has in another shape.
    """
    joined = {name: tensor.detach().to(dtype) for name, tensor in base.items() if name not in whole}
    for name, update in updates.items():
        if name not in base or tuple(base[name].shape) != update.shape:
            raise LizardzooError(
                f"the difference has a low-rank update of {name} {list(update.shape)}, but its base has "
                f"{f'it as {list(base[name].shape)}' if name in base else 'no such parameter'}; save it again"
            )
        joined[name] = update.merged(base[name]).to(dtype)
    return {**joined, **whole}
