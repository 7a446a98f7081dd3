"""Proxy-NCA with dynamic assignment: a sample's positive is the nearest of all proxies.

Movshovitz-Attias et al., "No Fuss Distance Metric Learning using Proxies", ICCV 2017. The P
proxies belong to no class. p(x) is the nearest proxy of x (ties: the lower row), and

    with labels      negatives of x are {p(z) : z in the GLOBAL batch, y_z != y_x} without p(x):
                     a shared proxy is never its own negative
    without labels   negatives are all proxies but p(x)

A row without negatives adds 0 to the mean over the batch. (We could not verify whether the paper
uses p(x) or the class's p(y) as the positive.) The surrogates are those of
`losses/proxy_nca.py` and `losses/proxy_nca_margin.py`; the choice of the nearest proxy has no
derivative.

Two rounds: the nearest proxy over all shards, then the statistics given that choice.

Shape legend: G rows of the global batch, D embedding size, L proxies of the shard, c a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dml_dist.losses.chunks import ChunkedLogits, chunk_rows
from dml_dist.losses.class_weights import local_weights, mean_over_rows
from dml_dist.losses.forms import ProxyShard, Round
from dml_dist.losses.numerics import (
    Merge,
    Statistics,
    accurate_dtype,
    group_rows,
    normalize_rows,
    softplus_exact,
)
from dml_dist.losses.proxy_logits import Excluded, negative_statistics
from dml_dist.losses.proxy_nca_margin import (
    COSINE_SCALE,
    Reduction,
    hinge_losses,
    hinge_metrics,
    hinge_statistics,
)


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
        use_labels: Whether negatives are the other classes' proxies.
        logit_memory_mb: Bound on the memory for logits in MiB, > 0.
        class_weights: Weight of each class, (C,), or None for equal ones.
    """

    num_free_rows: int
    surrogate: Literal["nca", "margin"] = "nca"
    denominator: Literal["all", "negatives"] = "all"
    embedding_scale: float = 3.0
    proxy_scale: float = 3.0
    margin: float = 0.5
    reduction: Reduction = "mean"
    use_labels: bool = True
    logit_memory_mb: float = 64.0
    class_weights: Tensor | None = field(default=None, compare=False)

    @property
    def proxies_per_class(self) -> int:
        """K = 1: every row is a unit of its own."""
        return 1

    @property
    def logit_scale(self) -> float:
        """The logit of a cosine of 1: 2 s_x s_p, or 2 for the margin surrogate."""
        if self.surrogate == "margin":
            return COSINE_SCALE
        return 2.0 * self.embedding_scale * self.proxy_scale

    @property
    def rounds(self) -> tuple[Round, ...]:
        """The nearest proxy, then the surrogate's statistics."""
        merges: dict[str, Merge] = {"lse_negatives": "logsumexp", "positive": "sum"}
        if self.surrogate == "margin":
            merges = {"hinges": "sum", "open": "sum", "positive": "sum"}
            if self.reduction == "mean":
                merges["num_negatives"] = "sum"
        if self.class_weights is not None:
            merges["weight"] = "sum"
        return Round({"nearest": "argmax"}, self._nearest), Round(merges, self._selected)

    def finish(self, total: Statistics) -> Tensor:
        """Return the mean over the rows of the global batch."""
        if self.surrogate == "margin":
            loss_G = hinge_losses(total)
            if self.reduction == "mean":
                loss_G = loss_G / total["num_negatives"].clamp_min(1)
            return mean_over_rows(loss_G, total)
        lse_G = total["lse_negatives"]
        some_G = lse_G > -torch.inf
        # A row without negatives (-inf) adds 0; NaN is kept, so that a diverged model is noticed.
        gap_G = lse_G.where(some_G | lse_G.isnan(), 0.0) - total["positive"]
        loss_G = softplus_exact(gap_G) if self.denominator == "all" else gap_G
        return mean_over_rows(loss_G.where(some_G | loss_G.isnan(), 0.0), total)

    def statistics(self, total: Statistics) -> Statistics:
        """Return the statistics of static assignment, and the number of chosen proxies."""
        dtype = total["positive"].dtype
        chosen = (group_rows(nearest_rows(total)).max() + 1).to(dtype)
        if self.surrogate == "margin":
            return {**hinge_metrics(total), "chosen_proxies": chosen}
        violated_G = total["lse_negatives"] > total["positive"]
        return {
            "positive_cosine": total["positive"].mean() / self.logit_scale,
            "violation_rate": violated_G.to(dtype).mean(),
            "chosen_proxies": chosen,
        }

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

    def _selected(
        self,
        embeddings_GD: Tensor,
        labels_G: Tensor,
        proxies_LD: Tensor,
        shard: ProxyShard,
        known: Statistics,
    ) -> Statistics:
        queries_GD, table_LD = self._queries(embeddings_GD, proxies_LD)
        rows_G = nearest_rows(known)
        own_1G, excluded = (rows_G - shard.row_low)[None], None
        if self.use_labels:
            chosen = _select_proxies(rows_G, labels_G, shard)
            own_1G, excluded = chosen.own_1G, chosen.excluded
            table_LD = table_LD[chosen.local_rows_G]
        memory_mb = self.logit_memory_mb
        values: Statistics = {}
        if self.surrogate == "margin":
            threshold_G = known["nearest"][0].to(queries_GD.dtype) - self.margin
            hinges = hinge_statistics(
                queries_GD, table_LD, own_1G, threshold_G, memory_mb=memory_mb, excluded=excluded
            )
            values |= hinges._asdict()
            if self.reduction == "mean":
                values["num_negatives"] = _count_negatives(own_1G, len(table_LD), excluded).to(
                    queries_GD.dtype
                )
        else:
            found = negative_statistics(
                queries_GD, table_LD, own_1G, memory_mb=memory_mb, excluded=excluded
            )
            values |= {"lse_negatives": found.lse_negatives, "positive": found.positive}
        if self.class_weights is not None:
            values["weight"] = local_weights(
                self.class_weights, labels_G, own_1G, len(table_LD), queries_GD.dtype
            )
        return values


