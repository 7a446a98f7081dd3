"""A softmax over a sample of the classes: the batch's own, and negatives drawn at each step.

As in partial fully-connected layers (An et al., "Partial FC: Training 10 Million Identities on a
Single Machine", 2021): class c takes part in step t if it is in the global batch, or if the
uniform draw of (seed, t, c) is below the share. Draws are by class, so they are the same for any
number of ranks. Only rows that take part are updated: the others and their optimiser state stay as
they are; neither momentum nor weight decay acts on them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dml_dist.losses.forms import ProxyShard, RoundsLoss, RowLoss
from dml_dist.parallel.objective import GlobalBatch, TouchedRows
from dml_dist.parallel.proxies import PROXIES, ProxyObjective
from dml_dist.random_streams import Stream, generator_of

_BLOCK_CLASSES = 4096
"""Classes drawn from one stream; part of what a seed means, so never changed."""


class SampledProxyObjective(ProxyObjective):
    """A loss of one proxy a class over the batch's classes and a share of the others."""

    def __init__(
        self, loss: RowLoss | RoundsLoss, *, negatives_share: float, **of_table: Any
    ) -> None:
        """Make the table as `ProxyObjective` does.

        Args:
            loss: The loss; one proxy a class.
            negatives_share: Share of the classes that takes part besides the batch's, 0 .. 1.
            of_table: Arguments of `ProxyObjective`.
        """
        super().__init__(loss, **of_table)
        self.seed: int = of_table["seed"]
        self.negatives_share = negatives_share
        self._touched: TouchedRows | None = None

    def touched_rows(self) -> dict[str, TouchedRows]:
        """Return the rows of the last step."""
        return {} if self._touched is None else {PROXIES: self._touched}

    def _table(self, batch: GlobalBatch) -> tuple[Tensor, Tensor, ProxyShard]:
        """Return labels as rows of the drawn table, that table, and its shard."""
        low, num_classes = self.shard.low_class, len(self.proxies)
        drawn = drawn_classes(
            low, self.shard.high_class, self.negatives_share, self.seed, batch.step
        ).to(self.proxies.device)
        local_G = batch.labels_G - low
        held_G = (local_G >= 0) & (local_G < num_classes)
        # One entry more: classes of other ranks are written there.
        takes_part = torch.cat([drawn, drawn.new_zeros(1)])
        takes_part[torch.where(held_G, local_G, num_classes)] = True
        rows = takes_part[:-1].nonzero()[:, 0]
        values = self.proxies.detach()[rows].requires_grad_()
        self._touched = TouchedRows(self.proxies, rows, values)
        place = torch.full_like(takes_part, -1, dtype=torch.int64)
        place[rows] = torch.arange(len(rows), device=rows.device)
        places_G = place[torch.where(held_G, local_G, num_classes)].where(held_G, -1)
        return places_G, values, ProxyShard(self.num_classes, 0, len(rows))


def drawn_classes(low: int, high: int, share: float, seed: int, step: int) -> Tensor:
    """Return which of the classes `low` .. `high - 1` a step draws, (high - low,) bool."""
    drawn = np.empty(high - low, dtype=np.bool_)
    for block in range(low // _BLOCK_CLASSES, -(-high // _BLOCK_CLASSES)):
        generator = generator_of(Stream.SAMPLED_NEGATIVES, seed, step, block)
        numbers = generator.random(_BLOCK_CLASSES)
        start = block * _BLOCK_CLASSES
        first, end = max(low, start), min(high, start + _BLOCK_CLASSES)
        drawn[first - low : end - low] = numbers[first - start : end - start] < share
    return torch.from_numpy(drawn)
