"""Statistics of all logits of a batch over a proxy shard, without holding the logits.

Proxies are worked through in chunks of rows. A running maximum and sum give the log-sum-exp;
the backward pass computes each chunk's logits again, but where one chunk held them all: then their
exponentials are kept. The normalisation of proxies is part of the chunk, so that no normalised
copy of the table is made.

With n = p / |p| and r = 1 / |p| of a proxy p, queries x_i, logits l_i = x_i . n, and
a_i = dloss/dl_i, the gradients are

    dloss/dx_i = sum over proxies of a_i r p
    dloss/dp   = r (g - n (n . g)),  g = sum_i a_i x_i

Shape legend: G queries, D embedding size, L proxies of the shard, c proxies of a chunk,
K proxies a class.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dml_dist.losses.forms import ProxyShard
from dml_dist.losses.numerics import MIN_NORM

_TINY = 1e-30
"""Below any sum of exponentials that has a term: their largest is 1."""

_CPU_CHUNK_BYTES = 16 * 2**20
"""Logits of a CPU chunk: more gains nothing, less waits more often for a busy machine."""


@dataclass(frozen=True)
class NegativeStatistics:
    """What Proxy-NCA needs of all logits over one shard, each (G,).

    Attributes:
        lse_negatives: Log-sum-exp over proxies of other classes; -inf where there are none.
        positive: Largest logit of the row's own class; 0 where the shard does not hold the class.
        sum_negatives: Sum over proxies of other classes; None when not asked for.
    """

    lse_negatives: Tensor
    positive: Tensor
    sum_negatives: Tensor | None


def negative_statistics(
    queries_GD: Tensor,
    proxies_LD: Tensor,
    labels_G: Tensor,
    shard: ProxyShard,
    *,
    memory_mb: float,
    with_sum: bool = False,
) -> NegativeStatistics:
    """Return statistics of the logits `queries . normalised proxies`, differentiable once.

    Args:
        queries_GD: Scaled, normalised embeddings, (G, D) float32 or float64.
        proxies_LD: Raw proxies of the shard, (L, D), the same dtype. The own class's nearest
            proxy (ties: the lower row) is the positive, its others count nowhere.
        labels_G: Class of each query, (G,) int64.
        shard: Which classes the proxies are of.
        memory_mb: Bound on the memory for logits in MiB; at least one row is held.
        with_sum: Whether `sum_negatives` is asked for.
    """
    rows = chunk_rows(queries_GD, memory_mb)
    return NegativeStatistics(
        *_NegativeStatistics.apply(queries_GD, proxies_LD, labels_G, shard, rows, with_sum)
    )


def chunk_rows(queries_GD: Tensor, memory_mb: float) -> int:
    """Return how many proxies a chunk has, so that (rows + 1, G) and (rows, D) fit the memory."""
    row_bytes = max(1, *queries_GD.shape) * queries_GD.element_size()
    budget = memory_mb * 2**20 / 2
    if queries_GD.device.type == "cpu":
        budget = min(budget, _CPU_CHUNK_BYTES)
    return max(1, int(budget / row_bytes) - 1)


def _own_rows(labels_G: Tensor, shard: ProxyShard) -> Tensor:
    """Return the shard's rows of each label's class, (K, G); outside 0 .. L - 1 elsewhere."""
    per_class = shard.proxies_per_class
    offsets_K = torch.arange(per_class, device=labels_G.device)
    return (labels_G - shard.low_class) * per_class + offsets_K[:, None]


def _in_chunk(rows: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Return which rows a chunk holds, and their places in it; others' place is one past it."""
    held = (rows >= low) & (rows < high)
    return held, torch.where(held, rows - low, high - low)


def _chunks(
    buffer: Tensor, num_rows: int, rows_per_chunk: int
) -> Iterator[tuple[int, int, Tensor]]:
    """Give (low, high, buffer cut to high - low + 1 rows) of every chunk."""
    for low in range(0, num_rows, rows_per_chunk):
        high = min(num_rows, low + rows_per_chunk)
        yield low, high, buffer[: high - low + 1]


