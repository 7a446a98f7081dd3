"""Slow reference retrieval metrics: every distance, every list sorted in full, exact fractions."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np


def stored(embeddings: np.ndarray, distance: str) -> np.ndarray:
    """Return float32 rows; cosine: divided by their norm in float64 first."""
    if distance == "euclidean":
        return embeddings.astype(np.float32)
    out = np.zeros(embeddings.shape, dtype=np.float32)
    for i, row in enumerate(embeddings.astype(np.float64)):
        norm = tree_sum([value * value for value in row]) ** 0.5
        out[i] = row / norm if norm > 0 else row
    return out


def tree_sum(values: Sequence[np.float64]) -> np.float64:
    """Add float64 values as a binary tree over their number padded to a power of two."""
    values = list(values)
    while len(values) & (len(values) - 1):
        values.append(np.float64(0.0))
    while len(values) > 1:
        half = len(values) // 2
        values = [values[j] + values[half + j] for j in range(half)]
    return values[0]


def exact_distances(rows: np.ndarray) -> np.ndarray:
    """Return all (N, N) distances; the tree runs over arrays of shape (N, N), one a coordinate."""
    x = rows.astype(np.float64)
    return tree_sum([(x[:, None, j] - x[None, :, j]) ** 2 for j in range(x.shape[1])])


def retrieval(
    embeddings: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    *,
    recall_at: Sequence[int],
    distance: str,
    roles: Sequence[str] | None = None,
) -> dict[str, float]:
    """Return the metrics under the names of records, and "rankings": row -> sorted gallery rows."""
    count = len(embeddings)
    roles = ["both"] * count if roles is None else list(roles)
    distances = exact_distances(stored(embeddings, distance))
    gallery = [g for g in range(count) if roles[g] in ("gallery", "both")]
    hits = dict.fromkeys(recall_at, 0)
    r_precision = map_at_r = Fraction(0)
    counted = lone = 0
    rankings = {}
    for q in range(count):
        if roles[q] not in ("query", "both"):
            continue
        order = [g for _, g in sorted((distances[q, g], g) for g in gallery if g != q)]
        relevant = [int(labels[g]) == int(labels[q]) for g in order]
        total = sum(relevant)
        if total == 0:
            lone += 1
            continue
        counted += 1
        rankings[q] = order
        for k in recall_at:
            hits[k] += any(relevant[:k])
        r_precision += Fraction(sum(relevant[:total]), total)
        for i in range(1, total + 1):
            if relevant[i - 1]:
                map_at_r += Fraction(sum(relevant[:i]), i) / total
    return {
        **{f"recall_at_{k}": hits[k] / counted for k in recall_at},
        "r_precision": float(r_precision / counted),
        "map_at_r": float(map_at_r / counted),
        "num_queries": counted,
        "num_gallery": len(gallery),
        "num_lone_queries": lone,
        "rankings": rankings,
    }
