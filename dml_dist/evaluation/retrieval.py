"""Retrieval metrics of embeddings, exact and the same for any number of ranks.

Ranks hold contiguous parts of the rows. In two rounds, blocks of query rows go from the rank that
owns them to all ranks, which each answer for their gallery shard:

1. The nearest R rows (R: gallery rows of the query's class) are listed and merged: R-precision,
   MAP@R, and Recall@K of every query with a hit in its list.
2. For queries without one, the nearest row of their class is found and closer rows are counted.

Queries with small R come first, so that one large class does not lengthen everybody's list.

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

from dml_dist.errors import ConfigError, DmlDistError
from dml_dist.evaluation.population import Array, Population, check_rows, gather_population
from dml_dist.metrics import retrieval as metrics
from dml_dist.parallel.comm import Comm
from dml_dist.search.exact import Distance, store_rows
from dml_dist.search.gallery import GalleryShard, Queries
from dml_dist.search.neighbors import NO_ROW
from dml_dist.search.propose import Backend, resolve_backend
from dml_dist.search.sharded import ShardedGallery, norm_bound, queries_per_block

# Longer lists answer Recall@K for more queries, shorter ones are found and decided sooner.
_SHORTEST_LIST = 8
_STAGES = ("prepare", "list", "count")


@dataclass(frozen=True, eq=False)
class RetrievalResult:
    """What an evaluation found; the same on every rank.

    Attributes:
        recall_at_k: K -> Recall@K, in [0, 1].
        r_precision: In [0, 1].
        map_at_r: MAP@R, in [0, 1].
        num_queries: Queries that were counted.
        num_gallery: Rows of the gallery.
        num_lone_queries: Queries without another gallery row of their class, not counted.
        seconds: Stage ("prepare", "list", "count", "total") -> seconds of the slowest rank.
        query_rows: (Q,) int64, the counted queries in rising order, when neighbours were asked for.
        neighbors: (Q, k) int64 global gallery rows, nearest first; -1 where the gallery ends.
        neighbor_distances: (Q, k) float64, squared Euclidean; inf where the gallery ends.
    """

    recall_at_k: dict[int, float]
    r_precision: float
    map_at_r: float
    num_queries: int
    num_gallery: int
    num_lone_queries: int
    seconds: dict[str, float]
    query_rows: np.ndarray | None = None
    neighbors: np.ndarray | None = None
    neighbor_distances: np.ndarray | None = None

    def as_dict(self) -> dict[str, float]:
        """Return the metrics by their names in records: recall_at_1, map_at_r, ..."""
        return {
            **{f"recall_at_{k}": value for k, value in self.recall_at_k.items()},
            "r_precision": self.r_precision,
            "map_at_r": self.map_at_r,
            "num_queries": self.num_queries,
            "num_gallery": self.num_gallery,
            "num_lone_queries": self.num_lone_queries,
        }


def evaluate(
    embeddings: Array,
    labels: Array,
    *,
    recall_at: Sequence[int] = (1, 2, 4, 8),
    distance: Distance = "cosine",
    roles: Sequence[str] | np.ndarray | None = None,
    backend: str = "auto",
    memory_mb: float = 512.0,
    comm: Comm | None = None,
    neighbors: int = 0,
) -> RetrievalResult:
    """Return Recall@K, R-precision and MAP@R of embeddings.

    A query never finds its own row; equal distances are ordered by gallery row. The digits depend
    on rows, labels and roles alone: not on `comm`, `backend`, `memory_mb`, threads or device.

    Args:
        embeddings: (N, D) rows of a floating type, not necessarily normalised; with `comm` this
            rank's contiguous part in rank order, which may be empty.
        labels: (N,) integers of any value.
        recall_at: The K of Recall@K, each >= 1; K may exceed the gallery.
        distance: "cosine" (rows normalised in float64, then stored in float32) or "euclidean".
        roles: (N,) "query", "gallery" or "both"; none means both for all.
        backend: "auto", "faiss" or "torch": what proposes neighbours.
        memory_mb: Bound on this rank's working memory in MiB, beside its embeddings and two
            float32 copies of them.
        comm: The ranks; none means this process alone. Every rank calls this.
        neighbors: How many neighbours of every counted query the result shall list.

    Raises:
        DataError: If rows are not finite, shapes or roles are wrong, or nothing can be counted.
        ConfigError: If an option is out of range or the backend is not installed.
    """
    start = time.perf_counter()
    if comm is None:
        comm = Comm.single(str(embeddings.device) if isinstance(embeddings, Tensor) else "cpu")
    error: DmlDistError | None = None
    try:
        _check_options(recall_at, distance, memory_mb, neighbors)
        chosen = resolve_backend(backend, comm.device)
        local = check_rows(embeddings, labels, roles, comm.device)
    except DmlDistError as raised:
        error = raised
    comm.agree(error, what="check the rows to evaluate")
    population = gather_population(local, comm)
    evaluation = _Evaluation(
        population,
        _stored(local.embeddings_ND, population, distance, comm),
        comm,
        recall_at=tuple(recall_at),
        backend=chosen,
        memory_bytes=int(memory_mb * 2**20),
        neighbors=neighbors,
        start=start,
    )
    return evaluation.run()


def _check_options(
    recall_at: Sequence[int], distance: str, memory_mb: float, neighbors: int
) -> None:
    if not recall_at or any(int(k) != k or k < 1 for k in recall_at):
        raise ConfigError(
            f"required whole numbers >= 1 in recall_at, got {list(recall_at)}; give, say, (1, 10)"
        )
    if distance not in ("cosine", "euclidean"):
        raise ConfigError(f"required distance to be cosine or euclidean, got {distance!r}")
    if not memory_mb > 0:
        raise ConfigError(f"required memory_mb > 0, got {memory_mb}; the default is 512")
    if neighbors < 0:
        raise ConfigError(f"required neighbors >= 0, got {neighbors}; 0 lists none")


def _stored(
    embeddings_ND: Tensor, population: Population, distance: Distance, comm: Comm
) -> Tensor:
    """Return this rank's stored rows; a rank without rows takes the others' width."""
    width = int(
        comm.all_reduce_max(
            torch.tensor([embeddings_ND.shape[1] if len(embeddings_ND) else 0], device=comm.device),
            what="embedding width",
        )
    )
    if not population.sizes[comm.rank]:
        return torch.zeros((0, width), dtype=torch.float32, device=comm.device)
    return store_rows(embeddings_ND, distance)


class _Evaluation:
    """One evaluation in progress: what its two rounds share."""

    def __init__(
        self,
        population: Population,
        vectors_ND: Tensor,
        comm: Comm,
        *,
        recall_at: tuple[int, ...],
        backend: Backend,
        memory_bytes: int,
        neighbors: int,
        start: float,
    ) -> None:
        self._population = population
        self._vectors_ND = vectors_ND
        self._comm = comm
        self._recall_at = recall_at
        self._neighbors = min(neighbors, int(population.is_gallery_N.sum()))
        self._memory_bytes = memory_bytes
        self._seconds = dict.fromkeys(_STAGES, 0.0)
        self._sums = metrics.RetrievalSums(0, (0,) * len(recall_at), 0, 0)
        self._listed: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
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
        self._seconds["prepare"] = time.perf_counter() - start

    def run(self) -> RetrievalResult:
        """Return the result on every rank."""
        for owner in range(self._comm.world_size):
            with self._stage("list"):
                unlisted = [
                    self._list_block(row_Q, num_places, owner)
                    for row_Q, num_places in self._blocks(owner)
                ]
            with self._stage("count"):
                missed = np.concatenate([np.zeros(0, dtype=np.int64), *unlisted])
                self._count(self._comm.broadcast_object(missed, owner), owner)
        return self._finish()

    def _blocks(self, owner: int) -> Iterator[tuple[np.ndarray, int]]:
        """Yield blocks of a rank's queries with the length of their lists."""
        row_Q = self._population.counted_queries(owner)
        shortest = max(min(max(self._recall_at), _SHORTEST_LIST), self._neighbors)
        num_gallery = int(self._population.is_gallery_N.sum())
        places_Q = np.maximum(self._population.num_relevant_N[row_Q], shortest)
        places_Q = np.minimum(places_Q, num_gallery)
        low = 0
        while low < len(row_Q):
            # Lists of one block differ in length by a factor of two at most.
            high = int(np.searchsorted(places_Q, 2 * places_Q[low], side="right"))
            num_places = int(places_Q[high - 1])
            high = min(high, low + self._queries_per_block(num_places))
            yield row_Q[low:high], int(places_Q[high - 1])
            low = high

    def _list_block(self, row_Q: np.ndarray, num_places: int, owner: int) -> np.ndarray:
        """Rank the nearest rows of a block; return the queries without a hit (on the owner)."""
        found = self._gallery.nearest(self._queries(row_Q, owner), num_places, owner)
        if found is None:
            return row_Q[:0]
        neighbor_QK = found.row_QK.cpu().numpy()
        class_N = self._population.class_N
        is_free = neighbor_QK == NO_ROW
        neighbor_class_QK = class_N[np.where(is_free, 0, neighbor_QK)]
        relevant_QK = (neighbor_class_QK == class_N[row_Q][:, None]) & ~is_free
        num_relevant_Q = self._population.num_relevant_N[row_Q]
        rank_Q = metrics.first_hit(relevant_QK)
        self._add(len(row_Q), rank_Q, metrics.ranking_partial(relevant_QK, num_relevant_Q))
        if self._neighbors:
            listed_QK = np.where(is_free, -1, neighbor_QK)[:, : self._neighbors]
            distance_QK = found.distance_QK[:, : self._neighbors].cpu().numpy()
            self._listed.append((row_Q, listed_QK, distance_QK))
        if max(self._recall_at) <= num_places:
            return row_Q[:0]
        return row_Q[rank_Q == metrics.NOT_LISTED]

    def _count(self, row_Q: np.ndarray, owner: int) -> None:
        """Find the rank of the nearest row of their class for queries without a listed one."""
        step = self._queries_per_block(1)
        for low in range(0, len(row_Q), step):
            block = row_Q[low : low + step]
            queries = self._queries(block, owner)
            rank_Q = self._gallery.rank_of_class(queries, limit=max(self._recall_at))
            if self._comm.rank == owner:
                self._add(0, rank_Q.cpu().numpy(), (0, 0))

    def _add(self, num_queries: int, rank_Q: np.ndarray, ranking: tuple[int, int]) -> None:
        hits_at = metrics.recall_partial(rank_Q, self._recall_at)
        part = metrics.RetrievalSums(num_queries, hits_at, *ranking)
        self._sums = metrics.merge(self._sums, part)

    def _queries(self, row_Q: np.ndarray, owner: int) -> Queries:
        """Return queries of one rank on every rank."""
        if self._comm.rank == owner:
            vectors_QD = self._vectors_ND[self._tensor(row_Q - self._low)]
        else:
            vectors_QD = self._vectors_ND.new_empty((len(row_Q), self._vectors_ND.shape[1]))
        if self._comm.world_size > 1:
            vectors_QD = self._comm.broadcast(vectors_QD, owner, what="pass queries around")
        classes = self._tensor(self._population.class_N[row_Q])
        return Queries(vectors_QD, self._tensor(row_Q), classes)

    def _queries_per_block(self, num_places: int) -> int:
        width, world_size = self._vectors_ND.shape[1], self._comm.world_size
        return queries_per_block(self._memory_bytes, num_places, width, world_size)

    def _finish(self) -> RetrievalResult:
        total = metrics.RetrievalSums(0, (0,) * len(self._recall_at), 0, 0)
        seconds = dict.fromkeys((*_STAGES, "total"), 0.0)
        self._seconds["total"] = sum(self._seconds.values())
        for sums, stages in self._comm.gather_objects((self._sums, self._seconds)):
            total = metrics.merge(total, sums)
            seconds = {stage: max(seconds[stage], stages[stage]) for stage in seconds}
        means = metrics.finish(total, self._recall_at)
        listed = self._gather_listed() if self._neighbors else (None, None, None)
        query_rows, neighbors, neighbor_distances = listed
        return RetrievalResult(
            recall_at_k=means.recall_at_k,
            r_precision=means.r_precision,
            map_at_r=means.map_at_r,
            num_queries=total.num_queries,
            num_gallery=int(self._population.is_gallery_N.sum()),
            num_lone_queries=self._population.num_lone_queries,
            seconds=seconds,
            query_rows=query_rows,
            neighbors=neighbors,
            neighbor_distances=neighbor_distances,
        )

    def _gather_listed(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the counted queries, their neighbours and distances in rising order of rows."""
        parts = [part for parts in self._comm.gather_objects(self._listed) for part in parts]
        query_rows, neighbors, distances = (
            np.concatenate(columns) for columns in zip(*parts, strict=True)
        )
        order = np.argsort(query_rows)
        return query_rows[order], neighbors[order], distances[order]

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._vectors_ND.device)

    @contextmanager
    def _stage(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[stage] += time.perf_counter() - start
