"""The two rounds of an evaluation over blocks of queries.

1. The nearest R rows (R: gallery rows of the query's class) are listed and merged. They give
   R-precision, MAP@R, and Recall@K of every query with a hit in its list.
2. For other queries, the nearest row of their class is found and closer rows are counted; likewise
   for queries without a hit of their super-class, if requested.

The rank that owns a block broadcasts its rows, every rank searches its gallery shard, and the owner
merges the results. Blocks are sorted by R, so that one large class does not lengthen the lists of
others.

Legend: N rows of this rank, Q queries of a block, K entries of a list, D embedding width.
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

# Longer lists settle Recall@K for more queries in round 1, shorter ones are faster to compute.
_MIN_LIST_LENGTH = 8
# Longer lists are searched in blocks: a join keeps over twice as many candidates per query.
_MAX_JOIN_LENGTH = 64
_QUERIES_PER_PART = 8192

Misses = tuple[np.ndarray, np.ndarray]
"""Queries without a hit of their class, and queries without a hit of their super-class."""


@dataclass(frozen=True, eq=False)
class NeighborLists:
    """Neighbors of the counted queries, in increasing order of the queries.

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
    """Result of both rounds, the same on every rank.

    Attributes:
        tally: Sums over the counted queries of all ranks.
        seconds: Stage -> seconds of the slowest rank.
        listed: The requested neighbors, or None.
    """

    tally: Tally
    seconds: dict[str, float]
    listed: NeighborLists | None


