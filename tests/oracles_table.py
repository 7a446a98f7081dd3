"""Slow reference implementations of the losses between a batch and a table: loops over pairs.

Plain autograd through them gives the reference gradients of embeddings and table rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from tests.oracles_losses import unit
from tests.oracles_pairs import average, distance


@dataclass(frozen=True)
class Pairs:
    """A batch, a table of M rows a class, and which of its rows are of which image."""

    embeddings: Tensor
    labels: Tensor
    images: Sequence[int]
    table: Tensor
    table_images: Sequence[int]
    rows_per_class: int

    def positives(self, i: int) -> list[int]:
        """The own class's rows, without missing ones and that of the same image."""
        return [
            j
            for j, image in enumerate(self.table_images)
            if j // self.rows_per_class == int(self.labels[i]) and image not in (-1, self.images[i])
        ]

    def negatives(self, i: int) -> list[int]:
        """The rows of other classes that are not missing."""
        return [
            j
            for j, image in enumerate(self.table_images)
            if j // self.rows_per_class != int(self.labels[i]) and image != -1
        ]

    def zero(self) -> Tensor:
        """A zero that is connected to embeddings and table."""
        return self.embeddings.sum() * 0 + self.table.sum() * 0


def table_contrastive_oracle(
    pairs: Pairs,
    *,
    positive_margin: float = 0.0,
    negative_margin: float = 0.5,
    reduction: str = "nonzero",
) -> Tensor:
    pulls, pushes = [], []
    for i, x in enumerate(pairs.embeddings):
        for j in pairs.positives(i):
            pulls.append((distance(x, pairs.table[j]) - positive_margin).clamp_min(0))
        for j in pairs.negatives(i):
            pushes.append((negative_margin - distance(x, pairs.table[j])).clamp_min(0))
    return average(pulls, reduction, pairs.zero()) + average(pushes, reduction, pairs.zero())


def table_triplet_oracle(
    pairs: Pairs,
    *,
    margin: float = 0.1,
    mining: str = "all",
    squared: bool = False,
    smooth: bool = False,
    reduction: str = "nonzero",
) -> Tensor:
    power = 2 if squared else 1
    terms = []
    for i, x in enumerate(pairs.embeddings):
        d = [distance(x, row) for row in pairs.table]
        value = [float(entry.detach()) for entry in d]
        found = []
        for p, n in product(pairs.positives(i), pairs.negatives(i)):
            near, far = value[p] ** power, value[n] ** power
            if mining != "semi_hard" or near < far < near + margin:
                found.append((far - near, p, n))
        if mining == "hard" and found:
            found = [min(found)]
        for _, p, n in found:
            violation = d[p] ** power - d[n] ** power + margin
            terms.append(torch.log1p(violation.exp()) if smooth else violation.clamp_min(0))
    return average(terms, reduction, pairs.zero())


def table_multi_similarity_oracle(
    pairs: Pairs,
    *,
    positive_scale: float = 2.0,
    negative_scale: float = 50.0,
    base: float = 0.5,
    epsilon: float | None = 0.1,
    reduction: str = "mean",
) -> Tensor:
    terms = []
    for i, x in enumerate(pairs.embeddings):
        s = [(unit(x) * unit(row)).sum() for row in pairs.table]
        value = [float(entry.detach()) for entry in s]
        positives, negatives = pairs.positives(i), pairs.negatives(i)
        if epsilon is not None:
            top = max((value[j] for j in negatives), default=-math.inf)
            low = min((value[j] for j in positives), default=math.inf)
            positives = [j for j in positives if value[j] - epsilon < top]
            negatives = [j for j in negatives if value[j] + epsilon > low]
        pull = sum((torch.exp(-positive_scale * (s[j] - base)) for j in positives), pairs.zero())
        push = sum((torch.exp(negative_scale * (s[j] - base)) for j in negatives), pairs.zero())
        terms.append(torch.log1p(pull) / positive_scale + torch.log1p(push) / negative_scale)
    return average(terms, reduction, pairs.zero())
