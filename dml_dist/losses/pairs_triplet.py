"""Triplet loss over the global batch: all, semi-hard or hardest triplets.

    h( d_ap - d_an + m ),  h = relu, or softplus (`smooth`)

`squared` takes squared distances; `swap` takes min(d_an, d_pn) for d_an (Balntas et al., BMVC
2016), after mining. Triplets are processed in chunks of positive pairs: (Q, G)
tensors of bounded memory, never (A, G, G).

Shape legend: G rows of the global batch, A anchors of this part, D embedding size, Q positive
pairs of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dml_dist.losses.miners import hardest_triplets, maybe_hardest, semi_hard
from dml_dist.losses.numerics import Merge, Statistics
from dml_dist.losses.pair_distances import pair_distances
from dml_dist.losses.pairs import (
    MINED_MERGES,
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

Mining = Literal["all", "semi_hard", "hard"]
"""All triplets; those with d_ap < d_an < d_ap + m; the one with the largest d_ap - d_an."""

_LIVE_TENSORS = 12
"""Upper bound on the (Q, G) tensors of a chunk and its backward pass, with `swap`."""


@dataclass(frozen=True)
class Triplet:
    """Triplet loss, partitioned by anchor.

    Attributes:
        margin: m >= 0; at most 2, or 4 with `squared`.
        mining: Which triplets count.
        squared: Whether distances are squared.
        swap: Whether d_an may be replaced by a smaller d_pn.
        smooth: Use softplus instead of relu.
        reduction: `nonzero` or `mean`, over the triplets that count.
        triplet_memory_mb: Bound on the memory of triplets in MiB; a chunk has at least one positive
            pair.
    """

    margin: float = 0.1
    mining: Mining = "all"
    squared: bool = False
    swap: bool = False
    smooth: bool = False
    reduction: Reduction = "nonzero"
    triplet_memory_mb: float = 64.0

    @property
    def merges(self) -> Mapping[str, Merge]:
        """Sum and counts of triplets."""
        return sum_merges("triplet")

    def anchor_partial(self, batch: AnchorBatch) -> Statistics:
        """Return the sum and counts over the triplets of the anchors."""
        unit_GD = batch.unit_rows()
        anchors_AD = batch.of_anchors(unit_GD)
        if self.mining == "hard":
            distances_AG = pair_distances(anchors_AD, unit_GD, partial(maybe_hardest, batch))
            return self._hard(batch, unit_GD, distances_AG)
        same_AG = batch.same_class()
        others_AG = same_AG.clone()
        others_AG[:, batch.low : batch.high].fill_diagonal_(False)
        budget = self.triplet_memory_mb * 2**20 / _LIVE_TENSORS
        rows = max(1, int(budget / (len(unit_GD) * unit_GD.element_size())))
        chunks = others_AG.nonzero().split(rows)

        def open_choices(distances_AG: Tensor, errors_AG: Tensor) -> Tensor:
            return self._open(chunks, same_AG, distances_AG, errors_AG)

        # With `swap` the smaller of two distances is a choice of its own, not worth the bound.
        distances_AG = pair_distances(anchors_AD, unit_GD, None if self.swap else open_choices)
        return self._chunked(batch, unit_GD, distances_AG, same_AG, chunks)

    def finish(self, total: Statistics) -> Tensor:
        """Return the mean over triplets."""
        return reduced(total, self.reduction, "triplet")

    def statistics(self, total: Statistics) -> Statistics:
        """Return the fraction of the counted triplets that violate the margin."""
        return {"active_triplets": active_share(total, "triplet")}

    def _hard(self, batch: AnchorBatch, unit_GD: Tensor, distances_AG: Tensor) -> Statistics:
        positive_A, negative_A, found_A = hardest_triplets(batch, self.maybe_squared(distances_AG))
        ap_A = distances_AG.gather(1, positive_A[:, None])[:, 0]
        an_A = distances_AG.gather(1, negative_A[:, None])[:, 0]
        if self.swap:
            difference_AD = unit_GD[positive_A] - unit_GD[negative_A]
            an_A = torch.minimum(an_A, torch.linalg.vector_norm(difference_AD, dim=1))
        terms_A, mined_AG = self._terms(ap_A, an_A), batch.mined_pairs()
        mined_A = None if mined_AG is None else mined_AG.gather(1, negative_A[:, None])[:, 0]
        return {
            **sum_and_counts("triplet", terms_A, found_A),
            **mined_counts(terms_A, found_A, mined_A),
        }

    def _open(
        self, chunks: Sequence[Tensor], same_AG: Tensor, distances_AG: Tensor, errors_AG: Tensor
    ) -> Tensor:
        """Return which pairs are in a triplet whose hinge or mining the errors leave open."""
        least_AG = self.maybe_squared((distances_AG - errors_AG).clamp_min(0.0))
        most_AG = self.maybe_squared(distances_AG + errors_AG)
        open_AG = torch.zeros_like(same_AG)
        # d_an = d_ap + m is the hinge and the upper limit of semi-hard negatives, d_ap the lower.
        margins = (self.margin, 0.0) if self.mining == "semi_hard" else (self.margin,)
        for pairs_Q2 in chunks:
            a_Q, p_Q = pairs_Q2.unbind(dim=1)
            least_Q1, most_Q1 = least_AG[a_Q, p_Q][:, None], most_AG[a_Q, p_Q][:, None]
            an_least_QG, an_most_QG = (x.index_select(0, a_Q) for x in (least_AG, most_AG))
            for margin in margins:
                open_QG = (an_most_QG > least_Q1 + margin) & (an_least_QG < most_Q1 + margin)
                open_QG &= ~same_AG.index_select(0, a_Q)
                q_T, n_T = open_QG.nonzero(as_tuple=True)
                open_AG[a_Q[q_T], n_T] = True
                open_AG[a_Q[q_T], p_Q[q_T]] = True
        return open_AG

    def _chunked(
        self,
        batch: AnchorBatch,
        unit_GD: Tensor,
        distances_AG: Tensor,
        same_AG: Tensor,
        chunks: Sequence[Tensor],
    ) -> Statistics:
        mined_AG = batch.mined_pairs()

        def chunk(leaves: Sequence[Tensor], pairs_Q2: Tensor) -> Statistics:
            own_AG, all_GD = leaves
            a_Q, p_Q = pairs_Q2.unbind(dim=1)
            ap_Q1 = own_AG[a_Q, p_Q][:, None]
            an_QG = own_AG.index_select(0, a_Q)
            counted_QG = ~same_AG.index_select(0, a_Q)
            if (flags_G := batch.is_representative_G) is not None:
                counted_QG &= (flags_G[a_Q + batch.low] | flags_G[p_Q])[:, None] | flags_G
            if self.mining == "semi_hard":
                measured = self.maybe_squared(ap_Q1), self.maybe_squared(an_QG)
                counted_QG &= semi_hard(*measured, self.margin)
            if self.swap:
                an_QG = torch.minimum(an_QG, pair_distances(all_GD[p_Q], all_GD))
            terms_QG = self._terms(ap_Q1, an_QG)
            mined_QG = None if mined_AG is None else mined_AG[a_Q]
            return {
                **sum_and_counts("triplet", terms_QG, counted_QG),
                **mined_counts(terms_QG, counted_QG, mined_QG),
            }

        names = [*self.merges, *(MINED_MERGES if mined_AG is not None else ())]
        return _sum_over_chunks(chunk, chunks, [distances_AG, unit_GD], names)

    def terms(self, violations: Tensor) -> Tensor:
        """Return h(v), v = d_ap - d_an + m with distances squared or not."""
        if self.smooth:
            return torch.logaddexp(violations, torch.zeros_like(violations))
        return violations.relu()

    def slopes(self, violations: Tensor) -> Tensor:
        """Return h'(v)."""
        return violations.sigmoid() if self.smooth else (violations > 0).to(violations.dtype)

    def maybe_squared(self, distances: Tensor) -> Tensor:
        """Return the distances as the loss and its miner compare them."""
        return distances.square() if self.squared else distances

    def _terms(self, positive: Tensor, negative: Tensor) -> Tensor:
        return self.terms(self.maybe_squared(positive) - self.maybe_squared(negative) + self.margin)


