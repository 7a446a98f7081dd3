"""Statistics of a checkpoint's proxies: norms, similar classes, and images near wrong proxies.

report/proxies.npz, written by the final evaluation:

    names             (C,) text       class names, by class id
    norms             (C, K) float32  norms of the K proxies of each class
    drawn             (S,) int64      class ids whose nearest other class was searched
    nearest           (S,) int64      that class
    similarity        (S,) float32    cosine similarity of the two nearest proxies
    image_class       (M,) int64      class ids of some training images
    image_nearest     (M,) int64      class of the proxy that is nearest to the image's embedding
"""

from __future__ import annotations

import zipfile
from collections import Counter
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dml_dist.errors import DataError
from dml_dist.files import open_atomic
from dml_dist.report.figures import Colors, Picture, draw_picture, new_axes, whole_numbers
from dml_dist.runs.folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_LISTED = 10
"""Rows of the lists of similar classes and of confusions."""


@dataclass(frozen=True, eq=False)
class ProxyFacts:
    """The arrays of proxies.npz, described at the top of this module."""

    names: np.ndarray
    norms: np.ndarray
    drawn: np.ndarray
    nearest: np.ndarray
    similarity: np.ndarray
    image_class: np.ndarray
    image_nearest: np.ndarray

    @property
    def own_share(self) -> float:
        """Share of the drawn training images whose nearest proxy is of their own class."""
        return float((self.image_class == self.image_nearest).mean())

    def similar_pairs(self, count: int = NUM_LISTED) -> list[tuple[str, str, float]]:
        """Return the most similar pairs of classes, most similar first, each pair once."""
        pairs: dict[tuple[int, int], float] = {}
        for at in np.argsort(-self.similarity, kind="stable"):
            one, two = sorted((int(self.drawn[at]), int(self.nearest[at])))
            pairs.setdefault((one, two), float(self.similarity[at]))
            if len(pairs) == count:
                break
        return [
            (str(self.names[one]), str(self.names[two]), value)
            for (one, two), value in pairs.items()
        ]

    def confusions(self, count: int = NUM_LISTED) -> list[tuple[str, str, int, int]]:
        """Return the pairs (class, class of the nearest proxy) with the most images.

        Each with its number of images and the number of drawn images of the first class.
        """
        wrong = self.image_class != self.image_nearest
        counts = Counter(
            zip(self.image_class[wrong].tolist(), self.image_nearest[wrong].tolist(), strict=True)
        )
        sizes = Counter(self.image_class.tolist())
        order = sorted(counts.items(), key=lambda item: (-item[1] / sizes[item[0][0]], item[0]))
        order.sort(key=lambda item: -item[1])
        return [
            (str(self.names[one]), str(self.names[two]), number, sizes[one])
            for (one, two), number in order[:count]
        ]


def write_proxy_facts(run_dir: Path, facts: ProxyFacts) -> None:
    """Write the facts to a run's folder."""
    report_dir = RunFolder(run_dir).report_dir
    report_dir.mkdir(exist_ok=True)
    with open_atomic(report_dir / "proxies.npz") as file:
        np.savez_compressed(
            file, **{field.name: getattr(facts, field.name) for field in fields(facts)}
        )


def read_proxy_facts(run_dir: Path) -> ProxyFacts | None:
    """Return what `write_proxy_facts` wrote, None when there is no file.

    Raises:
        DataError: If the file is damaged.
    """
    path = RunFolder(run_dir).report_dir / "proxies.npz"
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as values:
            facts = ProxyFacts(**{field.name: values[field.name] for field in fields(ProxyFacts)})
        if facts.norms.ndim != 2 or len(facts.norms) != len(facts.names):
            raise ValueError(f"norms of shape {facts.norms.shape} for {len(facts.names)} classes")
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"the proxy statistics {path} cannot be read: the file is damaged ({error!r}); "
            "resume the run to write it again, or delete the file"
        ) from None
    return facts


def draw_proxies(facts: ProxyFacts) -> list[Picture]:
    """Draw the norms of the proxies, and their similarity to the nearest proxy of another class."""
    count = facts.norms.size
    several = f" ({facts.norms.shape[1]} per class)" if facts.norms.shape[1] > 1 else ""
    low, high = float(facts.norms.min()), float(facts.norms.max())
    norms = draw_picture(
        "proxy-norms",
        f"Norms of the {count:,} proxies{several} of the evaluated checkpoint, {low:.3g} to "
        f"{high:.3g}. A loss on normalized proxies does not depend on them, but the larger the "
        "norm, the less an update changes the proxy's direction.",
        partial(_draw_histogram, facts.norms.ravel(), "norm of a proxy", "proxies", "recall"),
    )
    if not len(facts.similarity):
        return [norms]
    drawn = "" if len(facts.drawn) == len(facts.names) else f" ({len(facts.drawn):,} drawn)"
    nearest = draw_picture(
        "proxy-similarity",
        f"Cosine similarity of each class's proxy{drawn} to the nearest proxy of another class; "
        f"the median is {np.median(facts.similarity):.3f}, the highest "
        f"{facts.similarity.max():.3f}. Near 1 the loss hardly separates the two classes.",
        partial(
            _draw_histogram, facts.similarity, "cosine similarity to the nearest", "classes", "map"
        ),
    )
    return [norms, nearest]


def _draw_histogram(
    values: np.ndarray, xlabel: str, ylabel: str, color: str, colors: Colors
) -> Figure:
    figure, axes = new_axes(colors, xlabel, ylabel)
    low, high = float(values.min()), float(values.max())
    spread = max(high - low, 1e-3 * max(abs(high), 1e-6))
    bins = np.linspace(low - 0.01 * spread, low + 1.01 * spread, 31)
    counts, _ = np.histogram(values, bins)
    axes.bar(bins[:-1], counts, width=0.88 * (bins[1] - bins[0]), align="edge", color=colors[color])
    whole_numbers(axes.yaxis)
    return figure
