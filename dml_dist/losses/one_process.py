"""Losses of row form in one process: plain tensors through the same formula, as one shard."""

from __future__ import annotations

import torch
from torch import Tensor

from dml_dist.losses.forms import ProxyShard, RoundsLoss, RowLoss, rounds_of
from dml_dist.losses.numerics import Statistics


def loss_of_table(
    loss: RowLoss | RoundsLoss,
    embeddings_BD: Tensor,
    labels_B: Tensor,
    proxies: Tensor,
    *,
    num_classes: int,
    num_units: int | None = None,
) -> Tensor:
    """Return a loss over a whole table of proxies, a 0-d tensor.

    Args:
        loss: The loss.
        embeddings_BD: Embeddings, (B, D), of any length.
        labels_B: Classes, (B,) int64, 0 .. C - 1.
        proxies: The table, (rows, D), of any length.
        num_classes: C.
        num_units: What the table is cut by: its classes (None), or single rows.

    Raises:
        ValueError: If shapes or labels do not fit.
    """
    if embeddings_BD.ndim != 2 or proxies.ndim != 2 or embeddings_BD.shape[1] != proxies.shape[1]:
        raise ValueError(
            "required embeddings (B, D) and proxies (rows, D), got shapes "
            f"{tuple(embeddings_BD.shape)} and {tuple(proxies.shape)}"
        )
    check_labels(labels_B, embeddings_BD.shape[0], num_classes)
    units = num_classes if num_units is None else num_units
    shard = ProxyShard(units, 0, units, loss.proxies_per_class)
    if shard.num_rows != len(proxies):
        raise ValueError(f"required {shard.num_rows} rows of proxies, got {len(proxies)}")
    return loss.finish(total_of_table(loss, embeddings_BD, labels_B, proxies, shard))


def total_of_table(
    loss: RowLoss | RoundsLoss,
    embeddings_BD: Tensor,
    labels_B: Tensor,
    proxies: Tensor,
    shard: ProxyShard,
) -> Statistics:
    """Return a loss's statistics of all rounds over the only shard."""
    total: Statistics = {}
    for round_ in rounds_of(loss):
        known = {name: value.detach() for name, value in total.items()}
        total |= round_.partial(embeddings_BD, labels_B, proxies, shard, known)
    return total


def whole_classes(proxies: Tensor, proxies_per_class: int) -> int:
    """Return how many classes a table has.

    Raises:
        ValueError: If it does not hold whole classes.
    """
    num_classes, rest = divmod(len(proxies), proxies_per_class)
    if rest:
        raise ValueError(
            f"required whole classes of {proxies_per_class} proxies, got {len(proxies)} rows"
        )
    return num_classes


def check_labels(labels: Tensor, num_rows: int, num_classes: int | None) -> None:
    """Raise ValueError unless labels are (num_rows,) int64 in 0 .. num_classes - 1.

    The range is looked at on the CPU only: on a GPU the look would wait for the device.
    """
    if labels.shape != (num_rows,) or labels.dtype != torch.int64:
        raise ValueError(
            f"required labels of shape ({num_rows},) and dtype int64, "
            f"got {tuple(labels.shape)} and {labels.dtype}"
        )
    if num_classes is not None and labels.device.type == "cpu" and num_rows:
        low, high = (int(bound) for bound in labels.aminmax())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"required class ids 0 .. {num_classes - 1}, got {low} .. {high}: "
                "labels are class ids of the training split, not labels of the data set"
            )
