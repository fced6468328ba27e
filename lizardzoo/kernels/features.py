"""The Hedgehog feature map, as logarithms.

Lizard (arXiv:2507.09025, section 3.1) and LoLCATs (arXiv:2410.10254) map x to [f(xW), f(-xW)]; f is a softmax over the
features of each half (the paper's table 13) or exp (its section 4). Features are positive and travel as logarithms:
exp features span e^+-80 and more, which no product of fp32 numbers survives.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Activation = Literal["softmax", "exp"]


class FeatureMap(NamedTuple):
    """Weights of phi(x) = [f(xW), f(-xW)], the Hedgehog map (Lizard, arXiv:2507.09025, section 3.1): 2F features.

    Attributes:
        query: W for queries, [1 or H, D, F], fp32.
        key: W for keys, [1 or Hkv, D, F], fp32.
        activation: f: "softmax" over the features of each half (the paper's table 13), or "exp" (its section 4).
    """

    query: Tensor
    key: Tensor
    activation: Activation


def logits(x: Tensor, weight: Tensor) -> Tensor:
    """x W: [B, T, H, D] x [1 or H, D, F] -> [B, T, H, F]."""
    return torch.einsum("bthd,hdf->bthf", x, weight.expand(x.shape[2], -1, -1))


def log_features(x: Tensor, weight: Tensor, activation: Activation) -> Tensor:
    """log phi(x): [B, T, H, D] x [1 or H, D, F] -> [B, T, H, 2F], in weight's dtype."""
    z = logits(x.to(weight.dtype), weight)
    if activation == "softmax":
        return torch.cat([z.log_softmax(-1), (-z).log_softmax(-1)], -1)
    return torch.cat([z, -z], -1)
