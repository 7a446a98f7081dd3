"""Distances of the pairs of a batch of unit rows, whose choices do not depend on the partition.

    d_ij = |x_i - x_j|, with gradient 0 where d_ij = 0

The exact form computes a distance from its two rows alone, in a fixed order, so that its bits do
not depend on how anchors are partitioned. A matrix product is faster, but its last bits depend on
the shape of the block, and it loses digits of small distances. So distances come from a product,

    d^2 = |x_i|^2 + |x_j|^2 - 2 x_i . x_j

and pairs are computed again in the exact form where they are near, or where a choice of the loss
(a hinge, a miner) could come out differently within the error bound below. What is chosen is then
what the exact form chooses.

Bound (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1; u = eps / 2, rows
of length <= 1): a sum of D products errs by at most D u / (1 - D u) times the sum of the absolute
products, in any order, fused or not. Together the three sums of the product err by 4 D u, and the
squared distance of the exact form by 4 D u, so that with

    bound = 1.05 (8 D + 128) u,    |d^2 - d_exact^2| <= bound,    |d - d_exact| <= bound / d

The factor 1.05 covers second-order terms and 128 all roundings beside the sums, those of sums and
differences of two distances and a margin included. All of this needs `full_precision`.

Shape legend: G rows of the global batch, A anchors of this part, D embedding size, Q pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dml_dist.losses.numerics import full_precision

OpenChoices = Callable[[Tensor, Tensor], Tensor]
"""(distances, their largest errors) -> which pairs a choice depends on that the errors leave open.

All are (A, G).
"""

_NEAR = 1e-2
"""Products lose digits by 1 / d in the gradient and 1 / d^2 in the distance: at most to this."""

_DENSE = 4
"""Above 1 / 4 of all pairs, single pairs take longer than the exact form of all."""


def pair_distances(
    anchors_AD: Tensor, rows_GD: Tensor, open_choices: OpenChoices | None = None
) -> Tensor:
    """Return |a_i - x_j|, (A, G), differentiable once; the gradient is 0 at distance 0.

    Args:
        anchors_AD: Rows of length <= 1, (A, D).
        rows_GD: Rows of length <= 1, (G, D).
        open_choices: Names the pairs to compute again in the exact form, see above; None computes
            all pairs in the exact form.
    """
    distances: Tensor = _PairDistances.apply(anchors_AD, rows_GD, open_choices)
    return distances


def cosines(anchors_AD: Tensor, rows_GD: Tensor) -> Tensor:
    """Return a_i . x_j, (A, G), differentiable once.

    Args:
        anchors_AD: Rows of length <= 1, (A, D).
        rows_GD: Rows of length <= 1, (G, D).
    """
    products: Tensor = _Cosines.apply(anchors_AD, rows_GD)
    return products


def cosines_for_choices(
    cosines_AG: Tensor,
    anchors_AD: Tensor,
    rows_GD: Tensor,
    open_choices: Callable[[Tensor, float], Tensor],
) -> Tensor:
    """Return cosines by which the same is chosen in every partition, (A, G), without gradient.

    The exact form is the sum of a pair's D products in a fixed order. It and the matrix product
    err by D u each, so that they differ by at most 1.05 (2 D + 64) u.

    Args:
        cosines_AG: `cosines` of both.
        anchors_AD: Rows of length <= 1, (A, D).
        rows_GD: Rows of length <= 1, (G, D).
        open_choices: (cosines, largest error) -> the pairs to compute again, (A, G) bool.
    """
    with torch.no_grad():
        error = 1.05 * (rows_GD.shape[1] + 32) * torch.finfo(cosines_AG.dtype).eps
        pairs = _pairs(open_choices(cosines_AG, error))
        chosen_AG = cosines_AG.clone() if pairs else cosines_AG.detach()
        for i_Q, j_Q in pairs:
            products_QD = anchors_AD.index_select(0, i_Q) * rows_GD.index_select(0, j_Q)
            chosen_AG[i_Q, j_Q] = products_QD.sum(dim=1)
        return chosen_AG


class _PairDistances(Function):
    @staticmethod
    def forward(
        ctx: Any, anchors_AD: Tensor, rows_GD: Tensor, open_choices: OpenChoices | None
    ) -> Tensor:
        if open_choices is None:
            distances_AG = _exact(anchors_AD, rows_GD)
        else:
            distances_AG = _by_product(anchors_AD, rows_GD, open_choices)
        ctx.save_for_backward(anchors_AD, rows_GD, distances_AG)
        return distances_AG

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_AG: Tensor) -> tuple[Tensor, Tensor | None, None]:
        anchors_AD, rows_GD, distances_AG = ctx.saved_tensors
        weights_AG = (grad_AG / distances_AG).masked_fill_(distances_AG == 0, 0.0)
        near_AG = (distances_AG < _NEAR) & (weights_AG != 0)
        far_AG = weights_AG.masked_fill(near_AG, 0.0)
        # sum_j w_ij (a_i - x_j) by products, which are far faster than (A, G, D) differences.
        of_anchors, of_rows = _product_gradients(-far_AG, anchors_AD, rows_GD)
        of_anchors.addcmul_(anchors_AD, far_AG.sum(dim=1, keepdim=True))
        of_rows.addcmul_(rows_GD, far_AG.sum(dim=0)[:, None])
        # Near pairs by differences, since the two products above would cancel.
        for i_Q, j_Q in _pairs(near_AG):
            pulls_QD = anchors_AD.index_select(0, i_Q) - rows_GD.index_select(0, j_Q)
            pulls_QD *= weights_AG[i_Q, j_Q, None]
            of_anchors.index_add_(0, i_Q, pulls_QD)
            of_rows.index_add_(0, j_Q, pulls_QD, alpha=-1)
        return of_anchors, None if of_rows is of_anchors else of_rows, None


class _Cosines(Function):
    @staticmethod
    def forward(ctx: Any, anchors_AD: Tensor, rows_GD: Tensor) -> Tensor:
        ctx.save_for_backward(anchors_AD, rows_GD)
        with full_precision(rows_GD.device):
            return anchors_AD @ rows_GD.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_AG: Tensor) -> tuple[Tensor, Tensor | None]:
        of_anchors, of_rows = _product_gradients(grad_AG, *ctx.saved_tensors)
        return of_anchors, None if of_rows is of_anchors else of_rows


def _product_gradients(
    weights_AG: Tensor, anchors_AD: Tensor, rows_GD: Tensor
) -> tuple[Tensor, Tensor]:
    """Return sum_j w_ij x_j and sum_i w_ij a_i; if both are the same rows, their sum, twice."""
    if anchors_AD is rows_GD:
        # One product for two.
        both_GD = (weights_AG + weights_AG.T) @ rows_GD
        return both_GD, both_GD
    return weights_AG @ rows_GD, weights_AG.T @ anchors_AD


def _exact(anchors: Tensor, rows: Tensor) -> Tensor:
    """Return distances by differences; a pair's bits are the same in any block and batch."""
    return torch.cdist(anchors, rows, compute_mode="donot_use_mm_for_euclid_dist")


