"""Triplet loss between the batch and a table: all, semi-hard or hardest triplets.

The formula is that of `losses/pairs_triplet.py`. The anchor is a row i of the batch, the positive
one of the M rows p of its class, the negative any row n of another class. A first round collects
the distances of the positives, so that every shard has the triplets of its own negatives:

    S = sum over n of h(d_ip - d_in + m),    dS / d d_ip = sum over n of h'(d_ip - d_in + m)

Both are sums over shards, and `finish` gives the positives their gradient from the second.

Shape legend: G rows of the global batch, D embedding size, c rows of a chunk, M rows a class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dml_dist.losses.miners import semi_hard
from dml_dist.losses.numerics import Merge, Statistics, normalize_rows
from dml_dist.losses.pair_distances import pair_distances
from dml_dist.losses.pairs import reduced, sum_and_counts, sum_merges
from dml_dist.losses.pairs_triplet import Triplet
from dml_dist.losses.table import (
    TableBatch,
    TableRound,
    chunk_bounds,
    exact_distances,
    rows_per_chunk,
    sum_over_chunks,
    take_rows,
)

_PAIRS: Mapping[str, Merge] = {"distances": "sum", "positives": "sum"}
_NEAREST: Mapping[str, Merge] = {"nearness": "max"}
_SUMS: Mapping[str, Merge] = {**sum_merges("triplet"), "slopes": "sum"}


@dataclass(frozen=True)
class TableTriplet:
    """Triplet loss between the batch and the table.

    Attributes:
        loss: Margin, mining, distance, surrogate and reduction; without `swap`.
        memory_mb: Bound on the memory of a chunk in MiB.
    """

    loss: Triplet
    memory_mb: float

    def rounds(self, rows_per_class: int) -> tuple[TableRound, ...]:
        """Return one round for the hardest triplets, else those of positives and of triplets."""
        widths = dict.fromkeys(_PAIRS, rows_per_class)
        if self.loss.mining == "hard":
            return (TableRound({**_PAIRS, **_NEAREST}, self._hardest, widths | {"nearness": 1}),)
        return (
            TableRound(_PAIRS, _positives, widths),
            TableRound(_SUMS, self._triplets, {"slopes": rows_per_class}),
        )

    def finish(self, total: Statistics) -> Tensor:
        """Return the mean over triplets."""
        return reduced(self._counted(total), self.loss.reduction, "triplet")

    def statistics(self, total: Statistics) -> Statistics:
        """Return the fraction of the counted triplets that violate the margin."""
        return self.loss.statistics(self._counted(total))

    def _counted(self, total: Statistics) -> Statistics:
        """Return sum and counts of triplets; the sum has all gradients."""
        if self.loss.mining == "hard":
            return self._of_hardest(total)
        measured_GM = self.loss.maybe_squared(total["distances"])
        # A zero whose gradient is that of the sum by the positives' distances.
        of_positives = ((measured_GM - measured_GM.detach()) * total["slopes"].detach()).sum()
        return total | {"triplet_sum": total["triplet_sum"] + of_positives}

    # ------------------------------------------------------------ all, semi-hard

    def _triplets(self, batch: TableBatch, known: Statistics) -> Statistics:
        limits_GM = known["distances"].masked_fill(known["positives"] == 0, torch.nan)

        def of_chunk(queries_GD: Tensor, rows_cD: Tensor, negative_Gc: Tensor) -> Statistics:
            def open_pairs(distances_Gc: Tensor, errors_Gc: Tensor) -> Tensor:
                return self._open(limits_GM, distances_Gc, errors_Gc) & negative_Gc

            distances_Gc = pair_distances(queries_GD, rows_cD, open_pairs)
            found = _TripletSums.apply(self.loss, limits_GM, distances_Gc, negative_Gc)
            return dict(zip(_SUMS, found, strict=True))

        return sum_over_chunks(of_chunk, batch, tuple(_SUMS), self.memory_mb)

    def _open(self, limits_GM: Tensor, distances_Gc: Tensor, errors_Gc: Tensor) -> Tensor:
        """Return which negatives are in a triplet whose hinge or mining the errors leave open."""
        loss = self.loss
        least_Gc = loss.maybe_squared((distances_Gc - errors_Gc).clamp_min(0.0))
        most_Gc = loss.maybe_squared(distances_Gc + errors_Gc)
        open_Gc = torch.zeros_like(distances_Gc, dtype=torch.bool)
        # d_an = d_ap + m is the hinge and the upper limit of semi-hard negatives, d_ap the lower.
        margins = (loss.margin, 0.0) if loss.mining == "semi_hard" else (loss.margin,)
        for limit_G in loss.maybe_squared(limits_GM).unbind(dim=1):
            for margin in margins:
                limit_G1 = limit_G[:, None] + margin
                open_Gc |= (most_Gc >= limit_G1) & (least_Gc <= limit_G1)
        return open_Gc

    # ------------------------------------------------------------ hardest

    def _hardest(self, batch: TableBatch, known: Statistics) -> Statistics:
        row_G, found_G = self._nearest_rows(batch)
        nearest_GD, _ = take_rows(batch.rows_LD, row_G)
        distances_G = exact_distances(
            batch.queries_GD[:, None], normalize_rows(nearest_GD)[:, None]
        )[:, 0, 0]
        nearness_G = torch.where(found_G, -distances_G, -torch.inf)
        return _positives(batch, known) | {"nearness": nearness_G}

    @torch.no_grad()
    def _nearest_rows(self, batch: TableBatch) -> tuple[Tensor, Tensor]:
        """Return each row's nearest negative in this shard, ties to the lower, and if any."""
        queries_GD = batch.queries_GD
        step = rows_per_chunk(queries_GD, self.memory_mb)
        best_G = queries_GD.new_full((len(queries_GD),), torch.inf)
        row_G = torch.zeros_like(batch.labels_G)
        for low, high in chunk_bounds(len(batch.rows_LD), step):
            left_out_Gc = ~batch.negatives(low, high)
            unit_cD = normalize_rows(batch.rows_LD[low:high])
            distances_Gc = pair_distances(queries_GD, unit_cD, partial(_maybe_nearest, left_out_Gc))
            near_G, index_G = distances_Gc.masked_fill_(left_out_Gc, torch.inf).min(dim=1)
            row_G = torch.where(near_G < best_G, index_G + low, row_G)
            best_G = torch.minimum(near_G, best_G)
        return row_G, best_G < torch.inf

    def _of_hardest(self, total: Statistics) -> Statistics:
        distances_GM, positive_GM = total["distances"], total["positives"] > 0
        farthest_G1 = (
            distances_GM.detach().masked_fill(~positive_GM, -torch.inf).argmax(dim=1, keepdim=True)
        )
        found_G = positive_GM.any(dim=1) & (total["nearness"] > -torch.inf)
        # Without a negative the nearness is -inf, whose gradient would be NaN.
        near_G = -total["nearness"].masked_fill(~found_G, 0.0)
        measured_G = self.loss.maybe_squared(distances_GM.gather(1, farthest_G1)[:, 0])
        violations_G = measured_G - self.loss.maybe_squared(near_G) + self.loss.margin
        return sum_and_counts("triplet", self.loss.terms(violations_G), found_G)


