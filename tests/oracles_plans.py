"""Slow, obvious references for batch plans."""

from __future__ import annotations

from collections import Counter

import numpy as np


def windows_of(order: np.ndarray, tar_shard_of: dict[int, int]) -> list[list[int]]:
    """Return the runs of tar shards that are read together in an order of rows.

    Walk through the rows; a run ends where none of its tar shards has a row left.
    """
    left = Counter(tar_shard_of[int(row)] for row in order)
    runs: list[list[int]] = [[]]
    open_shards: set[int] = set()
    for row in order:
        if runs[-1] and not open_shards:
            runs.append([])
        tar_shard = tar_shard_of[int(row)]
        if tar_shard not in runs[-1]:
            runs[-1].append(tar_shard)
            open_shards.add(tar_shard)
        left[tar_shard] -= 1
        if not left[tar_shard]:
            open_shards.discard(tar_shard)
    return runs


def check_balanced_epoch(
    batches: list[np.ndarray], label_of: dict[int, int], num_classes: int, num_samples: int
) -> None:
    """Assert every promise of a balanced epoch by counting."""
    sizes = Counter(label_of.values())
    visits: Counter[int] = Counter()
    used: Counter[int] = Counter()
    for batch in batches:
        labels = [label_of[int(row)] for row in batch]
        groups = [labels[low : low + num_samples] for low in range(0, len(labels), num_samples)]
        assert len(groups) == num_classes
        assert all(len(set(group)) == 1 for group in groups)
        classes = [group[0] for group in groups]
        assert len(set(classes)) == num_classes, "a class occurs twice in a batch"
        visits.update(classes)
        in_batch = Counter(batch.tolist())
        for row, count in in_batch.items():
            size = sizes[label_of[row]]
            most = -(-num_samples // size)  # 1 where the class has enough rows
            assert count <= most
        used.update(batch.tolist())
    counts = [visits[label] for label in sizes]
    assert max(counts) - min(counts) <= 1, "classes are not visited evenly"
    for label in sizes:
        times = [used[row] for row in label_of if label_of[row] == label]
        assert max(times) - min(times) <= 1, "a row repeats before others of its class were used"
