"""A gallery sharded over ranks: partial results are gathered and merged.

Every rank calls every method, with the same queries. Results do not depend on the partition: lists
merge by (distance, row), counts add.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dml_dist.parallel.comm import Comm
from dml_dist.search.gallery_shard import GalleryShard, Queries
from dml_dist.search.neighbors import Neighbors, merge_neighbors

_LARGEST_BLOCK = 4096


class ShardedGallery:
    """The gallery shards of all ranks, searched as one gallery. All methods are collective."""

    def __init__(self, shard: GalleryShard, comm: Comm) -> None:
        """Combine this rank's shard with those of the other ranks of `comm`."""
        self._shard = shard
        self._comm = comm

    def with_classes(self, class_N: Tensor) -> ShardedGallery:
        """Return the same gallery with other classes of this rank's rows, (N,) int64."""
        return ShardedGallery(self._shard.with_classes(class_N), self._comm)

    def nearest(self, queries: Queries, num_neighbors: int, owner: int) -> Neighbors | None:
        """Return the nearest rows of the whole gallery on rank `owner`, None elsewhere.

        Args:
            queries: Q queries, the same on every rank.
            num_neighbors: K, >= 1.
            owner: The rank that merges, while the others start the next block.
        """
        part = self._shard.nearest(queries, num_neighbors)
        if self._comm.world_size == 1:
            return part
        parts = self._gather(part)
        return merge_neighbors(parts, num_neighbors) if self._comm.rank == owner else None

    def rank_of_class(self, queries: Queries, limit: int) -> Tensor:
        """Return how many gallery rows come before the nearest row of a query's class, (Q,) int64.

        Args:
            queries: Q queries, each with another row of its class in the gallery.
            limit: Results that reach it are lower bounds (`GalleryShard.count_closer`).
        """
        nearest = self._shard.nearest_of_class(queries)
        if self._comm.world_size > 1:
            nearest = merge_neighbors(self._gather(nearest), 1)
        closer_Q = self._shard.count_closer(
            queries, nearest.distance_QK[:, 0], nearest.row_QK[:, 0], limit
        )
        return self._comm.all_reduce_sum(closer_Q, what="count closer gallery rows")

    def _gather(self, part: Neighbors) -> list[Neighbors]:
        sizes = [part.row_QK.shape[0]] * self._comm.world_size
        distances = self._comm.all_gather_rows(
            part.distance_QK, sizes, what="gather neighbors' distances"
        )
        rows = self._comm.all_gather_rows(part.row_QK, sizes, what="gather neighbors' rows")
        return [
            Neighbors(distance_QK, row_QK)
            for distance_QK, row_QK in zip(distances.split(sizes), rows.split(sizes), strict=True)
        ]


def queries_per_block(memory_bytes: int, num_neighbors: int, width: int, world_size: int) -> int:
    """Return how many queries fit into one block within a memory bound, >= 1.

    Args:
        memory_bytes: Bound on a rank's working memory.
        num_neighbors: Entries of a list.
        width: Embedding width.
        world_size: Number of ranks, each of which contributes a list.
    """
    proposed = num_neighbors + 5 + num_neighbors // 8
    # Proposals (12 bytes, twice that in Faiss), indices, distances, rows and their sorted copies;
    # gathered lists and their sorted copies; hits and precisions of the metrics; vectors as
    # stored, shifted and in float64.
    per_query = 112 * proposed + 64 * num_neighbors * world_size + 24 * width
    # Faiss multiplies blocks of queries with 1,024 gallery rows; torch's block has the other half
    # of the memory (`propose.gallery_tile`).
    return max(1, min(_LARGEST_BLOCK, memory_bytes // 2 // (per_query + 4 * 1024)))


def norm_bound(vectors_ND: Tensor, comm: Comm) -> float:
    """Return an upper bound on the norms of stored rows of all ranks; every rank calls this."""
    largest = vectors_ND.abs().amax() if vectors_ND.numel() else vectors_ND.new_zeros(())
    bound = largest.to(torch.float64) * vectors_ND.shape[1] ** 0.5
    return float(comm.all_reduce_max(bound.reshape(1), what="largest norm"))
