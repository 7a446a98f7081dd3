"""Slow reference clustering: k-means as loops over rows, and E[I] in exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from tests.oracles_retrieval import tree_sum


def distance(a: np.ndarray, b: np.ndarray) -> np.float64:
    """Return the squared distance of two float32 rows, added as a binary tree in float64."""
    return tree_sum([(np.float64(x) - np.float64(y)) ** 2 for x, y in zip(a, b, strict=True)])


def nearest(row: np.ndarray, centers: np.ndarray) -> int:
    """Return the nearest center, ties to the lower one."""
    distances = [distance(row, center) for center in centers]
    return distances.index(min(distances))


def kmeans(rows: np.ndarray, first: list[int], max_iterations: int = 20) -> tuple[list[int], int]:
    """Return the cluster of each row and the number of updates.

    Means are exact fractions, rounded to float32; empty clusters take the rows farthest from
    their centres.
    """
    centers = rows[first].copy()
    clusters = [nearest(row, centers) for row in rows]
    for iteration in range(1, max_iterations + 1):
        far = sorted(
            (-distance(row, centers[cluster]), i)
            for i, (row, cluster) in enumerate(zip(rows, clusters, strict=True))
            if clusters.count(cluster) > 1
        )
        spare = [i for minus, i in far if minus < 0]
        new = centers.copy()
        for c in range(len(centers)):
            members = [i for i, cluster in enumerate(clusters) if cluster == c]
            if members:
                for j in range(rows.shape[1]):
                    total = sum(Fraction(float(rows[i, j])) for i in members)
                    new[c, j] = np.float32(float(total / len(members)))
            elif spare:
                new[c] = rows[spare.pop(0)]
        centers = new
        before, clusters = clusters, [nearest(row, centers) for row in rows]
        if clusters == before:
            return clusters, iteration
    return clusters, max_iterations


def expected_information(classes: list[int], clusters: list[int]) -> float:
    """Return E[I] with hypergeometric probabilities as exact fractions."""
    total = sum(classes)
    terms = []
    for a in classes:
        for b in clusters:
            for n in range(max(1, a + b - total), min(a, b) + 1):
                ways = math.comb(b, n) * math.comb(total - b, a - n)
                weight = float(Fraction(ways, math.comb(total, a)))
                terms.append(n / total * math.log(total * n / (a * b)) * weight)
    return math.fsum(terms)
