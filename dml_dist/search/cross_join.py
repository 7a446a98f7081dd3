"""Join over all ranks: the K nearest neighbors of every row, each pair of rows computed once.

Each rank joins its shard with itself (`self_join`). Then, in rounds, every rank broadcasts one
chunk of its rows. The block of chunk b of rank o with chunk c of rank r is computed by r, in round
b, if b + c is even and o < r, or b + c is odd and o > r; else by o, in round c. So every block is
computed once, and all ranks work in all rounds. Pairs within the limit of either side are ranked by
exact distances immediately; results for a chunk of another rank are sent to that rank.

Legend: N rows of this rank, B rows of a chunk, P pairs, K neighbors of a query, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from dml_dist.losses.numerics import full_precision
from dml_dist.parallel.comm import Comm
from dml_dist.search.approximate import Approximation
from dml_dist.search.exact import pair_distances
from dml_dist.search.neighbors import Neighbors, merge_neighbors, neighbors_of_pairs
from dml_dist.search.self_join import (
    CHUNK,
    LARGEST,
    SLACK,
    SelfJoin,
    block,
    block_memory,
    left_operand,
    right_operand,
)

# A candidate during the sort: key, position, order, and their copies.
_BYTES_PER_PAIR = 48


def join_bytes(k_N: np.ndarray, width: int, world_size: int) -> int:
    """Return the maximum bytes of a rank's join, in addition to the rows and their float32 copy.

    Args:
        k_N: K of each of its rows.
        width: Embedding width.
        world_size: Number of ranks.
    """
    candidates = int((2 * k_N + SLACK)[k_N > 0].sum()) * _BYTES_PER_PAIR
    lists = 16 * int(k_N.max(initial=0)) * (len(k_N) + 4 * world_size * CHUNK)
    return candidates + lists + 12 * CHUNK * CHUNK + 8 * (world_size + 3) * CHUNK * width


class CrossJoin:
    """State of one join of the shards of all ranks; `run` is collective."""

    def __init__(
        self,
        vectors_ND: Tensor,
        approximation: Approximation,
        sizes: tuple[int, ...],
        k_of_rank: Callable[[int], np.ndarray],
        comm: Comm,
    ) -> None:
        """Prepare the join.

        Args:
            vectors_ND: Stored float32 rows of this rank, all of them in the gallery, on a CPU.
            approximation: Approximation of these rows; all ranks use the same radius.
            sizes: Number of rows of each rank.
            k_of_rank: Rank -> K of each of its rows, int64; 0 for rows that are not queries.
            comm: The ranks.
        """
        self._vectors_ND = vectors_ND
        self._approximation = approximation
        self._sizes = sizes
        self._comm = comm
        self._low = sum(sizes[: comm.rank])
        self._k_of_rank = [torch.from_numpy(k_of_rank(rank)) for rank in range(comm.world_size)]
        self._num_places = max(1, *(int(part.max()) for part in self._k_of_rank if len(part)))
        self._norm_N = approximation.square_N.to(torch.float64).sqrt()
        bounds = [*range(0, len(vectors_ND), CHUNK), len(vectors_ND)]
        self._chunks = list(pairwise(bounds))
        self._pending: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in self._chunks]

    def run(self) -> tuple[Neighbors, np.ndarray]:
        """Return the exact lists of this rank's rows, (N, K), and which are unresolved, (N,) bool.

        Every rank calls this. Entries beyond a query's own K, and the lists of unresolved queries,
        are undefined.
        """
        own_k_N = self._k_of_rank[self._comm.rank]
        row_N = torch.arange(self._low, self._low + len(own_k_N))
        join = SelfJoin(self._vectors_ND, row_N, self._approximation, own_k_N.numpy())
        self._lists, is_unresolved_N = join.run(self._num_places)
        self._is_unresolved_N = torch.from_numpy(is_unresolved_N)
        if self._comm.world_size > 1:
            with full_precision(self._vectors_ND.device):
                self._memory = block_memory()
                self._threshold_N = torch.empty(len(row_N), dtype=torch.float64)
                for number in range(len(self._chunks)):
                    self._lower_threshold(number)
                # As many rounds on every rank as the largest shard has chunks: `_round` is
                # collective, a rank without such a chunk takes part with 0 rows.
                for number in range(-(-max(self._sizes) // CHUNK)):
                    self._round(number)
                for number in range(len(self._chunks)):
                    self._merge_pending(number)
        return self._lists, self._is_unresolved_N.numpy()

    def _round(self, number: int) -> None:
        """Broadcast chunk `number` of every rank, and collect the results for it. Collective."""
        comm = self._comm
        low, high = self._bounds(comm.rank, number)
        if high > low:
            self._merge_pending(number)  # For the lowest thresholds before they are sent.
        bounds = [self._bounds(rank, number) for rank in range(comm.world_size)]
        sizes = [end - start for start, end in bounds]
        rows = comm.all_gather_rows(self._vectors_ND[low:high], sizes, what="join rows")
        thresholds = comm.all_gather_rows(self._threshold_N[low:high], sizes, what="join limits")
        parts = zip(rows.split(sizes), thresholds.split(sizes), strict=True)
        found = [self._join_blocks(rank, number, *part) for rank, part in enumerate(parts)]
        # Collectives in rank order of the owners, the same on every rank.
        for owner, (lists, is_unresolved_B) in enumerate(found):
            each = [sizes[owner]] * comm.world_size
            distances = comm.all_gather_rows(lists.distance_QK, each, what="join distances")
            numbers = comm.all_gather_rows(lists.row_QK, each, what="join neighbors")
            is_unresolved_B = comm.all_reduce_max(
                is_unresolved_B.to(torch.uint8), what="join open queries"
            )
            if owner == comm.rank and high > low:
                self._is_unresolved_N[low:high] |= is_unresolved_B > 0
                self._merge(
                    number, list(map(Neighbors, distances.split(each), numbers.split(each)))
                )

    def _join_blocks(
        self, owner: int, number: int, rows_BD: Tensor, threshold_B: Tensor
    ) -> tuple[Neighbors, Tensor]:
        """Compute this rank's blocks with a chunk of another rank; store results for own rows.

        Returns the neighbors of the chunk's rows, and which of them are unresolved.
        """
        start, end = self._bounds(owner, number)
        rank = self._comm.rank
        k_B = self._k_of_rank[owner][start:end]
        is_unresolved_B = torch.zeros(len(rows_BD), dtype=torch.bool)
        triples: list[tuple[Tensor, Tensor, Tensor]] = []
        if owner != rank and len(rows_BD):
            others = self._approximation.of_queries(rows_BD)
            left_BE = left_operand(others)
            limit_B = self._limits(others.square_Q.sqrt(), threshold_B)
            first = sum(self._sizes[:owner]) + start
            for own, (low, high) in enumerate(self._chunks):
                # The checkerboard of the module docstring: the owner computes the other half.
                if ((number + own) % 2 == 0) != (owner < rank):
                    continue
                right = right_operand(self._approximation, low, high)
                found = block(left_BE, right, self._memory)
                query, other = self._drop_overfull(
                    found.within(limit_B, of_columns=False), k_B, is_unresolved_B
                )
                distance = pair_distances(rows_BD, query, self._vectors_ND, other + low)
                triples.append((query, distance, other + low + self._low))
                limit_G = self._limits(self._norm_N[low:high], self._threshold_N[low:high])
                query, other = self._drop_overfull(
                    found.within(limit_G, of_columns=True),
                    self._k_of_rank[rank][low:high],
                    self._is_unresolved_N[low:high],
                )
                distance = pair_distances(self._vectors_ND, query + low, rows_BD, other)
                self._defer(own, (query, distance, other + first))
        lists = _lists(triples, len(rows_BD), self._num_places)
        return lists, is_unresolved_B

    def _drop_overfull(
        self, pairs: tuple[np.ndarray, ...], k_Q: Tensor, is_unresolved_Q: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the pairs of queries that have few; mark other queries unresolved, in place."""
        query_P, other_P = torch.from_numpy(pairs[0]), torch.from_numpy(pairs[1])
        count_Q = torch.bincount(query_P, minlength=len(k_Q))
        # More pairs than this in a single block are too many to resolve one by one. CHUNK // 4 is
        # slack for thresholds that are still loose.
        is_unresolved_Q |= count_Q > 2 * k_Q + SLACK + CHUNK // 4
        kept_P = ~is_unresolved_Q[query_P]
        return query_P[kept_P], other_P[kept_P]

    def _bounds(self, rank: int, number: int) -> tuple[int, int]:
        size = self._sizes[rank]
        return min(number * CHUNK, size), min((number + 1) * CHUNK, size)

    def _limits(self, norm_Q: Tensor, threshold_Q: Tensor) -> Tensor:
        """Return an upper bound on the approximate distance of rows within a scaled exact one.

        -inf for a negative threshold, which marks a query that takes no more rows.
        """
        # One error bound: thresholds are exact here, unlike in `SelfJoin`.
        limit_Q = threshold_Q + self._approximation.bound(norm_Q, threshold_Q.clamp(min=0.0))
        limit_Q = torch.where(threshold_Q < 0, -torch.inf, limit_Q.clamp(max=LARGEST))
        return limit_Q.to(torch.float32)

    def _lower_threshold(self, number: int) -> None:
        """Set a chunk's thresholds to the scaled exact distance of each query's K-th neighbor."""
        low, high = self._chunks[number]
        k_Q = self._k_of_rank[self._comm.rank][low:high]
        last_Q1 = (k_Q - 1).clamp(min=0)[:, None]
        known_Q = self._lists.distance_QK[low:high].gather(1, last_Q1)[:, 0]
        closed_Q = self._is_unresolved_N[low:high] | (k_Q == 0)
        known_Q = known_Q * self._approximation.scale_square
        self._threshold_N[low:high] = known_Q.masked_fill(closed_Q, -1.0)

    def _defer(self, number: int, triple: tuple[Tensor, Tensor, Tensor]) -> None:
        """Store results for one of this rank's chunks; merge them once there are many."""
        pending = self._pending[number]
        pending.append(triple)
        if sum(len(query) for query, _, _ in pending) > 2 * CHUNK:
            self._merge_pending(number)

    def _merge_pending(self, number: int) -> None:
        low, high = self._chunks[number]
        lists = _lists(self._pending[number], high - low, self._num_places)
        self._pending[number] = []
        self._merge(number, [lists])

    def _merge(self, number: int, parts: list[Neighbors]) -> None:
        low, high = self._chunks[number]
        known = Neighbors(self._lists.distance_QK[low:high], self._lists.row_QK[low:high])
        merged = merge_neighbors([known, *parts], self._num_places)
        self._lists.distance_QK[low:high] = merged.distance_QK
        self._lists.row_QK[low:high] = merged.row_QK
        self._lower_threshold(number)


def _lists(
    triples: list[tuple[Tensor, Tensor, Tensor]], num_queries: int, num_neighbors: int
) -> Neighbors:
    """Return lists from unordered (query, distance, row) triples, of which there may be none."""
    empty = torch.zeros(0, dtype=torch.int64)
    none = (empty, empty.to(torch.float64), empty)
    query, distance, row = (torch.cat(part) for part in zip(none, *triples, strict=True))
    return neighbors_of_pairs(query, distance, row, num_queries, num_neighbors)
