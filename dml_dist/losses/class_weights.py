"""Class weights for imbalanced classes, and the map from classes to shared proxies.

The weighted loss of a batch is sum_i w_{y_i} l_i / sum_i w_{y_i} over the GLOBAL batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dml_dist.losses.numerics import Statistics
from dml_dist.random_streams import Stream, generator_of

Weighting = Literal["none", "inverse_frequency", "effective_number"]


def class_weights(kind: Weighting, class_sizes: Sequence[int], beta: float = 0.999) -> Tensor:
    """Return the weight of each class, (C,) float64, with a mean of 1.

    `inverse_frequency` is 1 / n_c; `effective_number` is (1 - beta) / (1 - beta^n_c) (Cui et al.,
    "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019).

    Args:
        kind: Weighting scheme; `none` gives ones.
        class_sizes: n_c, images of each class, >= 1.
        beta: Parameter of `effective_number`, 0 < beta < 1.
    """
    sizes_C = torch.as_tensor(class_sizes, dtype=torch.float64)
    weights_C = torch.ones_like(sizes_C)
    if kind == "inverse_frequency":
        weights_C = 1 / sizes_C
    elif kind == "effective_number":
        # expm1 keeps the digits of 1 - beta^n for beta near 1.
        weights_C = (1 - beta) / -torch.expm1(sizes_C * np.log(beta))
    return weights_C / weights_C.mean()


def local_weights(
    weights_C: Tensor, labels_G: Tensor, own_KG: Tensor, num_rows: int, dtype: torch.dtype
) -> Tensor:
    """Return the rows' weights where the shard holds their own proxies, 0 elsewhere, (G,).

    Exactly one shard holds them, so that the sum over shards is the weight.
    """
    held_G = (own_KG[0] >= 0) & (own_KG[0] < num_rows)
    return weights_C[labels_G].to(dtype).masked_fill(~held_G, 0.0)


def mean_over_rows(loss_G: Tensor, total: Statistics) -> Tensor:
    """Return the mean of the rows' losses, weighted if the statistics have a `weight`."""
    if "weight" not in total:
        return loss_G.mean()
    return (total["weight"] * loss_G).sum() / total["weight"].sum()


def fractional_rows(num_classes: int, num_rows: int, seed: int) -> Tensor:
    """Return the row that each class shares with others, (C,) int64, drawn from the seed.

    Classes are permuted and divided evenly: a row has floor(C / P) or ceil(C / P) of them.

    Args:
        num_classes: C.
        num_rows: P, 1 .. C.
        seed: Seed, >= 0.
    """
    order = generator_of(Stream.FRACTIONAL_PROXIES, seed).permutation(num_classes)
    return torch.from_numpy(order * num_rows // num_classes)


def table_labels(labels_G: Tensor, class_rows: Tensor | None) -> Tensor:
    """Return each label's index into the table: its class, or the row its class shares."""
    return labels_G if class_rows is None else class_rows[labels_G]
