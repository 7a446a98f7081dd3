"""Inputs normalised by ImageNet's mean and std, rescaled to those that a network's weights need."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dml_dist.config.data import IMAGENET_MEAN, IMAGENET_STD

Channels = tuple[float, float, float]


class Rescale(nn.Module):
    """Rescale images from ImageNet's mean and std to another mean and std."""

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Channels, std: Channels) -> None:
        super().__init__()
        old_mean, old_std, new_mean, new_std = (
            torch.tensor(values, dtype=torch.float64).view(3, 1, 1)
            for values in (IMAGENET_MEAN, IMAGENET_STD, mean, std)
        )
        # Not in the state dict: they belong to the network, not to its weights.
        self.register_buffer("scale", (old_std / new_std).float(), persistent=False)
        self.register_buffer("shift", ((old_mean - new_mean) / new_std).float(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return torch.addcmul(self.shift, images, self.scale)
