"""Losses of the gathered global batch without proxies: pairs and triplets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dml_dist.losses.forms import PairLoss
from dml_dist.losses.numerics import accurate_dtype
from dml_dist.losses.pairs import MINED_MERGES, AnchorBatch, AnchorLoss, active_share
from dml_dist.losses.pairs_margin import Margin
from dml_dist.parallel.class_table import fetch_rows
from dml_dist.parallel.collectives import (
    gather_rows_of_parts,
    gather_rows_of_whole,
    merge_over_ranks,
)
from dml_dist.parallel.comm import Comm
from dml_dist.parallel.proxies import EMBEDDINGS, GlobalBatch, Objective, ObjectiveOutput, OwnedRows
from dml_dist.partition import part_bounds


class PairObjective(Objective):
    """A loss of pair form, computed as a whole by every rank from the gathered embeddings."""

    def __init__(self, loss: PairLoss, *, num_classes: int, comm: Comm) -> None:
        super().__init__(num_classes, comm)
        self.loss = loss

    def _output(self, embeddings_BD: Tensor, batch: GlobalBatch) -> ObjectiveOutput:
        embeddings_GD = gather_rows_of_whole(
            embeddings_BD.to(accurate_dtype(embeddings_BD)),
            batch.sizes,
            self.comm,
            what=EMBEDDINGS,
        )
        return ObjectiveOutput(self.loss(embeddings_GD, batch.labels_G), {})


class AnchorObjective(Objective):
    """A loss of pairs or triplets: each rank has its own rows as anchors, against all rows.

    The gradient contract of `parallel/proxies.py` with parts of the loss by rows for parts by
    proxies: rank r's S_r are sums and counts over its anchors, dl/dX of S_r is one part of dl/dX.
    """

    def __init__(
        self,
        loss: AnchorLoss,
        *,
        num_classes: int,
        seed: int,
        comm: Comm,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(num_classes, comm)
        self.loss = loss
        self.seed = seed
        self.dtype = dtype

    def _output(self, embeddings_BD: Tensor, batch: GlobalBatch) -> ObjectiveOutput:
        dtype = torch.promote_types(accurate_dtype(embeddings_BD), self.dtype)
        embeddings_GD = gather_rows_of_parts(
            embeddings_BD.to(dtype), batch.sizes, self.comm, what=EMBEDDINGS
        )
        own = batch.part(self.comm.rank)
        anchors = AnchorBatch(
            embeddings_GD,
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
            anchors = replace(anchors, betas_A=betas_G[own].to(dtype))
        partial = self.loss.anchor_partial(anchors)
        # A loss of one's own may leave the counts of mined negatives out.
        counts_mined = MINED_MERGES.keys() <= partial.keys()
        merges = {**self.loss.merges, **(MINED_MERGES if counts_mined else {})}
        total = merge_over_ranks(partial, merges, self.comm)
        with torch.no_grad():
            statistics = dict(self.loss.statistics(total))
            if counts_mined:
                statistics["active_mined"] = active_share(total, "mined")
        return ObjectiveOutput(self.loss.finish(total), statistics)

    def _betas(self, labels_G: Tensor) -> Tensor | None:
        """Return beta of every row of the batch, (G,), or None without learnt ones."""
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
        return fetch_rows(self.betas, labels_G, *bounds, self.comm, what="betas of classes")[:, 0]


def anchor_objective(loss: AnchorLoss, **rest: Any) -> AnchorObjective:
    """Return the objective of a loss, with the parameters that it learns.

    Args:
        loss: The loss.
        rest: num_classes, seed, comm and dtype, as `AnchorObjective` takes them.
    """
    if isinstance(loss, Margin) and loss.beta_form == "scalar":
        return ScalarBetaObjective(loss, **rest)
    if isinstance(loss, Margin) and loss.beta_form == "class":
        return ClassBetaObjective(loss, **rest)
    return AnchorObjective(loss, **rest)
