"""Proxy-NCA: class proxies replace the other images of a batch.

Movshovitz-Attias et al., "No Fuss Distance Metric Learning using Proxies", ICCV 2017.

Embeddings are normalized to length s_x and proxies to s_p; with squared Euclidean distances the
logit of sample i and proxy c is, up to a constant that cancels,

    l_ic = 2 s_x s_p cos(x_i, p_c)

The positive is the nearest of the K proxies of the sample's class (static assignment), negatives
are all proxies of other classes; the other proxies of the own class are ignored.

    denominator negatives (the paper):  mean_i [ logsumexp_neg(l_i) - l_i+ ]
    denominator all:                    mean_i softplus( logsumexp_neg(l_i) - l_i+ )

The second is the softmax cross-entropy over positive and negatives, in a form that keeps float32
gradients when the loss is tiny and when the positive's softmax underflows. Label smoothing e
(denominator all) takes the target 1 - e on the positive and e spread evenly over the (C - 1) K
negatives, and adds e (l_i+ - mean_neg(l_i)).

Fractional assignment has fewer proxies than classes: a fixed map assigns each class a row that it
shares with others. Classes that share a row are not negatives of each other, so it is the same loss
with rows in place of classes.

With class weights the mean is sum_i w_{y_i} l_i / sum_i w_{y_i}. The margin surrogate is in
`losses/proxy_nca_margin.py`, dynamic assignment in `losses/proxy_nca_dynamic.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from dml_dist.losses.chunks import own_rows
from dml_dist.losses.class_weights import local_weights, mean_over_rows, table_labels
from dml_dist.losses.forms import ProxyShard
from dml_dist.losses.numerics import (
    Merge,
    Statistics,
    accurate_dtype,
    normalize_rows,
    softplus_exact,
)
from dml_dist.losses.proxy_logits import negative_statistics


@dataclass(frozen=True)
class ProxyNCA:
    """Proxy-NCA over proxy shards (`losses/forms.py`).

    Attributes:
        num_classes: Units of the table: C >= 2, or with `class_rows` its rows P >= 2.
        denominator: `all`, or `negatives` as in the paper.
        embedding_scale: s_x > 0.
        proxy_scale: s_p > 0.
        proxies_per_class: K >= 1.
        label_smoothing: Share e of the target on negatives, 0 <= e < 1; needs `all`.
        logit_memory_mb: Bound on the memory for logits in MiB, > 0.
        class_rows: Row of each class, (C,) int64, for fractional assignment.
        class_weights: Weight of each class, (C,), or None for equal ones.
    """

    num_classes: int
    denominator: Literal["all", "negatives"] = "all"
    embedding_scale: float = 3.0
    proxy_scale: float = 3.0
    proxies_per_class: int = 1
    label_smoothing: float = 0.0
    logit_memory_mb: float = 64.0
    class_rows: Tensor | None = field(default=None, compare=False)
    class_weights: Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.num_classes < 2:
            raise ValueError(
                f"Proxy-NCA needs at least 2 classes for negatives, but num_classes is "
                f"{self.num_classes}"
            )
        if self.label_smoothing > 0 and self.denominator == "negatives":
            raise ValueError("label_smoothing > 0 needs denominator 'all', but it is 'negatives'")

    @property
    def num_free_rows(self) -> int | None:
        """P with shared rows (`class_rows`), None for a table of K rows per class."""
        return None if self.class_rows is None else self.num_classes

    @property
    def logit_scale(self) -> float:
        """2 s_x s_p, the logit of a cosine of 1."""
        return 2.0 * self.embedding_scale * self.proxy_scale

    @property
    def merges(self) -> Mapping[str, Merge]:
        """Two statistics per row, one more with label smoothing, one more with class weights."""
        merges: dict[str, Merge] = {"lse_negatives": "logsumexp", "positive": "sum"}
        if self.label_smoothing > 0:
            merges["sum_negatives"] = "sum"
        if self.class_weights is not None:
            merges["weight"] = "sum"
        return merges

    def partial(
        self, embeddings_GD: Tensor, labels_G: Tensor, proxies_LD: Tensor, shard: ProxyShard
    ) -> Statistics:
        """Return the statistics of each row over one proxy shard, each (G,)."""
        dtype = accurate_dtype(embeddings_GD, proxies_LD)
        queries_GD = normalize_rows(embeddings_GD.to(dtype)) * self.logit_scale
        own_KG = own_rows(table_labels(labels_G, self.class_rows), shard)
        found = negative_statistics(
            queries_GD,
            proxies_LD.to(dtype),
            own_KG,
            memory_mb=self.logit_memory_mb,
            with_sum=self.label_smoothing > 0,
        )
        values: Statistics = {"lse_negatives": found.lse_negatives, "positive": found.positive}
        if found.sum_negatives is not None:
            values["sum_negatives"] = found.sum_negatives
        if self.class_weights is not None:
            weights_C = self.class_weights
            values["weight"] = local_weights(weights_C, labels_G, own_KG, len(proxies_LD), dtype)
        return values

    def finish(self, total: Statistics) -> Tensor:
        """Return the mean over the rows of the global batch."""
        gap_G = total["lse_negatives"] - total["positive"]
        if self.denominator == "negatives":
            return mean_over_rows(gap_G, total)
        loss_G = softplus_exact(gap_G)
        if self.label_smoothing > 0:
            num_negatives = (self.num_classes - 1) * self.proxies_per_class
            mean_negative_G = total["sum_negatives"] / num_negatives
            loss_G = loss_G + self.label_smoothing * (total["positive"] - mean_negative_G)
        return mean_over_rows(loss_G, total)

    def statistics(self, total: Statistics) -> Statistics:
        """Return the mean positive cosine, and the fraction of rows whose negatives outweigh it."""
        violated_G = total["lse_negatives"] > total["positive"]
        return {
            "positive_cosine": total["positive"].mean() / self.logit_scale,
            "violation_rate": violated_G.to(total["positive"].dtype).mean(),
        }
