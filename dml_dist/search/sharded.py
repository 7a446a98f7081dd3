"""The whole gallery, one shard on every rank: partial answers are gathered and merged.

Every rank calls every method, with the same queries. Nothing here depends on how the gallery is
cut: lists merge by (distance, row), counts add.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dml_dist.parallel.comm import Comm
from dml_dist.search.gallery_shard import GalleryShard, Queries
from dml_dist.search.neighbors import Neighbors, merge_neighbors

_LARGEST_BLOCK = 4096


class ShardedGallery:
    """Gallery shards of all ranks behind the questions that are asked of one gallery."""

    def __init__(self, shard: GalleryShard, comm: Comm) -> None:
        """Join this rank's shard with those of the other ranks of `comm`."""
        self._shard = shard
        self._comm = comm

    def with_classes(self, class_N: Tensor) -> ShardedGallery:
        """Return the same gallery under other classes of this rank's rows, (N,) int64."""
        return ShardedGallery(self._shard.with_classes(class_N), self._comm)

    def nearest(self, queries: Queries, num_places: int, owner: int) -> Neighbors | None:
        """Return the nearest rows of the whole gallery on rank `owner`, None elsewhere.

        Args:
            queries: Q queries, the same on every rank.
            num_places: K, >= 1.
            owner: The rank that merges; the others are free for the next block sooner.
        """
        part = self._shard.nearest(queries, num_places)
        if self._comm.world_size == 1:
            return part
        parts = self._gather(part)
        return merge_neighbors(parts, num_places) if self._comm.rank == owner else None

    def rank_of_class(self, queries: Queries, limit: int) -> Tensor:
        """Return how many gallery rows come before the nearest row of a query's class, (Q,) int64.

        Args:
            queries: Q queries, each with another row of its class in the gallery.
            limit: Ranks of this size or more are only known to be so.
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
            part.distance_QK, sizes, what="gather neighbours' distances"
        )
        rows = self._comm.all_gather_rows(part.row_QK, sizes, what="gather neighbours' rows")
        return [
            Neighbors(distance_QK, row_QK)
            for distance_QK, row_QK in zip(distances.split(sizes), rows.split(sizes), strict=True)
        ]


def queries_per_block(memory_bytes: int, num_places: int, width: int, world_size: int) -> int:
    """Return how many queries are searched for at once within a memory bound, >= 1.

    Args:
        memory_bytes: Bound on a rank's working memory.
        num_places: Places of a list.
        width: Embedding width.
        world_size: Number of ranks that each give a list.
    """
    proposed = num_places + 5 + num_places // 8
    # Proposals (12 bytes, twice that in Faiss), indices, distances, rows and their sorted copies;
    # gathered lists and their sorted copies; hits and precisions of the metrics; vectors as
    # stored, shifted and in float64.
    per_query = 112 * proposed + 64 * num_places * world_size + 24 * width
    # Faiss multiplies blocks of queries with 1,024 gallery rows; torch's block has the other half
    # of the memory (`propose.gallery_tile`).
    return max(1, min(_LARGEST_BLOCK, memory_bytes // 2 // (per_query + 4 * 1024)))


def norm_bound(vectors_ND: Tensor, comm: Comm) -> float:
    """Return a number that no stored row's norm exceeds on any rank; every rank calls this."""
    largest = vectors_ND.abs().amax() if vectors_ND.numel() else vectors_ND.new_zeros(())
    bound = largest.to(torch.float64) * vectors_ND.shape[1] ** 0.5
    return float(comm.all_reduce_max(bound.reshape(1), what="largest norm"))