def nearest_rows(total: Statistics) -> Tensor:
    """Return the rows of the nearest proxies, (G,) int64; row 0 if it is not finite."""
    rows_G = total["nearest"][1]
    return rows_G.where(rows_G.isfinite(), 0.0).long()


class _SelectedProxies(NamedTuple):
    """The batch's distinct nearest proxies as G columns; unused columns are empty.

    Attributes:
        local_rows_G: The shard's row of each column; arbitrary where it holds none.
        own_1G: Column of each row's own proxy, (1, G); -1 where the shard does not hold it.
        excluded: Which columns are not negatives of which rows of the batch.
    """

    local_rows_G: Tensor
    own_1G: Tensor
    excluded: Excluded


def _select_proxies(rows_G: Tensor, labels_G: Tensor, shard: ProxyShard) -> _SelectedProxies:
    """Return the distinct rows, and which of them samples of another class selected."""
    column_G = group_rows(rows_G)
    row_of_column_G = torch.full_like(rows_G, -1).scatter_(0, column_G, rows_G)
    held_G = (row_of_column_G >= shard.row_low) & (row_of_column_G < shard.row_high)
    # Samples of a class other than y selected a column iff its lowest or highest label is not y.
    empty_G = torch.full_like(labels_G, -1)
    lowest_G = empty_G.scatter_reduce(0, column_G, labels_G, "amin", include_self=False)
    highest_G = empty_G.scatter_reduce(0, column_G, labels_G, "amax", include_self=False)

    def excluded(low: int, high: int) -> Tensor:
        others_cG = (lowest_G[low:high, None] != labels_G) | (highest_G[low:high, None] != labels_G)
        return ~(others_cG & held_G[low:high, None])

    local_G = (row_of_column_G - shard.row_low).clamp(0, shard.row_high - shard.row_low - 1)
    own_G = torch.where(held_G[column_G], column_G, -1)
    return _SelectedProxies(local_G, own_G[None], excluded)


def _count_negatives(own_1G: Tensor, num_rows: int, excluded: Excluded | None) -> Tensor:
    """Return how many of the table's rows are negatives of each row of the batch, (G,)."""
    held_G = (own_1G[0] >= 0) & (own_1G[0] < num_rows)
    if excluded is None:
        return num_rows - held_G.long()
    allowed_cG = ~excluded(0, num_rows)
    own_too_G = allowed_cG.gather(0, own_1G.clamp(0, num_rows - 1))[0] & held_G
    return allowed_cG.sum(dim=0) - own_too_G.long()
