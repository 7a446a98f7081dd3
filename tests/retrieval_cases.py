"""Embeddings that are hard to rank exactly: ties, duplicates, near-duplicates, collapse."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Case:
    """Rows to evaluate; roles of None are both for all."""

    embeddings: np.ndarray
    labels: np.ndarray
    roles: np.ndarray | None = None


def cases() -> dict[str, Case]:
    """Return all cases by name; deterministic."""
    rng = np.random.default_rng(20)
    count = 90
    labels = rng.integers(0, 17, count)
    normal = rng.standard_normal((count, 12)).astype(np.float32)
    grid = rng.integers(-1, 2, (count, 3)).astype(np.float32)
    centers = rng.standard_normal((count // 3, 20))
    shifts = 10.0 ** rng.uniform(-7, -4, (count, 1)) * rng.standard_normal((count, 20))
    near = (np.repeat(centers, 3, axis=0) + shifts).astype(np.float32)
    # Rows of a group of near-duplicates have different classes; row i and i + 30 agree in class.
    near_labels = np.arange(count) % (count // 3)
    outlier = normal.copy()
    outlier[40] *= 1e18
    with_zeros = normal.copy()
    with_zeros[::7] = 0.0
    lone = labels.copy()
    lone[::4] = 1000 + np.arange(len(lone[::4]))
    wide = np.array([2**24, 2**24 + 1, -5, 2**62, -(2**63), 7])[rng.integers(0, 6, count)]
    large = np.where(rng.uniform(size=count) < 0.5, 3, labels)
    roles = np.array(["query", "gallery", "both"])[rng.integers(0, 3, count)]
    split = np.array(["query", "gallery"])[rng.integers(0, 2, count)]
    return {
        "normal": Case(normal, labels),
        "ties on a grid": Case(grid, labels),
        "near-duplicates of other classes": Case(near, near_labels),
        "collapsed": Case(np.ones((count, 5), dtype=np.float32), labels),
        "collapsed to zero": Case(np.zeros((count, 5), dtype=np.float32), labels),
        "nearly collapsed, far from the origin": Case(
            (100.0 + 1e-4 * normal).astype(np.float32), labels
        ),
        "an outlier": Case(outlier, labels),
        "rows of zeros": Case(with_zeros, labels),
        "tiny": Case(normal * np.float32(1e-30), labels),
        "huge": Case(normal * np.float32(1e30), labels),
        "lone classes": Case(normal, lone),
        "wide and negative labels": Case(normal, wide),
        "one large class": Case(normal, large),
        "one class": Case(grid, np.zeros(count, dtype=np.int64)),
        "mixed roles": Case(grid, labels, roles),
        "query and gallery apart": Case(normal, labels, split),
        "one column": Case(normal[:, :1].copy(), labels),
        "two rows": Case(normal[:2].copy(), np.array([4, 4])),
    }
