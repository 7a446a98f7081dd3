"""The nearest rows of every row of a gallery shard among the shard's own rows, by half a product.

Distances are symmetric: the block of approximate distances of chunks i and j serves the queries of
both. A query keeps the rows whose approximate distance does not exceed a threshold, which falls as
more rows are seen: K rows are known within it, less the bounds of `search.approximate`. What is
left at the end is decided by exact distances. A query that too many rows stay in doubt for
(collapsed embeddings) is left open, for others to answer.

Legend: N rows of the shard, P pairs, K places of a list, D embedding width, i and j chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from dml_dist.search.approximate import Approximation, Thresholds, full_precision
from dml_dist.search.exact import pair_distances
from dml_dist.search.neighbors import Neighbors, empty_neighbors, neighbors_of_pairs

CHUNK = 1024
"""Rows of a chunk: a block of products, 4 MiB, stays near a core."""

LARGEST = torch.finfo(torch.float32).max
"""Limit of a query that takes every row, but for the infinitely far ones, which are none."""

# Rows or columns of a block that are looked at together.
_PART = 64
# Kept of a query beyond twice its list: what doubt and thresholds that lag behind leave.
SPARE = 32


@dataclass(frozen=True, eq=False)
class Block:
    """A block of scaled approximate distances of two sets of rows, both ways round.

    Attributes:
        values_QG: float32, (Q, G), both multiples of `_PART`; inf beyond the rows.
    """

    values_QG: Tensor

    def within(self, limit_Q: Tensor, *, of_columns: bool) -> tuple[np.ndarray, ...]:
        """Return (query, other, value) of the pairs within the queries' limits, (P,) each.

        Args:
            limit_Q: Limit of each row of the block, or of each column, float32.
            of_columns: Whether columns are the queries.
        """
        num_rows, num_columns = self.values_QG.shape
        limit_Q = _padded(limit_Q, -torch.inf)
        # Few queries have a pair in a part of a block: the parts' minima tell which.
        if of_columns:
            parts_SPG = self.values_QG.view(num_rows // _PART, _PART, num_columns)
            # NumPy takes minima over rows twice as fast as torch, and those below six times slower.
            lowest_SG = torch.from_numpy(parts_SPG.numpy().min(axis=1))
            part_H, query_H = (lowest_SG <= limit_Q).nonzero(as_tuple=True)
            found_HP = parts_SPG[part_H, :, query_H]
        else:
            parts_QSP = self.values_QG.view(num_rows, num_columns // _PART, _PART)
            query_H, part_H = (parts_QSP.amin(dim=2) <= limit_Q[:, None]).nonzero(as_tuple=True)
            found_HP = parts_QSP[query_H, part_H]
        hit_P = np.flatnonzero((found_HP <= limit_Q[query_H, None]).numpy())
        at_P = hit_P // _PART
        other_P = part_H.numpy()[at_P] * _PART + hit_P % _PART
        return query_H.numpy()[at_P], other_P, found_HP.flatten().numpy()[hit_P]


def block_memory() -> Tensor:
    """Return memory for a block of two chunks, float32."""
    side = CHUNK + -CHUNK % _PART
    return torch.empty(side * side)


def block(left_QE: Tensor, right_GE: Tensor, out: Tensor) -> Block:
    """Return the block of rows made by `left_side` and `right_side`; `out` is its memory."""
    num_queries, num_others = len(left_QE), len(right_GE)
    values_QG = out[: num_queries * num_others].view(num_queries, num_others)
    return Block(torch.mm(left_QE, right_GE.T, out=values_QG))


def left_side(rows: Thresholds) -> Tensor:
    """Return rows for the left of a product that gives whole distances, (Q', D + 2) float32.

    Its sums have two products more than each of the bound's; the bound has room for them. Q' is Q
    rounded up to a multiple of `_PART`; rows beyond Q are infinitely far from all.
    """
    square_Q = _padded(rows.square_Q.to(torch.float32), torch.inf)
    rows_QD = _padded(rows.rows_QD, 0.0)
    return torch.cat([-2.0 * rows_QD, square_Q[:, None], torch.ones(len(rows_QD), 1)], dim=1)


def right_side(approximation: Approximation, low: int, high: int) -> Tensor:
    """Return rows low..high-1 of the shard for the right of it, (G', D + 2) float32."""
    square_G = _padded(approximation.square_N[low:high], torch.inf)
    rows_GD = _padded(approximation.rows_ND[low:high], 0.0)
    return torch.cat([rows_GD, torch.ones(len(rows_GD), 1), square_G[:, None]], dim=1)


def _padded(rows: Tensor, value: float) -> Tensor:
    """Return rows with more of one value, up to a multiple of `_PART`."""
    missing = -len(rows) % _PART
    if not missing:
        return rows
    return torch.cat([rows, rows.new_full((missing, *rows.shape[1:]), value)])


class SelfJoin:
    """One join in progress: the candidates of every query so far."""

    def __init__(
        self, vectors_ND: Tensor, row_N: Tensor, approximation: Approximation, places_N: np.ndarray
    ) -> None:
        """Prepare the join of a shard with itself, on a CPU.

        Args:
            vectors_ND: Stored float32 rows.
            row_N: Their global rows, int64, rising.
            approximation: Of these rows.
            places_N: K of each row as a query, int64; 0 where its list is not asked for.
        """
        self._vectors_ND = vectors_ND
        self._row_N = row_N
        self._approximation = approximation
        self._places_N = places_N
        self._norm_N = approximation.square_N.to(torch.float64).sqrt()
        # Above what a row within a query's list can have; none passes while the query is closed.
        self._limit_N = torch.full((len(places_N),), -torch.inf)
        self._is_open_N = np.zeros(len(places_N), dtype=bool)
        bounds = [*range(0, len(places_N), CHUNK), len(places_N)]
        self._chunks = list(pairwise(bounds))
        self._kept = [_Candidates() for _ in self._chunks]

    def run(self, num_places: int) -> tuple[Neighbors, np.ndarray]:
        """Return the exact lists, (N, num_places), and the queries that are left open, (N,) bool.

        Places from a query's K on, and the lists of open queries, mean nothing.
        """
        with full_precision(self._row_N.device):
            memory = block_memory()
            for number in range(len(self._chunks)):
                self._begin(number, memory)
            for number in range(len(self._chunks)):
                self._join_later(number, memory)
            for number in range(len(self._chunks)):
                self._tighten(number)
        return self._decide(num_places), self._is_open_N

    def _begin(self, number: int, memory: Tensor) -> None:
        """Join a chunk with itself, which gives its queries their first limits."""
        low, high = self._chunks[number]
        found = block(self._left(number), self._right(number), memory)
        found.values_QG.fill_diagonal_(torch.inf)
        places_Q = self._places_N[low:high]
        wanted = min(int(places_Q.max()), high - low)
        if wanted == 0:
            return
        nearest_QK = found.values_QG[: high - low].topk(wanted, dim=1, largest=False).values.numpy()
        last_Q = np.full(high - low, np.inf)
        has_list_Q = (places_Q > 0) & (places_Q <= wanted)
        last_Q[has_list_Q] = nearest_QK[has_list_Q, places_Q[has_list_Q] - 1]
        last_Q[places_Q == 0] = -np.inf
        self._limit_N[low:high] = self._limits(low, high, last_Q)
        self._add(number, found.within(self._limit_N[low:high], of_columns=False), low)

    def _join_later(self, number: int, memory: Tensor) -> None:
        """Join a chunk with all chunks after it."""
        left_QE = self._left(number)
        low, high = self._chunks[number]
        for other in range(number + 1, len(self._chunks)):
            start, end = self._chunks[other]
            found = block(left_QE, self._right(other), memory)
            self._add(number, found.within(self._limit_N[low:high], of_columns=False), start)
            self._add(other, found.within(self._limit_N[start:end], of_columns=True), low)

    def _left(self, number: int) -> Tensor:
        low, high = self._chunks[number]
        return left_side(self._approximation.of_queries(self._vectors_ND[low:high]))

    def _right(self, number: int) -> Tensor:
        return right_side(self._approximation, *self._chunks[number])

    def _limits(self, low: int, high: int, last_Q: np.ndarray) -> Tensor:
        """Return what no row of a query's list exceeds, given K rows within `last_Q`, float32."""
        norm_Q = self._norm_N[low:high]
        within_Q = self._approximation.above(norm_Q, torch.from_numpy(last_Q))
        limit_Q = within_Q + self._approximation.bound(norm_Q, within_Q)
        return limit_Q.clamp(max=LARGEST).to(torch.float32)

    def _add(self, number: int, pairs: tuple[np.ndarray, ...], start: int) -> None:
        """Keep pairs of a chunk's queries with rows counted from `start`."""
        query_P, other_P, value_P = pairs
        kept = self._kept[number]
        kept.append(query_P, other_P + start, value_P)
        if kept.num_new > max(kept.num_sorted, 2 * CHUNK):
            self._tighten(number)

    def _tighten(self, number: int) -> None:
        """Sort a chunk's candidates, lower its queries' limits, and drop what exceeds them."""
        low, high = self._chunks[number]
        kept, places_Q = self._kept[number], self._places_N[low:high]
        query_P, value_P = kept.sort()
        count_Q = np.bincount(query_P, minlength=high - low)
        first_Q = count_Q.cumsum() - count_Q
        last_Q = np.full(high - low, np.inf)
        has_list_Q = (places_Q > 0) & (count_Q >= places_Q)
        last_Q[has_list_Q] = value_P[(first_Q + places_Q - 1)[has_list_Q]]
        limit_Q = torch.minimum(self._limit_N[low:high], self._limits(low, high, last_Q)).numpy()
        within_P = value_P <= limit_Q[query_P]
        # More than a list and some: doubt is not going to leave these queries.
        count_Q = np.bincount(query_P[within_P], minlength=high - low)
        is_open_Q = self._is_open_N[low:high] | (count_Q > 2 * places_Q + SPARE)
        self._is_open_N[low:high] = is_open_Q
        self._limit_N[low:high] = torch.from_numpy(np.where(is_open_Q, -np.inf, limit_Q))
        kept.choose(within_P & ~is_open_Q[query_P])

    def _decide(self, num_places: int) -> Neighbors:
        """Return the lists of all queries out of their candidates' exact distances."""
        parts = [empty_neighbors(0, num_places, self._row_N.device)]
        for (low, high), kept in zip(self._chunks, self._kept, strict=True):
            query_P, position_P = kept.pairs()
            distance_P = pair_distances(
                self._vectors_ND, query_P + low, self._vectors_ND, position_P
            )
            row_P = self._row_N[position_P]
            parts.append(neighbors_of_pairs(query_P, distance_P, row_P, high - low, num_places))
        return Neighbors(
            torch.cat([part.distance_QK for part in parts]),
            torch.cat([part.row_QK for part in parts]),
        )


class _Candidates:
    """Pairs of the queries of one chunk: sorted ones by (query, value), and new ones.

    Attributes:
        num_sorted: Sorted pairs.
        num_new: New ones.
    """

    def __init__(self) -> None:
        self._key_P = np.zeros(0, dtype=np.int64)
        self._position_P = np.zeros(0, dtype=np.int64)
        self._new: list[tuple[np.ndarray, np.ndarray]] = []
        self.num_sorted = 0
        self.num_new = 0

    def append(self, query_P: np.ndarray, position_P: np.ndarray, value_P: np.ndarray) -> None:
        """Add pairs; values that rounding made negative count as 0."""
        bits_P = np.maximum(value_P, np.float32(0)).view(np.int32)
        # Bits of floats that are not negative rise with the floats.
        self._new.append(((query_P << 32) | bits_P, position_P))
        self.num_new += len(query_P)

    def sort(self) -> tuple[np.ndarray, np.ndarray]:
        """Sort all pairs; return their queries, int64, and values, float32."""
        key_P = np.concatenate([self._key_P, *(key for key, _ in self._new)])
        position_P = np.concatenate([self._position_P, *(position for _, position in self._new)])
        order_P = key_P.argsort()
        self._key_P, self._position_P, self._new = key_P[order_P], position_P[order_P], []
        self.num_sorted, self.num_new = len(order_P), 0
        return self._key_P >> 32, (self._key_P & 0xFFFFFFFF).astype(np.int32).view(np.float32)

    def choose(self, is_kept_P: np.ndarray) -> None:
        """Keep some of the sorted pairs."""
        self._key_P, self._position_P = self._key_P[is_kept_P], self._position_P[is_kept_P]
        self.num_sorted = len(self._key_P)

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Return queries and positions of the sorted pairs, (P,) int64 each."""
        return torch.from_numpy(self._key_P >> 32), torch.from_numpy(self._position_P)
