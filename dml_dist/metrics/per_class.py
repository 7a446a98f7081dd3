"""Recall@1, R-precision and MAP@R of each class as integer sums that merge by addition.

Units and their halves are those of `metrics.ranking`, so that the sums of a class depend neither on
the order of its queries nor on their partition.

Legend: Q queries, C classes, S = 6 sums.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dml_dist.metrics.ranking import UNIT_BITS, join_units, split_units, to_units


@dataclass(frozen=True, eq=False)
class ClassMeans:
    """Means over the counted queries of each class.

    Attributes:
        num_queries_C: Counted queries, int64.
        recall_at_1_C: float64 in [0, 1]; NaN without a counted query.
        r_precision_C: Likewise.
        map_at_r_C: Likewise.
    """

    num_queries_C: np.ndarray
    recall_at_1_C: np.ndarray
    r_precision_C: np.ndarray
    map_at_r_C: np.ndarray


def empty_sums(num_classes: int) -> np.ndarray:
    """Return sums over no queries, (S, C) int64; sums over disjoint queries merge by `+`."""
    return np.zeros((6, num_classes), dtype=np.int64)


def add_partial(
    sums_SC: np.ndarray,
    class_Q: np.ndarray,
    hit_Q: np.ndarray,
    r_precision_Q: np.ndarray,
    map_at_r_Q: np.ndarray,
) -> None:
    """Add queries to sums in place.

    Args:
        sums_SC: From `empty_sums`.
        class_Q: Class of each query, 0..C-1, (Q,) int64.
        hit_Q: Whether its nearest neighbor has its class, (Q,) bool.
        r_precision_Q: In [0, 1], (Q,) float64.
        map_at_r_Q: In [0, 1], (Q,) float64.
    """
    values = (
        np.ones(len(class_Q), dtype=np.int64),
        hit_Q.astype(np.int64),
        *split_units(to_units(r_precision_Q)),
        *split_units(to_units(map_at_r_Q)),
    )
    for sums_C, values_Q in zip(sums_SC, values, strict=True):
        np.add.at(sums_C, class_Q, values_Q)


def finish(sums_SC: np.ndarray) -> ClassMeans:
    """Return the means of each class."""
    num_queries, hits, *halves = sums_SC.tolist()

    def mean_units(upper_C: list[int], lower_C: list[int]) -> np.ndarray:
        sums_C = map(join_units, upper_C, lower_C)
        return _quotients(sums_C, [count << UNIT_BITS for count in num_queries])

    return ClassMeans(
        sums_SC[0].copy(),
        _quotients(hits, num_queries),
        mean_units(*halves[:2]),
        mean_units(*halves[2:]),
    )


def _quotients(sums_C: Iterable[int], counts_C: list[int]) -> np.ndarray:
    # Python's integer division is correctly rounded for any size.
    pairs = zip(sums_C, counts_C, strict=True)
    return np.array([total / count if count else np.nan for total, count in pairs], dtype=float)
