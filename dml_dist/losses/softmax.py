"""Softmax over class proxies on the unit sphere: normalised softmax, CosFace, ArcFace.

With cosines cos_ic of sample i and class proxy c, cross-entropy over the logits

    normalised softmax (Zhai and Wu, 2019)    cos_ic / T
    CosFace (Wang et al., CVPR 2018)          s (cos_ic - m [c = y_i])
    ArcFace (Deng et al., CVPR 2019)          s cos(theta + m) for c = y_i, theta = arccos(cos_ic);
                                              s cos_ic for others

ArcFace's target is s (cos theta - m sin m) where theta > pi - m, as common implementations have
it: else it would grow again with the angle.

All are the mean over the global batch of softplus(logsumexp_{c != y} l_ic - l_iy), which keeps
float32 gradients of tiny losses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dml_dist.losses.chunks import own_rows
from dml_dist.losses.forms import ProxyShard
from dml_dist.losses.numerics import (
    Merge,
    Statistics,
    accurate_dtype,
    normalize_rows,
    softplus_exact,
)
from dml_dist.losses.one_process import loss_of_table
from dml_dist.losses.proxy_logits import negative_statistics


@dataclass(frozen=True)
class NormalizedSoftmax:
    """Normalised softmax as a loss of row form, and what the others change of it.

    Attributes:
        scale: s = 1 / T > 0.
        logit_memory_mb: Bound on the memory for logits in MiB, > 0.
    """

    scale: float = 20.0
    logit_memory_mb: float = 64.0

    @property
    def proxies_per_class(self) -> int:
        """One."""
        return 1

    @property
    def merges(self) -> Mapping[str, Merge]:
        """Two statistics of each row."""
        return {"lse_negatives": "logsumexp", "positive": "sum"}

    def target(self, positive_G: Tensor) -> Tensor:
        """Return the logits of the own classes, of their logits without a margin."""
        return positive_G

    def partial(
        self, embeddings_GD: Tensor, labels_G: Tensor, proxies_LD: Tensor, shard: ProxyShard
    ) -> Statistics:
        """Return the statistics of each row over one proxy shard, each (G,)."""
        dtype = accurate_dtype(embeddings_GD, proxies_LD)
        found = negative_statistics(
            normalize_rows(embeddings_GD.to(dtype)) * self.scale,
            proxies_LD.to(dtype),
            own_rows(labels_G, shard),
            memory_mb=self.logit_memory_mb,
        )
        return {"lse_negatives": found.lse_negatives, "positive": found.positive}

    def finish(self, total: Statistics) -> Tensor:
        """Return the mean over the rows of the global batch."""
        return softplus_exact(total["lse_negatives"] - self.target(total["positive"])).mean()

    def statistics(self, total: Statistics) -> Statistics:
        """Return the mean cosine to the own proxy, and the share of rows it does not dominate."""
        violated_G = total["lse_negatives"] > self.target(total["positive"])
        return {
            "positive_cosine": total["positive"].mean() / self.scale,
            "violation_rate": violated_G.to(total["positive"].dtype).mean(),
        }


@dataclass(frozen=True)
class CosFace(NormalizedSoftmax):
    """CosFace as a loss of row form.

    Attributes:
        scale: s > 0.
        logit_memory_mb: Bound on the memory for logits in MiB, > 0.
        margin: m, in cosines, 0 to 1.
    """

    scale: float = 64.0
    margin: float = 0.35

    def target(self, positive_G: Tensor) -> Tensor:
        """Return s (cos - m)."""
        return positive_G - self.scale * self.margin


@dataclass(frozen=True)
class ArcFace(NormalizedSoftmax):
    """ArcFace as a loss of row form.

    Attributes:
        scale: s > 0.
        logit_memory_mb: Bound on the memory for logits in MiB, > 0.
        margin_degrees: m, in degrees, 0 to 90.
    """

    scale: float = 64.0
    margin_degrees: float = 28.6

    def target(self, positive_G: Tensor) -> Tensor:
        """Return s cos(theta + m), continued linearly in the cosine beyond pi - m.

        cos(theta + m) = cos theta cos m - sin theta sin m. At cos = +-1, where the sine has no
        derivative, its part of the gradient is 0; the embedding's gradient would have none either.
        """
        margin = math.radians(self.margin_degrees)
        cos_G = positive_G / self.scale
        eps = torch.finfo(cos_G.dtype).eps
        squared_G = (1 - cos_G) * (1 + cos_G)
        sin_G = squared_G.clamp_min(eps).sqrt().where(squared_G > eps, 0.0)
        moved_G = cos_G * math.cos(margin) - sin_G * math.sin(margin)
        beyond_G = cos_G - margin * math.sin(margin)
        return self.scale * torch.where(cos_G < -math.cos(margin), beyond_G, moved_G)


def normalized_softmax_loss(
    embeddings_BD: Tensor,
    labels_B: Tensor,
    proxies: Tensor,
    *,
    temperature: float = 0.05,
    logit_memory_mb: float = 64.0,
) -> Tensor:
    """Return the normalised softmax of one process, a 0-d tensor.

    Args:
        embeddings_BD: Embeddings, (B, D), of any length; half precision is taken to float32.
        labels_B: Classes, (B,) int64, 0 .. C - 1.
        proxies: Proxies, (C, D), of any length.
        temperature: T > 0.
        logit_memory_mb: Bound on the memory for logits in MiB, > 0.

    Raises:
        ValueError: If shapes or labels do not fit.
    """
    loss = NormalizedSoftmax(1.0 / temperature, logit_memory_mb)
    return loss_of_table(loss, embeddings_BD, labels_B, proxies, num_classes=len(proxies))


def cosface_loss(
    embeddings_BD: Tensor,
    labels_B: Tensor,
    proxies: Tensor,
    *,
    scale: float = 64.0,
    margin: float = 0.35,
    logit_memory_mb: float = 64.0,
) -> Tensor:
    """Return CosFace of one process, a 0-d tensor.

    Args:
        embeddings_BD: Embeddings, (B, D), of any length; half precision is taken to float32.
        labels_B: Classes, (B,) int64, 0 .. C - 1.
        proxies: Proxies, (C, D), of any length.
        scale: s > 0.
        margin: m, in cosines, 0 to 1.
        logit_memory_mb: Bound on the memory for logits in MiB, > 0.

    Raises:
        ValueError: If shapes or labels do not fit.
    """
    loss = CosFace(scale, logit_memory_mb, margin)
    return loss_of_table(loss, embeddings_BD, labels_B, proxies, num_classes=len(proxies))


def arcface_loss(
    embeddings_BD: Tensor,
    labels_B: Tensor,
    proxies: Tensor,
    *,
    scale: float = 64.0,
    margin_degrees: float = 28.6,
    logit_memory_mb: float = 64.0,
) -> Tensor:
    """Return ArcFace of one process, a 0-d tensor.

    Args:
        embeddings_BD: Embeddings, (B, D), of any length; half precision is taken to float32.
        labels_B: Classes, (B,) int64, 0 .. C - 1.
        proxies: Proxies, (C, D), of any length.
        scale: s > 0.
        margin_degrees: m, in degrees, 0 to 90.
        logit_memory_mb: Bound on the memory for logits in MiB, > 0.

    Raises:
        ValueError: If shapes or labels do not fit.
    """
    loss = ArcFace(scale, logit_memory_mb, margin_degrees)
    return loss_of_table(loss, embeddings_BD, labels_B, proxies, num_classes=len(proxies))
