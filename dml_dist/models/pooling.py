"""Pooling layers from feature maps (B, F, H, W) to vectors (B, F)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Keeps x ** p and its gradient finite where a feature is 0 (after ReLU, most are).
_GEM_FLOOR = 1e-6
_GEM_POWERS = (1.0, 64.0)


class AvgPool(nn.Module):
    """Mean over positions."""

    def forward(self, features: Tensor) -> Tensor:
        return features.mean(dim=(2, 3))


class MaxPool(nn.Module):
    """Maximum over positions."""

    def forward(self, features: Tensor) -> Tensor:
        return F.adaptive_max_pool2d(features, 1).flatten(1)


class AvgMaxPool(nn.Module):
    """Mean plus maximum over positions."""

    def forward(self, features: Tensor) -> Tensor:
        return features.mean(dim=(2, 3)) + F.adaptive_max_pool2d(features, 1).flatten(1)


class GeMPool(nn.Module):
    """Generalised mean with a learned power p: mean(max(x, 1e-6) ** p) ** (1 / p).

    Radenovic et al., "Fine-tuning CNN Image Retrieval with No Human Annotation" (2018), with one
    power for all channels. p is used clamped to [1, 64]: below 1 the mean is dominated by the
    floor, far above 64 float32 overflows.
    """

    def __init__(self, power: float) -> None:
        super().__init__()
        self.power = nn.Parameter(torch.tensor(float(power)))

    def forward(self, features: Tensor) -> Tensor:
        power = self.power.clamp(*_GEM_POWERS)
        features = features.clamp(min=_GEM_FLOOR)
        # Relative to the largest feature, so that powers cannot overflow.
        largest = features.amax(dim=(2, 3), keepdim=True).detach()
        mean = (features / largest).pow(power).mean(dim=(2, 3))
        return largest.flatten(1) * mean.pow(1.0 / power)


def build_pooling(name: Literal["avg", "max", "avg+max", "gem"], gem_power: float) -> nn.Module:
    """Return a pooling module by name."""
    match name:
        case "avg":
            return AvgPool()
        case "max":
            return MaxPool()
        case "avg+max":
            return AvgMaxPool()
        case "gem":
            return GeMPool(gem_power)
