"""The two rounds of an evaluation, in which blocks of queries go around the ranks.

1. The nearest R rows (R: gallery rows of the query's class) are listed and merged: R-precision,
   MAP@R, and Recall@K of every query with a hit in its list.
2. For queries without one, the nearest row of their class is found and closer rows are counted;
   likewise for queries without a hit of their super-class, where that is asked for.

The rank that owns a block gives its rows to all; each answers for its gallery shard; the owner
adds up. Queries with small R come first, so that one large class does not lengthen everybody's
list.

Legend: N rows of this rank, Q queries of a block, K places of a list, D embedding width.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dml_dist.evaluation.population import Population
from dml_dist.evaluation.tally import Tally
from dml_dist.metrics import retrieval as metrics
from dml_dist.metrics.definitions import Definition
from dml_dist.parallel.comm import Comm
from dml_dist.search.gallery import GalleryShard, Queries
from dml_dist.search.neighbors import NO_ROW
from dml_dist.search.propose import Backend
from dml_dist.search.sharded import ShardedGallery, norm_bound, queries_per_block

# Longer lists answer Recall@K for more queries, shorter ones are found and decided sooner.
_SHORTEST_LIST = 8


@dataclass(frozen=True, eq=False)
class Listed:
    """Neighbours of the counted queries, which stand in rising order.

    Attributes:
        query_rows: (Q,) int64 global rows.
        neighbors: (Q, k) int64 global gallery rows, nearest first; -1 where the gallery ends.
        distances: (Q, k) float64; inf where the gallery ends.
    """

    query_rows: np.ndarray
    neighbors: np.ndarray
    distances: np.ndarray


@dataclass(frozen=True, eq=False)
class Outcome:
    """What the rounds found, the same on every rank.

    Attributes:
        tally: Sums over the counted queries of all ranks.
        seconds: Stage -> seconds of the slowest rank.
        listed: The neighbours that were asked for.
    """

    tally: Tally
    seconds: dict[str, float]
    listed: Listed | None


class Rounds:
    """One evaluation in progress: what its two rounds share."""

    def __init__(
        self,
        population: Population,
        vectors_ND: Tensor,
        comm: Comm,
        *,
        recall_at: tuple[int, ...],
        definitions: Sequence[Definition] = (),
        super_N: np.ndarray | None = None,
        backend: Backend,
        memory_bytes: int,
        neighbors: int,
    ) -> None:
        """Prepare this rank's gallery shard; every rank calls this.

        Args:
            population: The rows of all ranks.
            vectors_ND: This rank's stored rows.
            comm: The ranks.
            recall_at: The K of Recall@K.
            definitions: Numbers of other projects that are summed as well.
            super_N: Super-class of each row of all ranks, int64, -1 for none, when Recall@K by
                super-class is asked for.
            backend: What proposes neighbours.
            memory_bytes: Bound on this rank's working memory.
            neighbors: How many neighbours of every counted query are kept.
        """
        self._population = population
        self._vectors_ND = vectors_ND
        self._comm = comm
        self._neighbors = min(neighbors, population.num_gallery)
        self._memory_bytes = memory_bytes
        self._super_N = super_N
        self._seconds = {"list": 0.0, "count": 0.0}
        if super_N is not None:
            self._seconds["super_class"] = 0.0
        self._tally = Tally(recall_at, definitions, len(population.label_C))
        self._parts: list[Listed] = []
        self._low, high = population.part(comm.rank)
        in_gallery = population.is_gallery_N[self._low : high]
        row_N = self._low + np.flatnonzero(in_gallery)
        shard = GalleryShard(
            vectors_ND if in_gallery.all() else vectors_ND[self._tensor(in_gallery)],
            self._tensor(row_N),
            self._tensor(population.class_N[row_N]),
            radius=norm_bound(vectors_ND, comm),
            backend=backend,
            memory_bytes=memory_bytes,
        )
        self._gallery = ShardedGallery(shard, comm)
        self._super_gallery = self._gallery
        if super_N is not None:
            self._super_gallery = self._gallery.with_classes(self._tensor(super_N[row_N]))

    def run(self) -> Outcome:
        """Carry out both rounds; every rank calls this."""
        for owner in range(self._comm.world_size):
            with self._stage("list"):
                missed = [
                    self._list_block(row_Q, num_places, owner)
                    for row_Q, num_places in self._blocks(owner)
                ]
            missed_Q, super_missed_Q = (
                np.concatenate([np.zeros(0, dtype=np.int64), *parts])
                for parts in (list(zip(*missed, strict=True)) or ((), ()))
            )
            with self._stage("count"):
                self._count(missed_Q, owner)
            if self._super_N is not None:
                with self._stage("super_class"):
                    self._count(super_missed_Q, owner, self._super_N)
        return self._finish()

    def _blocks(self, owner: int) -> Iterator[tuple[np.ndarray, int]]:
        """Yield blocks of a rank's queries with the length of their lists."""
        row_Q = self._population.counted_queries(owner)
        shortest = max(min(max(self._tally.recall_at), _SHORTEST_LIST), self._neighbors)
        num_relevant_Q = self._population.num_relevant_N[row_Q]
        places_Q = np.maximum(num_relevant_Q, shortest)
        for definition in self._tally.definitions:
            places_Q = np.maximum(places_Q, definition.places(num_relevant_Q))
        places_Q = np.minimum(places_Q, self._population.num_gallery)
        low = 0
        while low < len(row_Q):
            # Lists of one block differ in length by a factor of two at most.
            high = int(np.searchsorted(places_Q, 2 * places_Q[low], side="right"))
            num_places = int(places_Q[high - 1])
            high = min(high, low + self._queries_per_block(num_places))
            yield row_Q[low:high], int(places_Q[high - 1])
            low = high

    def _list_block(
        self, row_Q: np.ndarray, num_places: int, owner: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rank the nearest rows of a block; return the queries without a hit, on the owner.

        They are those without a hit of their class, and those without one of their super-class.
        """
        found = self._gallery.nearest(self._queries(row_Q, owner), num_places, owner)
        if found is None:
            return row_Q[:0], row_Q[:0]
        neighbor_QK = found.row_QK.cpu().numpy()
        class_N = self._population.class_N
        is_free = neighbor_QK == NO_ROW
        position_QK = np.where(is_free, 0, neighbor_QK)
        relevant_QK = (class_N[position_QK] == class_N[row_Q][:, None]) & ~is_free
        num_relevant_Q = self._population.num_relevant_N[row_Q]
        rank_Q = self._tally.add_lists(class_N[row_Q], relevant_QK, num_relevant_Q)
        super_missed_Q = row_Q[:0]
        if self._super_N is not None:
            super_missed_Q = self._list_super(row_Q, position_QK, is_free)
        if self._neighbors:
            listed_QK = np.where(is_free, -1, neighbor_QK)[:, : self._neighbors]
            distance_QK = found.distance_QK[:, : self._neighbors].cpu().numpy()
            self._parts.append(Listed(row_Q, listed_QK, distance_QK))
        if max(self._tally.recall_at) <= num_places:
            return row_Q[:0], row_Q[:0]
        return row_Q[rank_Q == metrics.NOT_LISTED], super_missed_Q

    def _list_super(
        self, row_Q: np.ndarray, position_QK: np.ndarray, is_free: np.ndarray
    ) -> np.ndarray:
        """Look for the super-class in lists; return the queries without a hit of theirs."""
        assert self._super_N is not None
        has_super_Q = self._super_N[row_Q] >= 0
        row_Q = row_Q[has_super_Q]
        relevant_QK = self._super_N[position_QK[has_super_Q]] == self._super_N[row_Q][:, None]
        rank_Q = self._tally.add_super_lists(relevant_QK & ~is_free[has_super_Q])
        return row_Q[rank_Q == metrics.NOT_LISTED]

    def _count(self, row_Q: np.ndarray, owner: int, super_N: np.ndarray | None = None) -> None:
        """Find the rank of the nearest row of their class for queries without a listed one.

        Args:
            row_Q: The queries, known to the owner.
            owner: The rank whose queries they are.
            super_N: Super-classes, when they and not classes are looked for.
        """
        row_Q = self._comm.broadcast_object(row_Q, owner)
        gallery = self._gallery if super_N is None else self._super_gallery
        step = self._queries_per_block(1)
        for low in range(0, len(row_Q), step):
            queries = self._queries(row_Q[low : low + step], owner, super_N)
            rank_Q = gallery.rank_of_class(queries, limit=max(self._tally.recall_at))
            if self._comm.rank == owner:
                self._tally.add_ranks(rank_Q.cpu().numpy(), of_super_class=super_N is not None)

    def _queries(self, row_Q: np.ndarray, owner: int, super_N: np.ndarray | None = None) -> Queries:
        """Return queries of one rank on every rank, under their classes or super-classes."""
        if self._comm.rank == owner:
            vectors_QD = self._vectors_ND[self._tensor(row_Q - self._low)]
        else:
            vectors_QD = self._vectors_ND.new_empty((len(row_Q), self._vectors_ND.shape[1]))
        if self._comm.world_size > 1:
            vectors_QD = self._comm.broadcast(vectors_QD, owner, what="pass queries around")
        classes = self._tensor((self._population.class_N if super_N is None else super_N)[row_Q])
        return Queries(vectors_QD, self._tensor(row_Q), classes)

    def _queries_per_block(self, num_places: int) -> int:
        width, world_size = self._vectors_ND.shape[1], self._comm.world_size
        return queries_per_block(self._memory_bytes, num_places, width, world_size)

    def _finish(self) -> Outcome:
        """Merge what the ranks found about their own queries."""
        seconds = dict.fromkeys(self._seconds, 0.0)
        parts: list[Listed] = []
        found = self._comm.gather_objects((self._seconds, self._parts), what="gather lists")
        for stages, listed in found:
            seconds = {stage: max(seconds[stage], stages[stage]) for stage in seconds}
            parts.extend(listed)
        tally = self._tally.merged(self._comm)
        return Outcome(tally, seconds, _in_order(parts) if self._neighbors else None)

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._vectors_ND.device)

    @contextmanager
    def _stage(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[stage] += time.perf_counter() - start


def _in_order(parts: list[Listed]) -> Listed:
    """Return the parts as one, queries in rising order."""
    query_rows = np.concatenate([part.query_rows for part in parts])
    order = np.argsort(query_rows)
    return Listed(
        query_rows[order],
        np.concatenate([part.neighbors for part in parts])[order],
        np.concatenate([part.distances for part in parts])[order],
    )
