"""Proxy-Anchor: every class proxy is an anchor for all samples of the global batch.

Kim et al., "Proxy Anchor Loss for Deep Metric Learning", CVPR 2020, eq. 4. With cosines s(x, p),
P all proxies, P+ those with a sample of their class in the GLOBAL batch, X_p+ and X_p- the samples
of a proxy's class and the others:

    1/|P+| sum_{p in P+} log(1 + sum_{x in X_p+} exp(-a (s(x, p) - m)))
    + 1/|P| sum_{p in P} log(1 + sum_{x in X_p-} exp(a (s(x, p) + m)))

The released code of non-isotropy regularization averages the first term over samples instead,
`positives="samples"`: 1/B sum_i of the term of sample i's proxy.

The loss is column-wise: a proxy's term needs all samples and no other proxy. A proxy shard computes
its terms completely, and only scalars cross ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dml_dist.losses.chunks import ChunkedLogits, OwnLogits, chunk_rows, in_chunk, own_rows
from dml_dist.losses.forms import ProxyShard, Round
from dml_dist.losses.numerics import Statistics, accurate_dtype, group_rows, normalize_rows
from dml_dist.losses.one_process import dense_loss


@dataclass(frozen=True)
class ProxyAnchor:
    """Proxy-Anchor over proxy shards (`losses/forms.py`).

    Attributes:
        scale: a > 0.
        margin: m, in cosines, 0 to 1.
        positives: What the positive terms are averaged over.
        logit_memory_mb: Bound on the memory for logits in MiB, > 0.
    """

    scale: float = 32.0
    margin: float = 0.1
    positives: Literal["classes", "samples"] = "classes"
    logit_memory_mb: float = 64.0

    @property
    def proxies_per_class(self) -> int:
        """K = 1."""
        return 1

    @property
    def rounds(self) -> tuple[Round, ...]:
        """One round of scalars."""
        names = ("positive_term", "negative_term", "positive_cosine")
        return (Round(dict.fromkeys(names, "sum"), self._partial, frozenset(names)),)

    def finish(self, total: Statistics) -> Tensor:
        """Return the sum of both terms."""
        return total["positive_term"] + total["negative_term"]

    def statistics(self, total: Statistics) -> Statistics:
        """Return both terms and the mean positive cosine."""
        return dict(total)

    def _partial(
        self,
        embeddings_GD: Tensor,
        labels_G: Tensor,
        proxies_LD: Tensor,
        shard: ProxyShard,
        _: Statistics,
    ) -> Statistics:
        dtype = accurate_dtype(embeddings_GD, proxies_LD)
        queries_GD = normalize_rows(embeddings_GD.to(dtype)) * self.scale
        own_1G = own_rows(labels_G, shard)
        negative_sum, positive_G = _ColumnStatistics.apply(
            queries_GD,
            proxies_LD.to(dtype),
            own_1G,
            self.scale * self.margin,
            chunk_rows(queries_GD, self.logit_memory_mb),
        )
        held_G = (own_1G[0] >= 0) & (own_1G[0] < len(proxies_LD))
        pulls_G = (self.scale * self.margin - positive_G).masked_fill(~held_G, -torch.inf)
        return {
            "positive_term": self._positive_term(pulls_G, labels_G),
            "negative_term": negative_sum / shard.num_classes,
            "positive_cosine": positive_G.detach().mean() / self.scale,
        }

    def _positive_term(self, pulls_G: Tensor, labels_G: Tensor) -> Tensor:
        """Return the mean of the proxies' log(1 + sum exp(pull)); a pull of -inf adds nothing."""
        groups_G = group_rows(labels_G)
        zeros_G = torch.zeros_like(pulls_G)
        # The 1 in the logarithm is exp(0), so the maximum is at least 0.
        peak_G = zeros_G.scatter_reduce(0, groups_G, pulls_G.detach(), "amax")
        exps_G = (pulls_G - peak_G[groups_G]).exp()
        terms_G = log_one_plus(peak_G, zeros_G.index_add(0, groups_G, exps_G))
        if self.positives == "samples":
            return terms_G[groups_G].mean()
        return terms_G.sum() / (groups_G.max() + 1)


