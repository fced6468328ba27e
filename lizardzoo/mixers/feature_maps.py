"""The weights of a Hedgehog map (Lizard, section 3.1; LoLCATs): per layer or per head, started at the identity."""

from __future__ import annotations

import torch
from torch import nn

from lizardzoo.kernels import FeatureMap
from lizardzoo.kernels.features import Activation
from lizardzoo.mixers.base import start_value


class HedgehogMap(nn.Module):
    """phi_q and phi_k: query [Hq, D, F], key [Hk, D, F] with one head where the layer shares one map; fp32."""

    def __init__(
        self, query_heads: int, key_heads: int, head_dim: int, feature_dim: int, activation: Activation
    ) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.query = nn.Parameter(torch.empty(query_heads, head_dim, feature_dim, dtype=torch.float32))
        self.key = nn.Parameter(torch.empty(key_heads, head_dim, feature_dim, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The identity; features beyond head_dim start as fixed rotations of it, else they would all stay alike."""
        head_dim, feature_dim = self.query.shape[1:]
        blocks = [torch.eye(head_dim, dtype=torch.float32)]
        generator = torch.Generator().manual_seed(0)
        while head_dim * len(blocks) < feature_dim:
            turned = torch.randn(head_dim, head_dim, generator=generator, dtype=torch.float32)
            blocks.append(torch.linalg.qr(turned).Q)
        start = torch.cat(blocks, 1)[:, :feature_dim]
        start_value(self.query, start)
        start_value(self.key, start)

    def forward(self) -> FeatureMap:
        """The map as the kernels take it."""
        return FeatureMap(self.query, self.key, self.activation)
