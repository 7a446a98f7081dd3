"""Statistics of all logits of a batch over a proxy shard, without holding the logits.

Proxies are processed in chunks of rows (`losses/chunks.py`), with a running maximum and sum for the
log-sum-exp. The backward pass recomputes each chunk's logits, unless one chunk holds them all: then
their exponentials are saved.

Shape legend: G queries, D embedding size, L proxies of the shard, c proxies of a chunk,
K proxies a class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dml_dist.losses.chunks import (
    ChunkedLogits,
    OwnLogits,
    RunningLogSumExp,
    chunk_rows,
    in_chunk,
)

_TINY = 1e-30
"""Below any nonempty sum of exponentials, whose largest term is 1."""

Excluded = Callable[[int, int], Tensor]
"""(low, high) -> mask of the logits of rows low .. high - 1 to ignore, (high - low, G) bool."""


@dataclass(frozen=True)
class NegativeStatistics:
    """Statistics of all logits over one shard that a softmax over proxies needs, each (G,).

    Attributes:
        lse_negatives: Log-sum-exp over all but own rows; -inf where there are none.
        positive: Largest logit of the own rows; 0 where the shard does not hold them.
        sum_negatives: Sum over all but own rows; None unless requested.
    """

    lse_negatives: Tensor
    positive: Tensor
    sum_negatives: Tensor | None


def negative_statistics(
    queries_GD: Tensor,
    proxies_LD: Tensor,
    own_KG: Tensor,
    *,
    memory_mb: float,
    with_sum: bool = False,
    excluded: Excluded | None = None,
) -> NegativeStatistics:
    """Return statistics of the logits `queries . normalized proxies`, differentiable once.

    Args:
        queries_GD: Scaled, normalized embeddings, (G, D) float32 or float64.
        proxies_LD: Raw proxies of the shard, (L, D), the same dtype.
        own_KG: The shard's rows that each query owns, (K, G) int64, all outside 0 .. L - 1 where
            it does not hold them. The nearest (ties: the lower row) is the positive, the others
            are ignored.
        memory_mb: Bound on the memory for logits in MiB; a chunk has at least one row.
        with_sum: Whether to return `sum_negatives`; not together with `excluded`.
        excluded: Which other rows are not negatives; None for none.
    """
    rows = chunk_rows(queries_GD, memory_mb)
    return NegativeStatistics(
        *_NegativeStatistics.apply(queries_GD, proxies_LD, own_KG, rows, with_sum, excluded)
    )


class _NegativeStatistics(Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries_GD: Tensor,
        proxies_LD: Tensor,
        own_KG: Tensor,
        rows_per_chunk: int,
        with_sum: bool,
        excluded: Excluded | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        num_rows = len(proxies_LD)
        chunked = ChunkedLogits(queries_GD, proxies_LD, rows_per_chunk)
        own = OwnLogits(own_KG, queries_GD)
        lse = RunningLogSumExp(queries_GD)
        sum_G = queries_GD.new_zeros(len(queries_GD)) if with_sum else None
        with torch.autocast(queries_GD.device.type, enabled=False):
            for low, high, logits in chunked.chunks():
                logits_cG = logits[:-1]
                chunked.measure(low, high)
                chunked.fill(low, high, logits_cG)
                if sum_G is not None:
                    sum_G += logits_cG.sum(dim=0)
                # Own rows drop out of the log-sum-exp; the extra row absorbs those of other chunks.
                logits.scatter_(0, own.collect(low, high, logits), -torch.inf)
                if excluded is not None:
                    logits_cG.masked_fill_(excluded(low, high), -torch.inf)
                lse.add(logits_cG)
        lse_G = lse.result()
        positive_G, best_1G, missing_G = own.positive(num_rows)
        if sum_G is not None:
            sum_G -= own.logits_KG.masked_fill(missing_G, 0.0).sum(dim=0)
        # A single chunk: the buffer still holds exp(logit - peak), which saves a second product.
        kept = (chunked.buffer[:-1], lse.total_G) if chunked.rows_per_chunk == num_rows else ()
        ctx.save_for_backward(
            queries_GD, proxies_LD, chunked.norm_L1, lse_G, own_KG, best_1G, *kept
        )
        ctx.rows_per_chunk, ctx.excluded = rows_per_chunk, excluded
        return lse_G, positive_G, sum_G

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_lse_G: Tensor, grad_positive_G: Tensor, grad_sum_G: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        queries_GD, proxies_LD, norm_L1, lse_G, own_KG, best_1G, *kept = ctx.saved_tensors
        # No negatives: every exponential below is exp(-inf - 0) = 0, not NaN.
        lse_G = lse_G.masked_fill(lse_G == -torch.inf, 0.0)
        grad_queries_GD = torch.zeros_like(queries_GD)
        grad_proxies_LD = torch.empty_like(proxies_LD)
        chunked = ChunkedLogits(queries_GD, proxies_LD, ctx.rows_per_chunk, norm_L1)
        with torch.autocast(queries_GD.device.type, enabled=False):
            for low, high, grads in chunked.chunks():
                grads_cG = grads[:-1]
                if kept:
                    exps_cG, total_G = kept
                    # A total of 0 means no negatives: all its exponentials are 0 as well.
                    torch.mul(exps_cG, grad_lse_G / total_G.clamp_min(_TINY), out=grads_cG)
                else:
                    chunked.fill(low, high, grads_cG)
                    grads_cG.sub_(lse_G).exp_().mul_(grad_lse_G)
                    if ctx.excluded is not None:
                        grads_cG.masked_fill_(ctx.excluded(low, high), 0.0)
                if grad_sum_G is not None:
                    grads_cG.add_(grad_sum_G)
                # First clear all own rows, then write the positive, which is one of them.
                grads.scatter_(0, in_chunk(own_KG, low, high)[1], 0.0)
                grads.scatter_(0, in_chunk(best_1G, low, high)[1], grad_positive_G[None])
                chunked.add_gradients(low, high, grads_cG, grad_queries_GD, grad_proxies_LD)
        return grad_queries_GD, grad_proxies_LD, None, None, None, None
