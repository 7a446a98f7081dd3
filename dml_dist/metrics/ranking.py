"""Recall@K, R-precision and MAP@R as sums that merge: partial, merge, finish.

For a query with R other gallery rows of its class, and rel(i) = 1 when the i-th nearest gallery
row has its class (Musgrave et al., "A Metric Learning Reality Check", ECCV 2020):

    Recall@K    = 1 when the nearest row of its class is among the first K, else 0
    R-precision = 1/R sum_{i <= R} rel(i)
    MAP@R       = 1/R sum_{i <= R} P(i) rel(i),   P(i) = 1/i sum_{j <= i} rel(j)

Each is the mean over queries with R >= 1.

A query's R-precision and MAP@R are rounded to multiples of 2^-52 (error at most 2^-53, also of
their mean) and added as integers of any size, so sums depend neither on the order of the queries
nor on their partition.

Legend: Q queries, K entries of a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

UNIT_BITS = 52
_HALF_BITS = UNIT_BITS // 2
NOT_LISTED = np.iinfo(np.int64).max
"""Rank of a query whose class does not occur in its list."""


@dataclass(frozen=True)
class RetrievalSums:
    """Sums over queries, as integers.

    Attributes:
        num_queries: Number of counted queries.
        hits_at: For each K of Recall@K, the queries with a hit among the first K.
        r_precision_units: Sum of R-precision in units of 2^-52.
        map_at_r_units: Sum of MAP@R in units of 2^-52.
    """

    num_queries: int
    hits_at: tuple[int, ...]
    r_precision_units: int
    map_at_r_units: int


@dataclass(frozen=True)
class RetrievalMeans:
    """Means over queries, in [0, 1]."""

    recall_at_k: dict[int, float]
    r_precision: float
    map_at_r: float


def first_hit(relevant_QK: np.ndarray) -> np.ndarray:
    """Return the 0-based index of the first relevant neighbor, or NOT_LISTED, (Q,) int64."""
    index_Q = relevant_QK.argmax(axis=1)
    return np.where(relevant_QK.any(axis=1), index_Q, NOT_LISTED)


def recall_partial(rank_Q: np.ndarray, recall_at: Sequence[int]) -> tuple[int, ...]:
    """Return, for each K, how many queries have their nearest relevant row among the first K.

    Args:
        rank_Q: Gallery rows that come before the nearest relevant one, (Q,) int64.
        recall_at: The K of Recall@K, each >= 1.
    """
    return tuple(int(np.count_nonzero(rank_Q < k)) for k in recall_at)


def ranking_partial(relevant_QK: np.ndarray, num_relevant_Q: np.ndarray) -> tuple[int, int]:
    """Return the sums of R-precision and MAP@R over queries, in units of 2^-52.

    Args:
        relevant_QK: Whether each neighbor, nearest first, has the query's class, (Q, K) bool;
            K is at least every query's R.
        num_relevant_Q: R, (Q,) int64, each >= 1.
    """
    r_precision_Q, map_at_r_Q = ranking_scores(relevant_QK, num_relevant_Q)
    return sum_units(to_units(r_precision_Q)), sum_units(to_units(map_at_r_Q))


def ranking_scores(
    relevant_QK: np.ndarray, num_relevant_Q: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return R-precision and the average precision of MAP@R of each query, (Q,) float64 each.

    Args:
        relevant_QK: As in `ranking_partial`.
        num_relevant_Q: R, (Q,) int64, each >= 1.
    """
    counted_QK = top_hits(relevant_QK, num_relevant_Q)
    r_precision_Q = counted_QK.sum(axis=1) / num_relevant_Q
    return r_precision_Q, sum_of_precisions(counted_QK) / num_relevant_Q


def top_hits(relevant_QK: np.ndarray, length_Q: np.ndarray) -> np.ndarray:
    """Return the hits among the first `length_Q` entries of each list, (Q, K) bool."""
    return relevant_QK & (np.arange(1, relevant_QK.shape[1] + 1) <= length_Q[:, None])


def sum_of_precisions(counted_QK: np.ndarray) -> np.ndarray:
    """Return sum_i P(i) rel(i) of each query over its list's hits, (Q,) float64."""
    num_queries, list_length = counted_QK.shape
    if list_length == 0:
        return np.zeros(num_queries)
    hits_QK = counted_QK.cumsum(axis=1)
    # cumsum adds from the left for any K, and entries beyond the last hit add exact zeros, so the
    # result does not depend on K; `sum` may reorder.
    precisions_QK = np.where(counted_QK, hits_QK / np.arange(1, list_length + 1), 0.0)
    return precisions_QK.cumsum(axis=1)[:, -1]


def merge(a: RetrievalSums, b: RetrievalSums) -> RetrievalSums:
    """Return the sums over two disjoint sets of queries."""
    return RetrievalSums(
        a.num_queries + b.num_queries,
        tuple(x + y for x, y in zip(a.hits_at, b.hits_at, strict=True)),
        a.r_precision_units + b.r_precision_units,
        a.map_at_r_units + b.map_at_r_units,
    )


def finish(total: RetrievalSums, recall_at: Sequence[int]) -> RetrievalMeans:
    """Return the means.

    Raises:
        ValueError: If no query was counted.
    """
    if total.num_queries == 0:
        raise ValueError("no query was counted, so the means are undefined")
    # Python's integer division is correctly rounded for any size.
    return RetrievalMeans(
        {k: hits / total.num_queries for k, hits in zip(recall_at, total.hits_at, strict=True)},
        total.r_precision_units / (total.num_queries << UNIT_BITS),
        total.map_at_r_units / (total.num_queries << UNIT_BITS),
    )


def to_units(values_Q: np.ndarray) -> np.ndarray:
    """Return values in [0, 1] as multiples of 2^-52, (Q,) int64."""
    return np.rint(values_Q * 2.0**UNIT_BITS).astype(np.int64)


def sum_units(units_Q: np.ndarray) -> int:
    """Return the sum of units as a Python integer, which cannot overflow."""
    upper_Q, lower_Q = split_units(units_Q)
    return join_units(int(upper_Q.sum()), int(lower_Q.sum()))


def split_units(units_Q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return upper and lower halves of units, whose int64 sums cannot overflow below 2^36 rows.

    Sums of the units themselves would overflow at 2,048 queries.
    """
    return units_Q >> _HALF_BITS, units_Q & ((1 << _HALF_BITS) - 1)


def join_units(upper: int, lower: int) -> int:
    """Return the sum of units from the sums of their upper and lower halves."""
    return (upper << _HALF_BITS) + lower
