"""One gallery shard: exact nearest rows, nearest rows of a class, and counts of closer rows.

Results are partial: exact distances and global rows of this shard. Merged over shards (lists) or
summed (counts) they are those of the whole gallery. Float32 products decide only where their error
bound leaves no uncertainty; uncertain pairs are resolved by exact distances. A query never finds
itself: it is recognized by its global row number.

Legend: N gallery rows of this shard, Q queries, K entries of a list, P pairs, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from dml_dist.losses.numerics import full_precision
from dml_dist.search.approximate import Approximation, Thresholds
from dml_dist.search.exact import pair_distances
from dml_dist.search.neighbors import (
    NO_ROW,
    Neighbors,
    empty_neighbors,
    merge_neighbors,
    neighbors_of_pairs,
    sort_neighbors,
)
from dml_dist.search.propose import Backend, propose

# Tiles of products that fit a core's cache; a GPU needs larger ones.
_TILE_QUERIES = {"cpu": 128, "cuda": 4096}
_TILE_GALLERY = {"cpu": 1024, "cuda": 16384}
_BYTES_PER_PRODUCT = 8
# An uncertain pair: two indices, distance, row, and their sorted copies.
_BYTES_PER_PAIR = 96
# Uncertain pairs are resolved in batches of this many per query; with trained embeddings a query
# has only a few in all.
_PAIRS_PER_QUERY = 64
# Classes up to this size are compared pair by pair; larger ones by products.
_LARGE_CLASS = 256


@dataclass(frozen=True, eq=False)
class Queries:
    """Rows to search for.

    Attributes:
        vectors_QD: Stored float32 rows.
        row_Q: Their global rows, int64; a gallery row of the same number is the query itself.
        class_Q: Their classes, int64.
    """

    vectors_QD: Tensor
    row_Q: Tensor
    class_Q: Tensor

    def select(self, index_S: Tensor) -> Queries:
        """Return some of the queries."""
        return Queries(self.vectors_QD[index_S], self.row_Q[index_S], self.class_Q[index_S])

    def __len__(self) -> int:
        """Number of queries."""
        return self.row_Q.shape[0]


class GalleryShard:
    """The gallery rows of one rank."""

    def __init__(
        self,
        vectors_ND: Tensor,
        row_N: Tensor,
        class_N: Tensor,
        *,
        radius: float,
        backend: Backend,
        memory_bytes: int,
    ) -> None:
        """Prepare a shard.

        Args:
            vectors_ND: Stored float32 rows, (N, D); N may be 0.
            row_N: Their global rows, int64, increasing.
            class_N: Their classes, int64.
            radius: Upper bound on the norms of all stored rows of all ranks (`norm_bound`).
            backend: Search backend for candidates.
            memory_bytes: Bound on working memory in addition to the rows and their float32 copy.
        """
        self.vectors_ND = vectors_ND
        self.row_N = row_N
        self._backend: Backend = backend
        self._memory_bytes = memory_bytes
        self._pairs_at_once = max(1, memory_bytes // 4 // _BYTES_PER_PAIR)
        self.approximation = Approximation(vectors_ND, radius)
        self._radius = radius
        # Rows grouped by class: the rows of class c are _by_class[starts of c : end of c].
        self._sorted_class_N, self._by_class_N = class_N.sort(stable=True)

    def with_classes(self, class_N: Tensor) -> GalleryShard:
        """Return the same rows with other classes, (N,) int64; nothing else is copied."""
        other = copy(self)
        other._sorted_class_N, other._by_class_N = class_N.sort(stable=True)
        return other

    def __len__(self) -> int:
        """Number of gallery rows of this shard."""
        return self.row_N.shape[0]

    def nearest(
        self, queries: Queries, num_neighbors: int, *, num_extra: int | None = None
    ) -> Neighbors:
        """Return the exact nearest rows of this shard, without the queries' own rows.

        Args:
            queries: Q queries.
            num_neighbors: K, >= 1; entries beyond the shard's rows stay empty.
            num_extra: Candidates beyond K, >= 1; None for a default that suits lists that may
                contain the query itself. It affects speed alone.
        """
        if not len(self) or not len(queries):
            return empty_neighbors(len(queries), num_neighbors, self.row_N.device)
        with full_precision(self.row_N.device):
            approximate = self.approximation.of_queries(queries.vectors_QD)
            # One for the query itself, some more so that rounding leaves few queries unresolved.
            wanted = num_neighbors + (5 + num_neighbors // 8 if num_extra is None else num_extra)
            proposals = propose(
                self.approximation, approximate, wanted, self._backend, self._memory_bytes
            )
            found = self._resolve(queries, proposals.position_QK, num_neighbors)
            last_Q = found.distance_QK[:, -1] * self.approximation.scale_square
            error_Q = self.approximation.bound(approximate.norm_Q, last_Q)
            # A query is resolved if no omitted row can be nearer than its K-th. Not `<=`: NaN from
            # inf - inf counts as unresolved.
            unresolved_Q = (~(proposals.farthest_Q - error_Q > last_Q)).nonzero()[:, 0]
            unresolved_Q = unresolved_Q[proposals.farthest_Q[unresolved_Q] < torch.inf]
            if len(unresolved_Q):
                rest = self._nearest_within(
                    queries.select(unresolved_Q), found.distance_QK[unresolved_Q, -1], num_neighbors
                )
                found.distance_QK[unresolved_Q] = rest.distance_QK
                found.row_QK[unresolved_Q] = rest.row_QK
        return found

    def nearest_of_class(self, queries: Queries) -> Neighbors:
        """Return the nearest row of each query's own class in this shard, (Q, 1)."""
        low_Q = torch.searchsorted(self._sorted_class_N, queries.class_Q)
        count_Q = torch.searchsorted(self._sorted_class_N, queries.class_Q, right=True) - low_Q
        found = empty_neighbors(len(queries), 1, self.row_N.device)
        is_large_Q = count_Q > _LARGE_CLASS
        for number in queries.class_Q[is_large_Q].unique().tolist():
            index_S = (queries.class_Q == number).nonzero()[:, 0]
            low, high = int(low_Q[index_S[0]]), int((low_Q + count_Q)[index_S[0]])
            part = self._nearest_in_large_class(queries.select(index_S), self._by_class_N[low:high])
            found.distance_QK[index_S], found.row_QK[index_S] = part.distance_QK, part.row_QK
        return self._nearest_in_small_classes(
            queries, low_Q, count_Q.masked_fill(is_large_Q, 0), found
        )

    def _nearest_in_large_class(self, queries: Queries, position_M: Tensor) -> Neighbors:
        """Return the nearest of some rows (increasing), found by products, (Q, 1)."""
        found = empty_neighbors(len(queries), 1, self.row_N.device)
        step = max(1, self._memory_bytes // 4 // (8 * max(1, self.vectors_ND.shape[1])))
        for position in position_M.split(step):
            rows = GalleryShard(
                self.vectors_ND[position],
                self.row_N[position],
                torch.zeros_like(position),
                radius=self._radius,
                backend=self._backend,
                memory_bytes=self._memory_bytes // 2,
            )
            found = merge_neighbors([found, rows.nearest(queries, 1)], 1)
        return found

    def _nearest_in_small_classes(
        self, queries: Queries, low_Q: Tensor, count_Q: Tensor, found: Neighbors
    ) -> Neighbors:
        """Return the nearest of `found` and the listed rows of each query, (Q, 1).

        Args:
            queries: Q queries.
            low_Q: First of a query's rows among the rows grouped by class.
            count_Q: Number of its rows; every pair's distance is computed.
            found: Lists of one entry.
        """
        end_Q = count_Q.cumsum(0)
        num_pairs = int(end_Q[-1]) if len(queries) else 0
        step = self._pairs_at_once
        for start in range(0, num_pairs, step):
            pair_P = torch.arange(start, min(start + step, num_pairs), device=end_Q.device)
            query_P = torch.searchsorted(end_Q, pair_P, right=True)
            place_P = pair_P - (end_Q - count_Q)[query_P] + low_Q[query_P]
            part = self._resolve_pairs(queries, query_P, self._by_class_N[place_P], 1)
            found = merge_neighbors([found, part], 1)
        return found

    def count_closer(
        self, queries: Queries, distance_Q: Tensor, row_Q: Tensor, limit: int
    ) -> Tensor:
        """Return how many rows of this shard come before (distance, row), (Q,) int64.

        Args:
            queries: Q queries; their own rows are not counted.
            distance_Q: Exact distances, float64.
            row_Q: Global rows at these distances, for ties.
            limit: Counts that reach it are lower bounds: in collapsed embeddings nearly every row
                is uncertain, and resolving all of them would take hours.
        """
        closer_Q = torch.zeros(len(queries), dtype=torch.int64, device=self.row_N.device)
        if not len(self):
            return closer_Q
        with full_precision(self.row_N.device):
            for low, high in self._query_tiles(len(queries)):
                tile = queries.select(torch.arange(low, high, device=self.row_N.device))
                closer_Q[low:high] = self._count_tile(
                    tile, distance_Q[low:high], row_Q[low:high], limit
                )
        return closer_Q

    def _count_tile(
        self, queries: Queries, distance_Q: Tensor, row_Q: Tensor, limit: int
    ) -> Tensor:
        closer_Q = torch.zeros(len(queries), dtype=torch.int64, device=self.row_N.device)
        approximate = self.approximation.of_queries(queries.vectors_QD)
        lower_Q, upper_Q = self._uncertain_range(approximate, distance_Q)
        pending: list[tuple[Tensor, Tensor]] = []
        num_pending = 0
        for low, block_QG in self._products(queries, approximate):
            sure_QG, near_QG = block_QG < lower_Q[:, None], block_QG <= upper_Q[:, None]
            sure_Q = sure_QG.sum(dim=1)
            closer_Q += sure_Q
            # Few queries have an uncertain row in a block: search only these for pairs.
            some = (near_QG.sum(dim=1) > sure_Q).nonzero()[:, 0]
            pair_P2 = (near_QG[some] ^ sure_QG[some]).nonzero()
            pending.append((some[pair_P2[:, 0]], pair_P2[:, 1] + low))
            num_pending += len(pair_P2)
            if num_pending > min(self._pairs_at_once, _PAIRS_PER_QUERY * len(queries)):
                closer_Q += self._count_pairs(queries, pending, distance_Q, row_Q)
                pending, num_pending = [], 0
                # Stop counting for queries that have reached the limit.
                lower_Q = lower_Q.masked_fill(closer_Q >= limit, -torch.inf)
                upper_Q = upper_Q.masked_fill(closer_Q >= limit, -torch.inf)
        return closer_Q + self._count_pairs(queries, pending, distance_Q, row_Q)

    def _count_pairs(
        self,
        queries: Queries,
        pairs: list[tuple[Tensor, Tensor]],
        distance_Q: Tensor,
        row_Q: Tensor,
    ) -> Tensor:
        """Return how many (query, position) pairs come before (distance, row), (Q,) int64."""
        closer_Q = torch.zeros(len(queries), dtype=torch.int64, device=self.row_N.device)
        if not pairs:
            return closer_Q
        query_P = torch.cat([query_P for query_P, _ in pairs])
        position_P = torch.cat([position_P for _, position_P in pairs])
        exact_P = pair_distances(queries.vectors_QD, query_P, self.vectors_ND, position_P)
        limit_P = distance_Q[query_P]
        before_P = (exact_P < limit_P) | (
            (exact_P == limit_P) & (self.row_N[position_P] < row_Q[query_P])
        )
        return torch.bincount(query_P[before_P], minlength=len(queries))

    def _nearest_within(
        self, queries: Queries, distance_Q: Tensor, num_neighbors: int
    ) -> Neighbors:
        """Return the nearest rows, given a distance within which at least K rows lie."""
        parts = []
        for low, high in self._query_tiles(len(queries)):
            tile = queries.select(torch.arange(low, high, device=self.row_N.device))
            approximate = self.approximation.of_queries(tile.vectors_QD)
            _, upper_Q = self._uncertain_range(approximate, distance_Q[low:high])
            found = empty_neighbors(len(tile), num_neighbors, self.row_N.device)
            for start, block_QG in self._products(tile, approximate):
                for query_P, position_P in self._pairs(block_QG <= upper_Q[:, None]):
                    part = self._resolve_pairs(tile, query_P, position_P + start, num_neighbors)
                    found = merge_neighbors([found, part], num_neighbors)
                # Later rows have higher numbers, so they cannot enter a list of K zero distances.
                upper_Q = upper_Q.masked_fill(found.distance_QK[:, -1] == 0, -torch.inf)
                if bool((upper_Q == -torch.inf).all()):
                    break
            parts.append(found)
        return Neighbors(
            torch.cat([part.distance_QK for part in parts]),
            torch.cat([part.row_QK for part in parts]),
        )

    def _resolve(self, queries: Queries, position_QM: Tensor, num_neighbors: int) -> Neighbors:
        """Return the first K of listed positions by exact distance."""
        num_queries, num_listed = position_QM.shape
        index_Q = torch.arange(num_queries, device=position_QM.device)
        query_P = index_Q.repeat_interleave(num_listed)
        position_P = position_QM.flatten()
        distance_P = pair_distances(queries.vectors_QD, query_P, self.vectors_ND, position_P)
        row_QM = self.row_N[position_P].view(num_queries, num_listed)
        distance_QM = distance_P.view(num_queries, num_listed)
        own_QM = row_QM == queries.row_Q[:, None]
        distance_QM = distance_QM.masked_fill_(own_QM, torch.inf)
        return sort_neighbors(distance_QM, row_QM.masked_fill_(own_QM, NO_ROW), num_neighbors)

    def _resolve_pairs(
        self, queries: Queries, query_P: Tensor, position_P: Tensor, num_neighbors: int
    ) -> Neighbors:
        """Return the first K of unordered pairs by exact distance."""
        row_P = self.row_N[position_P]
        other = row_P != queries.row_Q[query_P]
        query_P, position_P, row_P = query_P[other], position_P[other], row_P[other]
        distance_P = pair_distances(queries.vectors_QD, query_P, self.vectors_ND, position_P)
        return neighbors_of_pairs(query_P, distance_P, row_P, len(queries), num_neighbors)

    def _uncertain_range(
        self, approximate: Thresholds, distance_Q: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the partial distances below which a row is surely closer, above which farther."""
        scaled_Q = distance_Q * self.approximation.scale_square
        error_Q = self.approximation.bound(approximate.norm_Q, scaled_Q)
        lower_Q = (scaled_Q - error_Q - approximate.square_Q).to(torch.float32)
        upper_Q = (scaled_Q + error_Q - approximate.square_Q).to(torch.float32)
        return lower_Q, upper_Q

    def _products(self, queries: Queries, approximate: Thresholds) -> Iterator[tuple[int, Tensor]]:
        """Yield blocks of partial distances with their first position; a query's own is inf."""
        own_Q = torch.searchsorted(self.row_N, queries.row_Q).clamp(max=len(self) - 1)
        inside = self.row_N[own_Q] == queries.row_Q
        tile = self._gallery_tile(len(queries))
        buffer = torch.empty(len(queries) * tile, device=self.row_N.device)
        for low in range(0, len(self), tile):
            high = min(low + tile, len(self))
            out = buffer[: len(queries) * (high - low)].view(len(queries), high - low)
            block_QG = self.approximation.partial_distances(approximate.rows_QD, low, high, out=out)
            here = (inside & (own_Q >= low) & (own_Q < high)).nonzero()[:, 0]
            block_QG[here, own_Q[here] - low] = torch.inf
            yield low, block_QG

    def _pairs(self, chosen_QG: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the (query, column) pairs of a mask, in parts that fit the memory."""
        pairs_P2 = chosen_QG.nonzero()
        for part in pairs_P2.split(self._pairs_at_once):
            yield part[:, 0], part[:, 1]

    def _query_tiles(self, num_queries: int) -> Iterator[tuple[int, int]]:
        step = _TILE_QUERIES.get(self.row_N.device.type, 128)
        step = max(1, min(step, self._memory_bytes // (64 * _BYTES_PER_PRODUCT)))
        for low in range(0, num_queries, step):
            yield low, min(low + step, num_queries)

    def _gallery_tile(self, num_queries: int) -> int:
        step = _TILE_GALLERY.get(self.row_N.device.type, 1024)
        # Plus 16 bytes per pair of the mask, in case a whole block is uncertain.
        room = self._memory_bytes // 2 // (num_queries * (_BYTES_PER_PRODUCT + 16))
        return max(1, min(step, room, len(self)))
