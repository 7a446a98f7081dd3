"""Proxy-NCA with dynamic assignment: proxies belong to no class, p(u) is the nearest of all to u.

Movshovitz-Attias et al., "No Fuss Distance Metric Learning using Proxies", ICCV 2017. The paper
samples a triplet (x, y, Z), y another image of x's class and Z images of other classes, and puts
(x, p(y), p(Z)) in its place. With the GLOBAL batch, and ties going to the lower row:

    positive     p(y), y another row of x's class: one that is drawn from (seed, step, row of x),
                 or the mean over all of them
    negatives    {p(z) : y_z != y_x} without p(y): a shared proxy is never its own negative

The positive is p(y), not p(x): with p(x) labels enter the negatives alone, all images pull the
proxy that is nearest already, and nothing is learnt. A row without y or without negatives adds 0
to the mean over the batch. Without class labels, y is a second view of x: give the views of an
image a label of their own.

The surrogates are those of `losses/proxy_nca.py` and `losses/proxy_nca_margin.py`; the choice of
the nearest proxy has no derivative.

Two rounds: the nearest proxy over all shards, then the logits of the proxies that the batch chose,
M x G with M = min(G, P), so that what crosses ranks does not depend on the number of classes.

Shape legend: G rows of the global batch, D embedding size, L proxies of the shard, c a chunk,
M columns of chosen proxies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dml_dist.losses.chunks import ChunkedLogits, chunk_rows
from dml_dist.losses.class_weights import mean_over_rows
from dml_dist.losses.forms import ProxyShard, Round
from dml_dist.losses.numerics import (
    Merge,
    Statistics,
    accurate_dtype,
    group_rows,
    normalize_rows,
    softplus_exact,
)
from dml_dist.losses.proxy_nca_margin import COSINE_SCALE, Reduction
from dml_dist.random_streams import Stream, generator_of


@dataclass(frozen=True)
class DynamicProxyNCA:
    """Proxy-NCA with dynamic assignment over proxy shards (`losses/forms.py`).

    Attributes:
        num_free_rows: P >= 2, rows of the table.
        surrogate: `nca` or `margin`.
        denominator: For `nca`: `all`, or `negatives` as in the paper.
        embedding_scale: s_x > 0, for `nca`.
        proxy_scale: s_p > 0, for `nca`.
        margin: M of `margin`, in squared distances of unit rows, 0 < M < 4.
        reduction: Reduction of a row's hinges over its negatives.
        positives: One drawn row of the class, or the mean over all of them.
        logit_memory_mb: Bound on the memory for logits in MiB, > 0.
        class_weights: Weight of each class, (C,), or None for equal ones.
        seed: Seed of the drawn positives.
        step: Step of the drawn positives; `parallel/assignment.py` counts it.
    """

    num_free_rows: int
    surrogate: Literal["nca", "margin"] = "nca"
    denominator: Literal["all", "negatives"] = "all"
    embedding_scale: float = 3.0
    proxy_scale: float = 3.0
    margin: float = 0.5
    reduction: Reduction = "mean"
    positives: Literal["drawn", "all"] = "drawn"
    logit_memory_mb: float = 64.0
    class_weights: Tensor | None = field(default=None, compare=False)
    seed: int = 0
    step: int = 0

    @property
    def proxies_per_class(self) -> int:
        """Return 1: the table is divided by rows."""
        return 1

    @property
    def logit_scale(self) -> float:
        """Factor of the cosines: 2 s_x s_p, or for the margin surrogate 2."""
        if self.surrogate == "margin":
            return COSINE_SCALE
        return 2.0 * self.embedding_scale * self.proxy_scale

    @property
    def rounds(self) -> tuple[Round, ...]:
        """The nearest proxies, then the logits of those that the batch chose."""
        merges: dict[str, Merge] = {"logits": "sum", "group": "sum"}
        if self.class_weights is not None:
            merges["weight"] = "sum"
        return (
            Round({"nearest": "argmax"}, self._nearest),
            Round(merges, self._chosen, columns={"logits": self.num_free_rows}),
        )

    def finish(self, total: Statistics) -> Tensor:
        """Return the mean over the rows of the global batch."""
        loss_G, count_G = torch.zeros_like(total["group"]), torch.zeros_like(total["group"])
        for terms in self._terms(total):
            loss_G = loss_G + terms.loss_G
            count_G = count_G + terms.paired_G
        return mean_over_rows(loss_G / count_G.clamp_min(1), total)

    def statistics(self, total: Statistics) -> Statistics:
        """Return means over the terms, the share of rows without any, and the chosen proxies."""
        terms = list(self._terms(total))
        dtype = total["logits"].dtype
        counted_SG = torch.stack([one.counted_G for one in terms])
        num_terms = counted_SG.sum().clamp_min(1)
        violations_SG = torch.stack([one.num_violations_G for one in terms]) * counted_SG
        cosines_SG = torch.stack([one.positive_G for one in terms]) / self.logit_scale
        found = {
            "positive_cosine": cosines_SG.where(counted_SG, 0.0).sum() / num_terms,
            "violation_rate": (violations_SG > 0).sum() / num_terms,
            "rows_without_term": 1 - counted_SG.any(dim=0).to(dtype).mean(),
            "chosen_proxies": (group_rows(nearest_rows(total)).max() + 1).to(dtype),
        }
        if self.surrogate == "margin":
            found["open_negatives"] = violations_SG.sum() / num_terms
        return found

    # ------------------------------------------------------------ partial

    def _queries(self, embeddings_GD: Tensor, proxies_LD: Tensor) -> tuple[Tensor, Tensor]:
        dtype = accurate_dtype(embeddings_GD, proxies_LD)
        return normalize_rows(embeddings_GD.to(dtype)) * self.logit_scale, proxies_LD.to(dtype)

    @torch.no_grad()
    def _nearest(
        self,
        embeddings_GD: Tensor,
        labels_G: Tensor,
        proxies_LD: Tensor,
        shard: ProxyShard,
        _: Statistics,
    ) -> Statistics:
        queries_GD, table_LD = self._queries(embeddings_GD, proxies_LD)
        chunked = ChunkedLogits(queries_GD, table_LD, chunk_rows(queries_GD, self.logit_memory_mb))
        best_G = queries_GD.new_full((len(queries_GD),), -torch.inf)
        row_G = torch.zeros_like(labels_G)
        for low, high, logits in chunked.chunks():
            chunked.measure(low, high)
            chunked.fill(low, high, logits[:-1])
            peak_G, index_G = logits[:-1].max(dim=0)
            # Strictly greater: ties stay with the lower row.
            better_G = peak_G > best_G
            best_G = torch.where(better_G, peak_G, best_G)
            row_G = torch.where(better_G, index_G + low, row_G)
        # float64 holds row numbers exactly up to 2^53, so one tensor carries both.
        return {"nearest": torch.stack([best_G.double(), (row_G + shard.row_low).double()])}

    def _chosen(
        self,
        embeddings_GD: Tensor,
        labels_G: Tensor,
        proxies_LD: Tensor,
        shard: ProxyShard,
        known: Statistics,
    ) -> Statistics:
        queries_GD, table_LD = self._queries(embeddings_GD, proxies_LD)
        rows_G = nearest_rows(known)
        num_columns = min(len(rows_G), self.num_free_rows)
        row_of_M = rows_G.new_full((num_columns,), -1).scatter_(0, group_rows(rows_G), rows_G)
        held_M1 = ((row_of_M >= shard.row_low) & (row_of_M < shard.row_high))[:, None]
        local_M = (row_of_M - shard.row_low).clamp(0, len(table_LD) - 1)
        logits_MG = _Product.apply(normalize_rows(table_LD[local_M]), queries_GD)
        # One shard has the nearest proxy of a row: what is known of the row is summed from there.
        # `finish` sees statistics alone, and of labels it needs only which rows share one.
        owned_G = (rows_G >= shard.row_low) & (rows_G < shard.row_high)
        values = {
            "logits": torch.where(held_M1, logits_MG, 0.0),
            "group": torch.where(owned_G, group_rows(labels_G).to(logits_MG.dtype), 0.0),
        }
        if self.class_weights is not None:
            weight_G = self.class_weights[labels_G].to(logits_MG.dtype)
            values["weight"] = torch.where(owned_G, weight_G, 0.0)
        return values

    # ------------------------------------------------------------ finish

    def _terms(self, total: Statistics) -> Iterator[_Terms]:
        """Return the terms of each choice of y, one choice for all rows at a time."""
        logits_MG, group_G = total["logits"], total["group"].long()
        column_G = group_rows(nearest_rows(total))
        # Rows of a class other than y chose a column iff its lowest or highest class is not y.
        empty_M = group_G.new_full((len(logits_MG),), -1)
        lowest_M = empty_M.scatter_reduce(0, column_G, group_G, "amin", include_self=False)
        highest_M = empty_M.scatter_reduce(0, column_G, group_G, "amax", include_self=False)
        other_MG = (lowest_M[:, None] != group_G) | (highest_M[:, None] != group_G)
        other_MG &= (lowest_M >= 0)[:, None]
        columns_M1 = torch.arange(len(logits_MG), device=group_G.device)[:, None]
        for mate_G, paired_G in self._mates(group_G):
            own_G = column_G[mate_G]
            negative_MG = other_MG & (columns_M1 != own_G)
            counted_G = paired_G & negative_MG.any(dim=0)
            positive_G = logits_MG.gather(0, own_G[None])[0]
            surrogate = self._hinges if self.surrogate == "margin" else self._softmax
            loss_G, violated_MG = surrogate(logits_MG, positive_G, negative_MG, counted_G)
            # NaN is kept, so that a diverged model is noticed.
            yield _Terms(
                loss_G.where(counted_G, 0.0 * positive_G),
                positive_G.detach(),
                (violated_MG & negative_MG).sum(dim=0),
                paired_G,
                counted_G,
            )

    def _mates(self, group_G: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Return choices of y for every row, and which rows have it."""
        if self.positives == "drawn":
            draws = generator_of(Stream.DYNAMIC_POSITIVES, self.seed, self.step)
            uniform_G = torch.from_numpy(draws.random(len(group_G))).to(group_G.device)
            size_G = _sizes(group_G)[group_G]
            yield class_mates(group_G, 1 + (uniform_G * (size_G - 1)).long())
            return
        # Waits for the device: the number of choices is that of the batch's largest class.
        for shift in range(1, max(2, int(_sizes(group_G).max()))):
            yield class_mates(group_G, torch.full_like(group_G, shift))

    def _softmax(
        self, logits_MG: Tensor, positive_G: Tensor, negative_MG: Tensor, counted_G: Tensor
    ) -> tuple[Tensor, Tensor]:
        # Rows that do not count keep all logits: a log-sum-exp of nothing has no gradient.
        lse_G = logits_MG.masked_fill(~negative_MG & counted_G, -torch.inf).logsumexp(dim=0)
        gap_G = lse_G - positive_G
        loss_G = softplus_exact(gap_G) if self.denominator == "all" else gap_G
        return loss_G, (gap_G > 0).expand_as(logits_MG)

    def _hinges(
        self, logits_MG: Tensor, positive_G: Tensor, negative_MG: Tensor, counted_G: Tensor
    ) -> tuple[Tensor, Tensor]:
        hinges_MG = logits_MG - positive_G + self.margin
        loss_G = hinges_MG.clamp_min(0.0).where(negative_MG, 0.0).sum(dim=0)
        if self.reduction == "mean":
            loss_G = loss_G / negative_MG.sum(dim=0).clamp_min(1)
        return loss_G, hinges_MG > 0


