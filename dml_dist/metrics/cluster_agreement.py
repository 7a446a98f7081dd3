"""Agreement of clusters with classes, from a sparse contingency table: partial, merge, finish.

With n_ij rows of class i in cluster j, a_i rows of class i, b_j rows of cluster j, N rows:

    I         = sum_ij n_ij / N log(N n_ij / (a_i b_j))
    H(a)      = -sum_i a_i / N log(a_i / N),  H(b) likewise
    NMI       = 2 I / (H(a) + H(b))                     arithmetic mean; 1 when both are 0
    NMI (geo) = I / sqrt(H(a) H(b))                     as in older scikit-learn versions
    AMI       = (I - E[I]) / ((H(a) + H(b)) / 2 - E[I])
    precision = TP / sum_j b_j (b_j - 1) / 2,  TP = sum_ij n_ij (n_ij - 1) / 2
    recall    = TP / sum_i a_i (a_i - 1) / 2
    F1        = 2 TP / (sum of both denominators above)

E[I] is the expectation over all assignments of rows to clusters that keep every a_i and b_j (Vinh,
Epps, Bailey, "Information Theoretic Measures for Clusterings Comparison", JMLR 2010). Its terms
depend on a_i and b_j alone, so each pair of sizes is computed once. The hypergeometric weights of a
pair are computed from their ratios and normalized to sum 1, which is accurate for large N.

Sums are correctly rounded (`math.fsum`), counts of pairs are integers of any size: results do not
depend on how rows are partitioned.

Legend: N rows, E cells of the table that are not empty.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Contingency:
    """Sparse contingency table: nonempty cells, sorted by (class, cluster).

    Attributes:
        class_E: int64.
        cluster_E: int64.
        count_E: int64, each >= 1.
    """

    class_E: np.ndarray
    cluster_E: np.ndarray
    count_E: np.ndarray


@dataclass(frozen=True)
class PairScores:
    """Agreement of the pairs of rows in one cluster with the pairs in one class, in [0, 1]."""

    precision: float
    recall: float
    f1: float


def partial(class_N: np.ndarray, cluster_N: np.ndarray) -> Contingency:
    """Return the contingency table of some rows.

    Args:
        class_N: Class of each row, >= 0, (N,) int64.
        cluster_N: Cluster of each row, >= 0, (N,) int64.
    """
    return _aggregate(class_N, cluster_N, np.ones(len(class_N), dtype=np.int64))


def merge(a: Contingency, b: Contingency) -> Contingency:
    """Return the table of two disjoint sets of rows."""
    return _aggregate(
        np.concatenate([a.class_E, b.class_E]),
        np.concatenate([a.cluster_E, b.cluster_E]),
        np.concatenate([a.count_E, b.count_E]),
    )


def normalized_mutual_information(table: Contingency) -> float:
    """Return NMI with the arithmetic mean, in [0, 1]."""
    classes, clusters = _sizes(table)
    total = _entropy(classes) + _entropy(clusters)
    return 1.0 if total == 0 else _clamp(2 * _mutual_information(table) / total)


def geometric_nmi(table: Contingency) -> float:
    """Return NMI with the geometric mean, in [0, 1]; 0 when only one of the entropies is 0."""
    classes, clusters = _sizes(table)
    entropies = _entropy(classes), _entropy(clusters)
    if min(entropies) == 0:
        return 1.0 if max(entropies) == 0 else 0.0
    return _clamp(_mutual_information(table) / math.sqrt(entropies[0] * entropies[1]))


def adjusted_mutual_information(table: Contingency) -> float:
    """Return AMI with the arithmetic mean: 1 for equal partitions, about 0 for random ones."""
    classes, clusters = _sizes(table)
    if len(table.count_E) == len(classes) == len(clusters):
        return 1.0  # Equal partitions; the quotient below may be 0 / 0.
    expected = _expected_information(classes, clusters)
    mean = (_entropy(classes) + _entropy(clusters)) / 2
    denominator = mean - expected
    return (_mutual_information(table) - expected) / denominator if denominator else 0.0


def pair_scores(table: Contingency) -> PairScores:
    """Return pairwise precision, recall and F1; 0 if there are no pairs to divide by."""
    classes, clusters = _sizes(table)
    shared = _pairs(table.count_E.tolist())
    in_clusters, in_classes = _pairs(clusters), _pairs(classes)
    return PairScores(
        shared / in_clusters if in_clusters else 0.0,
        shared / in_classes if in_classes else 0.0,
        2 * shared / (in_clusters + in_classes) if in_clusters + in_classes else 0.0,
    )


def _aggregate(classes: np.ndarray, clusters: np.ndarray, counts: np.ndarray) -> Contingency:
    if not len(classes):
        empty = np.zeros(0, dtype=np.int64)
        return Contingency(empty, empty, empty)
    order = np.lexsort((clusters, classes))
    classes, clusters, counts = classes[order], clusters[order], counts[order]
    # Sum the counts of equal cells, which are adjacent after the sort.
    is_first = np.ones(len(classes), dtype=bool)
    is_first[1:] = (classes[1:] != classes[:-1]) | (clusters[1:] != clusters[:-1])
    first = np.flatnonzero(is_first)
    return Contingency(classes[first], clusters[first], np.add.reduceat(counts, first))


def _sizes(table: Contingency) -> tuple[list[int], list[int]]:
    """Return the sizes of classes and of clusters that have rows."""

    def sizes(part_E: np.ndarray) -> list[int]:
        _, dense_E = np.unique(part_E, return_inverse=True)
        total = np.zeros(int(dense_E.max(initial=-1)) + 1, dtype=np.int64)
        np.add.at(total, dense_E, table.count_E)
        return [int(size) for size in total]

    return sizes(table.class_E), sizes(table.cluster_E)


def _mutual_information(table: Contingency) -> float:
    num_rows = int(table.count_E.sum())
    _, class_E = np.unique(table.class_E, return_inverse=True)
    _, cluster_E = np.unique(table.cluster_E, return_inverse=True)
    classes, clusters = (np.array(sizes, dtype=np.float64) for sizes in _sizes(table))
    fraction_E = table.count_E / num_rows
    expected_E = classes[class_E] * clusters[cluster_E]
    return math.fsum(fraction_E * np.log(num_rows * table.count_E.astype(np.float64) / expected_E))


def _entropy(sizes: list[int]) -> float:
    num_rows = sum(sizes)
    fraction = np.array(sizes, dtype=np.float64) / num_rows
    return abs(math.fsum(-fraction * np.log(fraction)))


def _expected_information(classes: list[int], clusters: list[int]) -> float:
    num_rows = sum(classes)
    return math.fsum(
        class_times * cluster_times * _expected_cell(a, b, num_rows)
        for a, class_times in Counter(classes).items()
        for b, cluster_times in Counter(clusters).items()
    )


def _expected_cell(a: int, b: int, num_rows: int) -> float:
    """Return a cell's expected contribution to I, for a class of a rows and a cluster of b."""
    low, high = max(0, a + b - num_rows), min(a, b)
    n = np.arange(low, high + 1, dtype=np.float64)
    before = n[:-1]
    ratios = np.log((a - before) * (b - before)) - np.log((before + 1) * (num_rows - a - b + n[1:]))
    weights = np.concatenate([[0.0], ratios.cumsum()])
    # In logarithms relative to the largest: the factorials themselves would overflow.
    weights = np.exp(weights - weights.max())
    weights /= math.fsum(weights)
    positive = n > 0
    terms = n[positive] / num_rows * np.log(num_rows * n[positive] / (float(a) * b))
    return math.fsum(terms * weights[positive])


def _pairs(counts: Iterable[int]) -> int:
    return sum(count * (count - 1) // 2 for count in counts)


def _clamp(value: float) -> float:
    """Clamp to [0, 1], which rounding may leave."""
    return min(1.0, max(0.0, value))
