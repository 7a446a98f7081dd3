"""Which image to look at after a non-finite loss: its embedding is not finite, or the longest.

Norms of embeddings stay on the device until a loss was bad; nothing is waited for before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from dml_dist.parallel.comm import Comm


@dataclass
class EmbeddingNorms:
    """Norms of this rank's embeddings in the steps since the last record.

    Attributes:
        steps: For each step its index rows, (b,) int64, and norms, (b,).
    """

    steps: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, rows: Tensor, norms: Tensor) -> None:
        """Note one step."""
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
