"""Losses over pairs of rows of the global batch, partitioned by anchor; the contrastive loss.

A part takes some rows of the batch as anchors and pairs them with all rows: (A, G) distances,
(G, G) only if one part has all anchors. It returns sums and counts, `partial -> merge (addition)
-> finish`; counts have no gradient.

    n(x) = x / max(|x|, 1e-12)        d_ij = |n(e_i) - n(e_j)|

Hinges and miners choose the same pairs on any number of ranks: see `pair_distances`.

With `is_representative_G` only pairs and triplets that contain a representative count.

Shape legend: G rows of the global batch, A anchors of this part, D embedding size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from dml_dist.losses.numerics import (
    Merge,
    Statistics,
    accurate_dtype,
    empty_loss,
    nan_unless_finite,
    normalize_rows,
)
from dml_dist.losses.one_process import check_labels
from dml_dist.losses.pair_distances import pair_distances

Reduction = Literal["nonzero", "mean"]
"""Mean over the nonzero terms, or over all terms; 0 if there are none."""


@dataclass(frozen=True, eq=False)
class AnchorBatch:
    """The global batch, and the range of rows that are the anchors of one part.

    Attributes:
        embeddings_GD: All embeddings, not normalized, (G, D) float32 or float64.
        labels_G: Their classes, (G,) int64.
        low: The first anchor's row.
        high: One past the last anchor's row.
        is_representative_G: Which rows are representatives, (G,) bool; None counts all pairs.
        betas_A: Margin loss: beta of every anchor, (A,), of the loss's dtype.
        seed: Seed, >= 0; with the step it determines a row's random draws.
        step: Optimizer updates so far, >= 0.
        neighbors_Ch: Hard class mining: nearest classes of every class, (C, h) int64, -1 for none.
    """

    embeddings_GD: Tensor
    labels_G: Tensor
    low: int
    high: int
    is_representative_G: Tensor | None = None
    betas_A: Tensor | None = None
    seed: int = 0
    step: int = 0
    neighbors_Ch: Tensor | None = None

    def unit_rows(self) -> Tensor:
        """Return the normalized embeddings, (G, D), in float32, or float64 if they are."""
        dtype = accurate_dtype(self.embeddings_GD)
        return normalize_rows(self.embeddings_GD.to(dtype))

    def of_anchors(self, rows_GD: Tensor) -> Tensor:
        """Return the anchors' rows, (A, D); the same tensor if all rows are anchors."""
        whole = self.low == 0 and self.high == len(rows_GD)
        return rows_GD if whole else rows_GD[self.low : self.high]

    def same_class(self) -> Tensor:
        """Return which rows have the anchor's class, the anchor included, (A, G) bool."""
        return self.labels_G[self.low : self.high, None] == self.labels_G

    def pair_masks(self) -> tuple[Tensor, Tensor]:
        """Return which ordered pairs count as positive and which as negative, (A, G) bool each."""
        same_AG = self.same_class()
        rows_G = torch.arange(len(self.labels_G), device=self.labels_G.device)
        positive_AG = same_AG & (rows_G[self.low : self.high, None] != rows_G)
        negative_AG = ~same_AG
        if self.is_representative_G is None:
            return positive_AG, negative_AG
        held_AG = self.holds_representative()
        return positive_AG & held_AG, negative_AG & held_AG

    def mined_pairs(self) -> Tensor | None:
        """Return which pairs are of two classes of which one is mined for the other, (A, G) bool.

        None without hard class mining.
        """
        if self.neighbors_Ch is None:
            return None
        labels_A = self.labels_G[self.low : self.high]
        mined_AG = torch.zeros_like(self.same_class())
        for neighbor_C in self.neighbors_Ch.unbind(dim=1):
            mined_AG |= neighbor_C[labels_A, None] == self.labels_G
            mined_AG |= labels_A[:, None] == neighbor_C[self.labels_G]
        return mined_AG

    def holds_representative(self) -> Tensor:
        """Return which pairs contain a representative, (A, G) bool; all without representatives."""
        flags_G = self.is_representative_G
        if flags_G is None:
            flags_G = torch.ones_like(self.labels_G, dtype=torch.bool)
        return flags_G[self.low : self.high, None] | flags_G


