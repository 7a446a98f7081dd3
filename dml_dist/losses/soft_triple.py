"""SoftTriple: a softmax over classes of several centers each.

Qian et al., "SoftTriple Loss: Deep Metric Learning Without Triplet Sampling", ICCV 2019, eq. 8 and
10, without the regularizer that merges centers. With cosines cos_ick of sample i and center k of
class c:

    q_ic = sum_k softmax_k(cos_ick / gamma) cos_ick
    mean_i of the cross-entropy over la (q_ic - m [c = y_i])

`scale` is la. The softmax over classes is that of `losses/softmax.py`.
"""

from __future__ import annotations

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
from dml_dist.losses.forms import ProxyShard
from dml_dist.losses.numerics import Statistics, accurate_dtype, normalize_rows
from dml_dist.losses.one_process import count_classes, dense_loss
from dml_dist.losses.softmax import CosFace


@dataclass(frozen=True)
class SoftTriple(CosFace):
    """SoftTriple over proxy shards: CosFace over the relaxed similarities q.

    Attributes:
        scale: la > 0.
        logit_memory_mb: Bound on the memory for logits in MiB, > 0.
        margin: m, in cosines, 0 to 1.
        centers_per_class: K >= 1.
        gamma: Temperature of the softmax over a class's centers, > 0.
    """

    scale: float = 20.0
    margin: float = 0.01
    centers_per_class: int = 10
    gamma: float = 0.1

    @property
    def proxies_per_class(self) -> int:
        """K, the centers per class."""
        return self.centers_per_class

    def partial(
        self, embeddings_GD: Tensor, labels_G: Tensor, proxies_LD: Tensor, shard: ProxyShard
    ) -> Statistics:
        """Return the statistics of each row over one proxy shard, each (G,)."""
        dtype = accurate_dtype(embeddings_GD, proxies_LD)
        queries_GD = normalize_rows(embeddings_GD.to(dtype))
        k = self.centers_per_class
        # Half the memory: a chunk holds weights and the cosines.
        rows = chunk_rows(queries_GD, self.logit_memory_mb / 2)
        lse_G, positive_G = _RelaxedStatistics.apply(
            queries_GD,
            proxies_LD.to(dtype),
            (labels_G - shard.low_class)[None],
            (k, self.gamma, self.scale),
            max(k, rows // k * k),  # A chunk holds whole classes.
        )
        return {"lse_negatives": lse_G, "positive": positive_G}


def _relax(cosines_cG: Tensor, k: int, gamma: float) -> tuple[Tensor, Tensor]:
    """Return a chunk's weights (c, G) and relaxed similarities q (c / K, 1, G)."""
    cosines_nKG = cosines_cG.view(-1, k, cosines_cG.shape[1])
    weights_nKG = (cosines_nKG / gamma).softmax(dim=1)
    return weights_nKG, (weights_nKG * cosines_nKG).sum(dim=1, keepdim=True)


class _RelaxedStatistics(Function):
    """Log-sum-exp of scale q over other classes, and scale q of the own class."""

    @staticmethod
    def forward(
        ctx: Any,
        queries_GD: Tensor,
        proxies_LD: Tensor,
        own_1G: Tensor,
        settings: tuple[int, float, float],
        rows_per_chunk: int,
    ) -> tuple[Tensor, Tensor]:
        k, gamma, scale = settings
        chunked = ChunkedLogits(queries_GD, proxies_LD, rows_per_chunk)
        own = OwnLogits(own_1G, queries_GD)
        lse = RunningLogSumExp(queries_GD)
        padding_1G = queries_GD.new_zeros((1, len(queries_GD)))
        with torch.autocast(queries_GD.device.type, enabled=False):
            for low, high, cosines in chunked.chunks():
                chunked.measure(low, high)
                chunked.fill(low, high, cosines[:-1])
                _, q_n1G = _relax(cosines[:-1], k, gamma)
                logits = torch.cat([q_n1G[:, 0] * scale, padding_1G])
                index_1G = own.collect(low // k, high // k, logits)
                lse.add(logits.scatter_(0, index_1G, -torch.inf)[:-1])
        lse_G = lse.result()
        ctx.save_for_backward(queries_GD, proxies_LD, chunked.norm_L1, lse_G, own_1G)
        ctx.settings, ctx.rows_per_chunk = settings, rows_per_chunk
        return lse_G, own.positive(len(proxies_LD) // k)[0]

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_lse_G: Tensor, grad_positive_G: Tensor
    ) -> tuple[Tensor | None, ...]:
        queries_GD, proxies_LD, norm_L1, lse_G, own_1G = ctx.saved_tensors
        k, gamma, scale = ctx.settings
        lse_G = lse_G.masked_fill(lse_G == -torch.inf, 0.0)
        grad_queries_GD = torch.zeros_like(queries_GD)
        grad_proxies_LD = torch.empty_like(proxies_LD)
        chunked = ChunkedLogits(queries_GD, proxies_LD, ctx.rows_per_chunk, norm_L1)
        padding_1G = torch.zeros_like(lse_G)[None]
        with torch.autocast(queries_GD.device.type, enabled=False):
            for low, high, cosines in chunked.chunks():
                cosines_cG = cosines[:-1]
                chunked.fill(low, high, cosines_cG)
                weights_nKG, q_n1G = _relax(cosines_cG, k, gamma)
                grads = torch.cat([q_n1G[:, 0] * scale, padding_1G])
                grads.sub_(lse_G).exp_().mul_(grad_lse_G)
                index_1G = in_chunk(own_1G, low // k, high // k)[1]
                grads.scatter_(0, index_1G, grad_positive_G[None]).mul_(scale)
                # dq / dcos_k = w_k (1 + (cos_k - q) / gamma)
                slope_nKG = cosines_cG.view_as(weights_nKG)
                slope_nKG.sub_(q_n1G).div_(gamma).add_(1).mul_(weights_nKG)
                slope_nKG.mul_(grads[:-1, None])
                chunked.add_gradients(low, high, cosines_cG, grad_queries_GD, grad_proxies_LD)
        return grad_queries_GD, grad_proxies_LD, None, None, None


def soft_triple_loss(
    embeddings_BD: Tensor,
    labels_B: Tensor,
    proxies: Tensor,
    *,
    scale: float = 20.0,
    margin: float = 0.01,
    centers_per_class: int = 10,
    gamma: float = 0.1,
    logit_memory_mb: float = 64.0,
) -> Tensor:
    """Return SoftTriple of one process, a 0-d tensor.

    Args:
        embeddings_BD: Embeddings, (B, D), of any length; half precision is converted to float32.
        labels_B: Classes, (B,) int64, 0 .. C - 1.
        proxies: Centers, (C K, D), of any length; row c K + k is center k of class c.
        scale: la > 0.
        margin: m, in cosines, 0 to 1.
        centers_per_class: K >= 1.
        gamma: Temperature of the softmax over a class's centers, > 0.
        logit_memory_mb: Bound on the memory for logits in MiB, > 0.

    Raises:
        ValueError: If shapes or labels do not fit.
    """
    loss = SoftTriple(scale, logit_memory_mb, margin, centers_per_class, gamma)
    num_classes = count_classes(proxies, centers_per_class)
    return dense_loss(loss, embeddings_BD, labels_B, proxies, num_classes=num_classes)
