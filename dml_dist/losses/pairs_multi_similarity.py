"""Multi-similarity loss with its miner.

Wang et al., "Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning", CVPR
2019. With cosines S, over the pairs of anchor i that the miner keeps,

    mean_i [ log(1 + sum_pos exp(-a (S - l))) / a + log(1 + sum_neg exp(b (S - l))) / b ]

where log(1 + an empty sum) = 0.

Shape legend: G rows of the global batch, A anchors of this part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dml_dist.losses.miners import multi_similarity_pairs, open_multi_similarity_pairs
from dml_dist.losses.numerics import Merge, Statistics
from dml_dist.losses.pair_distances import cosines, cosines_for_choices
from dml_dist.losses.pairs import (
    AnchorBatch,
    Reduction,
    active_share,
    mined_counts,
    reduced,
    sum_and_counts,
    sum_merges,
    whole_batch,
    whole_loss,
)


@dataclass(frozen=True)
class MultiSimilarity:
    """Multi-similarity loss, partitioned by anchor.

    Attributes:
        positive_scale: a > 0.
        negative_scale: b > 0.
        base: l, the cosine at which an exponential is 1.
        epsilon: Slack of the miner, > 0, or None to keep all pairs.
        reduction: `mean` over the rows of the batch, as in the paper, or over those with a nonzero
            term.
    """

    positive_scale: float = 2.0
    negative_scale: float = 50.0
    base: float = 0.5
    epsilon: float | None = 0.1
    reduction: Reduction = "mean"

    @property
    def merges(self) -> Mapping[str, Merge]:
        """Sum and counts of anchors."""
        return sum_merges("anchor")

    def anchor_partial(self, batch: AnchorBatch) -> Statistics:
        """Return the sum and counts over the anchors."""
        unit_GD = batch.unit_rows()
        anchors_AD = batch.of_anchors(unit_GD)
        cosines_AG = cosines(anchors_AD, unit_GD)
        positive_AG, negative_AG = batch.pair_masks()
        others_AG = negative_AG
        epsilon = self.epsilon
        if epsilon is not None:
            masks_AG = positive_AG, negative_AG

            def open_pairs(cosines_AG: Tensor, error: float) -> Tensor:
                return open_multi_similarity_pairs(cosines_AG, error, *masks_AG, epsilon)

            chosen_AG = cosines_for_choices(cosines_AG, anchors_AD, unit_GD, open_pairs)
            positive_AG, negative_AG = multi_similarity_pairs(chosen_AG, *masks_AG, epsilon)
        terms_A = self.terms(
            log_sum_exp(self.pulls(cosines_AG), positive_AG),
            log_sum_exp(self.pushes(cosines_AG), negative_AG),
        )
        return {
            **sum_and_counts("anchor", terms_A, torch.ones_like(terms_A, dtype=torch.bool)),
            **mined_counts(negative_AG.to(terms_A.dtype), others_AG, batch.mined_pairs()),
        }

    def finish(self, total: Statistics) -> Tensor:
        """Return the mean over anchors."""
        return reduced(total, self.reduction, "anchor")

    def pulls(self, cosines: Tensor) -> Tensor:
        """Return the exponents of positives."""
        return -self.positive_scale * (cosines - self.base)

    def pushes(self, cosines: Tensor) -> Tensor:
        """Return the exponents of negatives."""
        return self.negative_scale * (cosines - self.base)

    def terms(self, pulls_A: Tensor, pushes_A: Tensor) -> Tensor:
        """Return the anchors' terms from the log-sum-exps of their exponents; -inf for none."""
        pull_A = torch.logaddexp(pulls_A, torch.zeros_like(pulls_A)) / self.positive_scale
        return pull_A + torch.logaddexp(pushes_A, torch.zeros_like(pushes_A)) / self.negative_scale

    def statistics(self, total: Statistics) -> Statistics:
        """Return the fraction of rows that have a pair."""
        return {"active_anchors": active_share(total, "anchor")}


def log_sum_exp(exponents_AG: Tensor, kept_AG: Tensor) -> Tensor:
    """Return log sum exp over the kept entries of each row, (A,); -inf where there are none."""
    any_A1 = kept_AG.any(dim=1, keepdim=True)
    # A row that keeps nothing is summed over all entries: logsumexp of -inf alone would have a NaN
    # gradient, which `where` does not remove.
    sums_A = exponents_AG.masked_fill(~kept_AG & any_A1, -torch.inf).logsumexp(dim=1)
    return sums_A.where(any_A1[:, 0], -torch.inf)


def multi_similarity_loss(
    embeddings_BD: Tensor,
    labels_B: Tensor,
    *,
    positive_scale: float = 2.0,
    negative_scale: float = 50.0,
    base: float = 0.5,
    epsilon: float | None = 0.1,
    reduction: Reduction = "mean",
    is_representative_B: Tensor | None = None,
) -> Tensor:
    """Return the multi-similarity loss of one process, a 0-d tensor: one part with all anchors.

    Args:
        embeddings_BD: Embeddings, (B, D), of any length; half precision is converted to float32.
        labels_B: Classes, (B,) int64.
        positive_scale: a > 0.
        negative_scale: b > 0.
        base: l, the cosine at which an exponential is 1.
        epsilon: Slack of the miner, > 0; None keeps all pairs.
        reduction: Mean over all rows, or over those with a nonzero term.
        is_representative_B: Only pairs with such a row count, (B,) bool; None counts all.

    Raises:
        ValueError: If shapes or dtypes do not fit.
    """
    loss = MultiSimilarity(positive_scale, negative_scale, base, epsilon, reduction)
    batch = whole_batch(embeddings_BD, labels_B, is_representative_B)
    return whole_loss(loss, batch)
