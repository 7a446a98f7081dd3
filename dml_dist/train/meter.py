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
        first_bad: Which step since the last reading was the first with a loss or gradients that are
            not finite on any rank, from 0; None when all are finite.
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
        finite_gradients: Whether this rank's gradients were finite, 0-d tensors, one a step.
        num_images: Images of all ranks.
        data_seconds: Time for which this rank waited for batches.
    """

    values: dict[str, list[Tensor]] = field(default_factory=dict)
    finite_gradients: list[Tensor] = field(default_factory=list)
    num_images: int = 0
    data_seconds: float = 0.0
    _start: float = field(default_factory=time.perf_counter)

    def add(
        self,
        values: dict[str, Tensor],
        finite_gradients: Tensor,
        num_images: int,
        data_seconds: float,
    ) -> None:
        """Add one step."""
        self.finite_gradients.append(finite_gradients)
        for name, value in values.items():
            self.values.setdefault(name, []).append(value.detach())
        self.num_images += num_images
        self.data_seconds += data_seconds

    @property
    def num_steps(self) -> int:
        """Number of steps since the last reading."""
        return len(self.values.get("loss", ()))

    def read(self, comm: Comm) -> Reading:
        """Return the values since the last reading and reset; every rank calls this.

        Waits for the device.
        """
        columns = [*self.values.values(), self.finite_gradients]
        every = torch.stack([torch.stack(column).double() for column in columns])
        every = every.cpu()  # HOST SYNC: the only one of a run.
        steps, finite = every[:-1], every[-1]
        record = dict(zip(self.values, steps.mean(dim=1).tolist(), strict=True))
        loss = steps[list(self.values).index("loss")]
        # Ranks own other rows of the proxies, whose gradients only they have.
        bad = comm.all_reduce_max(1 - (loss.isfinite() & (finite > 0)).long(), what="finite steps")
        seconds = max(time.perf_counter() - self._start, 1e-9)
        record["images_per_second"] = self.num_images / seconds
        record["data_share"] = min(1.0, self.data_seconds / seconds)
        first_bad = int(bad.nonzero()[0]) if bad.any() else None
        column = [] if first_bad is None else steps[:, first_bad].tolist()
        bad_values = dict(zip(self.values, column, strict=False))
        self.restart()
        return Reading(record, first_bad, bad_values)

    def leave_out(self, seconds: float) -> None:
        """Leave a time out of the speed: the start of a problem."""
        self._start += seconds

    def restart(self) -> None:
        """Clear all values and restart the clock: after a validation or a checkpoint."""
        self.values.clear()
        self.finite_gradients.clear()
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
