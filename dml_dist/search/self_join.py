"""Self-join of a gallery shard: the K nearest neighbors of every row, from half of the products.

Distances are symmetric: the block of approximate distances between chunks i and j serves the
queries of both. Each query keeps candidates up to a limit: the approximate distance of its K-th
best candidate so far, plus the error bounds of `search.approximate`. The limit falls as more rows
are seen. The remaining candidates are ranked by exact distances. A query with too many candidates
(collapsed embeddings) is left unresolved; the caller answers it with `GalleryShard.nearest`.

Legend: N rows of the shard, P pairs, K neighbors of a query, D embedding width, i and j chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from dml_dist.losses.numerics import full_precision
from dml_dist.search.approximate import Approximation, Thresholds
from dml_dist.search.exact import pair_distances
from dml_dist.search.neighbors import Neighbors, empty_neighbors, neighbors_of_pairs

CHUNK = 1024
"""Rows per chunk: a block of products, 4 MiB, fits the cache of a core."""

LARGEST = torch.finfo(torch.float32).max
"""Limit of a query that keeps every row; finite, so that padding at distance inf is excluded."""

# Rows or columns of a block that share one minimum in `Block.within`.
_PART = 64
# Candidates allowed beyond 2 K: for uncertain pairs, and for limits that lag behind.
SLACK = 32


@dataclass(frozen=True, eq=False)
class Block:
    """A block of scaled approximate distances between two sets of rows, queried by row or column.

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
        # Most parts hold no pair within the limits; their minima tell which do, so that only few
        # values are compared one by one.
        if of_columns:
            parts_SPG = self.values_QG.view(num_rows // _PART, _PART, num_columns)
            # NumPy reduces this axis 2x faster than torch, but the last axis (below) 6x slower.
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
    """Allocate the memory of one block of two chunks, float32."""
    side = CHUNK + -CHUNK % _PART
    return torch.empty(side * side)


def block(left_QE: Tensor, right_GE: Tensor, out: Tensor) -> Block:
    """Return the block of rows from `left_operand` and `right_operand`, written into `out`."""
    num_queries, num_others = len(left_QE), len(right_GE)
    values_QG = out[: num_queries * num_others].view(num_queries, num_others)
    return Block(torch.mm(left_QE, right_GE.T, out=values_QG))


def left_operand(rows: Thresholds) -> Tensor:
    """Return the left operand of a product that yields whole distances, (Q', D + 2) float32.

    [-2 y_q, |y_q|^2, 1] . [y_g, 1, |y_g|^2] is the approximate distance. Its sum has two products
    more than the sums in the error bound, which are covered by the constant 16 in c. Q' is Q
    rounded up to a multiple of `_PART`; rows beyond Q are infinitely far from all.
    """
    square_Q = _padded(rows.square_Q.to(torch.float32), torch.inf)
    rows_QD = _padded(rows.rows_QD, 0.0)
    return torch.cat([-2.0 * rows_QD, square_Q[:, None], torch.ones(len(rows_QD), 1)], dim=1)


def right_operand(approximation: Approximation, low: int, high: int) -> Tensor:
    """Return the right operand for rows low..high-1 of the shard, (G', D + 2) float32."""
    square_G = _padded(approximation.square_N[low:high], torch.inf)
    rows_GD = _padded(approximation.rows_ND[low:high], 0.0)
    return torch.cat([rows_GD, torch.ones(len(rows_GD), 1), square_G[:, None]], dim=1)


def _padded(rows: Tensor, value: float) -> Tensor:
    """Pad the first dimension with `value` to a multiple of `_PART`."""
    missing = -len(rows) % _PART
    if not missing:
        return rows
    return torch.cat([rows, rows.new_full((missing, *rows.shape[1:]), value)])


class SelfJoin:
    """State of one join: the candidates and the limit of every query."""

    def __init__(
        self, vectors_ND: Tensor, row_N: Tensor, approximation: Approximation, k_N: np.ndarray
    ) -> None:
        """Prepare the join of a shard with itself, on a CPU.

        Args:
            vectors_ND: Stored float32 rows.
            row_N: Their global rows, int64, increasing.
            approximation: Approximation of these rows.
            k_N: K of each row as a query, int64; 0 for rows that are not queries.
        """
        self._vectors_ND = vectors_ND
        self._row_N = row_N
        self._approximation = approximation
        self._places_N = k_N
        self._norm_N = approximation.square_N.to(torch.float64).sqrt()
        # No row of a query's list exceeds its limit; -inf until the query has one, or if it is
        # unresolved: then no candidate passes.
        self._limit_N = torch.full((len(k_N),), -torch.inf)
        self._is_unresolved_N = np.zeros(len(k_N), dtype=bool)
        bounds = [*range(0, len(k_N), CHUNK), len(k_N)]
        self._chunks = list(pairwise(bounds))
        self._kept = [_Candidates() for _ in self._chunks]

    def run(self, num_neighbors: int) -> tuple[Neighbors, np.ndarray]:
        """Return the exact lists, (N, num_neighbors), and which queries are unresolved, (N,) bool.

        Entries beyond a query's K, and the lists of unresolved queries, are undefined.
        """
        with full_precision(self._row_N.device):
            memory = block_memory()
            # Diagonal blocks first: they give every query a finite limit early, so that the other
            # blocks add few candidates.
            for number in range(len(self._chunks)):
                self._join_diagonal(number, memory)
            for number in range(len(self._chunks)):
                self._join_off_diagonal(number, memory)
            for number in range(len(self._chunks)):
                self._prune(number)
        return self._resolve(num_neighbors), self._is_unresolved_N

    def _join_diagonal(self, number: int, memory: Tensor) -> None:
        """Join a chunk with itself, and set the first limits of its queries."""
        low, high = self._chunks[number]
        found = block(self._left_operand(number), self._right_operand(number), memory)
        found.values_QG.fill_diagonal_(torch.inf)  # A row is no neighbor of itself.
        k_Q = self._places_N[low:high]
        wanted = min(int(k_Q.max()), high - low)
        if wanted == 0:
            return
        nearest_QK = found.values_QG[: high - low].topk(wanted, dim=1, largest=False).values.numpy()
        last_Q = np.full(high - low, np.inf)
        has_list_Q = (k_Q > 0) & (k_Q <= wanted)
        last_Q[has_list_Q] = nearest_QK[has_list_Q, k_Q[has_list_Q] - 1]
        last_Q[k_Q == 0] = -np.inf
        self._limit_N[low:high] = self._limits(low, high, last_Q)
        self._add(number, found.within(self._limit_N[low:high], of_columns=False), low)

    def _join_off_diagonal(self, number: int, memory: Tensor) -> None:
        """Join a chunk with all later chunks; each block serves the queries of both."""
        left_QE = self._left_operand(number)
        low, high = self._chunks[number]
        for other in range(number + 1, len(self._chunks)):
            start, end = self._chunks[other]
            found = block(left_QE, self._right_operand(other), memory)
            self._add(number, found.within(self._limit_N[low:high], of_columns=False), start)
            self._add(other, found.within(self._limit_N[start:end], of_columns=True), low)

    def _left_operand(self, number: int) -> Tensor:
        low, high = self._chunks[number]
        return left_operand(self._approximation.of_queries(self._vectors_ND[low:high]))

    def _right_operand(self, number: int) -> Tensor:
        return right_operand(self._approximation, *self._chunks[number])

    def _limits(self, low: int, high: int, last_Q: np.ndarray) -> Tensor:
        """Return the limit of each query, given K candidates with values up to `last_Q`, float32.

        No approximate distance of a row in the exact list exceeds it.
        """
        norm_Q = self._norm_N[low:high]
        # The error bound twice: the K candidates have exact distances up to within_Q, so the list
        # lies within it, and the approximate distances of its rows err once more.
        within_Q = self._approximation.above(norm_Q, torch.from_numpy(last_Q))
        limit_Q = within_Q + self._approximation.bound(norm_Q, within_Q)
        return limit_Q.clamp(max=LARGEST).to(torch.float32)

    def _add(self, number: int, pairs: tuple[np.ndarray, ...], start: int) -> None:
        """Add candidates of a chunk's queries; their rows are counted from `start`."""
        query_P, other_P, value_P = pairs
        kept = self._kept[number]
        kept.append(query_P, other_P + start, value_P)
        # Prune when the new pairs outnumber the sorted ones: amortized, each pair is sorted O(1)
        # times.
        if kept.num_new > max(kept.num_sorted, 2 * CHUNK):
            self._prune(number)

    def _prune(self, number: int) -> None:
        """Sort a chunk's candidates, lower its queries' limits, and drop candidates beyond them."""
        low, high = self._chunks[number]
        kept, k_Q = self._kept[number], self._places_N[low:high]
        query_P, value_P = kept.sort()
        count_Q = np.bincount(query_P, minlength=high - low)
        first_Q = count_Q.cumsum() - count_Q
        last_Q = np.full(high - low, np.inf)
        has_list_Q = (k_Q > 0) & (count_Q >= k_Q)
        last_Q[has_list_Q] = value_P[(first_Q + k_Q - 1)[has_list_Q]]
        limit_Q = torch.minimum(self._limit_N[low:high], self._limits(low, high, last_Q)).numpy()
        within_P = value_P <= limit_Q[query_P]
        # Too many rows within the error bound of the K-th: later blocks will only add to them.
        count_Q = np.bincount(query_P[within_P], minlength=high - low)
        is_unresolved_Q = self._is_unresolved_N[low:high] | (count_Q > 2 * k_Q + SLACK)
        self._is_unresolved_N[low:high] = is_unresolved_Q
        self._limit_N[low:high] = torch.from_numpy(np.where(is_unresolved_Q, -np.inf, limit_Q))
        kept.keep(within_P & ~is_unresolved_Q[query_P])

    def _resolve(self, num_neighbors: int) -> Neighbors:
        """Return the lists of all queries, ranked by the exact distances of their candidates."""
        parts = [empty_neighbors(0, num_neighbors, self._row_N.device)]
        for (low, high), kept in zip(self._chunks, self._kept, strict=True):
            query_P, position_P = kept.pairs()
            distance_P = pair_distances(
                self._vectors_ND, query_P + low, self._vectors_ND, position_P
            )
            row_P = self._row_N[position_P]
            parts.append(neighbors_of_pairs(query_P, distance_P, row_P, high - low, num_neighbors))
        return Neighbors(
            torch.cat([part.distance_QK for part in parts]),
            torch.cat([part.row_QK for part in parts]),
        )


class _Candidates:
    """Candidate pairs of the queries of one chunk: some sorted by (query, value), some new.

    Attributes:
        num_sorted: Number of sorted pairs.
        num_new: Number of new pairs.
    """

    def __init__(self) -> None:
        self._key_P = np.zeros(0, dtype=np.int64)
        self._position_P = np.zeros(0, dtype=np.int64)
        self._new: list[tuple[np.ndarray, np.ndarray]] = []
        self.num_sorted = 0
        self.num_new = 0

    def append(self, query_P: np.ndarray, position_P: np.ndarray, value_P: np.ndarray) -> None:
        """Add pairs; values that are negative by rounding count as 0."""
        bits_P = np.maximum(value_P, np.float32(0)).view(np.int32)
        # One integer key for (query, value): the bits of nonnegative floats sort like the floats.
        self._new.append(((query_P << 32) | bits_P, position_P))
        self.num_new += len(query_P)

    def sort(self) -> tuple[np.ndarray, np.ndarray]:
        """Sort all pairs by (query, value); return their queries, int64, and values, float32."""
        key_P = np.concatenate([self._key_P, *(key for key, _ in self._new)])
        position_P = np.concatenate([self._position_P, *(position for _, position in self._new)])
        order_P = key_P.argsort()
        self._key_P, self._position_P, self._new = key_P[order_P], position_P[order_P], []
        self.num_sorted, self.num_new = len(order_P), 0
        return self._key_P >> 32, (self._key_P & 0xFFFFFFFF).astype(np.int32).view(np.float32)

    def keep(self, is_kept_P: np.ndarray) -> None:
        """Drop sorted pairs outside a mask."""
        self._key_P, self._position_P = self._key_P[is_kept_P], self._position_P[is_kept_P]
        self.num_sorted = len(self._key_P)

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Return queries and positions of the sorted pairs, (P,) int64 each."""
        return torch.from_numpy(self._key_P >> 32), torch.from_numpy(self._position_P)
