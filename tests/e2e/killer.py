"""A transform that kills its own rank, once, in the middle of training."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
from torch import Tensor

from dml_dist.config.data import StandardTransformConfig
from dml_dist.data.transforms import StandardTransform


class KillOnce(StandardTransform):
    """The standard transform, but SIGKILL to this process after a number of training images.

    Args:
        mark: File that is made before the kill; where it exists nobody is killed.
        after: Number of training images of rank 1 before the kill.
    """

    def __init__(self, mark: str, after: int) -> None:
        super().__init__(StandardTransformConfig(size=24, crop_scale=(0.7, 1.0), flip=0.0))
        self._mark = Path(mark)
        self._left = after

    def train(self, image: Tensor, generator: np.random.Generator) -> Tensor:
        """Return the transformed image, or die."""
        self._left -= 1
        if self._left < 0 and os.environ.get("RANK") == "1" and not self._mark.exists():
            self._mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().train(image, generator)
