"""The embedding space of a run: distances inside and between classes, and maps in the plane."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from dml_dist.random_streams import Stream, generator_of, seed_of
from dml_dist.report.figures import (
    SERIES,
    Colors,
    Picture,
    add_points,
    draw_picture,
    legend_above,
    new_axes,
    new_figure,
    whole_numbers,
)
from dml_dist.runs.artifacts import ClassTable, read_embeddings
from dml_dist.runs.folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_POINTS = 4_000
"""Largest number of images on a map."""
MOST_QUERIES = 1_000
"""Largest number of images whose distances to all others are measured."""

_BLOCK_FLOATS = 1 << 22  # of a block of distances: 16 MiB, some copies in float64 beside it
_MAP_SIZE = (4.6, 4.6)  # inches


@dataclass(frozen=True, eq=False)
class Space:
    """Embeddings of the final evaluation.

    Attributes:
        vectors: (N, D) float32; with cosine distance of length 1.
        labels: (N,) int64.
        distance: The run's distance between embeddings.
    """

    vectors: np.ndarray
    labels: np.ndarray
    distance: Literal["cosine", "euclidean"]


@dataclass(frozen=True, eq=False)
class Distances:
    """Euclidean distances of Q sampled images to all others.

    Attributes:
        same: (Q,) to the nearest image of the same class.
        other: (Q,) to the nearest image of another class.
        within: (Q,) mean distance to the images of the same class.
        between: Mean distance between the centers of two classes.
    """

    same: np.ndarray
    other: np.ndarray
    within: np.ndarray
    between: float

    @property
    def ratio(self) -> float:
        """Mean distance inside of a class over that between class centers; NaN if those are 0."""
        return float(self.within.mean()) / self.between if self.between else math.nan


def read_space(run_dir: Path, distance: Literal["cosine", "euclidean"]) -> Space | None:
    """Return the embeddings of a run's final evaluation, None when they were not saved.

    Raises:
        DataError: If their file is damaged.
    """
    path = RunFolder(run_dir).embeddings
    if not path.is_file():
        return None
    saved = read_embeddings(path)
    vectors = saved.embeddings
    if distance == "cosine":
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
    return Space(vectors, saved.labels, distance)


# ---------------------------------------------------------------- distances


def measure_distances(space: Space, seed: int) -> Distances | None:
    """Measure a sample of images against all; None without two classes or a class of two images."""
    _, classes, sizes = np.unique(space.labels, return_inverse=True, return_counts=True)
    paired = np.flatnonzero(sizes[classes] > 1)
    if len(sizes) < 2 or not len(paired):
        return None
    queries = generator_of(Stream.DISTANCES_IMAGES, seed).permutation(paired)[:MOST_QUERIES]
    norms = (space.vectors.astype(np.float64) ** 2).sum(axis=1)
    same, other, within = np.empty((3, len(queries)))
    block = max(1, _BLOCK_FLOATS // len(space.labels))
    for low in range(0, len(queries), block):
        part = queries[low : low + block]
        products = (space.vectors[part] @ space.vectors.T).astype(np.float64)
        distances = np.sqrt(np.maximum(norms[part, None] + norms - 2 * products, 0.0))
        mates = classes[part, None] == classes
        mates[np.arange(len(part)), part] = False
        cut = slice(low, low + len(part))
        same[cut] = np.where(mates, distances, np.inf).min(axis=1)
        within[cut] = (distances * mates).sum(axis=1) / mates.sum(axis=1)
        mates[np.arange(len(part)), part] = True
        other[cut] = np.where(mates, np.inf, distances).min(axis=1)
    return Distances(same, other, within, _between(space.vectors, classes, len(sizes), seed))


def _between(vectors: np.ndarray, classes: np.ndarray, num_classes: int, seed: int) -> float:
    """Return the mean distance between class centers; of sampled pairs if there are many."""
    sums = np.zeros((num_classes, vectors.shape[1]))
    np.add.at(sums, classes, vectors)
    centers = sums / np.bincount(classes)[:, None]
    one, two = np.triu_indices(num_classes, 1) if num_classes <= 200 else _pairs(num_classes, seed)
    return float(np.linalg.norm(centers[one] - centers[two], axis=1).mean())


def _pairs(num_classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = generator_of(Stream.DISTANCES_CLASSES, seed)
    one = generator.integers(0, num_classes, 20_000)
    return one, (one + generator.integers(1, num_classes, len(one))) % num_classes


def draw_distances(distances: Distances, space: Space) -> Picture:
    """Draw the distances to the nearest image of the same and of another class."""
    hits = float((distances.same < distances.other).mean())
    num_queries, num_images = len(distances.same), len(space.labels)
    shown = "all" if num_queries == num_images else f"{num_queries:,} drawn"
    caption = (
        f"Distance from a test image to the nearest image of its own class and of another class, "
        f"for {shown} of {num_images:,} images. For {hits:.1%} of them the own class is nearer: "
        "they hit. Mean distance within a class divided by that between class centers: "
        f"{_ratio_text(distances.ratio)}."
    )
    return draw_picture("distances", caption, partial(_draw_distances, distances, space))


def _ratio_text(ratio: float) -> str:
    return "all centers are equal" if math.isnan(ratio) else f"{ratio:.3f} (lower: tighter classes)"


def _draw_distances(distances: Distances, space: Space, colors: Colors) -> Figure:
    unit = " of normalized embeddings" if space.distance == "cosine" else ""
    figure, axes = new_axes(colors, f"Euclidean distance{unit}", "images")
    high = float(max(distances.same.max(), distances.other.max())) or 1.0
    bins = np.linspace(0, high * 1.0001, 41)
    for values, label, color in (
        (distances.same, "nearest of the same class", "recall"),
        (distances.other, "nearest of another class", "map"),
    ):
        counts, _ = np.histogram(values, bins)
        axes.stairs(counts, bins, color=colors[color], fill=True, alpha=0.18)
        axes.stairs(counts, bins, color=colors[color], linewidth=1.6, label=label)
    axes.set_xlim(0, high)
    axes.set_ylim(bottom=0)
    whole_numbers(axes.yaxis)
    legend_above(figure, colors)
    return figure


# ---------------------------------------------------------------- maps


@dataclass(frozen=True, eq=False)
class _Groups:
    """The color groups of images: position -> group, -1 for none."""

    of_point: np.ndarray
    names: list[str]
    what: str


def draw_maps(space: Space, classes: ClassTable | None, seed: int) -> list[Picture]:
    """Draw the embeddings in the plane: by PCA, and by UMAP where umap-learn is installed."""
    if len(space.labels) < 3 or space.vectors.shape[1] < 2:
        return []
    groups = _groups(space.labels, classes)
    chosen = generator_of(Stream.MAP_IMAGES, seed).permutation(len(space.labels))
    colored = groups.of_point[chosen] >= 0
    # Of thousands of classes hardly an image of the few colored ones would be drawn.
    few = 0 < colored.sum() < MOST_POINTS // 10
    if few:
        chosen = chosen[np.argsort(~colored, kind="stable")]
    chosen = np.sort(chosen[:MOST_POINTS])
    vectors = space.vectors[chosen].astype(np.float64)
    groups = replace(groups, of_point=groups.of_point[chosen])
    drawn = f"All {len(chosen):,} test images"
    if len(chosen) < len(space.labels):
        which = (
            "all of the colored classes, the others drawn at random" if few else "drawn at random"
        )
        drawn = f"{len(chosen):,} of {len(space.labels):,} test images, {which}"
    positions, share = principal_components(vectors)
    caption = (
        f"{drawn}, in the two directions of largest variance (PCA), which hold {share:.1%} of it. "
        f"{groups.what}"
    )
    maps = [draw_picture("map-pca", caption, partial(_draw_map, positions, groups, "component"))]
    if (layout := _umap(vectors, seed)) is not None:
        caption = (
            f"The same images placed by UMAP, which keeps neighbors together; distances between "
            f"groups say little. {groups.what}"
        )
        draw = partial(_draw_map, layout, groups, "UMAP axis")
        maps.append(draw_picture("map-umap", caption, draw))
    return maps


def principal_components(vectors_ND: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the (N, 2) coordinates of largest variance, and the share of the variance in them.

    Signs are such that the largest coordinate of each direction is positive.
    """
    centered = vectors_ND - vectors_ND.mean(axis=0)
    values, directions = np.linalg.eigh(centered.T @ centered)
    plane = directions[:, ::-1][:, :2]
    signs = np.sign(plane[np.abs(plane).argmax(axis=0), [0, 1]])
    total = float(values.sum())
    share = float(values[-2:].sum()) / total if total > 0 else 1.0
    return centered @ (plane * signs), share


