"""The nearest rows of every row of all ranks, each pair of rows met once.

Each rank joins its shard with itself (`self_join`). Then, in rounds, every rank hands one chunk of
its rows to all. Of chunk b of rank o and chunk c of rank r, r makes the block when b + c is even
and o < r, or b + c is odd and o > r; o makes it otherwise, in the round of c. So every block is
made once, and all ranks work in all rounds. A block's pairs within the limits of either side are
decided by exact distances at once; what was found for a chunk of another rank is gathered there.

Legend: N rows of this rank, B rows of a chunk, P pairs, K places of a list, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from dml_dist.parallel.comm import Comm
from dml_dist.search.approximate import Approximation, full_precision
from dml_dist.search.exact import pair_distances
from dml_dist.search.neighbors import Neighbors, merge_neighbors, neighbors_of_pairs
from dml_dist.search.self_join import (
    CHUNK,
    LARGEST,
    SPARE,
    SelfJoin,
    block,
    block_memory,
    left_side,
    right_side,
)

# A candidate while it is sorted: key, position, order, and their copies.
_BYTES_PER_PAIR = 48


def join_bytes(places_N: np.ndarray, width: int, world_size: int) -> int:
    """Return what a rank's join needs beside the rows and their float32 copy, at most.

    Args:
        places_N: K of each of its rows.
        width: Embedding width.
        world_size: Number of ranks.
    """
    candidates = int((2 * places_N + SPARE)[places_N > 0].sum()) * _BYTES_PER_PAIR
    lists = 16 * int(places_N.max(initial=0)) * (len(places_N) + 4 * world_size * CHUNK)
    return candidates + lists + 12 * CHUNK * CHUNK + 8 * (world_size + 3) * CHUNK * width


class CrossJoin:
    """One join of the shards of all ranks in progress; every rank calls every method."""

    def __init__(
        self,
        vectors_ND: Tensor,
        approximation: Approximation,
        sizes: tuple[int, ...],
        places_of: Callable[[int], np.ndarray],
        comm: Comm,
    ) -> None:
        """Prepare the join.

        Args:
            vectors_ND: Stored float32 rows of this rank, all of them in the gallery, on a CPU.
            approximation: Of these rows; all ranks use one radius.
            sizes: Rows of each rank.
            places_of: Rank -> K of each of its rows, int64; 0 where a list is not asked for.
            comm: The ranks.
        """
        self._vectors_ND = vectors_ND
        self._approximation = approximation
        self._sizes = sizes
        self._comm = comm
        self._low = sum(sizes[: comm.rank])
        self._places = [torch.from_numpy(places_of(rank)) for rank in range(comm.world_size)]
        self._num_places = max(1, *(int(part.max()) for part in self._places if len(part)))
        self._norm_N = approximation.square_N.to(torch.float64).sqrt()
        bounds = [*range(0, len(vectors_ND), CHUNK), len(vectors_ND)]
        self._chunks = list(pairwise(bounds))
        self._waiting: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in self._chunks]

    def run(self) -> tuple[Neighbors, np.ndarray]:
        """Return the exact lists of this rank's rows, (N, K), and which are open, (N,) bool.

        Places from a query's own K on, and the lists of open queries, mean nothing.
        """
        own_places_N = self._places[self._comm.rank]
        row_N = torch.arange(self._low, self._low + len(own_places_N))
        join = SelfJoin(self._vectors_ND, row_N, self._approximation, own_places_N.numpy())
        self._lists, is_open_N = join.run(self._num_places)
        self._is_open_N = torch.from_numpy(is_open_N)
        if self._comm.world_size > 1:
            with full_precision(self._vectors_ND.device):
                self._memory = block_memory()
                self._within_N = torch.empty(len(row_N), dtype=torch.float64)
                for number in range(len(self._chunks)):
                    self._lower(number)
                for number in range(-(-max(self._sizes) // CHUNK)):
                    self._round(number)
                for number in range(len(self._chunks)):
                    self._merge_waiting(number)
        return self._lists, self._is_open_N.numpy()

    def _round(self, number: int) -> None:
        """Hand chunk `number` of every rank to all, and bring back what is found for it."""
        comm = self._comm
        low, high = self._bounds(comm.rank, number)
        if high > low:
            self._merge_waiting(number)
        bounds = [self._bounds(rank, number) for rank in range(comm.world_size)]
        sizes = [end - start for start, end in bounds]
        rows = comm.all_gather_rows(self._vectors_ND[low:high], sizes, what="join rows")
        within = comm.all_gather_rows(self._within_N[low:high], sizes, what="join limits")
        parts = zip(rows.split(sizes), within.split(sizes), strict=True)
        found = [self._meet(rank, number, *part) for rank, part in enumerate(parts)]
        for owner, (lists, is_open_B) in enumerate(found):
            each = [sizes[owner]] * comm.world_size
            distances = comm.all_gather_rows(lists.distance_QK, each, what="join distances")
            numbers = comm.all_gather_rows(lists.row_QK, each, what="join neighbours")
            is_open_B = comm.all_reduce_max(is_open_B.to(torch.uint8), what="join open queries")
            if owner == comm.rank and high > low:
                self._is_open_N[low:high] |= is_open_B > 0
                self._merge(
                    number, list(map(Neighbors, distances.split(each), numbers.split(each)))
                )

    def _meet(
        self, owner: int, number: int, rows_BD: Tensor, within_B: Tensor
    ) -> tuple[Neighbors, Tensor]:
        """Make this rank's blocks with a chunk of another rank; return what it gives the chunk.

        That is a list of each of the chunk's rows, and which of them are to be left open.
        """
        start, end = self._bounds(owner, number)
        rank = self._comm.rank
        places_B = self._places[owner][start:end]
        is_open_B = torch.zeros(len(rows_BD), dtype=torch.bool)
        triples: list[tuple[Tensor, Tensor, Tensor]] = []
        if owner != rank and len(rows_BD):
            others = self._approximation.of_queries(rows_BD)
            left_BE = left_side(others)
            limit_B = self._limits(others.square_Q.sqrt(), within_B)
            first = sum(self._sizes[:owner]) + start
            for own, (low, high) in enumerate(self._chunks):
                if ((number + own) % 2 == 0) != (owner < rank):
                    continue
                right = right_side(self._approximation, low, high)
                found = block(left_BE, right, self._memory)
                query, other = self._few(
                    found.within(limit_B, of_columns=False), places_B, is_open_B
                )
                distance = pair_distances(rows_BD, query, self._vectors_ND, other + low)
                triples.append((query, distance, other + low + self._low))
                limit_G = self._limits(self._norm_N[low:high], self._within_N[low:high])
                query, other = self._few(
                    found.within(limit_G, of_columns=True),
                    self._places[rank][low:high],
                    self._is_open_N[low:high],
                )
                distance = pair_distances(self._vectors_ND, query + low, rows_BD, other)
                self._wait(own, (query, distance, other + first))
        lists = _lists(triples, len(rows_BD), self._num_places)
        return lists, is_open_B

    def _few(
        self, pairs: tuple[np.ndarray, ...], places_Q: Tensor, is_open_Q: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the pairs of queries with few of them, and mark the others open, in place."""
        query_P, other_P = torch.from_numpy(pairs[0]), torch.from_numpy(pairs[1])
        count_Q = torch.bincount(query_P, minlength=len(places_Q))
        # A list that is not full yet takes all; a row in doubt more often than that is hopeless.
        is_open_Q |= count_Q > 2 * places_Q + SPARE + CHUNK // 4
        kept_P = ~is_open_Q[query_P]
        return query_P[kept_P], other_P[kept_P]

    def _bounds(self, rank: int, number: int) -> tuple[int, int]:
        size = self._sizes[rank]
        return min(number * CHUNK, size), min((number + 1) * CHUNK, size)

    def _limits(self, norm_Q: Tensor, within_Q: Tensor) -> Tensor:
        """Return what no row within a scaled exact distance exceeds; below 0 there is none."""
        limit_Q = within_Q + self._approximation.bound(norm_Q, within_Q.clamp(min=0.0))
        limit_Q = torch.where(within_Q < 0, -torch.inf, limit_Q.clamp(max=LARGEST))
        return limit_Q.to(torch.float32)

    def _lower(self, number: int) -> None:
        """Set the scaled exact distances within which a chunk's queries know their K rows."""
        low, high = self._chunks[number]
        places_Q = self._places[self._comm.rank][low:high]
        last_Q1 = (places_Q - 1).clamp(min=0)[:, None]
        known_Q = self._lists.distance_QK[low:high].gather(1, last_Q1)[:, 0]
        closed_Q = self._is_open_N[low:high] | (places_Q == 0)
        known_Q = known_Q * self._approximation.scale_square
        self._within_N[low:high] = known_Q.masked_fill(closed_Q, -1.0)

    def _wait(self, number: int, triple: tuple[Tensor, Tensor, Tensor]) -> None:
        """Keep what was found for one of this rank's chunks; merge it when it is much."""
        waiting = self._waiting[number]
        waiting.append(triple)
        if sum(len(query) for query, _, _ in waiting) > 2 * CHUNK:
            self._merge_waiting(number)

    def _merge_waiting(self, number: int) -> None:
        low, high = self._chunks[number]
        lists = _lists(self._waiting[number], high - low, self._num_places)
        self._waiting[number] = []
        self._merge(number, [lists])

    def _merge(self, number: int, parts: list[Neighbors]) -> None:
        low, high = self._chunks[number]
        known = Neighbors(self._lists.distance_QK[low:high], self._lists.row_QK[low:high])
        merged = merge_neighbors([known, *parts], self._num_places)
        self._lists.distance_QK[low:high] = merged.distance_QK
        self._lists.row_QK[low:high] = merged.row_QK
        self._lower(number)


def _lists(
    triples: list[tuple[Tensor, Tensor, Tensor]], num_queries: int, num_places: int
) -> Neighbors:
    """Return lists out of loose (query, distance, row) triples, which may be none."""
    empty = torch.zeros(0, dtype=torch.int64)
    none = (empty, empty.to(torch.float64), empty)
    query, distance, row = (torch.cat(part) for part in zip(none, *triples, strict=True))
    return neighbors_of_pairs(query, distance, row, num_queries, num_places)
