"""A custom data set and custom losses, as another project would write them.

data.dataset: {name: custom, target: tests.custom_examples:Stripes, options: {num_classes: 6}}
loss: {name: custom, target: tests.custom_examples:HardNegativeSoftmax, options: {scale: 16.0}}
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dml_dist.data.sample import Sample
from dml_dist.losses.forms import ProxyShard
from dml_dist.losses.numerics import Merge, Statistics


@dataclass(frozen=True)
class StripeSource:
    """An image of stripes, drawn when it is read; `repr` identifies it."""

    period: int
    shift: int

    def read(self) -> tuple[bytes, str]:
        """Return the encoded image and its extension."""
        columns = (np.arange(24) + self.shift) % self.period < self.period // 2
        levels = np.tile(columns.astype(np.uint8) * 255, (24, 1))
        file = io.BytesIO()
        Image.fromarray(levels).save(file, "PNG")
        return file.getvalue(), "png"


@dataclass(frozen=True)
class Stripes:
    """A data set without a raw folder: a class is a period of stripes, an image a shift of them.

    The even classes train, the others test.
    """

    num_classes: int = 6
    images_per_class: int = 5

    def samples(self) -> list[Sample]:
        """List the images; keys are unique and have no dots."""
        return [
            Sample(
                key=f"stripes/{label}-{shift}",
                class_name=f"period {label + 2}",
                split="test" if label % 2 else "train",
                source=StripeSource(label + 2, shift),
            )
            for label in range(self.num_classes)
            for shift in range(self.images_per_class)
        ]


@dataclass(frozen=True)
class HardNegativeSoftmax:
    """Row form: normalized softmax over proxies, plus a hinge on the hardest negative proxy.

    mean_i [ logsumexp_c(s cos_ic) - s cos_iy + relu(max_{c != y} cos_ic - cos_iy + margin) ]
    """

    scale: float = 16.0
    margin: float = 0.1
    proxies_per_class: int = 1

    @property
    def merges(self) -> Mapping[str, Merge]:
        """Every kind of merge."""
        return {"lse": "logsumexp", "hardest": "max", "positive": "sum"}

    def partial(
        self, embeddings_GD: Tensor, labels_G: Tensor, proxies_LD: Tensor, shard: ProxyShard
    ) -> Statistics:
        """Return the statistics over one shard of the proxies."""
        cosines_GL = F.normalize(embeddings_GD) @ F.normalize(proxies_LD).T
        classes_L = torch.arange(shard.low_class, shard.high_class, device=labels_G.device)
        own_GL = labels_G[:, None] == classes_L
        return {
            "lse": (self.scale * cosines_GL).logsumexp(dim=1),
            "hardest": cosines_GL.masked_fill(own_GL, -torch.inf).max(dim=1).values,
            "positive": (cosines_GL * own_GL).sum(dim=1),
        }

    def finish(self, total: Statistics) -> Tensor:
        """Return the mean over the global batch."""
        softmax_G = total["lse"] - self.scale * total["positive"]
        hinge_G = F.relu(total["hardest"] - total["positive"] + self.margin)
        return (softmax_G + hinge_G).mean()

    def statistics(self, total: Statistics) -> Statistics:
        """Return the mean cosine to the positive."""
        return {"positive_cosine": total["positive"].mean()}


@dataclass(frozen=True)
class ContrastivePairs:
    """Pair form: squared distances of unit vectors, pulled to 0 or pushed beyond the margin."""

    margin: float = 1.0

    def __call__(self, embeddings_GD: Tensor, labels_G: Tensor) -> Tensor:
        """Return the mean over all pairs of the global batch."""
        unit_GD = F.normalize(embeddings_GD, eps=1e-12)
        first, second = torch.triu_indices(len(labels_G), len(labels_G), offset=1)
        squared = (unit_GD[first] - unit_GD[second]).square().sum(dim=1)
        same = labels_G[first] == labels_G[second]
        return torch.where(same, squared, F.relu(self.margin - squared)).sum() / max(1, len(first))


@dataclass(frozen=True)
class RowsCountedByEveryShard:
    """Row form that is wrong: every shard returns the number of rows, and they are summed.

    `dml-dist check-loss tests.custom_examples:RowsCountedByEveryShard` finds it.
    """

    proxies_per_class: int = 1

    @property
    def merges(self) -> Mapping[str, Merge]:
        """The count should be taken once, from the shape of `positive`."""
        return {"positive": "sum", "rows": "sum"}

    def partial(
        self, embeddings_GD: Tensor, labels_G: Tensor, proxies_LD: Tensor, shard: ProxyShard
    ) -> Statistics:
        """Return each row's cosine to its proxy if the shard holds it, and a one for each row."""
        cosines_GL = F.normalize(embeddings_GD, eps=1e-12) @ F.normalize(proxies_LD).T
        classes_L = torch.arange(shard.low_class, shard.high_class, device=labels_G.device)
        own_GL = labels_G[:, None] == classes_L
        return {
            "positive": (cosines_GL * own_GL).sum(dim=1),
            "rows": torch.ones_like(cosines_GL[:, 0]),
        }

    def finish(self, total: Statistics) -> Tensor:
        """Return minus the mean cosine, but for the count."""
        return -total["positive"].sum() / total["rows"].sum()

    def statistics(self, total: Statistics) -> Statistics:
        """Return nothing."""
        return {}


@dataclass(frozen=True)
class RootOfSquares:
    """Pair form that is wrong: the gradient of a root at 0 is NaN, so equal rows break it."""

    def __call__(self, embeddings_GD: Tensor, labels_G: Tensor) -> Tensor:
        """Return the mean distance of same-class rows."""
        unit_GD = F.normalize(embeddings_GD, eps=1e-12)
        distances_GG = (unit_GD[:, None] - unit_GD).square().sum(dim=2).sqrt()
        same_GG = labels_G[:, None] == labels_G
        return (distances_GG * same_GG).sum() / same_GG.sum()