class _TripletSums(Function):
    """Sum, counts and slopes of the triplets of a chunk, one positive of all rows at a time."""

    @staticmethod
    def forward(
        ctx: Any, loss: Triplet, limits_GM: Tensor, distances_Gc: Tensor, negative_Gc: Tensor
    ) -> tuple[Tensor, ...]:
        measured_Gc = loss.maybe_squared(distances_Gc)
        slopes_Gc = torch.zeros_like(measured_Gc)
        slopes_GM = torch.zeros_like(limits_GM)
        totals = [measured_Gc.new_zeros(()) for _ in sum_merges("triplet")]
        for m, limit_G in enumerate(loss.maybe_squared(limits_GM).unbind(dim=1)):
            limit_G1 = limit_G[:, None]
            counted_Gc = negative_Gc & ~limit_G1.isnan()
            if loss.mining == "semi_hard":
                counted_Gc &= semi_hard(limit_G1, measured_Gc, loss.margin)
            violations_Gc = limit_G1 - measured_Gc + loss.margin
            found = sum_and_counts("triplet", loss.terms(violations_Gc), counted_Gc)
            totals = [a + b for a, b in zip(totals, found.values(), strict=True)]
            of_one_Gc = loss.slopes(violations_Gc).masked_fill_(~counted_Gc, 0.0)
            slopes_Gc += of_one_Gc
            slopes_GM[:, m] = of_one_Gc.sum(dim=1)
        ctx.save_for_backward(slopes_Gc, distances_Gc)
        ctx.squared = loss.squared
        ctx.mark_non_differentiable(*totals[1:], slopes_GM)
        return (*totals, slopes_GM)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        slopes_Gc, distances_Gc = ctx.saved_tensors
        grad_Gc = slopes_Gc * -grad
        return None, None, grad_Gc * 2 * distances_Gc if ctx.squared else grad_Gc, None


def _maybe_nearest(left_out_Gc: Tensor, distances_Gc: Tensor, errors_Gc: Tensor) -> Tensor:
    """Return which rows may be the nearest of a chunk within the errors, (G, c) bool."""
    most_Gc = (distances_Gc + errors_Gc).masked_fill_(left_out_Gc, torch.inf)
    open_Gc = distances_Gc - errors_Gc <= most_Gc.amin(dim=1, keepdim=True)
    return open_Gc.masked_fill_(left_out_Gc, False)


def _positives(batch: TableBatch, _: Statistics) -> Statistics:
    distances_QM = batch.own_distances()
    return {
        "distances": batch.of_all(distances_QM),
        "positives": batch.of_all(batch.positive_QM.to(distances_QM.dtype)),
    }
