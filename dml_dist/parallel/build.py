"""From a loss section of the configuration to the objective, and to what it costs in traffic."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from dml_dist.config.objective import LossConfig
from dml_dist.errors import TopologyError
from dml_dist.losses.build import AnyLoss, build_loss
from dml_dist.losses.forms import RoundsLoss, RowLoss, rounds_of
from dml_dist.losses.pairs import AnchorLoss
from dml_dist.losses.pairs_margin import Margin
from dml_dist.parallel.comm import Comm
from dml_dist.parallel.pairs import PairObjective, anchor_objective
from dml_dist.parallel.proxies import Objective, ProxyObjective


def build_objective(
    config: LossConfig,
    *,
    num_classes: int,
    embedding_size: int,
    seed: int,
    comm: Comm,
    dtype: torch.dtype = torch.float32,
) -> Objective:
    """Return the objective on this rank's device, with this rank's part of the class table.

    Args:
        config: The loss section.
        num_classes: Training classes, C >= 2.
        embedding_size: D.
        seed: Seed of the initial proxies and of what losses draw, which do not depend on the
            number of ranks.
        comm: The ranks.
        dtype: float32, or float64, of proxies and loss.

    Raises:
        ConfigError: If the loss cannot be built, or there are fewer than two classes.
        TopologyError: If there are more ranks than classes.
    """
    loss = build_loss(config, num_classes)
    if comm.world_size > num_classes and _is_sharded(loss):
        raise TopologyError(
            f"loss {config.name}: required at least one class for each rank, got {num_classes} "
            f"training classes and {comm.world_size} ranks; start fewer ranks"
        )
    if isinstance(loss, AnchorLoss):
        return anchor_objective(loss, num_classes=num_classes, seed=seed, comm=comm, dtype=dtype)
    if not isinstance(loss, RowLoss | RoundsLoss):
        return PairObjective(loss, num_classes=num_classes, comm=comm)
    return ProxyObjective(
        loss,
        num_classes=num_classes,
        embedding_size=embedding_size,
        seed=seed,
        comm=comm,
        dtype=dtype,
    )


def proxies_per_class(config: LossConfig) -> int:
    """Return K, the rows of each class in the class table; 0 for a loss without proxies."""
    loss = build_loss(config, num_classes=2)
    return loss.proxies_per_class if isinstance(loss, RowLoss | RoundsLoss) else 0


def has_class_table(config: LossConfig) -> bool:
    """Whether ranks own rows of a class table, so that there must be a class for each rank."""
    return _is_sharded(build_loss(config, num_classes=2))


def _is_sharded(loss: AnyLoss) -> bool:
    if isinstance(loss, Margin):
        return loss.beta_form == "class"
    return isinstance(loss, RowLoss | RoundsLoss)


def bytes_per_step(
    config: LossConfig,
    *,
    embedding_size: int,
    batch_sizes: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> int:
    """Return what the objective makes each rank send in one step, as `Comm.bytes_sent` counts.

    It is O(B D) and does not depend on the number of classes. The gradients of replicated
    parameters count.

    Args:
        config: The loss section.
        embedding_size: D.
        batch_sizes: Rows of each rank.
        dtype: float32 or float64, of proxies and loss. For a loss of one's own of row form, each
            statistic is taken to be one number a row.
    """
    world_size, total, largest = len(batch_sizes), sum(batch_sizes), max(batch_sizes)
    others, item = world_size - 1, dtype.itemsize
    # Parts of unequal size travel padded to the largest.
    sent = others * largest * torch.int64.itemsize + others * largest * embedding_size * item
    loss = build_loss(config, num_classes=2)
    if isinstance(loss, AnchorLoss):
        reduced = _all_reduced_by_anchors(loss, total)
        sent += sum(2 * others * numbers * item // world_size for numbers in reduced)
        return sent + others * largest * embedding_size * item
    if not isinstance(loss, RowLoss | RoundsLoss):
        return sent

    def all_reduced(names: Iterable[str], scalars: frozenset[str], number_bytes: int) -> int:
        numbers = sum(1 if name in scalars else total for name in names)
        return 2 * others * numbers * number_bytes // world_size

    for round_ in rounds_of(loss):
        merges, scalars = round_.merges, round_.scalars
        peaks = [name for name, how in merges.items() if how != "sum"]
        owners = [name for name, how in merges.items() if how == "max"]
        sent += all_reduced(peaks, scalars, item) + all_reduced(merges, scalars, item)
        sent += all_reduced(owners, scalars, torch.int32.itemsize)
    return sent + others * largest * embedding_size * item


def _all_reduced_by_anchors(loss: AnchorLoss, num_rows: int) -> list[int]:
    """Return how many numbers each all-reduce of a step has."""
    numbers = [len(loss.merges)]
    if isinstance(loss, Margin) and loss.beta_form == "class":
        numbers += [num_rows, num_rows]  # The rows' betas, and their gradients.
    if isinstance(loss, Margin) and loss.beta_form == "scalar":
        numbers += [1]  # The gradient of beta.
    return numbers
