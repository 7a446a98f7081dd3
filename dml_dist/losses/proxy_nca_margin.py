"""Proxy-NCA with the margin surrogate: a hinge on the distances to proxies.

Movshovitz-Attias et al., "No Fuss Distance Metric Learning using Proxies", ICCV 2017. With squared
Euclidean distances of unit rows (scales are not applied), D = 2 - 2 cos,

    l_i = sum or mean over negatives of [ D(x_i, p+) - D(x_i, p-) + M ]_+

Two rounds: first the positive's cosine, then the hinges against it. The derivative by the
positive's distance is the number of active hinges, which `finish` applies.

Shape legend: G rows of the global batch, D embedding size, L proxies of the shard, c proxies of a
chunk, K proxies a class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dml_dist.losses.chunks import ChunkedLogits, OwnLogits, chunk_rows, in_chunk, own_rows
from dml_dist.losses.class_weights import local_weights, mean_over_rows, table_labels
from dml_dist.losses.forms import ProxyShard, Round
from dml_dist.losses.numerics import Merge, Statistics, accurate_dtype, normalize_rows
from dml_dist.losses.proxy_logits import Excluded

COSINE_SCALE = 2.0
"""Squared distance = 2 - 2 cos: queries get this norm, so that logits are in its unit."""

Reduction = Literal["sum", "mean"]


@dataclass(frozen=True)
class ProxyNCAMargin:
    """Proxy-NCA with the margin surrogate, static or fractional (`losses/forms.py`).

    Attributes:
        num_classes: Units of the table: C >= 2, or with `class_rows` its rows P >= 2.
        margin: M, in squared distances of unit rows, 0 < M < 4.
        reduction: Reduction of a row's hinges over its negatives.
        proxies_per_class: K >= 1.
        logit_memory_mb: Bound on the memory for logits in MiB, > 0.
        class_rows: Row of each class, (C,) int64, for fractional assignment.
        class_weights: Weight of each class, (C,), or None for equal ones.
    """

    num_classes: int
    margin: float = 0.5
    reduction: Reduction = "mean"
    proxies_per_class: int = 1
    logit_memory_mb: float = 64.0
    class_rows: Tensor | None = field(default=None, compare=False)
    class_weights: Tensor | None = field(default=None, compare=False)

    @property
    def num_free_rows(self) -> int | None:
        """P with shared rows (`class_rows`), None for a table of K rows per class."""
        return None if self.class_rows is None else self.num_classes

    @property
    def rounds(self) -> tuple[Round, ...]:
        """The positive's cosine, then the hinges."""
        merges: dict[str, Merge] = {"hinges": "sum", "open": "sum", "positive": "sum"}
        if self.class_weights is not None:
            merges["weight"] = "sum"
        return (
            Round({"known_positive": "sum"}, self._known_positive),
            Round(merges, self._hinges),
        )

    def finish(self, total: Statistics) -> Tensor:
        """Return the mean over the rows of the global batch."""
        count = (self.num_classes - 1) * self.proxies_per_class if self.reduction == "mean" else 1
        return mean_over_rows(hinge_losses(total) / count, total)

    def statistics(self, total: Statistics) -> Statistics:
        """Return the mean positive cosine, and the fraction of rows with an active hinge."""
        return hinge_metrics(total)

    def _queries(self, embeddings_GD: Tensor, proxies_LD: Tensor) -> tuple[Tensor, Tensor]:
        dtype = accurate_dtype(embeddings_GD, proxies_LD)
        return normalize_rows(embeddings_GD.to(dtype)) * COSINE_SCALE, proxies_LD.to(dtype)

    def _own(self, labels_G: Tensor, shard: ProxyShard) -> Tensor:
        return own_rows(table_labels(labels_G, self.class_rows), shard)

    @torch.no_grad()
    def _known_positive(
        self,
        embeddings_GD: Tensor,
        labels_G: Tensor,
        proxies_LD: Tensor,
        shard: ProxyShard,
        _: Statistics,
    ) -> Statistics:
        queries_GD, table_LD = self._queries(embeddings_GD, proxies_LD)
        own_KG = self._own(labels_G, shard)
        held_KG, index_KG = in_chunk(own_KG, 0, len(table_LD))
        rows_KGD = table_LD[index_KG.clamp_max(len(table_LD) - 1)]
        unit_KGD = torch.nn.functional.normalize(rows_KGD, dim=2, eps=1e-12)
        nearest_G = (unit_KGD * queries_GD).sum(dim=2).amax(dim=0)
        return {"known_positive": nearest_G.masked_fill(~held_KG[0], 0.0)}

    def _hinges(
        self,
        embeddings_GD: Tensor,
        labels_G: Tensor,
        proxies_LD: Tensor,
        shard: ProxyShard,
        known: Statistics,
    ) -> Statistics:
        queries_GD, table_LD = self._queries(embeddings_GD, proxies_LD)
        own_KG = self._own(labels_G, shard)
        found = hinge_statistics(
            queries_GD,
            table_LD,
            own_KG,
            known["known_positive"] - self.margin,
            memory_mb=self.logit_memory_mb,
        )
        values: Statistics = found._asdict()
        if self.class_weights is not None:
            values["weight"] = local_weights(
                self.class_weights, labels_G, own_KG, len(table_LD), queries_GD.dtype
            )
        return values


