"""Statistics of a data set from its index, and contact sheets of its images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from dml_dist.config.data import ShuffledBatchesConfig
from dml_dist.data.decode import decode_image
from dml_dist.data.index import Index
from dml_dist.data.plans import ShuffledPlan
from dml_dist.data.reader import ShardReader
from dml_dist.random_streams import Stream, generator_of

_TAR_SHARDS = 3
"""Of a remote split that a contact sheet is taken from: they are copied whole."""

_PAPER = 246  # grey level around an image that does not fill its square


@dataclass(frozen=True, eq=False)
class SplitFacts:
    """Numbers of one split.

    Attributes:
        name: Its name.
        num_images: Images.
        num_super_classes: Different super-classes; 0 when there are none.
        roles: Role -> images, for "both", "query" and "gallery" as far as there are any.
        class_sizes: (C,) int64 images of each class, largest first.
        window_classes: (w,) int64 different classes in each window of a shuffled epoch.
        mixed_classes: Classes that a typical window would hold if images were mixed.
    """

    name: str
    num_images: int
    num_super_classes: int
    roles: dict[str, int]
    class_sizes: np.ndarray
    window_classes: np.ndarray
    mixed_classes: float

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_sizes)

    @property
    def imbalance(self) -> float:
        """Images of the largest class, as a multiple of the median class."""
        return float(self.class_sizes[0] / np.median(self.class_sizes))

    @property
    def lone_share(self) -> float:
        """Share of the classes with a single image: no query among them finds another."""
        return float((self.class_sizes < 2).mean())

    @property
    def gini(self) -> float:
        """Gini coefficient of the class sizes: 0 when all are equal, near 1 when few hold all.

        With sizes x_1 <= ... <= x_C: (2 sum_i i x_i) / (C sum_i x_i) - (C + 1) / C.
        """
        sizes = self.class_sizes[::-1].astype(np.float64)
        count = len(sizes)
        weighted = float((np.arange(1, count + 1) * sizes).sum())
        return 2 * weighted / (count * float(sizes.sum())) - (count + 1) / count

    @property
    def is_class_sorted(self) -> bool:
        """Whether a typical window holds less than half of the classes of a mixed one."""
        return float(np.median(self.window_classes)) < self.mixed_classes / 2

    @property
    def warnings(self) -> list[str]:
        """What training or evaluation on this split may suffer from, one sentence each."""
        found = []
        if self.is_class_sorted:
            found.append(
                f"{self.name}: images are sorted by class: a window of a shuffled epoch holds "
                f"{np.median(self.window_classes):,.0f} classes (median), mixed images would give "
                f"{self.mixed_classes:,.0f}; choose balanced batches, widen data.batches.window, "
                "or rewrite the tar shards in shuffled order"
            )
        if self.imbalance >= 5:
            found.append(
                f"{self.name}: classes are imbalanced: the largest has {self.class_sizes[0]:,} "
                f"images, {self.imbalance:,.1f} times the median class (Gini {self.gini:.2f}); "
                "balanced batches show classes equally often"
            )
        if self.lone_share:
            lone = int((self.class_sizes < 2).sum())
            found.append(
                f"{self.name}: {lone:,} of {self.num_classes:,} classes ({self.lone_share:.1%}) "
                "have a single image: it makes no pair in training and is no query that counts"
            )
        return found


@dataclass(frozen=True, eq=False)
class ContactSheet:
    """Some images of some classes of a split.

    Attributes:
        split: The split.
        class_names: Name of each row.
        class_sizes: Images of each row's class in the split.
        tiles: (R, S, S, 3) uint8 for each row: its images in squares of S pixels.
    """

    split: str
    class_names: tuple[str, ...]
    class_sizes: tuple[int, ...]
    tiles: tuple[np.ndarray, ...]


def split_names(index: Index) -> list[str]:
    """Return the splits of an index: train first, then by name."""
    return sorted(set(index.split.tolist()), key=lambda name: (name != "train", name))


def split_facts(
    index: Index, split: str, *, window: int | None = None, seed: int = 0
) -> SplitFacts:
    """Count what a split holds; no image is read.

    Args:
        index: All images.
        split: Name of the split.
        window: Tar shards that a shuffled epoch mixes; None is the configuration's default.
        seed: Seed of the epoch whose windows are counted.
    """
    rows = index.rows(split)
    labels = index.label[rows]
    sizes = np.sort(np.bincount(labels))[::-1]
    roles = index.role[rows]
    per_window, mixed = _window_classes(index, rows, window or ShuffledBatchesConfig().window, seed)
    return SplitFacts(
        name=split,
        num_images=len(rows),
        num_super_classes=len(set(index.super_class[rows].tolist()) - {""}),
        roles={
            role: count
            for role in ("both", "query", "gallery")
            if (count := int((roles == role).sum()))
        },
        class_sizes=sizes[sizes > 0],
        window_classes=per_window,
        mixed_classes=mixed,
    )


def _window_classes(
    index: Index, rows: np.ndarray, window: int, seed: int
) -> tuple[np.ndarray, float]:
    """Return the classes of each window of an epoch, and how many a typical one would mix."""
    labels = index.label[rows]
    plan = ShuffledPlan(
        rows=np.arange(len(rows)),
        tar_shard=index.tar_shard[rows],
        seed=seed,
        global_batch_size=1,
        window=window,
        keep_last=True,
    )
    windows = plan.windows(0)
    pairs = np.unique(np.stack([windows, labels]), axis=1)
    counts = np.bincount(windows)
    # A class of m images is absent from a window with this share of them with (1 - share)^m.
    share = float(np.median(counts)) / len(rows)
    sizes = np.bincount(labels)
    mixed = float((1 - (1 - share) ** sizes[sizes > 0]).sum())
    return np.bincount(pairs[0]), mixed


def contact_sheet(
    index: Index,
    split: str,
    *,
    num_classes: int = 8,
    num_images: int = 10,
    side: int = 96,
    seed: int = 0,
) -> ContactSheet:
    """Draw classes of a split and images of each, and read them.

    Of a remote split those in a few drawn tar shards alone.

    Args:
        index: All images.
        split: Name of the split.
        num_classes: Classes that are drawn, fewer when there are not as many.
        num_images: Images of each, fewer when there are not as many.
        side: Pixels of the squares that images are shrunk into.
        seed: Seed of the draw.

    Raises:
        DataError: If an image cannot be read or decoded.
    """
    all_rows = rows = index.rows(split)
    generator = generator_of(Stream.CONTACT_SHEET, seed)
    if index.remote is not None:
        some_shards = generator.permutation(np.unique(index.tar_shard[rows]))[:_TAR_SHARDS]
        rows = rows[np.isin(index.tar_shard[rows], some_shards)]
    labels = index.label[rows]
    known = np.unique(labels)
    chosen = np.sort(generator.permutation(known)[:num_classes])
    reader = ShardReader(index)
    tiles, sizes = [], []
    for label in chosen:
        own = rows[labels == label]
        some = generator.permutation(own)[:num_images]
        sizes.append(int((index.label[all_rows] == label).sum()))
        tiles.append(np.stack([_tile(reader, int(row), side) for row in some]))
    reader.close()
    names = tuple(index.class_names[label] for label in chosen)
    return ContactSheet(split, names, tuple(sizes), tuple(tiles))


def _tile(reader: ShardReader, row: int, side: int) -> np.ndarray:
    """Return an image as training sees it, shrunk into a square, (side, side, 3) uint8."""
    image_CHW = decode_image(reader.read(row), reader.describe(row), reader.index.exif)
    pixels = image_CHW.permute(1, 2, 0).numpy()
    image = Image.fromarray(np.ascontiguousarray(pixels))
    scale = side / max(image.size)
    size = tuple(max(1, round(length * scale)) for length in image.size)
    # Small images keep their pixels.
    kind = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    image = image.resize((size[0], size[1]), kind)
    square = Image.new("RGB", (side, side), (_PAPER,) * 3)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square)