def triplet_loss(
    embeddings_BD: Tensor,
    labels_B: Tensor,
    *,
    margin: float = 0.1,
    mining: Mining = "all",
    squared: bool = False,
    swap: bool = False,
    smooth: bool = False,
    reduction: Reduction = "nonzero",
    triplet_memory_mb: float = 64.0,
    is_representative_B: Tensor | None = None,
) -> Tensor:
    """Return the triplet loss of one process, a 0-d tensor: one part with all anchors.

    Args:
        embeddings_BD: Embeddings, (B, D), of any length; half precision is converted to float32.
        labels_B: Classes, (B,) int64.
        margin: m >= 0.
        mining: `all`; `semi_hard`, d_ap < d_an < d_ap + m; or `hard`, each anchor's triplet with
            the largest d_ap - d_an.
        squared: Use squared distances, for mining as well.
        swap: Use min(d_an, d_pn) for d_an, after mining.
        smooth: Use softplus instead of relu.
        reduction: Mean over the nonzero terms, or over all triplets that count.
        triplet_memory_mb: Bound on the memory of triplets in MiB, > 0.
        is_representative_B: Only triplets with such a row count, (B,) bool; None counts all.

    Raises:
        ValueError: If shapes or dtypes do not fit.
    """
    loss = Triplet(margin, mining, squared, swap, smooth, reduction, triplet_memory_mb)
    batch = whole_batch(embeddings_BD, labels_B, is_representative_B)
    return whole_loss(loss, batch)


