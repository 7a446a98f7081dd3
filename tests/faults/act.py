"""A transform that injects a fault, or requests a stop, at a chosen image."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from dml_dist.config.data import StandardTransformConfig
from dml_dist.data.transforms import StandardTransform

Action = Literal[
    "kill", "kill parent", "kill other", "stop", "sleep", "raise", "remove", "terminate", "none"
]


class Act(StandardTransform):
    """The standard transform, but one of the processes that call it does something once.

    Args:
        mark: File that is made before the deed; where it exists nothing happens, unless `again`.
        action: SIGKILL to this process, to its parent or to the process whose id is in the
            file `path`; SIGSTOP or SIGTERM to this process; sleep; raise an error; remove the file
            `path`.
        after: Number of images that the process transforms before.
        during: Whether training's or evaluation's images count.
        rank: The rank that acts; its loader workers act if there are any.
        seconds: How long to sleep.
        path: A file.
        again: Act in every attempt.
        pause: Seconds that every training image takes longer, unless `mark` exists from the start.
    """

    def __init__(
        self,
        mark: str = "",
        action: Action = "none",
        after: int = 0,
        during: Literal["train", "evaluation"] = "train",
        rank: int = 1,
        seconds: float = 0.0,
        path: str = "",
        again: bool = False,
        pause: float = 0.0,
    ) -> None:
        super().__init__(StandardTransformConfig(size=24, crop_scale=(0.7, 1.0), flip=0.0))
        self._mark = Path(mark)
        self._action = action
        self._left = after
        self._during = during
        self._rank = rank
        self._seconds = seconds
        self._path = Path(path)
        self._again = again
        self._pause = 0.0 if mark and Path(mark).exists() else pause

    def train(self, image: Tensor, generator: np.random.Generator) -> Tensor:
        """Return the transformed image, or act."""
        if self._during == "train":
            self._count()
        time.sleep(self._pause)
        return super().train(image, generator)

    def evaluation(self, image: Tensor) -> Tensor:
        """Return the image as it is measured, or act."""
        if self._during == "evaluation":
            self._count()
        return super().evaluation(image)

    def _count(self) -> None:
        self._left -= 1
        if self._action == "none" or self._left >= 0:
            return
        if int(os.environ.get("RANK", "0")) != self._rank:
            return
        try:
            self._mark.touch(exist_ok=self._again)
        except FileExistsError:  # Done before, or by another loader worker just now.
            return
        match self._action:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "kill parent":
                os.kill(os.getppid(), signal.SIGKILL)
            case "kill other":
                os.kill(int(self._path.read_text()), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "terminate":
                os.kill(os.getpid(), signal.SIGTERM)
            case "sleep":
                time.sleep(self._seconds)
            case "raise":
                raise ValueError("a fault of the transform")
            case "remove":
                self._path.unlink()