def _by_product(anchors_AD: Tensor, rows_GD: Tensor, open_choices: OpenChoices) -> Tensor:
    squares_A, squares_G = (x.square().sum(dim=1) for x in (anchors_AD, rows_GD))
    distances_AG = squares_A[:, None] + squares_G
    with full_precision(rows_GD.device):
        distances_AG.addmm_(anchors_AD, rows_GD.T, alpha=-2)
    near_AG = distances_AG < _NEAR
    distances_AG.clamp_min_(0.0).sqrt_()
    _make_exact(distances_AG, near_AG, anchors_AD, rows_GD)
    bound = 1.05 * (4 * rows_GD.shape[1] + 64) * torch.finfo(distances_AG.dtype).eps
    errors_AG = (bound / distances_AG).masked_fill_(near_AG, 0.0)
    _make_exact(distances_AG, open_choices(distances_AG, errors_AG), anchors_AD, rows_GD)
    return distances_AG


def _make_exact(
    distances_AG: Tensor, chosen_AG: Tensor, anchors_AD: Tensor, rows_GD: Tensor
) -> None:
    """Replace the chosen distances by those of the exact form."""
    if int(chosen_AG.count_nonzero()) > chosen_AG.numel() // _DENSE:
        distances_AG.copy_(_exact(anchors_AD, rows_GD))
        return
    for i_Q, j_Q in _pairs(chosen_AG):
        i_QD, j_QD = anchors_AD.index_select(0, i_Q), rows_GD.index_select(0, j_Q)
        distances_AG[i_Q, j_Q] = _exact(i_QD[:, None], j_QD[:, None])[:, 0, 0]


def _pairs(chosen_AG: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the chosen pairs, at most G at a time, whose rows fit the memory of the batch."""
    i_P, j_P = chosen_AG.nonzero(as_tuple=True)
    size = chosen_AG.shape[1]
    return list(zip(i_P.split(size), j_P.split(size), strict=True)) if len(i_P) else []
