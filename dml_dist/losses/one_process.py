"""Losses over a whole proxy table in one process: the sharded formula with one shard."""

from __future__ import annotations

import torch
from torch import Tensor

from dml_dist.losses.forms import ProxyShard, RoundsLoss, RowLoss, rounds_of
from dml_dist.losses.numerics import Statistics, empty_loss, nan_unless_finite


def dense_loss(
    loss: RowLoss | RoundsLoss,
    embeddings_BD: Tensor,
    labels_B: Tensor,
    proxies: Tensor,
    *,
    num_classes: int,
    num_units: int | None = None,
) -> Tensor:
    """Return a loss over a whole proxy table, a 0-d tensor.

    It is 0 for a batch without rows, and NaN where an embedding or a proxy is not finite.

    Args:
        loss: The loss.
        embeddings_BD: Embeddings, (B, D), of any length.
        labels_B: Classes, (B,) int64, 0 .. C - 1.
        proxies: The table, (rows, D), of any length.
        num_classes: C.
        num_units: Units of the table (`forms.table_units`); None means its classes.

    Raises:
        ValueError: If shapes or labels do not fit.
    """
    if embeddings_BD.ndim != 2 or proxies.ndim != 2 or embeddings_BD.shape[1] != proxies.shape[1]:
        raise ValueError(
            "embeddings (B, D) and proxies (rows, D) must be matrices of equal width, but have the "
            f"shapes {tuple(embeddings_BD.shape)} and {tuple(proxies.shape)}"
        )
    check_labels(labels_B, embeddings_BD.shape[0], num_classes)
    units = num_classes if num_units is None else num_units
    shard = ProxyShard(units, 0, units, loss.proxies_per_class)
    if shard.num_rows != len(proxies):
        raise ValueError(f"the loss needs {shard.num_rows} proxies, but got {len(proxies)} rows")
    if not len(embeddings_BD):
        return empty_loss(embeddings_BD, proxies)
    total = dense_statistics(loss, embeddings_BD, labels_B, proxies, shard)
    return nan_unless_finite(nan_unless_finite(loss.finish(total), embeddings_BD), proxies)


def dense_statistics(
    loss: RowLoss | RoundsLoss,
    embeddings_BD: Tensor,
    labels_B: Tensor,
    proxies: Tensor,
    shard: ProxyShard,
) -> Statistics:
    """Return the statistics of all rounds of a loss, over one shard."""
    total: Statistics = {}
    for round_ in rounds_of(loss):
        # Earlier rounds are constants, as they are after an exchange between ranks.
        known = {name: value.detach() for name, value in total.items()}
        total |= round_.partial(embeddings_BD, labels_B, proxies, shard, known)
    return total


def count_classes(proxies: Tensor, proxies_per_class: int) -> int:
    """Return the number of classes of a table.

    Raises:
        ValueError: If it does not hold whole classes.
    """
    num_classes, rest = divmod(len(proxies), proxies_per_class)
    if rest:
        raise ValueError(
            f"the number of proxies, {len(proxies)}, is not a multiple of proxies_per_class "
            f"{proxies_per_class}"
        )
    return num_classes


def check_labels(labels: Tensor, num_rows: int, num_classes: int | None) -> None:
    """Raise ValueError unless labels are (num_rows,) int64 in 0 .. num_classes - 1.

    The range is checked on the CPU only: on a GPU the check would synchronize with the device.
    """
    if labels.shape != (num_rows,) or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must have shape ({num_rows},) and dtype int64, but have "
            f"{tuple(labels.shape)} and {labels.dtype}"
        )
    if num_classes is not None and labels.device.type == "cpu" and num_rows:
        low, high = (int(bound) for bound in labels.aminmax())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"labels are {low} .. {high}, outside the class ids 0 .. {num_classes - 1}; pass "
                "class ids of the training split, not labels of the data set"
            )
