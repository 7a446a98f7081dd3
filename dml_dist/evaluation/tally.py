"""Sums over the queries of one evaluation: of this rank, then merged over ranks.

Legend: Q queries, K entries of a list, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dml_dist.metrics import definitions as defined
from dml_dist.metrics import per_class
from dml_dist.metrics import ranking as metrics
from dml_dist.metrics.definitions import Definition, DefinitionSum
from dml_dist.parallel.comm import Comm


class Tally:
    """Running sums over queries.

    Attributes:
        recall_at: The K of Recall@K.
        definitions: Metric definitions of other projects to sum as well.
        sums: Sums of our own metrics.
        super_sums: Sums of Recall@K by super-class; only queries and hits are used.
        definition_sums: Sums of `definitions`, in their order.
        class_sums: See `metrics.per_class`, (S, C) int64.
    """

    def __init__(
        self, recall_at: tuple[int, ...], definitions: Sequence[Definition], num_classes: int
    ) -> None:
        """Start without any query."""
        self.recall_at = recall_at
        self.definitions = tuple(definitions)
        self.sums = self.super_sums = metrics.RetrievalSums(0, (0,) * len(recall_at), 0, 0)
        self.definition_sums = [DefinitionSum(0, 0) for _ in definitions]
        self.class_sums = per_class.empty_sums(num_classes)

    def add_lists(
        self, class_Q: np.ndarray, relevant_QK: np.ndarray, num_relevant_Q: np.ndarray
    ) -> np.ndarray:
        """Add queries by their lists; return the index of their first hit, (Q,) int64.

        Args:
            class_Q: Their classes, int64.
            relevant_QK: Whether each neighbor, nearest first, has the query's class, bool.
            num_relevant_Q: R of each query, int64, each >= 1.
        """
        rank_Q = metrics.first_hit(relevant_QK)
        r_precision_Q, map_at_r_Q = metrics.ranking_scores(relevant_QK, num_relevant_Q)
        part = metrics.RetrievalSums(
            len(class_Q),
            metrics.recall_partial(rank_Q, self.recall_at),
            metrics.sum_units(metrics.to_units(r_precision_Q)),
            metrics.sum_units(metrics.to_units(map_at_r_Q)),
        )
        self.sums = metrics.merge(self.sums, part)
        per_class.add_partial(self.class_sums, class_Q, rank_Q == 0, r_precision_Q, map_at_r_Q)
        for number, definition in enumerate(self.definitions):
            found = defined.partial(definition, relevant_QK, num_relevant_Q)
            self.definition_sums[number] = defined.merge(self.definition_sums[number], found)
        return rank_Q

    def add_super_lists(self, relevant_QK: np.ndarray) -> np.ndarray:
        """Like `add_lists`, by whether neighbors have the query's super-class."""
        rank_Q = metrics.first_hit(relevant_QK)
        self.super_sums = self._with_ranks(self.super_sums, rank_Q, len(rank_Q))
        return rank_Q

    def add_ranks(self, rank_Q: np.ndarray, *, of_super_class: bool) -> None:
        """Add the ranks of the nearest relevant row of queries whose lists had no hit."""
        if of_super_class:
            self.super_sums = self._with_ranks(self.super_sums, rank_Q, 0)
        else:
            self.sums = self._with_ranks(self.sums, rank_Q, 0)

    def merged(self, comm: Comm) -> Tally:
        """Return the tally of all ranks; every rank calls this."""
        total = Tally(self.recall_at, self.definitions, self.class_sums.shape[1])
        parts = comm.gather_objects(
            (self.sums, self.super_sums, self.definition_sums), what="gather metrics"
        )
        for sums, super_sums, definition_sums in parts:
            total.sums = metrics.merge(total.sums, sums)
            total.super_sums = metrics.merge(total.super_sums, super_sums)
            total.definition_sums = [
                defined.merge(a, b)
                for a, b in zip(total.definition_sums, definition_sums, strict=True)
            ]
        class_sums = torch.from_numpy(self.class_sums).to(comm.device)
        total.class_sums = comm.all_reduce_sum(class_sums, what="add sums of classes").cpu().numpy()
        return total

    def _with_ranks(
        self, sums: metrics.RetrievalSums, rank_Q: np.ndarray, num_queries: int
    ) -> metrics.RetrievalSums:
        hits_at = metrics.recall_partial(rank_Q, self.recall_at)
        return metrics.merge(sums, metrics.RetrievalSums(num_queries, hits_at, 0, 0))