def _umap(vectors: np.ndarray, seed: int) -> np.ndarray | None:
    """Return UMAP's (N, 2) layout, None where it is not installed or cannot place so few points."""
    try:
        from umap import UMAP  # The name, too: an uninstalled package may leave its folder behind.
    except ImportError:
        return None
    neighbors = min(15, len(vectors) - 1)
    if neighbors < 3:
        return None
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It warns that a seed allows one thread only.
        layout_seed = seed_of(Stream.MAP_LAYOUT, seed, bits=32)
        mapper = UMAP(n_neighbors=neighbors, random_state=layout_seed, n_jobs=1)
        return np.asarray(mapper.fit_transform(vectors.astype(np.float32)), dtype=np.float64)


def _groups(labels: np.ndarray, classes: ClassTable | None) -> _Groups:
    """Color the super-classes if they are few, else the weakest classes."""
    if classes is None:
        return _Groups(np.full(len(labels), -1), [], "")
    position = {label: at for at, label in enumerate(classes.results.label.tolist())}
    of_point = np.array([position.get(label, -1) for label in labels.tolist()])
    super_names = sorted({name for name in classes.super_classes if name})
    if 2 <= len(super_names) <= len(SERIES):
        number = {name: at for at, name in enumerate(super_names)}
        of_class = np.array([number.get(name or "", -1) for name in classes.super_classes])
        what = "Colors: super-classes."
        return _Groups(np.where(of_point >= 0, of_class[of_point], -1), super_names, what)
    weakest = classes.results.worst_first()[: len(SERIES)]
    of_class = np.full(len(classes), -1)
    of_class[weakest] = np.arange(len(weakest))
    names = [classes.names[at] for at in weakest]
    what = f"Colored: the {len(names)} classes with the lowest R@1; gray: all others."
    return _Groups(np.where(of_point >= 0, of_class[of_point], -1), names, what)


