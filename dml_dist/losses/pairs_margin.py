"""Margin loss with distance-weighted negatives.

Wu et al., "Sampling Matters in Deep Embedding Learning", ICCV 2017. Over ordered pairs (a, i),

    positives: relu(d_ai - beta_a + m)      negatives: relu(beta_a - d_ai + m)

All positive pairs count; for each of them the anchor draws one negative. The loss is the sum of
both divided by the number of nonzero terms (or of all terms), plus

    nu * mean over the rows of the batch of beta_a

beta_a is constant, one learned parameter, or learned per class. Deviation: the authors' code
weights nu beta by the anchor's number of triplets over the number of non-zero terms.

Shape legend: G rows of the global batch, A anchors of this part, D embedding size, K draws of an
anchor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dml_dist.losses.miners import distance_weights, draw_weighted, uniforms
from dml_dist.losses.numerics import Merge, Statistics, accurate_dtype
from dml_dist.losses.one_process import check_labels
from dml_dist.losses.pair_distances import pair_distances
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

BetaForm = Literal["fixed", "scalar", "class"]
"""Whether beta is a constant, one learned parameter, or one per class."""


@dataclass(frozen=True)
class Margin:
    """Margin loss, partitioned by anchor; `AnchorBatch.betas_A` holds beta.

    Attributes:
        margin: m > 0.
        beta: Its value, or its initial value; margin <= beta <= 2 - margin.
        beta_form: Whether beta is fixed or learned.
        nu: Weight of the mean beta, >= 0.
        distance_cutoff: Negatives nearer than this are drawn as if they were this far.
        loss_cutoff: Negatives at this distance or beyond are drawn only where there are no others.
        reduction: `nonzero` or `mean`, over positive and negative terms together.
    """

    margin: float = 0.2
    beta: float = 1.2
    beta_form: BetaForm = "scalar"
    nu: float = 0.0
    distance_cutoff: float = 0.5
    loss_cutoff: float = 1.4
    reduction: Reduction = "nonzero"

    @property
    def merges(self) -> Mapping[str, Merge]:
        """Sums and counts of both kinds of terms, the sum of beta and the number of rows."""
        return {**sum_merges("positive", "negative"), "beta_sum": "sum", "num_rows": "sum"}

    def anchor_partial(self, batch: AnchorBatch) -> Statistics:
        """Return sums and counts over the anchors' positives and drawn negatives."""
        unit_GD = batch.unit_rows()
        distances_AG = pair_distances(batch.of_anchors(unit_GD), unit_GD)
        betas_A = batch.betas_A
        if betas_A is None:
            betas_A = distances_AG.new_full((len(distances_AG),), self.beta)
        positive_AG, negative_AG = batch.pair_masks()
        columns_AK, drawn_AK = self._draw(batch, distances_AG, negative_AG)
        pulls_AG = (distances_AG - betas_A[:, None] + self.margin).relu()
        far_AK = distances_AG.gather(1, columns_AK)
        pushes_AK = (betas_A[:, None] - far_AK + self.margin).relu()
        mined_AG = batch.mined_pairs()
        mined_AK = None if mined_AG is None else mined_AG.gather(1, columns_AK)
        return {
            **sum_and_counts("positive", pulls_AG, positive_AG),
            **sum_and_counts("negative", pushes_AK, drawn_AK),
            **mined_counts(pushes_AK, drawn_AK, mined_AK),
            "beta_sum": betas_A.sum(),
            "num_rows": torch.full_like(betas_A.detach().sum(), len(betas_A)),
        }

    def finish(self, total: Statistics) -> Tensor:
        """Return the mean over terms, plus nu times the mean beta."""
        mean_beta = total["beta_sum"] / total["num_rows"].clamp_min(1.0)
        return reduced(total, self.reduction, "positive", "negative") + self.nu * mean_beta

    def statistics(self, total: Statistics) -> Statistics:
        """Return the nonzero fractions of terms, and the batch's mean beta."""
        return {
            "active_positives": active_share(total, "positive"),
            "active_negatives": active_share(total, "negative"),
            "beta": total["beta_sum"] / total["num_rows"].clamp_min(1.0),
        }

    @torch.no_grad()
    def _draw(
        self, batch: AnchorBatch, distances_AG: Tensor, negative_AG: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the drawn negatives and which of them count: one per positive of the anchor."""
        weights_AG = distance_weights(
            distances_AG,
            negative_AG,
            batch.embeddings_GD.shape[1],
            distance_cutoff=self.distance_cutoff,
            loss_cutoff=self.loss_cutoff,
        )
        _, sizes = batch.labels_G.unique(return_counts=True)
        # The largest class of the whole batch, so that the draws do not depend on the partition.
        per_anchor = int(sizes.max()) - 1 if len(sizes) else 0
        others_A = batch.same_class().sum(dim=1) - 1
        uniforms_AK = uniforms(batch.seed, batch.step, batch, per_anchor)
        draws_K = torch.arange(per_anchor, device=others_A.device)
        counted_AK = (draws_K < others_A[:, None]) & negative_AG.any(dim=1, keepdim=True)
        return draw_weighted(weights_AG, uniforms_AK), counted_AK


def margin_loss(
    embeddings_BD: Tensor,
    labels_B: Tensor,
    betas: Tensor | float = 1.2,
    *,
    margin: float = 0.2,
    nu: float = 0.0,
    distance_cutoff: float = 0.5,
    loss_cutoff: float = 1.4,
    reduction: Reduction = "nonzero",
    seed: int = 0,
    step: int = 0,
    is_representative_B: Tensor | None = None,
) -> Tensor:
    """Return the margin loss of one process, a 0-d tensor: one part with all anchors.

    Args:
        embeddings_BD: Embeddings, (B, D), of any length; half precision is converted to float32.
        labels_B: Classes, (B,) int64; 0 .. C - 1 where there is a beta for each class.
        betas: beta: a number, a tensor of one element, or one per class, (C,).
        margin: m > 0.
        nu: Weight of the mean beta, >= 0.
        distance_cutoff: Negatives nearer than this are drawn as if they were this far.
        loss_cutoff: Negatives at this distance or beyond are drawn only where there are no others.
        reduction: Mean over the nonzero terms, or over all.
        seed: Seed of the draws, with the step and the row.
        step: Optimizer updates so far.
        is_representative_B: Only pairs with such a row count, (B,) bool; None counts all.

    Raises:
        ValueError: If shapes, labels or dtypes do not fit.
    """
    dtype = accurate_dtype(embeddings_BD)
    betas = torch.as_tensor(betas, dtype=dtype, device=embeddings_BD.device)
    if betas.numel() == 1:
        betas_B = betas.reshape(1).expand(len(labels_B))
    else:
        check_labels(labels_B, len(embeddings_BD), len(betas))
        betas_B = betas[labels_B]
    loss = Margin(
        margin=margin,
        nu=nu,
        distance_cutoff=distance_cutoff,
        loss_cutoff=loss_cutoff,
        reduction=reduction,
    )
    batch = whole_batch(
        embeddings_BD, labels_B, is_representative_B, betas_B=betas_B, seed=seed, step=step
    )
    return whole_loss(loss, batch)