def log_one_plus(peak: Tensor, total: Tensor) -> Tensor:
    """Return log(1 + exp(peak) total) for peak >= 0, without overflow or loss of a small total."""
    # peak + log(exp(-peak) + total), with exp(-peak) = 1 + expm1(-peak).
    return peak + (total + torch.expm1(-peak)).log1p()


class _ColumnStatistics(Function):
    """Sum over proxies of log(1 + sum over negatives exp(logit + offset)), and positive logits."""

    @staticmethod
    def forward(
        ctx: Any,
        queries_GD: Tensor,
        proxies_LD: Tensor,
        own_1G: Tensor,
        offset: float,
        rows_per_chunk: int,
    ) -> tuple[Tensor, Tensor]:
        chunked = ChunkedLogits(queries_GD, proxies_LD, rows_per_chunk)
        own = OwnLogits(own_1G, queries_GD)
        terms_L1 = torch.empty_like(chunked.norm_L1)
        with torch.autocast(queries_GD.device.type, enabled=False):
            for low, high, logits in chunked.chunks():
                logits_cG = logits[:-1]
                chunked.measure(low, high)
                chunked.fill(low, high, logits_cG)
                logits.scatter_(0, own.collect(low, high, logits), -torch.inf)
                logits_cG.add_(offset)
                peak_c1 = logits_cG.amax(dim=1, keepdim=True).clamp_min_(0)
                total_c1 = logits_cG.sub_(peak_c1).exp_().sum(dim=1, keepdim=True)
                terms_L1[low:high] = log_one_plus(peak_c1, total_c1)
        ctx.save_for_backward(queries_GD, proxies_LD, chunked.norm_L1, terms_L1, own_1G)
        ctx.offset, ctx.rows_per_chunk = offset, rows_per_chunk
        return terms_L1.sum(), own.positive(len(proxies_LD))[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor, grad_positive_G: Tensor) -> tuple[Tensor | None, ...]:
        queries_GD, proxies_LD, norm_L1, terms_L1, own_1G = ctx.saved_tensors
        grad_queries_GD = torch.zeros_like(queries_GD)
        grad_proxies_LD = torch.empty_like(proxies_LD)
        chunked = ChunkedLogits(queries_GD, proxies_LD, ctx.rows_per_chunk, norm_L1)
        with torch.autocast(queries_GD.device.type, enabled=False):
            for low, high, grads in chunked.chunks():
                grads_cG = grads[:-1]
                chunked.fill(low, high, grads_cG)
                grads_cG.sub_(terms_L1[low:high] - ctx.offset).exp_().mul_(grad_sum)
                index_1G = in_chunk(own_1G, low, high)[1]
                grads.scatter_(0, index_1G, grad_positive_G[None])
                chunked.add_gradients(low, high, grads_cG, grad_queries_GD, grad_proxies_LD)
        return grad_queries_GD, grad_proxies_LD, None, None, None


def proxy_anchor_loss(
    embeddings_BD: Tensor,
    labels_B: Tensor,
    proxies: Tensor,
    *,
    scale: float = 32.0,
    margin: float = 0.1,
    positives: Literal["classes", "samples"] = "classes",
    logit_memory_mb: float = 64.0,
) -> Tensor:
    """Return Proxy-Anchor of one process, a 0-d tensor.

    Args:
        embeddings_BD: Embeddings, (B, D), of any length; half precision is converted to float32.
        labels_B: Classes, (B,) int64, 0 .. C - 1.
        proxies: Proxies, (C, D), of any length.
        scale: a > 0.
        margin: m, in cosines, 0 to 1.
        positives: What the positive terms are averaged over.
        logit_memory_mb: Bound on the memory for logits in MiB, > 0.

    Raises:
        ValueError: If shapes or labels do not fit.
    """
    loss = ProxyAnchor(scale, margin, positives, logit_memory_mb)
    return dense_loss(loss, embeddings_BD, labels_B, proxies, num_classes=len(proxies))