_Chunk = Callable[[Sequence[Tensor], Tensor], Statistics]
"""(leaves, positive pairs of a chunk) -> its sum and counts."""


def _sum_over_chunks(
    function: _Chunk, chunks: Sequence[Tensor], leaves: Sequence[Tensor], names: Sequence[str]
) -> Statistics:
    """Return the statistics summed over chunks; each chunk's graph is freed before the next.

    The gradient of the sum is a scalar factor, so the gradients of the leaves are computed chunk by
    chunk in the forward pass, and only scaled in the backward pass.

    Args:
        function: Computes the statistics of a chunk.
        chunks: Positive pairs, (Q, 2) int64 each.
        leaves: Tensors the statistics are computed from.
        names: Names of the statistics in order; the first is the sum, the others are counts.
    """
    totals = _SumOverChunks.apply(function, chunks, len(names), *leaves)
    return dict(zip(names, totals, strict=True))


class _SumOverChunks(Function):
    @staticmethod
    def forward(
        ctx: Any, function: _Chunk, chunks: Sequence[Tensor], number: int, *leaves: Tensor
    ) -> tuple[Tensor, ...]:
        needed = ctx.needs_input_grad[3:]
        copies = [
            leaf.detach().requires_grad_(need) for leaf, need in zip(leaves, needed, strict=True)
        ]
        totals = [leaves[0].new_zeros(()) for _ in range(number)]
        for chunk in chunks:
            with torch.set_grad_enabled(any(needed)):
                found = list(function(copies, chunk).values())
            if any(needed):
                # Only the sum has a gradient; it accumulates in `copies` and frees the graph.
                found[0].backward()
            totals = [total + value.detach() for total, value in zip(totals, found, strict=True)]
        ctx.grads = [copy.grad for copy in copies]
        ctx.mark_non_differentiable(*totals[1:])
        return tuple(totals)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if value is None else value * grad for value in ctx.grads]
        return (None, None, None, *scaled)