class _NegativeStatistics(Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries_GD: Tensor,
        proxies_LD: Tensor,
        labels_G: Tensor,
        shard: ProxyShard,
        rows_per_chunk: int,
        with_sum: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        num_queries, num_rows = queries_GD.shape[0], proxies_LD.shape[0]
        rows_per_chunk = min(rows_per_chunk, num_rows)
        own_KG = _own_rows(labels_G, shard)
        peak_G = queries_GD.new_full((num_queries,), -torch.inf)
        total_G = queries_GD.new_zeros(num_queries)
        sum_G = queries_GD.new_zeros(num_queries) if with_sum else None
        own_logits_KG = queries_GD.new_full(own_KG.shape, -torch.inf)
        norm_L1 = proxies_LD.new_empty((num_rows, 1))
        # One row more than a chunk: what belongs to other chunks is read and written there.
        buffer = queries_GD.new_zeros((rows_per_chunk + 1, num_queries))
        with torch.autocast(queries_GD.device.type, enabled=False):
            for low, high, logits in _chunks(buffer, num_rows, rows_per_chunk):
                chunk, norm = proxies_LD[low:high], norm_L1[low:high]
                torch.linalg.vector_norm(chunk, dim=1, keepdim=True, out=norm)
                logits_cG = logits[:-1]
                torch.mm(chunk, queries_GD.T, out=logits_cG)
                logits_cG.div_(norm.clamp_min_(MIN_NORM))
                if sum_G is not None:
                    sum_G += logits_cG.sum(dim=0)
                held_KG, place_KG = _in_chunk(own_KG, low, high)
                own_logits_KG = torch.where(held_KG, logits.gather(0, place_KG), own_logits_KG)
                logits.scatter_(0, place_KG, -torch.inf)
                new_peak_G = torch.maximum(peak_G, logits_cG.amax(dim=0))
                # A query whose chunks so far held no negative has peak -inf: shift it by 0.
                shift_G = new_peak_G.masked_fill(new_peak_G == -torch.inf, 0.0)
                total_G *= (peak_G - shift_G).exp_()
                total_G += logits_cG.sub_(shift_G).exp_().sum(dim=0)
                peak_G = new_peak_G
        lse_G = peak_G + total_G.log()
        positive_G, best_G = own_logits_KG.max(dim=0)
        # Classes are whole, so a shard has all K rows of a label's class or none.
        foreign_G = (own_KG[0] < 0) | (own_KG[0] >= num_rows)
        positive_G = positive_G.masked_fill(foreign_G, 0.0)
        if sum_G is not None:
            sum_G -= own_logits_KG.masked_fill(foreign_G, 0.0).sum(dim=0)
        best_1G = own_KG.gather(0, best_G[None])
        kept = (buffer[:-1], total_G) if rows_per_chunk == num_rows else ()
        ctx.save_for_backward(queries_GD, proxies_LD, norm_L1, lse_G, own_KG, best_1G, *kept)
        ctx.rows_per_chunk = rows_per_chunk
        return lse_G, positive_G, sum_G

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_lse_G: Tensor, grad_positive_G: Tensor, grad_sum_G: Tensor | None
    ) -> tuple[Tensor, Tensor, None, None, None, None]:
        queries_GD, proxies_LD, norm_L1, lse_G, own_KG, best_1G, *kept = ctx.saved_tensors
        num_queries, num_rows = queries_GD.shape[0], proxies_LD.shape[0]
        lse_G = lse_G.masked_fill(lse_G == -torch.inf, 0.0)
        grad_queries_GD = torch.zeros_like(queries_GD)
        grad_proxies_LD = torch.empty_like(proxies_LD)
        buffer = queries_GD.new_zeros((ctx.rows_per_chunk + 1, num_queries))
        with torch.autocast(queries_GD.device.type, enabled=False):
            for low, high, grads in _chunks(buffer, num_rows, ctx.rows_per_chunk):
                chunk, norm = proxies_LD[low:high], norm_L1[low:high]
                grads_cG, grad_chunk = grads[:-1], grad_proxies_LD[low:high]
                if kept:
                    exps_cG, total_G = kept
                    # A total of 0: no negative, all its exponentials are 0.
                    torch.mul(exps_cG, grad_lse_G / total_G.clamp_min(_TINY), out=grads_cG)
                else:
                    torch.mm(chunk, queries_GD.T, out=grads_cG)
                    grads_cG.div_(norm).sub_(lse_G).exp_().mul_(grad_lse_G)
                if grad_sum_G is not None:
                    grads_cG.add_(grad_sum_G)
                grads.scatter_(0, _in_chunk(own_KG, low, high)[1], 0.0)
                grads.scatter_(0, _in_chunk(best_1G, low, high)[1], grad_positive_G[None])
                grads_cG.div_(norm)
                grad_queries_GD.addmm_(grads_cG.T, chunk)
                torch.mm(grads_cG, queries_GD, out=grad_chunk)
                # r n (n . g); a proxy shorter than MIN_NORM is only multiplied by a constant.
                along_c1 = (chunk * grad_chunk).sum(dim=1, keepdim=True)
                along_c1.div_(norm.square()).masked_fill_(norm <= MIN_NORM, 0.0)
                grad_chunk.addcmul_(along_c1, chunk, value=-1)
        return grad_queries_GD, grad_proxies_LD, None, None, None, None
