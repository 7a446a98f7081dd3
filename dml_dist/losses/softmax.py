"""Softmax over class proxies on the unit sphere: normalized softmax, CosFace, ArcFace.

With cosines cos_ic of sample i and class proxy c, cross-entropy over the logits

    normalized softmax (Zhai and Wu, 2019)    cos_ic / T
    CosFace (Wang et al., CVPR 2018)          s (cos_ic - m [c = y_i])
    ArcFace (Deng et al., CVPR 2019)          s cos(theta + m) for c = y_i, theta = arccos(cos_ic);
                                              s cos_ic for others

Beyond theta = pi - m, ArcFace's target logit is s (cos theta - m sin m), as in common
implementations: s cos(theta + m) would increase again with the angle.

Each loss is the mean over the global batch of softplus(logsumexp_{c != y} l_ic - l_iy). This form
keeps the float32 gradients of very small losses.
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
from dml_dist.losses.one_process import dense_loss
from dml_dist.losses.proxy_logits import negative_statistics


@dataclass(frozen=True)
class NormalizedSoftmax:
    """Normalized softmax, and the base class of CosFace and ArcFace, which override `target`.

    Attributes:
        scale: s = 1 / T > 0.
        logit_memory_mb: Bound on the memory for logits in MiB, > 0.
    """

    scale: float = 20.0
    logit_memory_mb: float = 64.0

    @property
    def proxies_per_class(self) -> int:
        """K = 1."""
        return 1

    @property
    def merges(self) -> Mapping[str, Merge]:
        """The log-sum-exp over negatives and the positive logit of each row."""
        return {"lse_negatives": "logsumexp", "positive": "sum"}

    def target(self, positive_G: Tensor) -> Tensor:
        """Return the target logits, (G,), given the positive logits without a margin."""
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
        """Return the mean positive cosine, and the fraction of rows that violate the margin."""
        violated_G = total["lse_negatives"] > self.target(total["positive"])
        return {
            "positive_cosine": total["positive"].mean() / self.scale,
            "violation_rate": violated_G.to(total["positive"].dtype).mean(),
        }


@dataclass(frozen=True)
class CosFace(NormalizedSoftmax):
    """CosFace over proxy shards (`losses/forms.py`).

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
    """ArcFace over proxy shards (`losses/forms.py`).

    Attributes:
        scale: s > 0.
        logit_memory_mb: Bound on the memory for logits in MiB, > 0.
        margin_degrees: m, in degrees, 0 to 90.
    """

    scale: float = 64.0
    margin_degrees: float = 28.6

    def target(self, positive_G: Tensor) -> Tensor:
        """Return s cos(theta + m), continued linearly in the cosine beyond pi - m.

        cos(theta + m) = cos theta cos m - sin theta sin m. The sine term has gradient 0 at
        cos = +-1.
        """
        margin = math.radians(self.margin_degrees)
        cos_G = positive_G / self.scale
        eps = torch.finfo(cos_G.dtype).eps
        # (1 - cos)(1 + cos) cancels less than 1 - cos^2 near cos = +-1, where sqrt has an infinite
        # derivative: the clamp keeps it finite and `where` sets it to 0.
        squared_G = (1 - cos_G) * (1 + cos_G)
        sin_G = squared_G.clamp_min(eps).sqrt().where(squared_G > eps, 0.0)
        with_margin_G = cos_G * math.cos(margin) - sin_G * math.sin(margin)
        linear_G = cos_G - margin * math.sin(margin)
        return self.scale * torch.where(cos_G < -math.cos(margin), linear_G, with_margin_G)


def normalized_softmax_loss(
    embeddings_BD: Tensor,
    labels_B: Tensor,
    proxies: Tensor,
    *,
    temperature: float = 0.05,
    logit_memory_mb: float = 64.0,
) -> Tensor:
    """Return the normalized softmax of one process, a 0-d tensor.

    Args:
        embeddings_BD: Embeddings, (B, D), of any length; half precision is converted to float32.
        labels_B: Classes, (B,) int64, 0 .. C - 1.
        proxies: Proxies, (C, D), of any length.
        temperature: T > 0.
        logit_memory_mb: Bound on the memory for logits in MiB, > 0.

    Raises:
        ValueError: If shapes or labels do not fit.
    """
    loss = NormalizedSoftmax(1.0 / temperature, logit_memory_mb)
    return dense_loss(loss, embeddings_BD, labels_B, proxies, num_classes=len(proxies))


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
        embeddings_BD: Embeddings, (B, D), of any length; half precision is converted to float32.
        labels_B: Classes, (B,) int64, 0 .. C - 1.
        proxies: Proxies, (C, D), of any length.
        scale: s > 0.
        margin: m, in cosines, 0 to 1.
        logit_memory_mb: Bound on the memory for logits in MiB, > 0.

    Raises:
        ValueError: If shapes or labels do not fit.
    """
    loss = CosFace(scale, logit_memory_mb, margin)
    return dense_loss(loss, embeddings_BD, labels_B, proxies, num_classes=len(proxies))


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
        embeddings_BD: Embeddings, (B, D), of any length; half precision is converted to float32.
        labels_B: Classes, (B,) int64, 0 .. C - 1.
        proxies: Proxies, (C, D), of any length.
        scale: s > 0.
        margin_degrees: m, in degrees, 0 to 90.
        logit_memory_mb: Bound on the memory for logits in MiB, > 0.

    Raises:
        ValueError: If shapes or labels do not fit.
    """
    loss = ArcFace(scale, logit_memory_mb, margin_degrees)
    return dense_loss(loss, embeddings_BD, labels_B, proxies, num_classes=len(proxies))