@runtime_checkable
class AnchorLoss(Protocol):
    """A loss over pairs or triplets whose terms are partitioned by anchor."""

    @property
    def merges(self) -> Mapping[str, Merge]:
        """The statistics by name; all are 0-d and merged by `sum`."""

    def anchor_partial(self, batch: AnchorBatch) -> Statistics:
        """Return sums, differentiable, and counts over the anchors of one part.

        With `batch.neighbors_Ch` they may include those of `mined_counts`.
        """

    def finish(self, total: Statistics) -> Tensor:
        """Return the loss, a 0-d tensor, from the statistics of all anchors."""

    def statistics(self, total: Statistics) -> Statistics:
        """Return 0-d tensors to be recorded with the loss."""


def sum_and_counts(name: str, terms: Tensor, counted: Tensor) -> Statistics:
    """Return the sum, the number of nonzero and the number of all counted terms, 0-d each.

    Args:
        name: Name of the terms; the keys are `{name}_sum`, `{name}_nonzero`, `{name}_count`.
        terms: Terms >= 0, of any shape.
        counted: Which of them count, of the same shape.
    """
    kept = torch.where(counted, terms, 0.0)
    return {
        f"{name}_sum": kept.sum(),
        f"{name}_nonzero": (kept > 0).count_nonzero().to(kept.dtype),
        f"{name}_count": counted.count_nonzero().to(kept.dtype),
    }


MINED_MERGES: Mapping[str, Merge] = {"mined_nonzero": "sum", "mined_count": "sum"}
"""Merges of the statistics of `mined_counts`."""


def mined_counts(terms: Tensor, counted: Tensor, mined: Tensor | None) -> Statistics:
    """Count the terms with mined negatives, and the nonzero ones; {} without mining.

    Args:
        terms: Terms >= 0, of any shape; above zero where the margin is violated.
        counted: Which of them count.
        mined: Which of them have a mined negative, or None without mining.
    """
    if mined is None:
        return {}
    kept = counted & mined
    return {
        "mined_nonzero": (kept & (terms > 0)).sum().to(terms.dtype),
        "mined_count": kept.sum().to(terms.dtype),
    }


def sum_merges(*names: str) -> dict[str, Merge]:
    """Return the merges of the statistics of `sum_and_counts` for each name."""
    return {f"{name}_{part}": "sum" for name in names for part in ("sum", "nonzero", "count")}


def reduced(total: Statistics, reduction: Reduction, *names: str) -> Tensor:
    """Return the mean of the named terms together, 0-d; 0 if there are none."""
    counts = "nonzero" if reduction == "nonzero" else "count"
    sums = torch.stack([total[f"{name}_sum"] for name in names]).sum()
    number = torch.stack([total[f"{name}_{counts}"] for name in names]).sum()
    return sums / number.clamp_min(1.0)


def active_share(total: Statistics, name: str) -> Tensor:
    """Return the nonzero fraction of the named terms, 0-d."""
    return total[f"{name}_nonzero"] / total[f"{name}_count"].clamp_min(1.0)


def whole_batch(
    embeddings_BD: Tensor,
    labels_B: Tensor,
    is_representative_B: Tensor | None,
    *,
    betas_B: Tensor | None = None,
    seed: int = 0,
    step: int = 0,
) -> AnchorBatch:
    """Return a batch in which every row is an anchor, for one process.

    Raises:
        ValueError: If shapes or dtypes do not fit.
    """
    if embeddings_BD.ndim != 2:
        raise ValueError(
            f"embeddings must be a matrix (B, D), but have shape {tuple(embeddings_BD.shape)}"
        )
    num_rows = embeddings_BD.shape[0]
    check_labels(labels_B, num_rows, None)
    flags = is_representative_B
    if flags is not None and (flags.shape != (num_rows,) or flags.dtype != torch.bool):
        raise ValueError(
            f"is_representative must have shape ({num_rows},) and dtype bool, but has "
            f"{tuple(flags.shape)} and {flags.dtype}"
        )
    return AnchorBatch(embeddings_BD, labels_B, 0, num_rows, flags, betas_B, seed, step)


