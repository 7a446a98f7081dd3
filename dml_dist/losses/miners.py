"""Which pairs and triplets of a batch count: choices without gradient.

Shape legend: G rows of the global batch, A anchors of this part, D embedding size, K numbers
drawn for each anchor.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dml_dist.losses.pairs import AnchorBatch

_STREAM = 0x6E656773
"""Keeps these draws apart from others with the same seed; part of what a seed means."""


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
    and the nearest negative; of equally far ones the lower row. With representatives the triplet
    holds one, in any of its places.

    Args:
        batch: Which pairs are positive and negative.
        distances_AG: Distances of the anchors to all rows, squared or not.

    Returns:
        Row of the positive, row of the negative, and whether there is a triplet, (A,) each.
    """
    same_AG = batch.same_class()
    rows_G = torch.arange(len(batch.labels_G), device=batch.labels_G.device)
    positive_AG = same_AG & (rows_G[batch.low : batch.high, None] != rows_G)
    if batch.is_representative_G is None:
        return _hardest(distances_AG, positive_AG, ~same_AG)[:3]
    held_AG = batch.holds_representative()
    p_A, n_A, found_A, gap_A = _hardest(distances_AG, positive_AG & held_AG, ~same_AG)
    p2_A, n2_A, found2_A, gap2_A = _hardest(distances_AG, positive_AG, ~same_AG & held_AG)
    second_A = found2_A & (~found_A | (gap2_A > gap_A))
    return (
        torch.where(second_A, p2_A, p_A),
        torch.where(second_A, n2_A, n_A),
        found_A | found2_A,
    )


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
    S > min over positives - epsilon. An anchor without the one kind keeps none of the other.
    """
    hardest_negative_A1 = cosines_AG.masked_fill(~negative_AG, -torch.inf).amax(1, keepdim=True)
    hardest_positive_A1 = cosines_AG.masked_fill(~positive_AG, torch.inf).amin(1, keepdim=True)
    return (
        positive_AG & (cosines_AG - epsilon < hardest_negative_A1),
        negative_AG & (cosines_AG + epsilon > hardest_positive_A1),
    )


# ---------------------------------------------------------------- distance-weighted sampling


@torch.no_grad()
def distance_weights(
    distances_AG: Tensor,
    negative_AG: Tensor,
    embedding_size: int,
    *,
    distance_cutoff: float,
    loss_cutoff: float,
) -> Tensor:
    """Return the weights with which negatives are drawn, (A, G) float64, largest 1 or all zero.

    Wu et al., "Sampling Matters in Deep Embedding Learning", ICCV 2017: the inverse of the density
    of distances between random points of the unit sphere,

        q(d) = d^(D - 2) (1 - d^2 / 4)^((D - 3) / 2)

    with d no smaller than `distance_cutoff`. Negatives at `loss_cutoff` or beyond have no loss and
    are not drawn; an anchor that has only such ones draws evenly among them.

    Args:
        distances_AG: Distances of unit vectors, not squared.
        negative_AG: Which pairs are negatives that count.
        embedding_size: D.
        distance_cutoff: Lower bound on the distance, in (0, loss_cutoff).
        loss_cutoff: In (distance_cutoff, 2).
    """
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

    A row of zero weights gives columns that mean nothing.

    Args:
        weights_AG: Weights >= 0, float64.
        uniforms_AK: Numbers in [0, 1), float64: a column is drawn where the running sum of the
            weights first exceeds the number's share of their total.
    """
    sums_AG = weights_AG.cumsum(dim=1)
    total_A1 = sums_AG[:, -1:]
    # Below the total even when the product is rounded up, so that the last sum exceeds it.
    marks_AK = torch.minimum(
        uniforms_AK * total_A1, torch.nextafter(total_A1, torch.zeros_like(total_A1))
    )
    columns_AK = torch.searchsorted(sums_AG, marks_AK, right=True)
    return columns_AK.clamp_max(weights_AG.shape[1] - 1)


def uniforms(seed: int, step: int, batch: AnchorBatch, per_anchor: int) -> Tensor:
    """Return numbers in [0, 1) for every anchor, (A, K) float64 on the batch's device.

    Number k of row i is drawn from (seed, step, k, i) and the size of the global batch, whoever
    has row i as an anchor.
    """
    name = np.random.SeedSequence(seed, spawn_key=(_STREAM, step))
    generator = np.random.Generator(np.random.Philox(name))
    numbers_KG = generator.random((per_anchor, len(batch.labels_G)))
    own_AK = np.ascontiguousarray(numbers_KG[:, batch.low : batch.high].T)
    return torch.from_numpy(own_AK).to(batch.labels_G.device)