class _Terms(NamedTuple):
    """The terms of one choice of y for every row, (G,) each.

    Attributes:
        loss_G: 0 where the row has no term.
        positive_G: Logit of p(y), without gradient.
        num_violations_G: Open hinges, or whether the negatives outweigh the positive (> 0).
        paired_G: Which rows have such a y.
        counted_G: Which of them have negatives, too.
    """

    loss_G: Tensor
    positive_G: Tensor
    num_violations_G: Tensor
    paired_G: Tensor
    counted_G: Tensor


class _Product(Function):
    """a b^T, (M, G), in full precision, also where the backward pass is under autocast."""

    @staticmethod
    def forward(ctx: Any, a_MD: Tensor, b_GD: Tensor) -> Tensor:
        ctx.save_for_backward(a_MD, b_GD)
        with torch.autocast(a_MD.device.type, enabled=False):
            return a_MD @ b_GD.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MG: Tensor) -> tuple[Tensor, Tensor]:
        a_MD, b_GD = ctx.saved_tensors
        with torch.autocast(a_MD.device.type, enabled=False):
            return grad_MG @ b_GD, grad_MG.T @ a_MD


def nearest_rows(total: Statistics) -> Tensor:
    """Return the rows of the nearest proxies, (G,) int64; row 0 if it is not finite."""
    rows_G = total["nearest"][1]
    return rows_G.where(rows_G.isfinite(), 0.0).long()


def class_mates(group_G: Tensor, shift_G: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each row the row `shift` places on among those of its class, going round.

    Args:
        group_G: Class of each row, (G,) int64 in 0 .. G - 1.
        shift_G: Places, (G,) int64, >= 1.

    Returns:
        The other row, (G,) int64, and whether the class has so many others, (G,) bool.
    """
    size_G = _sizes(group_G)
    first_G = size_G.cumsum(0) - size_G
    order_G = group_G.argsort(stable=True)
    place_G = torch.empty_like(order_G).scatter_(
        0, order_G, torch.arange(len(order_G), device=order_G.device)
    )
    low_G, size_G = first_G[group_G], size_G[group_G]
    return order_G[low_G + (place_G - low_G + shift_G) % size_G], shift_G < size_G


def _sizes(group_G: Tensor) -> Tensor:
    """Return the number of rows of each group, (G,) int64; bincount would wait for the device."""
    return torch.zeros_like(group_G).scatter_add_(0, group_G, torch.ones_like(group_G))