def whole_loss(loss: AnchorLoss, batch: AnchorBatch) -> Tensor:
    """Return the loss of a batch in which every row is an anchor, a 0-d tensor.

    It is 0 for a batch without rows, and NaN where an embedding is not finite.
    """
    if not len(batch.labels_G):
        return empty_loss(batch.embeddings_GD)
    return nan_unless_finite(loss.finish(loss.anchor_partial(batch)), batch.embeddings_GD)


@dataclass(frozen=True)
class Contrastive:
    """Contrastive loss: relu(d - m_pos) of same-class and relu(m_neg - d) of other ordered pairs.

    Each of the two is reduced separately, and the results are added. With d not squared, as in the
    "reality check" protocol; Hadsell et al. (CVPR 2006) square it.

    Attributes:
        positive_margin: m_pos < 2; distances are 0 to 2.
        negative_margin: m_neg, in (0, 2].
        reduction: `nonzero` or `mean`.
    """

    positive_margin: float = 0.0
    negative_margin: float = 0.5
    reduction: Reduction = "nonzero"

    @property
    def merges(self) -> Mapping[str, Merge]:
        """Sums and counts of positive and negative pairs."""
        return sum_merges("positive", "negative")

    def anchor_partial(self, batch: AnchorBatch) -> Statistics:
        """Return sums and counts over the pairs of the anchors."""
        unit_GD = batch.unit_rows()
        distances_AG = pair_distances(batch.of_anchors(unit_GD), unit_GD, self._open_hinges)
        positive_AG, negative_AG = batch.pair_masks()
        pulls_AG, pushes_AG = self.pulls(distances_AG), self.pushes(distances_AG)
        return {
            **sum_and_counts("positive", pulls_AG, positive_AG),
            **sum_and_counts("negative", pushes_AG, negative_AG),
            **mined_counts(pushes_AG, negative_AG, batch.mined_pairs()),
        }

    def finish(self, total: Statistics) -> Tensor:
        """Return the sum of the two means."""
        positive = reduced(total, self.reduction, "positive")
        return positive + reduced(total, self.reduction, "negative")

    def statistics(self, total: Statistics) -> Statistics:
        """Return the fractions of pairs that violate their margin."""
        return {
            "active_positives": active_share(total, "positive"),
            "active_negatives": active_share(total, "negative"),
        }

    def pulls(self, distances: Tensor) -> Tensor:
        """Return the terms of positives."""
        return (distances - self.positive_margin).relu()

    def pushes(self, distances: Tensor) -> Tensor:
        """Return the terms of negatives."""
        return (self.negative_margin - distances).relu()

    def open_pushes(self, distances: Tensor, errors: Tensor) -> Tensor:
        """Return which negatives' hinges the errors leave open, bool."""
        return (distances - self.negative_margin).abs() < errors

    def _open_hinges(self, distances_AG: Tensor, errors_AG: Tensor) -> Tensor:
        open_AG = (distances_AG - self.positive_margin).abs() < errors_AG
        return open_AG | self.open_pushes(distances_AG, errors_AG)


def contrastive_loss(
    embeddings_BD: Tensor,
    labels_B: Tensor,
    *,
    positive_margin: float = 0.0,
    negative_margin: float = 0.5,
    reduction: Reduction = "nonzero",
    is_representative_B: Tensor | None = None,
) -> Tensor:
    """Return the contrastive loss of one process, a 0-d tensor: one part with all anchors.

    Args:
        embeddings_BD: Embeddings, (B, D), of any length; half precision is converted to float32.
        labels_B: Classes, (B,) int64.
        positive_margin: Positives up to this distance have no loss, < 2.
        negative_margin: Negatives from this distance on have no loss, in (0, 2].
        reduction: Mean over the nonzero terms, or over all pairs.
        is_representative_B: Only pairs with such a row count, (B,) bool; None counts all.

    Raises:
        ValueError: If shapes or dtypes do not fit.
    """
    loss = Contrastive(positive_margin, negative_margin, reduction)
    batch = whole_batch(embeddings_BD, labels_B, is_representative_B)
    return whole_loss(loss, batch)