class HingeStatistics(NamedTuple):
    """Statistics of all logits over one shard that the margin surrogate needs, each (G,).

    Attributes:
        hinges: Sum over negatives of [logit - threshold]_+.
        open: Number of negatives beyond the threshold; without gradient.
        positive: Largest logit of the own rows; 0 where the shard does not hold them.
    """

    hinges: Tensor
    open: Tensor
    positive: Tensor


def hinge_losses(total: Mapping[str, Tensor]) -> Tensor:
    """Return each row's sum of hinges, (G,), with its derivative by the positive."""
    # The threshold is a constant in round 2. This term is 0 and adds the missing gradient: -1 per
    # active hinge.
    positive_G = total["positive"]
    return total["hinges"] - (positive_G - positive_G.detach()) * total["open"]


def hinge_metrics(total: Mapping[str, Tensor]) -> Statistics:
    """Return the recorded statistics of a hinge loss, 0-d each."""
    violated_G = total["open"] > 0
    return {
        "positive_cosine": total["positive"].mean() / COSINE_SCALE,
        "violation_rate": violated_G.to(total["positive"].dtype).mean(),
        "open_negatives": total["open"].mean(),
    }


def hinge_statistics(
    queries_GD: Tensor,
    proxies_LD: Tensor,
    own_KG: Tensor,
    threshold_G: Tensor,
    *,
    memory_mb: float,
    excluded: Excluded | None = None,
) -> HingeStatistics:
    """Return statistics of the logits `queries . normalized proxies`, differentiable once.

    Args:
        queries_GD: Normalized embeddings times COSINE_SCALE, (G, D) float32 or float64.
        proxies_LD: Raw proxies of the shard, (L, D), the same dtype.
        own_KG: The shard's rows that each query owns, as for `negative_statistics`.
        threshold_G: The positive's logit less the margin, (G,); a constant.
        memory_mb: Bound on the memory for logits in MiB; a chunk has at least one row.
        excluded: Which other rows are not negatives; None for none.
    """
    rows = chunk_rows(queries_GD, memory_mb)
    return HingeStatistics(
        *_HingeStatistics.apply(queries_GD, proxies_LD, own_KG, threshold_G, rows, excluded)
    )


class _HingeStatistics(Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries_GD: Tensor,
        proxies_LD: Tensor,
        own_KG: Tensor,
        threshold_G: Tensor,
        rows_per_chunk: int,
        excluded: Excluded | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        chunked = ChunkedLogits(queries_GD, proxies_LD, rows_per_chunk)
        own = OwnLogits(own_KG, queries_GD)
        hinges_G, open_G = torch.zeros_like(threshold_G), torch.zeros_like(threshold_G)
        with torch.autocast(queries_GD.device.type, enabled=False):
            for low, high, logits in chunked.chunks():
                logits_cG = logits[:-1]
                chunked.measure(low, high)
                chunked.fill(low, high, logits_cG)
                logits.scatter_(0, own.collect(low, high, logits), -torch.inf)
                if excluded is not None:
                    logits_cG.masked_fill_(excluded(low, high), -torch.inf)
                logits_cG.sub_(threshold_G)
                open_G += (logits_cG > 0).sum(dim=0)
                hinges_G += logits_cG.clamp_min_(0).sum(dim=0)
        positive_G, best_1G, _ = own.positive(len(proxies_LD))
        saved = (queries_GD, proxies_LD, chunked.norm_L1, threshold_G, own_KG, best_1G)
        ctx.save_for_backward(*saved)
        ctx.rows_per_chunk, ctx.excluded = rows_per_chunk, excluded
        ctx.mark_non_differentiable(open_G)
        return hinges_G, open_G, positive_G

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_hinges_G: Tensor, _: Tensor, grad_positive_G: Tensor
    ) -> tuple[Tensor | None, ...]:
        queries_GD, proxies_LD, norm_L1, threshold_G, own_KG, best_1G = ctx.saved_tensors
        grad_queries_GD = torch.zeros_like(queries_GD)
        grad_proxies_LD = torch.empty_like(proxies_LD)
        chunked = ChunkedLogits(queries_GD, proxies_LD, ctx.rows_per_chunk, norm_L1)
        with torch.autocast(queries_GD.device.type, enabled=False):
            for low, high, grads in chunked.chunks():
                grads_cG = grads[:-1]
                chunked.fill(low, high, grads_cG)
                torch.mul(grads_cG > threshold_G, grad_hinges_G, out=grads_cG)
                if ctx.excluded is not None:
                    grads_cG.masked_fill_(ctx.excluded(low, high), 0.0)
                grads.scatter_(0, in_chunk(own_KG, low, high)[1], 0.0)
                grads.scatter_(0, in_chunk(best_1G, low, high)[1], grad_positive_G[None])
                chunked.add_gradients(low, high, grads_cG, grad_queries_GD, grad_proxies_LD)
        return grad_queries_GD, grad_proxies_LD, None, None, None, None
