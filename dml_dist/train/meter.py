"""What happens between two records, kept without waiting for the device."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Meter:
    """Losses, images and seconds since the last record.

    Losses stay tensors on the device; `read` is the one place that waits for them.

    Attributes:
        values: Name -> 0-d tensors, one a step.
        num_images: Images of all ranks.
        data_seconds: Time in which this rank waited for its next batch.
    """

    values: dict[str, list[Tensor]] = field(default_factory=dict)
    num_images: int = 0
    data_seconds: float = 0.0
    _start: float = field(default_factory=time.perf_counter)

    def add(self, values: dict[str, Tensor], num_images: int, data_seconds: float) -> None:
        """Note one step."""
        for name, value in values.items():
            self.values.setdefault(name, []).append(value.detach())
        self.num_images += num_images
        self.data_seconds += data_seconds

    def read(self) -> dict[str, float]:
        """Return the means since the last reading, images per second and the share of waiting.

        Waits for the device, and starts anew.
        """
        names = list(self.values)
        means = torch.stack([torch.stack(self.values[name]).double().mean() for name in names])
        record = dict(zip(names, means.tolist(), strict=True))  # HOST SYNC: the only one of a run
        seconds = max(time.perf_counter() - self._start, 1e-9)
        record["images_per_second"] = self.num_images / seconds
        record["data_share"] = min(1.0, self.data_seconds / seconds)
        self.restart()
        return record

    def restart(self) -> None:
        """Forget what was noted, and start the clock: after a validation or a checkpoint."""
        self.values.clear()
        self.num_images = 0
        self.data_seconds = 0.0
        self._start = time.perf_counter()