class Rounds:
    """State of one evaluation, shared by its two rounds."""

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
            definitions: Metric definitions of other projects to sum as well.
            super_N: Super-class of each row of all ranks, int64, -1 for none; None unless Recall@K
                by super-class is requested.
            backend: Search backend for candidates.
            memory_bytes: Bound on this rank's working memory.
            neighbors: Number of neighbors of every counted query to return.
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
        self._parts: list[NeighborLists] = []
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
        """Run both rounds; every rank calls this."""
        with self._stage("list"):
            joined, remaining = self._join()
        # Every rank visits owners in the same order, since blocks are collective.
        for owner in range(self._comm.world_size):
            with self._stage("list"):
                misses = joined if owner == self._comm.rank else []
                misses += [
                    self._list_block(row_Q, num_neighbors, owner)
                    for row_Q, num_neighbors in self._blocks(remaining[owner])
                ]
            misses_Q, super_misses_Q = (
                np.concatenate([np.zeros(0, dtype=np.int64), *parts])
                for parts in (list(zip(*misses, strict=True)) or ((), ()))
            )
            with self._stage("count"):
                self._count(misses_Q, owner)
            if self._super_N is not None:
                with self._stage("super_class"):
                    self._count(super_misses_Q, owner, self._super_N)
        return self._finish()

    def _join(self) -> tuple[list[Misses], list[np.ndarray]]:
        """List the queries of all ranks by one join, if every row is both query and gallery row.

        Returns this rank's misses, and the queries of each rank that remain for blocks. Collective.
        """
        population, comm = self._population, self._comm
        remaining = [population.counted_queries(rank) for rank in range(comm.world_size)]
        lengths = [self._join_lengths(rank) for rank in range(comm.world_size)]
        if not self._can_join(remaining, lengths):
            return [], remaining
        join = CrossJoin(
            self._vectors_ND, self._shard.approximation, population.sizes, lengths.__getitem__, comm
        )
        lists, is_unresolved_N = join.run()
        k_N = lengths[comm.rank]
        misses = []
        for index_Q in np.array_split(
            np.flatnonzero((k_N > 0) & ~is_unresolved_N), 1 + len(k_N) // _QUERIES_PER_PART
        ):
            part = Neighbors(lists.distance_QK[index_Q], lists.row_QK[index_Q])
            misses.append(self._add_lists(index_Q + self._low, part, k_N[index_Q]))
        # Collective: all ranks must agree on the blocks that remain.
        unresolved_rows = comm.gather_objects(
            np.flatnonzero(is_unresolved_N) + self._low, what="gather open"
        )
        for rank, (row_Q, rows) in enumerate(zip(remaining, unresolved_rows, strict=True)):
            low, _ = population.part(rank)
            remaining[rank] = row_Q[(lengths[rank][row_Q - low] == 0) | np.isin(row_Q, rows)]
        return misses, remaining

    def _join_lengths(self, rank: int) -> np.ndarray:
        """Return the list length of each row of a rank in a join, int64; 0 for rows not joined."""
        low, high = self._population.part(rank)
        row_Q = self._population.counted_queries(rank)
        k_Q = self._list_lengths(row_Q)
        k_N = np.zeros(high - low, dtype=np.int64)
        k_N[row_Q - low] = np.where(k_Q <= _MAX_JOIN_LENGTH, k_Q, 0)
        return k_N

    def _can_join(self, remaining: list[np.ndarray], lengths: list[np.ndarray]) -> bool:
        """Return whether a join applies, pays off and fits the memory; the same on every rank."""
        population = self._population
        if self._vectors_ND.device.type != "cpu":
            return False  # A GPU computes products faster than a join could filter them.
        if not (population.is_query_N.all() and population.is_gallery_N.all()):
            return False
        num_joined = sum(np.count_nonzero(part) for part in lengths)
        if 2 * num_joined < sum(len(row_Q) for row_Q in remaining):
            return False
        # The maximum over ranks, so that all ranks decide alike.
        needed = max(
            join_bytes(part, self._vectors_ND.shape[1], len(remaining)) for part in lengths
        )
        return needed <= self._memory_bytes

    def _list_lengths(self, row_Q: np.ndarray) -> np.ndarray:
        """Return the list length that each query needs, (Q,) int64."""
        shortest = max(min(max(self._tally.recall_at), _MIN_LIST_LENGTH), self._neighbors)
        num_relevant_Q = self._population.num_relevant_N[row_Q]
        k_Q = np.maximum(num_relevant_Q, shortest)
        for definition in self._tally.definitions:
            k_Q = np.maximum(k_Q, definition.list_length(num_relevant_Q))
        return np.minimum(k_Q, self._population.num_gallery)

    def _blocks(self, row_Q: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        """Yield blocks of queries with their common list length."""
        row_Q = row_Q[np.argsort(self._list_lengths(row_Q), kind="stable")]
        k_Q = self._list_lengths(row_Q)
        low = 0
        while low < len(row_Q):
            # All lists of a block have the longest length; a factor of two bounds the waste.
            high = int(np.searchsorted(k_Q, 2 * k_Q[low], side="right"))
            num_neighbors = int(k_Q[high - 1])
            high = min(high, low + self._queries_per_block(num_neighbors))
            yield row_Q[low:high], int(k_Q[high - 1])
            low = high

    def _list_block(self, row_Q: np.ndarray, num_neighbors: int, owner: int) -> Misses:
        """Rank the nearest rows of a block; return the misses, on the owner. Collective."""
        found = self._gallery.nearest(self._queries(row_Q, owner), num_neighbors, owner)
        if found is None:
            return row_Q[:0], row_Q[:0]
        return self._add_lists(row_Q, found, np.full(len(row_Q), num_neighbors))

    def _add_lists(self, row_Q: np.ndarray, found: Neighbors, k_Q: np.ndarray) -> Misses:
        """Add queries by the first `k_Q` entries of their lists; return the misses.

        A query counts as a miss only if its list is too short to settle Recall@K.
        """
        neighbor_QK = found.row_QK.cpu().numpy()
        class_N = self._population.class_N
        is_empty = neighbor_QK == NO_ROW
        is_empty |= np.arange(neighbor_QK.shape[1]) >= k_Q[:, None]
        position_QK = np.where(is_empty, 0, neighbor_QK)
        relevant_QK = (class_N[position_QK] == class_N[row_Q][:, None]) & ~is_empty
        num_relevant_Q = self._population.num_relevant_N[row_Q]
        rank_Q = self._tally.add_lists(class_N[row_Q], relevant_QK, num_relevant_Q)
        super_misses_Q = row_Q[:0]
        if self._super_N is not None:
            super_misses_Q = self._add_super_lists(row_Q, position_QK, is_empty)
        if self._neighbors:
            listed_QK = np.where(is_empty, -1, neighbor_QK)[:, : self._neighbors]
            distance_QK = found.distance_QK[:, : self._neighbors].cpu().numpy()
            self._parts.append(NeighborLists(row_Q, listed_QK, distance_QK))
        is_short_Q = k_Q < max(self._tally.recall_at)
        misses_Q = row_Q[(rank_Q == metrics.NOT_LISTED) & is_short_Q]
        return misses_Q, super_misses_Q[is_short_Q[np.isin(row_Q, super_misses_Q)]]

    def _add_super_lists(
        self, row_Q: np.ndarray, position_QK: np.ndarray, is_empty: np.ndarray
    ) -> np.ndarray:
        """Add queries by the super-classes in their lists; return those without a hit."""
        assert self._super_N is not None
        has_super_Q = self._super_N[row_Q] >= 0
        row_Q = row_Q[has_super_Q]
        relevant_QK = self._super_N[position_QK[has_super_Q]] == self._super_N[row_Q][:, None]
        rank_Q = self._tally.add_super_lists(relevant_QK & ~is_empty[has_super_Q])
        return row_Q[rank_Q == metrics.NOT_LISTED]

    def _count(self, row_Q: np.ndarray, owner: int, super_N: np.ndarray | None = None) -> None:
        """Add the rank of the nearest row of its class for every miss. Collective.

        Args:
            row_Q: The misses; only the owner's value is used.
            owner: The rank that owns the queries.
            super_N: Super-classes to use instead of classes.
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
        """Broadcast queries of one rank, with their classes or super-classes. Collective."""
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
        """Merge the results of all ranks. Collective."""
        seconds = dict.fromkeys(self._seconds, 0.0)
        parts: list[NeighborLists] = []
        found = self._comm.gather_objects((self._seconds, self._parts), what="gather lists")
        for stages, listed in found:
            seconds = {stage: max(seconds[stage], stages[stage]) for stage in seconds}
            parts.extend(listed)
        tally = self._tally.merged(self._comm)
        return Outcome(tally, seconds, _concatenate(parts) if self._neighbors else None)

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._vectors_ND.device)

    @contextmanager
    def _stage(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[stage] += time.perf_counter() - start


def _concatenate(parts: list[NeighborLists]) -> NeighborLists:
    """Concatenate parts, queries in increasing order."""
    query_rows = np.concatenate([part.query_rows for part in parts])
    order = np.argsort(query_rows)
    return NeighborLists(
        query_rows[order],
        np.concatenate([part.neighbors for part in parts])[order],
        np.concatenate([part.distances for part in parts])[order],
    )
