"""Batch plans: which index rows are read at which step, as pure integer functions.

A plan maps an epoch to its global batches and depends on the seed, the rows and the size of the
global batch, never on the number of ranks or loader workers. Rank `r` of `W` takes positions
`floor(r b / W) .. floor((r + 1) b / W) - 1` of every global batch of `b` rows. Resuming is
arithmetic: step `s` is batch `s mod steps_per_epoch` of epoch `s div steps_per_epoch`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, assert_never

import numpy as np

from dml_dist.config.data import (
    BalancedBatchesConfig,
    BatchesConfig,
    ShuffledBatchesConfig,
)
from dml_dist.errors import ConfigError, TopologyError
from dml_dist.partition import part_bounds
from dml_dist.random_streams import Stream, generator_of


class BatchPlan(Protocol):
    """Global batches of every epoch."""

    @property
    def steps_per_epoch(self) -> int:
        """Number of global batches of one epoch, >= 1, the same for all epochs."""
        ...

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """Return the index rows of each global batch of an epoch, each (b,) int64."""
        ...

    def coverage(self, epoch: int) -> float:
        """Return the share of the rows that an epoch reads at least once, in (0, 1]."""
        ...


@dataclass(frozen=True, eq=False)
class ShuffledPlan:
    """Reads every row once per epoch, shuffled within windows of tar shards.

    Each epoch shuffles the order of the tar shards and groups them into windows. Rows are shuffled
    within a window and windows are read in order, so a reader works on few tar shards at a time. A
    batch at the boundary of two windows holds rows of both.

    Attributes:
        rows: (n,) int64 index rows.
        tar_shard: (n,) tar shard of each row.
        seed: Seed of all orders.
        global_batch_size: B, rows of a batch, <= n.
        window: Number of tar shards that are shuffled together, >= 1.
        keep_last: Whether the last batch, of n mod B rows, is kept.
    """

    rows: np.ndarray
    tar_shard: np.ndarray
    seed: int
    global_batch_size: int
    window: int
    keep_last: bool

    @property
    def steps_per_epoch(self) -> int:
        """Number of global batches of one epoch: n / B, rounded up (keep) or down (drop)."""
        whole, rest = divmod(len(self.rows), self.global_batch_size)
        return whole + (1 if rest and self.keep_last else 0)

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """Return the index rows of each global batch of an epoch, each (b,) int64."""
        order = self.rows[self._order(epoch)]
        size = self.global_batch_size
        return [order[step * size : (step + 1) * size] for step in range(self.steps_per_epoch)]

    def coverage(self, epoch: int) -> float:
        """Return the share of the rows that an epoch reads: 1 unless a last batch is dropped."""
        read = min(self.steps_per_epoch * self.global_batch_size, len(self.rows))
        return read / len(self.rows)

    def windows(self, epoch: int) -> np.ndarray:
        """Return for each row the window, from 0, in which an epoch reads it, (n,) int64."""
        names, shard_of_row = np.unique(self.tar_shard, return_inverse=True)
        place = generator_of(Stream.TAR_SHARD_ORDER, self.seed, epoch).permutation(len(names))
        return place[shard_of_row] // self.window

    def _order(self, epoch: int) -> np.ndarray:
        """Return the (n,) positions into `rows` in the order in which an epoch reads them."""
        window_of_row = self.windows(epoch)
        shuffled = generator_of(Stream.ROW_ORDER, self.seed, epoch).permutation(len(self.rows))
        return shuffled[np.argsort(window_of_row[shuffled], kind="stable")]


@dataclass(frozen=True, eq=False)
class BalancedPlan:
    """P different classes with K rows each in every batch; an epoch is floor(n / (P K)) steps.

    Classes are visited round-robin: an epoch is a sequence of seeded permutations of all classes,
    so the numbers of visits of two classes differ by at most one. The visits of a class step
    through a seeded cycle of its rows: all its rows are used before any is used again. The K rows
    of a visit are different if the class has at least K rows, and repeat evenly otherwise.

    Attributes:
        rows: (n,) int64 index rows.
        labels: (n,) int64 label of each row; only their equality matters.
        seed: Seed of all orders.
        classes_per_batch: P, at most the number of classes.
        samples_per_class: K, >= 1.
    """

    rows: np.ndarray
    labels: np.ndarray
    seed: int
    classes_per_batch: int
    samples_per_class: int

    @property
    def steps_per_epoch(self) -> int:
        """Number of global batches of one epoch, floor(n / (P K))."""
        return len(self.rows) // (self.classes_per_batch * self.samples_per_class)

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """Return the index rows of each global batch: (P K,) int64, K rows of a class together."""
        _, class_of_row, sizes = np.unique(self.labels, return_inverse=True, return_counts=True)
        visited = self._class_order(epoch, len(sizes))
        visit = _occurrences(visited)
        # The rows of class c, in the order of its cycle, are at first[c] .. first[c] + size - 1.
        shuffled = generator_of(Stream.ROW_ORDER, self.seed, epoch).permutation(len(self.rows))
        cycles = self.rows[shuffled[np.argsort(class_of_row[shuffled], kind="stable")]]
        first = np.cumsum(sizes) - sizes
        place = visit[:, None] * self.samples_per_class + np.arange(self.samples_per_class)
        place = first[visited][:, None] + place % sizes[visited][:, None]
        return list(cycles[place].reshape(self.steps_per_epoch, -1))

    def coverage(self, epoch: int) -> float:
        """Return the share of the rows that an epoch reads at least once, in (0, 1]."""
        return len(np.unique(np.concatenate(self.epoch(epoch)))) / len(self.rows)

    def _class_order(self, epoch: int, num_classes: int) -> np.ndarray:
        """Return the classes that an epoch visits, (steps * P,), no class twice in a batch."""
        generator = generator_of(Stream.CLASS_ORDER, self.seed, epoch)
        num_visits = self.steps_per_epoch * self.classes_per_batch
        num_rounds = -(-num_visits // num_classes)
        visited = np.empty(num_rounds * num_classes, dtype=np.int64)
        in_open_batch = np.zeros(num_classes, dtype=bool)
        for low in range(0, len(visited), num_classes):
            order = generator.permutation(num_classes)
            num_open = low % self.classes_per_batch
            if num_open:
                # Two rounds meet inside a batch. The new round fills the batch with the first of
                # its classes that the batch does not hold yet.
                in_open_batch[:] = False
                in_open_batch[visited[low - num_open : low]] = True
                fresh = np.flatnonzero(~in_open_batch[order])
                filling = fresh[: self.classes_per_batch - num_open]
                order = np.concatenate([order[filling], np.delete(order, filling)])
            visited[low : low + num_classes] = order
        return visited[:num_visits]


def build_plan(
    config: BatchesConfig,
    *,
    rows: np.ndarray,
    labels: np.ndarray,
    tar_shard: np.ndarray,
    seed: int,
    global_batch_size: int,
    world_size: int,
) -> BatchPlan:
    """Return the configured plan.

    Args:
        config: The section `data.batches`.
        rows: (n,) int64 index rows of the training images.
        labels: (n,) int64 label of each of these rows.
        tar_shard: (n,) tar shard of each of these rows.
        seed: Seed of all orders, >= 0.
        global_batch_size: B, images of one step over all ranks.
        world_size: Number of ranks; only checked, the plan does not depend on it.

    Raises:
        ConfigError: If the rows do not fill one batch, or there are fewer classes than P.
        TopologyError: If a batch would have fewer rows than there are ranks.
    """
    if not len(rows) == len(labels) == len(tar_shard):
        raise ValueError(
            "every row needs one label and one tar shard, "
            f"got {len(rows)} rows, {len(labels)} labels and {len(tar_shard)} tar shards"
        )
    if global_batch_size < world_size:
        raise TopologyError(
            f"train.global_batch_size {global_batch_size} must be at least the number of ranks "
            f"{world_size}: every rank needs an image; raise it or use fewer ranks"
        )
    if len(rows) < global_batch_size:
        raise ConfigError(
            f"an epoch needs at least one batch of train.global_batch_size {global_batch_size} "
            f"images, but there are {len(rows)} training images (validation classes are held out); "
            f"set train.global_batch_size to at most {len(rows)}"
        )
    match config:
        case ShuffledBatchesConfig():
            keep_last = config.last == "keep"
            if keep_last:
                _check_last_batch(len(rows), global_batch_size, world_size)
            return ShuffledPlan(rows, tar_shard, seed, global_batch_size, config.window, keep_last)
        case BalancedBatchesConfig():
            _check_classes(config, labels, global_batch_size)
            return BalancedPlan(
                rows, labels, seed, config.classes_per_batch, config.samples_per_class
            )
        case _:
            assert_never(config)


def locate(step: int, steps_per_epoch: int) -> tuple[int, int]:
    """Return `(epoch, step inside the epoch)` of a global step; both count from 0."""
    return divmod(step, steps_per_epoch)


def global_batches(
    plan: BatchPlan, start_step: int, end_step: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (step, (b,) index rows) from `start_step` to `end_step` - 1.

    Each epoch is computed when it is reached.
    """
    current_epoch, batches = -1, list[np.ndarray]()
    for step in range(start_step, end_step):
        epoch, place = locate(step, plan.steps_per_epoch)
        if epoch != current_epoch:
            current_epoch, batches = epoch, plan.epoch(epoch)
        yield step, batches[place]


