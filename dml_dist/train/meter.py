"""Values of the steps between two records, kept without waiting for the device."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dml_dist.parallel.comm import Comm


@dataclass(frozen=True)
class Reading:
    """Values of the steps since the last reading.

    Attributes:
        values: Means over steps by name, images_per_second and data_share.
        first_bad: Which step since the last reading was the first with a loss that is not finite,
            from 0; None when all are finite.
        bad_values: The values of that step, by name; empty when all are finite.
    """

    values: dict[str, float]
    first_bad: int | None
    bad_values: dict[str, float]


@dataclass
class Meter:
    """Losses, images and seconds since the last record.

    Losses stay tensors on the device; `read` is the one place that waits for them.

    Attributes:
        values: Name -> 0-d tensors, one a step; `loss` is among them.
        num_images: Images of all ranks.
        data_seconds: Time for which this rank waited for batches.
    """

    values: dict[str, list[Tensor]] = field(default_factory=dict)
    num_images: int = 0
    data_seconds: float = 0.0
    _start: float = field(default_factory=time.perf_counter)

    def add(self, values: dict[str, Tensor], num_images: int, data_seconds: float) -> None:
        """Add one step."""
        for name, value in values.items():
            self.values.setdefault(name, []).append(value.detach())
        self.num_images += num_images
        self.data_seconds += data_seconds

    @property
    def num_steps(self) -> int:
        """Number of steps since the last reading."""
        return len(self.values.get("loss", ()))

    def read(self) -> Reading:
        """Return the values since the last reading and reset; waits for the device."""
        steps = torch.stack([torch.stack(column).double() for column in self.values.values()])
        steps = steps.cpu()  # HOST SYNC: the only one of a run.
        record = dict(zip(self.values, steps.mean(dim=1).tolist(), strict=True))
        bad = (~steps[list(self.values).index("loss")].isfinite()).nonzero()
        seconds = max(time.perf_counter() - self._start, 1e-9)
        record["images_per_second"] = self.num_images / seconds
        record["data_share"] = min(1.0, self.data_seconds / seconds)
        first_bad = int(bad[0]) if len(bad) else None
        column = [] if first_bad is None else steps[:, first_bad].tolist()
        bad_values = dict(zip(self.values, column, strict=False))
        self.restart()
        return Reading(record, first_bad, bad_values)

    def restart(self) -> None:
        """Clear all values and restart the clock: after a validation or a checkpoint."""
        self.values.clear()
        self.num_images = 0
        self.data_seconds = 0.0
        self._start = time.perf_counter()


# ---------------- the worst sample


@dataclass
class EmbeddingNorms:
    """Norms of this rank's embeddings in the steps since the last record.

    Attributes:
        steps: For each step its index rows, (b,) int64, and norms, (b,).
    """

    steps: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, rows: Tensor, norms: Tensor) -> None:
        """Add one step."""
        self.steps.append((rows, norms))

    def worst(self, place: int, comm: Comm) -> tuple[int, float]:
        """Return the index row and the norm of the worst sample; every rank calls this.

        Args:
            place: Which step, from 0.
            comm: The ranks.

        Returns:
            The first row whose norm is not finite, in the order of ranks and batch, else the row
            of the largest norm.
        """
        rows, norms = self.steps[place]
        own = list(zip(rows.tolist(), norms.double().tolist(), strict=True))
        of_all = [pair for part in comm.gather_objects(own, what="norms") for pair in part]
        bad = [pair for pair in of_all if not math.isfinite(pair[1])]
        row, norm = bad[0] if bad else max(of_all, key=lambda pair: pair[1])
        return row, norm
