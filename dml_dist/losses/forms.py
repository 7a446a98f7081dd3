"""The two interfaces of a loss, also for custom losses (config `loss.name: custom`).

Row form: one statistic per row of the global batch and proxy shard, `partial -> merge -> finish`.
Proxies are sharded over ranks; only the statistics cross ranks. Dense is "one shard".

A loss that needs a result over all shards first (the nearest of all proxies, the positive's
distance) has several rounds of partial and merge.

Pair form: a function of the embeddings and labels of the global batch, without proxies.

Shape legend: G rows of the global batch, D embedding size, L proxies of this shard,
K proxies a class, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from dml_dist.losses.numerics import Merge, Statistics


@dataclass(frozen=True)
class ProxyShard:
    """Range of the proxy table that a shard holds: whole classes, K rows each.

    Row `(c - low_class) K + k` of the shard is proxy k of class c. A table whose rows
    belong to no class (fractional and dynamic assignment) is treated as one class per row.

    Attributes:
        num_classes: C, classes of the whole table.
        low_class: First class of this shard.
        high_class: One past its last class.
        proxies_per_class: K.
    """

    num_classes: int
    low_class: int
    high_class: int
    proxies_per_class: int = 1

    @property
    def row_low(self) -> int:
        """First row of this shard in the whole table."""
        return self.low_class * self.proxies_per_class

    @property
    def row_high(self) -> int:
        """One past the last row of this shard in the whole table."""
        return self.high_class * self.proxies_per_class

    @property
    def num_rows(self) -> int:
        """Rows of the whole table, C K."""
        return self.num_classes * self.proxies_per_class


@runtime_checkable
class RowLoss(Protocol):
    """A loss over sharded proxies, with one round of partial and merge.

    The methods are pure, differentiable and independent of ranks. Embeddings and proxies are
    passed raw, not normalized, in float32 or float64.
    """

    @property
    def proxies_per_class(self) -> int:
        """K, rows of each class in the table."""

    @property
    def merges(self) -> Mapping[str, Merge]:
        """The statistics by name, each with its merge: `logsumexp`, `max` or `sum`."""

    def partial(
        self, embeddings_GD: Tensor, labels_G: Tensor, proxies_LD: Tensor, shard: ProxyShard
    ) -> Statistics:
        """Return the statistics over one proxy shard.

        Their shapes depend on the batch only. Where this shard contributes nothing, the value is
        the neutral element of its merge: 0 for `sum`, -inf for the others.
        """

    def finish(self, total: Statistics) -> Tensor:
        """Return the loss, a 0-d tensor, from the statistics over all shards."""

    def statistics(self, total: Statistics) -> Statistics:
        """Return 0-d tensors to be recorded with the loss; {} when there are none."""


Partial = Callable[[Tensor, Tensor, Tensor, ProxyShard, Statistics], Statistics]
"""(embeddings (G, D), labels (G,), proxies (L, D), shard, earlier rounds) -> statistics."""


@dataclass(frozen=True)
class Round:
    """One round of partial and merge.

    Attributes:
        merges: This round's statistics by name, each with its merge.
        partial: Computes them over one proxy shard, as `RowLoss.partial` does. Its last argument
            holds the statistics of earlier rounds over all shards, detached: they select what is
            counted. A value that needs a gradient is merged again in this round, or used in
            `finish`.
        scalars: Names of 0-d statistics.
        columns: Names of statistics (min(n, G), G), each with its n; all others are (G,).
    """

    merges: Mapping[str, Merge]
    partial: Partial
    scalars: frozenset[str] = frozenset()
    columns: Mapping[str, int] = field(default_factory=dict)


@runtime_checkable
class RoundsLoss(Protocol):
    """A loss over sharded proxies with several rounds; otherwise like `RowLoss`."""

    @property
    def proxies_per_class(self) -> int:
        """K, rows of each class in the table."""

    @property
    def rounds(self) -> tuple[Round, ...]:
        """The rounds in order; each statistic's name occurs in one round only."""

    def finish(self, total: Statistics) -> Tensor:
        """Return the loss, a 0-d tensor, from the statistics of all rounds over all shards."""

    def statistics(self, total: Statistics) -> Statistics:
        """Return 0-d tensors to be recorded with the loss; {} when there are none."""


def table_units(loss: RowLoss | RoundsLoss, num_classes: int) -> int:
    """Return the number of units by which a proxy table is sharded: classes, or single rows.

    A loss whose rows belong to no class has an attribute `num_free_rows`.
    """
    free: int | None = getattr(loss, "num_free_rows", None)
    return num_classes if free is None else free


def rounds_of(loss: RowLoss | RoundsLoss) -> tuple[Round, ...]:
    """Return the rounds of a loss; a `RowLoss` has one."""
    if isinstance(loss, RoundsLoss):
        return loss.rounds

    def partial(
        x: Tensor, labels: Tensor, p: Tensor, shard: ProxyShard, _: Statistics
    ) -> Statistics:
        return loss.partial(x, labels, p, shard)

    return (Round(loss.merges, partial),)


@runtime_checkable
class PairLoss(Protocol):
    """A loss over the embeddings of the global batch (pairs, triplets), without proxies.

    Called with embeddings (G, D), not normalized, in float32 or float64, and labels (G,) int64;
    returns a 0-d tensor.
    """

    def __call__(self, embeddings_GD: Tensor, labels_G: Tensor, /) -> Tensor:
        """Return the loss of the global batch."""