def rank_positions(batch_size: int, world_size: int, rank: int) -> tuple[int, int]:
    """Return the half-open positions of a global batch of `batch_size` rows that a rank reads."""
    return part_bounds(batch_size, world_size, rank)


def evaluation_batches(num_rows: int, batch_size: int) -> list[tuple[int, int]]:
    """Return the half-open bounds of the global evaluation batches, in order.

    They do not depend on the number of ranks, because the last bits of an embedding depend on the
    batch it is computed in. Rank `r` takes the whole batches of `part_bounds(num_batches, W, r)`.
    """
    return [(low, min(low + batch_size, num_rows)) for low in range(0, num_rows, batch_size)]


def _check_last_batch(num_rows: int, global_batch_size: int, world_size: int) -> None:
    last = num_rows % global_batch_size
    if 0 < last < world_size:
        raise TopologyError(
            f"data.batches.last: keep needs a last batch of at least {world_size} images, one for "
            f"each rank, but {num_rows} training images in batches of {global_batch_size} leave "
            f"{last}; set data.batches.last to drop, or change train.global_batch_size"
        )


def _check_classes(
    config: BalancedBatchesConfig, labels: np.ndarray, global_batch_size: int
) -> None:
    product = config.classes_per_batch * config.samples_per_class
    if product != global_batch_size:
        raise ConfigError(
            f"data.batches: classes_per_batch {config.classes_per_batch} x samples_per_class "
            f"{config.samples_per_class} = {product} must equal train.global_batch_size "
            f"{global_batch_size}"
        )
    num_classes = len(np.unique(labels))
    if num_classes < config.classes_per_batch:
        raise ConfigError(
            f"data.batches.classes_per_batch {config.classes_per_batch} needs as many different "
            f"training classes, but there are {num_classes} (validation classes are held out); "
            f"set it to at most {num_classes}"
        )


def _occurrences(values: np.ndarray) -> np.ndarray:
    """Return how often each value occurred before its place: [4, 2, 4, 4] -> [0, 0, 1, 2]."""
    order = np.argsort(values, kind="stable")
    _, first, counts = np.unique(values[order], return_index=True, return_counts=True)
    occurrences = np.empty(len(values), dtype=np.int64)
    occurrences[order] = np.arange(len(values)) - np.repeat(first, counts)
    return occurrences
