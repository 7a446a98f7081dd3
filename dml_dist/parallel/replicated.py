"""Proxies that every rank holds, for comparison with sharded ones in scaling studies.

As DDP would train them: each rank computes the mean over its own rows against all classes. Loss and
gradients are those of sharded proxies, but memory and traffic grow with C D on every rank.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from dml_dist.losses.numerics import empty_loss, nan_unless_finite
from dml_dist.parallel.collectives import times_world_size
from dml_dist.parallel.comm import Comm
from dml_dist.parallel.objective import GlobalBatch, Objective, ObjectiveOutput
from dml_dist.parallel.proxies import PROXIES, ProxyObjective
from dml_dist.parallel.traffic import Traffic

_LOSS = "loss of the global batch"


class ReplicatedProxyObjective(Objective):
    """A loss that is a mean over rows, over a class table of which each rank holds the whole.

    The sum over ranks of B / G times the mean of their B rows is the mean over the global batch.
    `gather` collects no embeddings: `embeddings_GD` is what this rank has, (B, D).

    Attributes:
        whole: The objective of one process.
    """

    gathers_embeddings = False

    def __init__(self, whole: ProxyObjective, comm: Comm) -> None:
        super().__init__(
            num_classes=whole.num_classes,
            embedding_size=whole.embedding_size,
            comm=comm,
            dtype=whole.dtype,
        )
        self.whole = whole

    def proxy_rows(self) -> tuple[int, ...]:
        """Return the rows of proxies of each rank: all of them."""
        return self.whole.proxy_rows() * self.comm.world_size

    def replicated_parameters(self) -> dict[str, nn.Parameter]:
        """Return the proxies."""
        return {PROXIES: self.whole.proxies}

    def _output(self, batch: GlobalBatch) -> ObjectiveOutput:
        own_BD = times_world_size(batch.embeddings_GD, self.comm)
        labels_B = batch.labels_G[batch.part(self.comm.rank)]
        own = replace(batch, embeddings_GD=own_BD, labels_G=labels_B)
        if len(labels_B):
            share = len(labels_B) / len(batch.labels_G)
            part = nan_unless_finite(self.whole._output(own).loss, own_BD) * share
        else:
            part = empty_loss(own_BD)
        total = self.comm.all_reduce_sum(part.detach(), what=_LOSS)
        # The value of the whole with the gradient of this rank's part; `part - part` is exactly 0.
        return ObjectiveOutput(total + (part - part.detach()), {})

    def _loss_traffic(self, num_rows: int, *, mined: bool) -> Traffic:
        return Traffic.of("all_reduce", _LOSS, self.dtype.itemsize, self.comm.world_size)
