"""Pair and triplet mining: which pairs and triplets of a batch count, without gradient.

Shape legend: G rows of the global batch, A anchors of this part, D embedding size, K draws of an
anchor.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dml_dist.losses.pairs import AnchorBatch
from dml_dist.random_streams import Stream, generator_of


@torch.no_grad()
def semi_hard(positive_Q1: Tensor, negative_QG: Tensor, margin: float) -> Tensor:
    """Return which negatives are farther than the positive, by less than the margin, (Q, G) bool.

    Schroff et al., "FaceNet", CVPR 2015: d_ap < d_an < d_ap + m.
    """
    return (negative_QG > positive_Q1) & (negative_QG < positive_Q1 + margin)


@torch.no_grad()
def hardest_triplets(batch: AnchorBatch, distances_AG: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each anchor's triplet with the largest d_ap - d_an among those that count.

    Hermans et al., "In Defense of the Triplet Loss", 2017 ("batch hard"): the farthest positive
    and the nearest negative, ties to the lower row. With representatives the triplet contains at
    least one, in any role.

    Args:
        batch: Which pairs are positive and negative.
        distances_AG: Distances of the anchors to all rows, squared or not.

    Returns:
        Row of the positive, row of the negative, and whether there is a triplet, (A,) each.
    """
    found = [_hardest(distances_AG, *masks) for masks in _ways(batch)]
    p_A, n_A, found_A, gap_A = found[0]
    for p2_A, n2_A, found2_A, gap2_A in found[1:]:
        second_A = found2_A & (~found_A | (gap2_A > gap_A))
        p_A, n_A = torch.where(second_A, p2_A, p_A), torch.where(second_A, n2_A, n_A)
        found_A = found_A | found2_A
    return p_A, n_A, found_A


@torch.no_grad()
def maybe_hardest(batch: AnchorBatch, distances_AG: Tensor, errors_AG: Tensor) -> Tensor:
    """Return the pairs that `hardest_triplets` could choose within the errors, (A, G) bool."""
    least_AG, most_AG = distances_AG - errors_AG, distances_AG + errors_AG
    maybe_AG = torch.zeros_like(distances_AG, dtype=torch.bool)
    for positive_AG, negative_AG in _ways(batch):
        far_A1 = least_AG.masked_fill(~positive_AG, -torch.inf).amax(dim=1, keepdim=True)
        near_A1 = most_AG.masked_fill(~negative_AG, torch.inf).amin(dim=1, keepdim=True)
        maybe_AG |= positive_AG & (most_AG >= far_A1)
        maybe_AG |= negative_AG & (least_AG <= near_A1)
    return maybe_AG


def _ways(batch: AnchorBatch) -> list[tuple[Tensor, Tensor]]:
    """Return the positives and negatives that may be combined freely, (A, G) bool each."""
    same_AG = batch.same_class()
    rows_G = torch.arange(len(batch.labels_G), device=batch.labels_G.device)
    positive_AG = same_AG & (rows_G[batch.low : batch.high, None] != rows_G)
    if batch.is_representative_G is None:
        return [(positive_AG, ~same_AG)]
    held_AG = batch.holds_representative()
    # The representative is anchor or positive, or anchor or negative: the harder of the two.
    return [(positive_AG & held_AG, ~same_AG), (positive_AG, ~same_AG & held_AG)]


