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
from dml_dist.metrics import ranking as metrics
from dml_dist.metrics.definitions import Definition
from dml_dist.parallel.comm import Comm
from dml_dist.search.cross_join import CrossJoin, join_bytes
from dml_dist.search.gallery_shard import GalleryShard, Queries
from dml_dist.search.neighbors import NO_ROW, Neighbors
from dml_dist.search.propose import Backend
from dml_dist.search.sharded import ShardedGallery, norm_bound, queries_per_block

# Longer lists answer Recall@K for more queries, shorter ones are found and decided sooner.
_SHORTEST_LIST = 8
# Longer lists than this are found in blocks: a join keeps some more candidates than a list has.
_LONGEST_JOINED = 64
_JOINED_AT_ONCE = 8192

Missed = tuple[np.ndarray, np.ndarray]
"""Queries without a hit of their class, and those without one of their super-class."""


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
        self._shard = GalleryShard(
            vectors_ND if in_gallery.all() else vectors_ND[self._tensor(in_gallery)],
            self._tensor(row_N),
            self._tensor(population.class_N[row_N]),
            radius=norm_bound(vectors_ND, comm),
            backend=backend,
            memory_bytes=memory_bytes,
        )
        self._gallery = ShardedGallery(self._shard, comm)
        self._super_gallery = self._gallery
        if super_N is not None:
            self._super_gallery = self._gallery.with_classes(self._tensor(super_N[row_N]))

    def run(self) -> Outcome:
        """Carry out both rounds; every rank calls this."""
        with self._stage("list"):
            joined, left = self._join()
        for owner in range(self._comm.world_size):
            with self._stage("list"):
                missed = joined if owner == self._comm.rank else []
                missed += [
                    self._list_block(row_Q, num_neighbors, owner)
                    for row_Q, num_neighbors in self._blocks(left[owner])
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

    def _join(self) -> tuple[list[Missed], list[np.ndarray]]:
        """List the queries of all ranks at once where every row is a query and in the gallery.

        Returns the queries without a hit among this rank's, and the queries of each rank that are
        left to be listed in blocks.
        """
        population, comm = self._population, self._comm
        left = [population.counted_queries(rank) for rank in range(comm.world_size)]
        places = [self._joined_places(rank) for rank in range(comm.world_size)]
        if not self._may_join(left, places):
            return [], left
        join = CrossJoin(
            self._vectors_ND, self._shard.approximation, population.sizes, places.__getitem__, comm
        )
        lists, is_unresolved_N = join.run()
        k_N = places[comm.rank]
        missed = []
        for index_Q in np.array_split(
            np.flatnonzero((k_N > 0) & ~is_unresolved_N), 1 + len(k_N) // _JOINED_AT_ONCE
        ):
            part = Neighbors(lists.distance_QK[index_Q], lists.row_QK[index_Q])
            missed.append(self._take_lists(index_Q + self._low, part, k_N[index_Q]))
        open_rows = comm.gather_objects(
            np.flatnonzero(is_unresolved_N) + self._low, what="gather open"
        )
        for rank, (row_Q, rows) in enumerate(zip(left, open_rows, strict=True)):
            low, _ = population.part(rank)
            left[rank] = row_Q[(places[rank][row_Q - low] == 0) | np.isin(row_Q, rows)]
        return missed, left

    def _joined_places(self, rank: int) -> np.ndarray:
        """Return the places of each row of a rank in a join, int64; 0 for none."""
        low, high = self._population.part(rank)
        row_Q = self._population.counted_queries(rank)
        k_Q = self._list_lengths(row_Q)
        k_N = np.zeros(high - low, dtype=np.int64)
        k_N[row_Q - low] = np.where(k_Q <= _LONGEST_JOINED, k_Q, 0)
        return k_N

    def _may_join(self, left: list[np.ndarray], places: list[np.ndarray]) -> bool:
        """Whether a join is possible, sensible, and fits the memory, alike on every rank."""
        population = self._population
        if self._vectors_ND.device.type != "cpu":
            return False  # A GPU makes products faster than a join could look at them.
        if not (population.is_query_N.all() and population.is_gallery_N.all()):
            return False
        num_joined = sum(np.count_nonzero(part) for part in places)
        if 2 * num_joined < sum(len(row_Q) for row_Q in left):
            return False
        needed = max(join_bytes(part, self._vectors_ND.shape[1], len(left)) for part in places)
        return needed <= self._memory_bytes

    def _list_lengths(self, row_Q: np.ndarray) -> np.ndarray:
        """Return how long the lists of queries are to be, (Q,) int64."""
        shortest = max(min(max(self._tally.recall_at), _SHORTEST_LIST), self._neighbors)
        num_relevant_Q = self._population.num_relevant_N[row_Q]
        k_Q = np.maximum(num_relevant_Q, shortest)
        for definition in self._tally.definitions:
            k_Q = np.maximum(k_Q, definition.places(num_relevant_Q))
        return np.minimum(k_Q, self._population.num_gallery)

    def _blocks(self, row_Q: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        """Yield blocks of queries with the length of their lists."""
        row_Q = row_Q[np.argsort(self._list_lengths(row_Q), kind="stable")]
        k_Q = self._list_lengths(row_Q)
        low = 0
        while low < len(row_Q):
            # Lists of one block differ in length by a factor of two at most.
            high = int(np.searchsorted(k_Q, 2 * k_Q[low], side="right"))
            num_neighbors = int(k_Q[high - 1])
            high = min(high, low + self._queries_per_block(num_neighbors))
            yield row_Q[low:high], int(k_Q[high - 1])
            low = high

    def _list_block(self, row_Q: np.ndarray, num_neighbors: int, owner: int) -> Missed:
        """Rank the nearest rows of a block; return the queries without a hit, on the owner."""
        found = self._gallery.nearest(self._queries(row_Q, owner), num_neighbors, owner)
        if found is None:
            return row_Q[:0], row_Q[:0]
        return self._take_lists(row_Q, found, np.full(len(row_Q), num_neighbors))

    def _take_lists(self, row_Q: np.ndarray, found: Neighbors, k_Q: np.ndarray) -> Missed:
        """Add queries by their lists, of which the first places count; return those without a hit.

        They are those without a hit of their class, and those without one of their super-class.
        """
        neighbor_QK = found.row_QK.cpu().numpy()
        class_N = self._population.class_N
        is_free = neighbor_QK == NO_ROW
        is_free |= np.arange(neighbor_QK.shape[1]) >= k_Q[:, None]
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
        is_short_Q = k_Q < max(self._tally.recall_at)
        missed_Q = row_Q[(rank_Q == metrics.NOT_LISTED) & is_short_Q]
        return missed_Q, super_missed_Q[is_short_Q[np.isin(row_Q, super_missed_Q)]]

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

    def _queries_per_block(self, num_neighbors: int) -> int:
        width, world_size = self._vectors_ND.shape[1], self._comm.world_size
        return queries_per_block(self._memory_bytes, num_neighbors, width, world_size)

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
