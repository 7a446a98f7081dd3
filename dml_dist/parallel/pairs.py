"""Losses of the gathered global batch without proxies: pairs and triplets."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dml_dist.losses.forms import PairLoss
from dml_dist.losses.numerics import accurate_dtype
from dml_dist.parallel.collectives import gather_rows_of_whole
from dml_dist.parallel.comm import Comm
from dml_dist.parallel.proxies import EMBEDDINGS, Objective, ObjectiveOutput


class PairObjective(Objective):
    """A loss of pair form, computed as a whole by every rank from the gathered embeddings."""

    def __init__(self, loss: PairLoss, *, num_classes: int, comm: Comm) -> None:
        super().__init__(num_classes, comm)
        self.loss = loss

    def _output(
        self, embeddings_BD: Tensor, labels_G: Tensor, batch_sizes: Sequence[int], step: int
    ) -> ObjectiveOutput:
        embeddings_GD = gather_rows_of_whole(
            embeddings_BD.to(accurate_dtype(embeddings_BD)),
            batch_sizes,
            self.comm,
            what=EMBEDDINGS,
        )
        return ObjectiveOutput(self.loss(embeddings_GD, labels_G), {})