def _draw_map(positions: np.ndarray, groups: _Groups, axis: str, colors: Colors) -> Figure:
    figure = new_figure((_MAP_SIZE[0], _MAP_SIZE[1] + 0.2 * -(-len(groups.names) // 2)))
    axes = figure.add_subplot()
    axes.spines[:].set_color(colors["rule"])
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(f"{axis} 1", color=colors["muted"])
    axes.set_ylabel(f"{axis} 2", color=colors["muted"])
    size = 2.6 if len(positions) <= 1500 else 1.9
    add_points(axes, positions[groups.of_point < 0], colors["faint"], size, zorder=1)
    for number, name in enumerate(groups.names):
        color = colors[SERIES[number]]
        points = positions[groups.of_point == number]
        big = size + (0.4 if len(points) * 4 > len(positions) else 1.6)
        add_points(axes, points, color, big, zorder=2)
        axes.plot([], [], "o", color=color, markersize=4, label=_short(name))
    _fit(axes, positions)
    if groups.names:
        legend_above(figure, colors, handlelength=1.0)
        for text in figure.legends[0].get_texts():
            text.set_parse_math(False)
    return figure


def _fit(axes: Axes, positions: np.ndarray) -> None:
    """Show all points, both axes at one scale."""
    low, high = positions.min(axis=0), positions.max(axis=0)
    half = float((high - low).max()) / 2 * 1.04 or 1.0
    center = (low + high) / 2
    axes.set_xlim(center[0] - half, center[0] + half)
    axes.set_ylim(center[1] - half, center[1] + half)
    axes.set_aspect("equal")


def _short(name: str, limit: int = 26) -> str:
    return name if len(name) <= limit else f"{name[: limit - 1]}…"


def draw_space(space: Space, classes: ClassTable | None, seed: int) -> Sequence[Picture]:
    """Draw the maps and distances of the embeddings."""
    distances = measure_distances(space, seed)
    pictures = [] if distances is None else [draw_distances(distances, space)]
    return [*draw_maps(space, classes, seed), *pictures]