def _hardest(
    distances_AG: Tensor, positive_AG: Tensor, negative_AG: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    far_A, p_A = distances_AG.masked_fill(~positive_AG, -torch.inf).max(dim=1)
    near_A, n_A = distances_AG.masked_fill(~negative_AG, torch.inf).min(dim=1)
    return p_A, n_A, positive_AG.any(dim=1) & negative_AG.any(dim=1), far_A - near_A


@torch.no_grad()
def multi_similarity_pairs(
    cosines_AG: Tensor, positive_AG: Tensor, negative_AG: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Return the pairs that the miner of the multi-similarity loss keeps, (A, G) bool each.

    Wang et al., CVPR 2019: a positive with S < max over negatives + epsilon, a negative with
    S > min over positives - epsilon. An anchor without positives keeps no
    negatives, and vice versa.
    """
    top_A1, bottom_A1 = _hardest_cosines(cosines_AG, positive_AG, negative_AG)
    return (
        positive_AG & far_positives(cosines_AG, top_A1, epsilon),
        negative_AG & near_negatives(cosines_AG, bottom_A1, epsilon),
    )


def far_positives(cosines_AG: Tensor, top_A1: Tensor, epsilon: float) -> Tensor:
    """Return which positives the miner keeps, whose negatives' largest cosine is `top`, bool."""
    return cosines_AG - epsilon < top_A1


def near_negatives(cosines_AG: Tensor, bottom_A1: Tensor, epsilon: float) -> Tensor:
    """Return which negatives the miner keeps, whose positives' least cosine is `bottom`, bool."""
    return cosines_AG + epsilon > bottom_A1


@torch.no_grad()
def open_multi_similarity_pairs(
    cosines_AG: Tensor, error: float, positive_AG: Tensor, negative_AG: Tensor, epsilon: float
) -> Tensor:
    """Return the pairs on which an open choice of `multi_similarity_pairs` depends, (A, G) bool.

    Args:
        cosines_AG: Cosines of the anchors with all rows.
        error: Largest error of a cosine.
        positive_AG: Which pairs are positive.
        negative_AG: Which pairs are negative.
        epsilon: Slack of the miner.
    """
    top_A1, bottom_A1 = _hardest_cosines(cosines_AG, positive_AG, negative_AG)
    # Both sides of the miner's comparison have an error.
    open_AG = positive_AG & ((cosines_AG - (top_A1 + epsilon)).abs() <= 2.0 * error)
    open_AG |= negative_AG & ((cosines_AG - (bottom_A1 - epsilon)).abs() <= 2.0 * error)
    hardest_AG = negative_AG & (cosines_AG >= top_A1 - 2.0 * error)
    hardest_AG |= positive_AG & (cosines_AG <= bottom_A1 + 2.0 * error)
    return open_AG | (hardest_AG & open_AG.any(dim=1, keepdim=True))


def _hardest_cosines(
    cosines_AG: Tensor, positive_AG: Tensor, negative_AG: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the largest of each anchor's negatives and the least of its positives, (A, 1) each."""
    return (
        cosines_AG.masked_fill(~negative_AG, -torch.inf).amax(dim=1, keepdim=True),
        cosines_AG.masked_fill(~positive_AG, torch.inf).amin(dim=1, keepdim=True),
    )


@torch.no_grad()
def distance_weights(
    distances_AG: Tensor,
    negative_AG: Tensor,
    embedding_size: int,
    *,
    distance_cutoff: float,
    loss_cutoff: float,
) -> Tensor:
    """Return the sampling weights of negatives, (A, G) float64; a row's maximum is 1, or all are 0.

    Wu et al., "Sampling Matters in Deep Embedding Learning", ICCV 2017: the inverse of the density
    of distances between random points of the unit sphere,

        q(d) = d^(D - 2) (1 - d^2 / 4)^((D - 3) / 2)

    with d no smaller than `distance_cutoff`. Negatives at `loss_cutoff` or beyond have no loss and
    are not drawn; an anchor that has no others draws uniformly.

    Args:
        distances_AG: Distances of unit vectors, not squared.
        negative_AG: Which pairs are negatives that count.
        embedding_size: D.
        distance_cutoff: Lower bound on the distance, in (0, loss_cutoff).
        loss_cutoff: In (distance_cutoff, 2).
    """
    # In logarithms: d^(2 - D) overflows for usual D.
    clamped_AG = distances_AG.double().clamp(distance_cutoff, loss_cutoff)
    log_weights_AG = (2.0 - embedding_size) * clamped_AG.log()
    log_weights_AG -= (embedding_size - 3.0) / 2.0 * (1.0 - clamped_AG.square() / 4.0).log()
    useful_AG = negative_AG & (distances_AG < loss_cutoff)
    log_weights_AG.masked_fill_(~useful_AG, -torch.inf)
    peak_A1 = log_weights_AG.amax(dim=1, keepdim=True)
    weights_AG = (log_weights_AG - peak_A1.masked_fill(peak_A1 == -torch.inf, 0.0)).exp()
    return torch.where(useful_AG.any(dim=1, keepdim=True), weights_AG, negative_AG.double())


@torch.no_grad()
def draw_weighted(weights_AG: Tensor, uniforms_AK: Tensor) -> Tensor:
    """Return K columns for each row, drawn in proportion to its weights, (A, K) int64.

    Columns of a row with zero weights are undefined.

    Args:
        weights_AG: Weights >= 0, float64.
        uniforms_AK: Uniform draws u in [0, 1), float64: the first column at which the cumulative
            sum of the weights exceeds u times their total is drawn.
    """
    sums_AG = weights_AG.cumsum(dim=1)
    total_A1 = sums_AG[:, -1:]
    # Stay below the total even when the product rounds up, so that the last column exceeds it.
    thresholds_AK = torch.minimum(
        uniforms_AK * total_A1, torch.nextafter(total_A1, torch.zeros_like(total_A1))
    )
    columns_AK = torch.searchsorted(sums_AG, thresholds_AK, right=True)
    return columns_AK.clamp_max(weights_AG.shape[1] - 1)


def uniforms(seed: int, step: int, batch: AnchorBatch, per_anchor: int) -> Tensor:
    """Return uniform draws in [0, 1) for every anchor, (A, K) float64 on the batch's device.

    Draw k of row i depends on (seed, step, k, i) and the global batch size, not on the rank that
    has row i as an anchor.
    """
    generator = generator_of(Stream.MINED_NEGATIVES, seed, step)
    # Every rank draws for the whole batch and keeps its columns: any number of ranks agrees.
    uniforms_KG = generator.random((per_anchor, len(batch.labels_G)))
    own_AK = np.ascontiguousarray(uniforms_KG[:, batch.low : batch.high].T)
    return torch.from_numpy(own_AK).to(batch.labels_G.device)
