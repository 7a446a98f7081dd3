"""Losses of the gathered global batch without proxies: pairs and triplets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dml_dist.losses.forms import PairLoss
from dml_dist.losses.pairs import MINED_MERGES, AnchorBatch, AnchorLoss, active_share
from dml_dist.losses.pairs_margin import Margin
from dml_dist.parallel.class_table import fetch_rows, fetch_traffic
from dml_dist.parallel.collectives import merge_over_ranks, merge_traffic
from dml_dist.parallel.objective import GlobalBatch, Objective, ObjectiveOutput, OwnedRows
from dml_dist.parallel.traffic import Traffic
from dml_dist.partition import part_bounds

_BETAS = "betas of classes"


class PairObjective(Objective):
    """A loss of pair form: every rank computes the whole of it from the gathered embeddings."""

    computes_whole = True

    def __init__(self, loss: PairLoss, **of_objective: Any) -> None:
        """Take the loss, and the arguments of `Objective`."""
        super().__init__(**of_objective)
        self.loss = loss

    def _output(self, batch: GlobalBatch) -> ObjectiveOutput:
        return ObjectiveOutput(self.loss(batch.embeddings_GD, batch.labels_G), {})

    def _loss_traffic(self, num_rows: int, *, mined: bool) -> Traffic:
        return Traffic()


class AnchorObjective(Objective):
    """A loss of pairs or triplets: each rank has its own rows as anchors, against all rows.

    The gradient contract of `parallel/proxies.py` with parts of the loss by rows for parts by
    proxies: rank r's S_r are sums and counts over its anchors, dl/dX of S_r is one part of dl/dX.
    """

    def __init__(self, loss: AnchorLoss, *, seed: int, **of_objective: Any) -> None:
        """Take the loss, the seed of what it draws, and the arguments of `Objective`."""
        super().__init__(**of_objective)
        self.loss = loss
        self.seed = seed

    def _loss_traffic(self, num_rows: int, *, mined: bool) -> Traffic:
        """Return what merging the statistics sends, which are all 0-d."""
        merges = {**self.loss.merges, **(MINED_MERGES if mined else {})}
        numels = dict.fromkeys(merges, 1)
        return merge_traffic(merges, numels, self.dtype, self.comm.world_size)

    def _output(self, batch: GlobalBatch) -> ObjectiveOutput:
        own = batch.part(self.comm.rank)
        anchors = AnchorBatch(
            batch.embeddings_GD,
            batch.labels_G,
            own.start,
            own.stop,
            is_representative_G=batch.is_representative_G,
            seed=self.seed,
            step=batch.step,
            neighbors_Ch=batch.neighbors_Ch,
        )
        betas_G = self._betas(batch.labels_G)
        if betas_G is not None:
            anchors = replace(anchors, betas_A=betas_G[own])
        partial = self.loss.anchor_partial(anchors)
        # A custom loss may leave the counts of mined negatives out.
        counts_mined = MINED_MERGES.keys() <= partial.keys()
        merges = {**self.loss.merges, **(MINED_MERGES if counts_mined else {})}
        total = merge_over_ranks(partial, merges, self.comm)
        with torch.no_grad():
            statistics = dict(self.loss.statistics(total))
            if counts_mined:
                statistics["active_mined"] = active_share(total, "mined")
        return ObjectiveOutput(self.loss.finish(total), statistics)

    def _betas(self, labels_G: Tensor) -> Tensor | None:
        """Return beta of every row of the batch, (G,), or None if it is not learnt."""
        return None


class ScalarBetaObjective(AnchorObjective):
    """Margin loss with one learnt beta, which every rank holds: a replicated parameter."""

    def __init__(self, loss: Margin, **rest: Any) -> None:
        super().__init__(loss, **rest)
        beta = torch.full((1,), loss.beta, dtype=self.dtype, device=self.comm.device)
        self.beta = nn.Parameter(beta)

    def replicated_parameters(self) -> dict[str, nn.Parameter]:
        """Return beta."""
        return {"beta": self.beta}

    def _betas(self, labels_G: Tensor) -> Tensor:
        return self.beta.expand(len(labels_G))


class ClassBetaObjective(AnchorObjective):
    """Margin loss with a learnt beta for each class, owned with its class range."""

    def __init__(self, loss: Margin, **rest: Any) -> None:
        super().__init__(loss, **rest)
        low, high = part_bounds(self.num_classes, self.comm.world_size, self.comm.rank)
        self.low_class, self.high_class = low, high
        betas = torch.full((high - low, 1), loss.beta, dtype=self.dtype, device=self.comm.device)
        self.betas = nn.Parameter(betas)

    def owned_parameters(self) -> dict[str, OwnedRows]:
        """Return the betas of this rank's classes, one column."""
        return {"betas": OwnedRows(self.betas, self.low_class, self.high_class, self.num_classes)}

    def _betas(self, labels_G: Tensor) -> Tensor:
        bounds = self.low_class, self.high_class
        return fetch_rows(self.betas, labels_G, *bounds, self.comm, what=_BETAS)[:, 0]

    def _loss_traffic(self, num_rows: int, *, mined: bool) -> Traffic:
        """Return what the loss and its rows' betas send."""
        betas = fetch_traffic(num_rows, 1, self.dtype, self.comm.world_size, what=_BETAS)
        return super()._loss_traffic(num_rows, mined=mined) + betas


def anchor_objective(loss: AnchorLoss, **rest: Any) -> AnchorObjective:
    """Return the objective of a loss, with the parameters that it learns.

    Args:
        loss: The loss.
        rest: The other arguments of `AnchorObjective`.
    """
    if isinstance(loss, Margin) and loss.beta_form == "scalar":
        return ScalarBetaObjective(loss, **rest)
    if isinstance(loss, Margin) and loss.beta_form == "class":
        return ClassBetaObjective(loss, **rest)
    return AnchorObjective(loss, **rest)
