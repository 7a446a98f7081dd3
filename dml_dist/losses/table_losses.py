"""Contrastive and multi-similarity loss between the batch and a table of representatives.

The formulas are those of `losses/pairs.py` and `losses/pairs_multi_similarity.py`, with the rows of
the batch as anchors and the table's rows as their pairs.

Shape legend: G rows of the global batch, D embedding size, c rows of a chunk, M rows a class,
Q rows of the batch whose class this shard holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dml_dist.errors import ConfigError
from dml_dist.losses.miners import far_positives, near_negatives
from dml_dist.losses.numerics import Merge, Statistics
from dml_dist.losses.pair_distances import cosines, cosines_for_choices, pair_distances
from dml_dist.losses.pairs import Contrastive, active_share, reduced, sum_and_counts, sum_merges
from dml_dist.losses.pairs_multi_similarity import MultiSimilarity, log_sum_exp
from dml_dist.losses.pairs_triplet import Triplet
from dml_dist.losses.table import (
    TableBatch,
    TableLoss,
    TableRound,
    merge_over_chunks,
    sum_over_chunks,
)
from dml_dist.losses.table_triplet import TableTriplet


def table_loss(loss: object, memory_mb: float) -> TableLoss:
    """Return the form of a pair loss between the batch and a table of representatives.

    Args:
        loss: The loss of pairs.
        memory_mb: Bound on the memory of a chunk of the table in MiB, > 0.

    Raises:
        ConfigError: If it has no such form.
    """
    match loss:
        case Contrastive():
            return TableContrastive(loss, memory_mb)
        case MultiSimilarity():
            return TableMultiSimilarity(loss, memory_mb)
        case Triplet(swap=False):
            return TableTriplet(loss, memory_mb)
        case Triplet():
            raise ConfigError(
                "projections.form is table, but loss.swap is true: the distances between all rows "
                "of the table, which it needs, are never computed. Set loss.swap: false, or "
                "projections.form: batch."
            )
        case _:
            raise ConfigError(
                "projections.form is table, which is defined for the losses contrastive, triplet "
                f"and multi_similarity, but the section loss gives {type(loss).__name__}. Choose "
                "one of these losses, or projections.form: batch."
            )


@dataclass(frozen=True)
class TableContrastive:
    """Contrastive loss between the batch and the table.

    Attributes:
        loss: Margins and reduction.
        memory_mb: Bound on the memory of a chunk in MiB.
    """

    loss: Contrastive
    memory_mb: float

    def rounds(self, rows_per_class: int) -> tuple[TableRound, ...]:
        """Return the only round: sums and counts."""
        return (TableRound(sum_merges("positive", "negative"), self._partial),)

    def finish(self, total: Statistics) -> Tensor:
        """Return the sum of the two means."""
        return self.loss.finish(total)

    def statistics(self, total: Statistics) -> Statistics:
        """Return the fractions of pairs that violate their margin."""
        return self.loss.statistics(total)

    def _partial(self, batch: TableBatch, _: Statistics) -> Statistics:
        pulls_QM = self.loss.pulls(batch.own_distances())
        names = tuple(sum_merges("negative"))
        return {
            **sum_and_counts("positive", pulls_QM, batch.positive_QM),
            **sum_over_chunks(self._pushes, batch, names, self.memory_mb),
        }

    def _pushes(self, queries_GD: Tensor, rows_cD: Tensor, negative_Gc: Tensor) -> Statistics:
        distances_Gc = pair_distances(queries_GD, rows_cD, self.loss.open_pushes)
        return sum_and_counts("negative", self.loss.pushes(distances_Gc), negative_Gc)


_PAIRS: Mapping[str, Merge] = {"cosines": "sum", "positives": "sum"}
_NEGATIVES: Mapping[str, Merge] = {"pushes": "logsumexp", "top": "max"}


@dataclass(frozen=True)
class TableMultiSimilarity:
    """Multi-similarity loss between the batch and the table.

    The first round collects the cosines of the positives, whose least one selects the negatives.
    The second adds up the negatives that the miner keeps and finds the hardest of all, which
    selects the positives.

    Attributes:
        loss: Scales, base, miner and reduction.
        memory_mb: Bound on the memory of a chunk in MiB.
    """

    loss: MultiSimilarity
    memory_mb: float

    def rounds(self, rows_per_class: int) -> tuple[TableRound, ...]:
        """Return the rounds of positives and of negatives."""
        return (
            TableRound(_PAIRS, _positives, dict.fromkeys(_PAIRS, rows_per_class)),
            TableRound(_NEGATIVES, self._negatives, dict.fromkeys(_NEGATIVES, 1)),
        )

    def finish(self, total: Statistics) -> Tensor:
        """Return the mean over anchors."""
        return reduced(self._anchors(total), self.loss.reduction, "anchor")

    def statistics(self, total: Statistics) -> Statistics:
        """Return the fraction of rows that have a pair."""
        return {"active_anchors": active_share(self._anchors(total), "anchor")}

    def _anchors(self, total: Statistics) -> Statistics:
        cosines_GM, positive_GM = total["cosines"], total["positives"] > 0
        if self.loss.epsilon is not None:
            top_G1 = total["top"][:, None]
            positive_GM = positive_GM & far_positives(
                cosines_GM.detach(), top_G1, self.loss.epsilon
            )
        pulls_G = log_sum_exp(self.loss.pulls(cosines_GM), positive_GM)
        terms_G = self.loss.terms(pulls_G, total["pushes"])
        return sum_and_counts("anchor", terms_G, torch.ones_like(terms_G, dtype=torch.bool))

    def _negatives(self, batch: TableBatch, known: Statistics) -> Statistics:
        positive_GM = known["positives"] > 0
        bottom_G = known["cosines"].masked_fill(~positive_GM, torch.inf).amin(dim=1)

        def of_chunk(queries_GD: Tensor, rows_cD: Tensor, negative_Gc: Tensor) -> Statistics:
            cosines_Gc = cosines(queries_GD, rows_cD)
            top_G, kept_Gc = self._mined(cosines_Gc, queries_GD, rows_cD, negative_Gc, bottom_G)
            return {"pushes": log_sum_exp(self.loss.pushes(cosines_Gc), kept_Gc), "top": top_G}

        return merge_over_chunks(of_chunk, batch, _NEGATIVES, self.memory_mb)

    @torch.no_grad()
    def _mined(
        self,
        cosines_Gc: Tensor,
        queries_GD: Tensor,
        rows_cD: Tensor,
        negative_Gc: Tensor,
        bottom_G: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the negatives' largest cosine, (G,), and which of them are kept, (G, c)."""
        epsilon = self.loss.epsilon
        if epsilon is None:
            return cosines_Gc.new_full((len(cosines_Gc),), -torch.inf), negative_Gc
        bottom_G1 = bottom_G[:, None]

        def open_pairs(cosines_Gc: Tensor, error: float) -> Tensor:
            """Return the negatives near the miner's limit, and all that may be the hardest."""
            top_G1 = cosines_Gc.masked_fill(~negative_Gc, -torch.inf).amax(dim=1, keepdim=True)
            open_Gc = (cosines_Gc - (bottom_G1 - epsilon)).abs() <= 2.0 * error
            open_Gc |= cosines_Gc >= top_G1 - 2.0 * error
            return open_Gc & negative_Gc

        chosen_Gc = cosines_for_choices(cosines_Gc, queries_GD, rows_cD, open_pairs)
        top_G = chosen_Gc.masked_fill(~negative_Gc, -torch.inf).amax(dim=1)
        return top_G, negative_Gc & near_negatives(chosen_Gc, bottom_G1, epsilon)


def _positives(batch: TableBatch, _: Statistics) -> Statistics:
    cosines_QM = batch.own_cosines()
    return {
        "cosines": batch.of_all(cosines_QM),
        "positives": batch.of_all(batch.positive_QM.to(cosines_QM.dtype)),
    }
